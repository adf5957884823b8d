"""The DAGs of benchmarks/kafka_peers.py: take a message of Kafka, tell that it was delivered."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from airflow.providers.apache.kafka.sensors.kafka import AwaitMessageSensor
from airflow.sdk import DAG, task
from airflow_events import wait_for_event
from airflow_events.listeners.kafka import KafkaListener

about = {
    "schedule": None,
    "params": {"base": "/nonexistent"},
    "max_active_runs": 2000,
    "max_active_tasks": 2000,
    "default_args": {"retries": 50, "retry_delay": timedelta(seconds=1)},
}


@task
def deliver(event, params=None, run_id=None):
    if event is None:
        raise ValueError("no message")
    value = event["value"] if isinstance(event, dict) else event
    Path(params["base"], f"{value} {run_id}").touch()


with DAG("await_message_sensor", **about):
    sensor = AwaitMessageSensor(
        task_id="wait",
        topics=["await_message_sensor"],
        apply_function="take_message.value",
        kafka_config_id="await_message_sensor",
    )
    deliver(sensor.output)

with DAG("kafka_listener", **about):
    event = wait_for_event.override(task_id="wait")(KafkaListener, "kafka_listener", group="etl")
    deliver(event)
