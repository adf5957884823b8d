"""The DAGs of ``benchmarks/peers.py``: wait for a message, tell that it was delivered."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

from airflow.providers.amazon.aws.sensors.sqs import SqsSensor
from airflow.providers.apache.kafka.sensors.kafka import AwaitMessageSensor
from airflow.sdk import DAG, task
from airflow_events import wait_for_event
from airflow_events.listeners.kafka import KafkaListener
from airflow_events.listeners.sqs import SqsListener

ABOUT = {
    "schedule": None,
    "params": {"base": "/nonexistent", "queue": "none"},
    "max_active_runs": 2000,
    "max_active_tasks": 2000,
    "default_args": {"retries": 50, "retry_delay": timedelta(seconds=1)},
}


@task
def deliver(event, params=None, run_id=None):
    if isinstance(event, list):  # the messages that the sensor has received and deleted
        values = [json.loads(message["Body"]) for message in event]
    else:
        values = [event["value"] if isinstance(event, dict) else event]
    for value in values:
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

with DAG("sqs_sensor", **ABOUT):
    # It would take up to five at once.
    sensor = SqsSensor(
        task_id="wait", sqs_queue="{{ params.queue }}", deferrable=True, max_messages=1, poke_interval=1
    )
    deliver(sensor.output["messages"])

with DAG("sqs_listener", **ABOUT):
    deliver(wait_for_event.override(task_id="wait")(SqsListener, "sqs_listener", lease=10.0))
