"""The DAGs of the matrix and of the chaos: a wait for each source and path, with and without a deadline."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, Asset, get_parsing_context, task
from airflow.sdk.exceptions import AirflowFailException
from airflow_events import wait_for_event
from paths import DEADLINE, PATHS, dag_id
from probes import lay_down

from sources import SOURCES

SOON = timedelta(seconds=1)


def matrix_dag(source, path, timeout):
    @task
    def deliver(event, params=None, run_id=None):
        if event is None:
            raise AirflowFailException("no event: a user marked the wait as successful")
        lay_down(Path(params["base"], "delivered", f"{run_id} {source.identity(event)}"), event)

    arguments = {"timeout": timeout, "outlets": [Asset("matrix")] if path.has_outlet else []}
    if path.starts_on_worker:
        arguments["pre_execute"] = lambda context: None
    if path.ends_on_worker:
        arguments["post_execute"] = lambda context, result: None
    with DAG(
        dag_id(source, path, timeout),
        schedule=None,
        catchup=False,
        params={"base": "/nonexistent", "queue": ""},
        max_active_runs=2000,
        max_active_tasks=2000,
        default_args={"retries": int(os.environ.get("MATRIX_RETRIES", "20")), "retry_delay": SOON},
    ) as dag:
        wait = wait_for_event.override(task_id="wait", **arguments)
        argument = source.argument("{{ params.base }}", "{{ params.queue }}")
        deliver(wait(source.listener, argument, **source.keywords))
    return dag


# A task's own process makes the one DAG that it needs, and so imports no client but that one's.
ASKED = get_parsing_context().dag_id
DAGS = [
    matrix_dag(source, path, timeout)
    for source in SOURCES
    for path in PATHS
    if path.name in source.paths
    for timeout in (None, DEADLINE)
    if ASKED in (None, dag_id(source, path, timeout))
]
