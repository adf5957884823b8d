"""What senders send to: four tasks that each wait for an event for each of many keys."""

from __future__ import annotations

import os

from airflow.sdk import DAG
from airflow_events import wait_for_events
from airflow_events.listeners.http import HttpListener

EACH = int(os.environ["ORDERS_EACH"])

with DAG("orders", schedule=None, catchup=False):
    for part in range(4):
        keys = [{"key": f"order-{number}"} for number in range(part * EACH, (part + 1) * EACH)]
        wait_for_events.override(task_id=f"part_{part}")(HttpListener, keys)
