"""Files dropped into a directory: each starts a run of its own, exactly once."""

from __future__ import annotations

from pathlib import Path

from airflow.sdk import dag, task
from airflow_events import start_on
from airflow_events.listeners.directory import DirectoryListener


@dag(
    schedule=start_on(DirectoryListener, "starts", pattern="*.csv"),
    max_active_runs=8,  # no more files are taken; the others stay where they are
    catchup=False,
    tags=["events"],
)
def events_start_runs():
    """Take CSV files out of the directory ``starts`` below AIRFLOW_HOME, one for each run."""

    @task
    def count_lines(dag_run=None):
        file = dag_run.conf["event"]
        lines = Path(file["path"]).read_text().splitlines()
        return {"file": file["name"], "lines": len(lines)}

    count_lines()


events_start_runs()
