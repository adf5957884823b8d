"""The DAG of scripts/chaos.py: take a file, tell that it was delivered."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, task
from airflow_events import wait_for_event
from airflow_events.listeners.directory import DirectoryListener

SOON = timedelta(seconds=1)

with DAG(
    "chaos",
    schedule=None,
    catchup=False,
    params={"base": "/nonexistent"},
    max_active_runs=2000,
    max_active_tasks=2000,
):

    @task(retries=50, retry_delay=SOON)
    def deliver(event, params=None, run_id=None):
        Path(params["base"], "delivered", f"{run_id} {event['id']}").touch()

    deliver(
        wait_for_event.override(task_id="wait", retries=50, retry_delay=SOON)(
            DirectoryListener, "{{ params.base }}/drops", settle=0
        )
    )
