"""A message of a Kafka topic: each run takes one, exactly once."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import dag, task
from airflow_events import wait_for_event
from airflow_events.listeners.kafka import KafkaListener


@dag(schedule=None, catchup=False, tags=["events"])
def events_kafka():
    """
    Take a message of the topic ``orders`` at the connection ``kafka_default``.

    Send one with: echo '{"order_id": 1}' | kafka-console-producer --bootstrap-server ... --topic orders
    """
    order = wait_for_event.override(task_id="order", timeout=timedelta(hours=6))(
        KafkaListener, topic="orders", group="airflow"
    )

    @task
    def handle(event):
        return event["value"]["order_id"]

    handle(order)


events_kafka()
