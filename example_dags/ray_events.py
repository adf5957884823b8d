"""
The example of Ray Workflow's events, in Airflow's words: two timers, and a task that gets both.

There it was ``workflow.wait_for_event(TimerListener, ...)`` and ``gather.bind(*events)``.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import dag, task
from airflow_events import wait_for_event
from airflow_events.listeners.timer import TimerListener


@dag(schedule=None, catchup=False, tags=["events"])
def events_ray_example():
    """Wait for two moments at once and gather both."""
    event_1 = wait_for_event.override(task_id="event_1")(TimerListener, timedelta(seconds=2))
    event_2 = wait_for_event.override(task_id="event_2")(TimerListener, timedelta(seconds=3))

    @task
    def gather(*events):
        return list(events)

    gather(event_1, event_2)


events_ray_example()
