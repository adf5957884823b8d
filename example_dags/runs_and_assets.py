"""Waits for what happens in Airflow itself: another DAG's run, one of its tasks, an asset."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import Asset, dag, task
from airflow_events import wait_for_event
from airflow_events.listeners.airflow import AssetListener, DagRunListener, TaskListener

ORDERS = Asset("events_orders")
DAY = timedelta(days=1)


@dag(schedule=None, catchup=False, tags=["events"])
def events_loader():
    """Publish orders: `events_report` waits for it."""

    @task(outlets=[ORDERS])
    def publish(outlet_events=None):
        outlet_events[ORDERS].extra = {"rows": 17}

    publish()


@dag(schedule=None, catchup=False, tags=["events"])
def events_report():
    """Wait until the orders are published and the run of `events_loader` has ended, since this run began."""
    published = wait_for_event.override(task_id="published", timeout=DAY)(TaskListener, "events_loader", "publish")
    orders = wait_for_event.override(task_id="orders", timeout=DAY, inlets=[ORDERS])(AssetListener, ORDERS.name)
    ended = wait_for_event.override(task_id="ended", timeout=DAY)(
        DagRunListener, "events_loader", state=["success", "failed"]
    )

    @task
    def report(publishing, update, run):
        return f"{update['extra']['rows']} rows at {publishing['end_date']}; the run: {run['state']}"

    report(published, orders, ended)


events_loader()
events_report()
