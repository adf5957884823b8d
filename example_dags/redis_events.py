"""An entry of a Redis stream: each run takes one, exactly once."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import dag, task
from airflow_events import wait_for_event
from airflow_events.listeners.redis import RedisListener


@dag(schedule=None, catchup=False, tags=["events"])
def events_redis():
    """
    Take an entry of the stream ``orders`` at the connection ``redis_default``.

    Send one with: redis-cli XADD orders '*' payload '{"order_id": 1}'
    """
    order = wait_for_event.override(task_id="order", timeout=timedelta(hours=6))(
        RedisListener, "orders", group="airflow", field="payload"
    )

    @task
    def handle(event):
        return event["value"]["order_id"]

    handle(order)


events_redis()
