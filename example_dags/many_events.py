"""
One task that waits for many events: a task instance and a trigger for all of them.

Run ``events_many`` and see on *Browse → Waits* how they arrive.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import dag, task
from airflow_events import wait_for_events
from airflow_events.listeners.timer import TimerListener


@dag(schedule=None, catchup=False, tags=["events"])
def events_many():
    """Wait for thirty moments, and for the first two of three that another task names."""
    moments = wait_for_events.override(task_id="moments")(
        TimerListener, [timedelta(seconds=second) for second in range(1, 31)]
    )

    @task
    def offers():
        return ["PT20S", "PT5S", "PT10S"]

    first_two = wait_for_events.override(task_id="first_two", first=2)(TimerListener, offers())

    @task
    def gather(moments, first_two):
        return {"moments": len(moments), "the first two": [index for index, _ in first_two]}

    gather(moments, first_two)


events_many()
