"""Files dropped into a directory: each run takes one, exactly once, and another task reads it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from airflow.sdk import dag, task
from airflow_events import wait_for_event
from airflow_events.listeners.directory import DirectoryListener


@dag(schedule=None, catchup=False, tags=["events"], params={"directory": "drops"})
def events_file_drops():
    """Take one CSV file out of the directory ``drops`` below AIRFLOW_HOME, or another by the run's conf."""
    dropped = wait_for_event.override(task_id="order", timeout=timedelta(hours=6))(
        DirectoryListener, "{{ params.directory }}", pattern="*.csv"
    )

    @task
    def count_lines(file):
        lines = Path(file["path"]).read_text().splitlines()
        return {"file": file["name"], "lines": len(lines)}

    count_lines(dropped)


events_file_drops()
