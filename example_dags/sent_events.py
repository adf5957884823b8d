"""One DAG continues the runs of another: it sends events to the keys that these wait for."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import dag, task
from airflow_events import EventHook, send_event, wait_for_event
from airflow_events.listeners.http import HttpListener


@dag(schedule=None, catchup=False, params={"order": 1}, tags=["events"])
def events_order():
    """Wait until an order is packed, and then until its parcel has left; `events_warehouse` sends both."""
    packed = wait_for_event.override(task_id="packed", timeout=timedelta(days=1))(
        HttpListener, key="packed-{{ params.order }}"
    )
    left = wait_for_event.override(task_id="left", timeout=timedelta(days=1))(
        HttpListener, key="left-{{ params.order }}"
    )

    @task
    def tell(box, parcel):
        return f"{box['weight']} kg, with {parcel['carrier']}"

    tell(packed, left)


@dag(schedule=None, catchup=False, params={"order": 1}, tags=["events"])
def events_warehouse():
    """Send what the runs of `events_order` wait for, also before they begin; a retry sends nothing twice."""
    packed = send_event.override(task_id="packed")("packed-{{ params.order }}", {"weight": 2.5})

    @task
    def hand_over(params=None):
        for order in (params["order"],):
            EventHook().send(f"left-{order}", {"carrier": "post"})

    packed >> hand_over()


events_order()
events_warehouse()
