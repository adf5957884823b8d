"""The DAGs of the matrix and of the chaos: a wait for each source and path, with and without a deadline."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, Asset, get_parsing_context, task
from airflow_events import wait_for_event
from paths import DEADLINE, PATHS, dag_id

from sources import SOURCES

SOON = timedelta(seconds=1)


def matrix_dag(source, path, timeout):
    @task
    def argument(params=None):
        return source.argument(params["base"], params["queue"])

    @task
    def deliver(event, params=None, run_id=None):
        if event is None:
            raise ValueError("no event: a user marked the wait as successful")
        Path(params["base"], "delivered", f"{run_id} {source.identity(event)}").write_text(
            json.dumps(event, default=str)
        )

    outlets = [Asset("matrix")] if path.ends_on_worker and source.listener.repeatable_poll else []
    with DAG(
        dag_id(source, path, timeout),
        schedule=None,
        catchup=False,
        params={"base": "/nonexistent", "queue": ""},
        max_active_runs=2000,
        max_active_tasks=2000,
        default_args={"retries": int(os.environ.get("MATRIX_RETRIES", "5")), "retry_delay": SOON},
    ) as dag:
        wait = wait_for_event.override(task_id="wait", timeout=timeout, outlets=outlets)
        first = argument() if path.starts_on_worker else source.argument("{{ params.base }}", "{{ params.queue }}")
        deliver(wait(source.listener, first, **source.keywords))
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
