"""
Orders from a RabbitMQ queue: each run takes one message, exactly once, and another task reads it.

The connection is ``rabbitmq_default``, for a local server
``AIRFLOW_CONN_RABBITMQ_DEFAULT='{"conn_type": "amqp", "host": "localhost"}'``. The queue must be there, durable,
and each message must have a ``message_id`` of its own.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import dag, task
from airflow_events import wait_for_event
from airflow_events.listeners.rabbitmq import RabbitMQListener


@dag(schedule=None, catchup=False, tags=["events"], params={"queue": "orders"})
def events_rabbitmq():
    """Take one JSON message out of the queue ``orders``, or another by the run's conf."""
    order = wait_for_event.override(task_id="order", timeout=timedelta(hours=6))(
        RabbitMQListener, "{{ params.queue }}"
    )

    @task
    def handle(event):
        return {"id": event["message_id"], "order": event["value"]}

    handle(order)


events_rabbitmq()
