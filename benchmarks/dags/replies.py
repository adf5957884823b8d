"""The DAG of benchmarks/replies.py: a wait for an event over HTTP, and what comes after it."""

from __future__ import annotations

from airflow.sdk import dag, task
from airflow_events import wait_for_event
from airflow_events.listeners.http import HttpListener


@task
def after(event):
    return event


@dag(schedule=None, catchup=False, params={"key": "none"})
def replies():
    after(wait_for_event.override(task_id="wait")(HttpListener, key="{{ params.key }}"))


replies()
