"""The DAG of benchmarks/recovery.py: take a file, tell that it was delivered."""

from __future__ import annotations

from pathlib import Path

from airflow.sdk import DAG, task
from airflow_events import wait_for_event
from airflow_events.listeners.directory import DirectoryListener

with DAG("recovery", schedule=None, catchup=False, params={"base": "/nonexistent"}):

    @task
    def deliver(event, params=None, run_id=None):
        Path(params["base"], "delivered", f"{event['name']} {run_id}").touch()

    deliver(wait_for_event.override(task_id="wait")(DirectoryListener, "{{ params.base }}/drops", settle=0))
