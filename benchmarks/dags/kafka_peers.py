"""The DAGs of ``benchmarks/kafka_peers.py``: wait for a message of Kafka, tell that it was delivered."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from airflow.providers.apache.kafka.sensors.kafka import AwaitMessageSensor
from airflow.sdk import DAG, task
from airflow_events import wait_for_event
from airflow_events.listeners.kafka import KafkaListener

ABOUT = {
    "schedule": None,
    "params": {"base": "/nonexistent"},
    "max_active_runs": 2000,
    "max_active_tasks": 2000,
    "default_args": {"retries": 50, "retry_delay": timedelta(seconds=1)},
}


@task
def deliver(event, params=None, run_id=None):
    value = event["value"] if isinstance(event, dict) else event
    Path(params["base"], f"{value} {run_id}").touch()


with DAG("await_message", **ABOUT):
    sensor = AwaitMessageSensor(
        task_id="wait",
        topics=["await_message"],
        kafka_config_id="await_message",
        apply_function="take_message.take",
    )
    deliver(sensor.output)

with DAG("kafka_listener", **ABOUT):
    deliver(wait_for_event.override(task_id="wait")(KafkaListener, "kafka_listener", group="kafka_listener"))
