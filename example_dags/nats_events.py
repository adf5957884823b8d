"""Orders from a JetStream stream: each run takes one, exactly once, and another task works on it."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import dag, task
from airflow_events import wait_for_event
from airflow_events.listeners.nats import NatsListener


@dag(schedule=None, catchup=False, tags=["events"], params={"stream": "orders"})
def events_nats():
    """
    Take one message of the stream ``orders``, or another by the run's conf, by the connection ``nats_default``.

    ``nats-server -js`` is a server for it, ``AIRFLOW_CONN_NATS_DEFAULT=nats://localhost:4222`` the connection,
    ``nats stream add orders --subjects 'orders.>' --storage file --defaults`` makes the stream, and
    ``nats pub orders.new '{"order_id": 42}'`` sends an order.
    """
    order = wait_for_event.override(task_id="order", timeout=timedelta(hours=6))(
        NatsListener, "{{ params.stream }}"
    )

    @task
    def ship(order):
        return f"order {order['value']['order_id']}, from {order['subject']}"

    ship(order)


events_nats()
