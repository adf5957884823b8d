"""The DAGs of ``benchmarks/kafka_peers.py``: wait for a message of Kafka, tell that it was delivered."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from airflow.providers.apache.kafka.hooks.consume import KafkaConsumerHook
from airflow.providers.apache.kafka.sensors.kafka import AwaitMessageSensor
from airflow.sdk import DAG, task
from airflow_events import wait_for_event
from airflow_events.listeners.kafka import KafkaListener
from confluent_kafka import TopicPartition

ABOUT = {
    "schedule": None,
    "params": {"base": "/nonexistent"},
    "max_active_runs": 2000,
    "max_active_tasks": 2000,
    "default_args": {"retries": 50, "retry_delay": timedelta(seconds=1)},
}


@task
def deliver(event, params=None, run_id=None):
    Path(params["base"], f"{event['value']} {run_id}").touch()
    return event


@task(retry_delay=timedelta(seconds=5))
def commit(event):
    """As the sensor's documentation has it, where it does not commit itself."""
    consumer = KafkaConsumerHook([event["topic"]], kafka_config_id=event["topic"]).get_conn
    place = TopicPartition(event["topic"], event["partition"], event["offset"] + 1)
    consumer.commit(offsets=[place], asynchronous=False)
    consumer.close()


def sensor(name, **more):
    return AwaitMessageSensor(
        task_id="wait", topics=[name], kafka_config_id=name, apply_function="take_message.take", **more
    ).output


with DAG("await_message", **ABOUT):
    deliver(sensor("await_message"))

with DAG("await_message_late", **ABOUT):
    commit(deliver(sensor("await_message_late", commit_offset=False)))

with DAG("kafka_listener", **ABOUT):
    deliver(wait_for_event.override(task_id="wait")(KafkaListener, "kafka_listener", group="kafka_listener"))
