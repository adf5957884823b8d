"""What senders send to: waits for events to keys, many in each run."""

from __future__ import annotations

from airflow.sdk import DAG
from airflow_events import wait_for_event
from airflow_events.listeners.http import HttpListener

EACH = 50

with DAG("orders", schedule=None, catchup=False, params={"part": 0}, max_active_runs=1000):
    for number in range(EACH):
        wait_for_event.override(task_id=f"order_{number}")(HttpListener, f"order-{{{{ params.part }}}}-{number}")
