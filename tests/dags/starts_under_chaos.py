"""The DAG that the events of a source start, under the kills of scripts/chaos.py."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, task
from airflow_events import start_on
from probes import lay_down
from source import conf

from sources import SOURCES

BASE = Path(os.environ.get("STARTS_AT", "/nonexistent"))
[SOURCE] = [source for source in SOURCES if source.name == os.environ.get("STARTS_BY", "directory")]


@task(retries=int(os.environ.get("MATRIX_RETRIES", "3")), retry_delay=timedelta(seconds=1))
def deliver(dag_run=None):
    event = dag_run.conf["event"]
    lay_down(BASE / "delivered" / f"{dag_run.run_id} {SOURCE.identity(event)}", event)


with DAG(
    "started_under_chaos",
    schedule=start_on(SOURCE.listener, SOURCE.argument(**conf(BASE)), **SOURCE.keywords),
    max_active_runs=int(os.environ.get("STARTS_UP_TO", "16")),
):
    deliver()
