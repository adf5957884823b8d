"""A decision by HTTP: whoever may edit the DAG's tasks sends it, to a key."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import dag, task
from airflow_events import wait_for_event
from airflow_events.listeners.http import HttpListener

DECISION = {
    "type": "object",
    "required": ["approved"],
    "properties": {"approved": {"type": "boolean"}, "comment": {"type": "string"}},
}


@dag(schedule=None, catchup=False, params={"order": 1}, tags=["events"])
def events_http():
    """
    Wait for a decision about an order.

    Send it, before or after the run has begun, with: curl -X POST "$AIRFLOW/events/keys/order-1"
    -H "Authorization: Bearer $TOKEN" -H "Content-Type: application/json" -d '{"approved": true}'
    """
    decision = wait_for_event.override(task_id="decision", timeout=timedelta(days=1))(
        HttpListener, key="order-{{ params.order }}", schema=DECISION
    )

    @task
    def handle(event):
        return "ship" if event["approved"] else "cancel"

    handle(decision)


events_http()
