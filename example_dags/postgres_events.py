"""Rows of a table as a queue: each run takes one, exactly once."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import dag, task
from airflow_events import wait_for_event
from airflow_events.listeners.postgres import PostgresListener


@dag(schedule=None, catchup=False, tags=["events"], params={"table": "events"})
def events_postgres():
    """
    Take one row of the table ``events`` of the connection ``postgres_default``, or of another by the run's conf.

    What `airflow_events.listeners.postgres.create_table` returns for ``events`` makes the table, and
    ``INSERT INTO events (value) VALUES ('{"order_id": 42}')`` sends an event.
    """
    order = wait_for_event.override(task_id="order", timeout=timedelta(hours=6))(
        PostgresListener, "{{ params.table }}"
    )

    @task
    def handle(event):
        return {"row": event["id"], "order": event["value"]["order_id"]}

    handle(order)


events_postgres()
