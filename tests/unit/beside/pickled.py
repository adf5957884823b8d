"""Print what a process makes of the listeners; run as a script, with one of the words below."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import sys

word = sys.argv[1]
if word == "imports":  # as if other DAG files had been parsed before
    for name in ("concurrent.futures", "email.mime.text", "logging.config", "xml.dom.minidom", "dill"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)

dag_of_listeners = importlib.import_module("dag_of_listeners")
reference = importlib.import_module("airflow_events.triggers.reference")

for listener in (dag_of_listeners.Listener, dag_of_listeners.Later, dag_of_listeners.make("other")):
    text = reference.by_value(listener)["pickle"]
    print(listener.__name__, reference.unsteady(listener), hashlib.sha256(text.encode()).hexdigest())
if word == "dag":
    from airflow.models.serialized_dag import SerializedDagModel
    from airflow.sdk import DAG
    from airflow.serialization.serialized_objects import DagSerialization
    from airflow_events import wait_for_event

    with DAG("d", schedule=None) as dag:
        wait_for_event(dag_of_listeners.Listener, "a")
        wait_for_event(dag_of_listeners.Later, "{{ ts }}")
    data = DagSerialization.to_dict(dag)
    print("DAG", SerializedDagModel.hash(data), len(str(data)))
