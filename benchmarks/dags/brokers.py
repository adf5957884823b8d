"""The DAGs of ``benchmarks/compare.py`` whose waits are for messages and files."""

from __future__ import annotations

from typing import Any

from airflow.providers.amazon.aws.sensors.sqs import SqsSensor
from airflow.providers.apache.kafka.sensors.kafka import AwaitMessageSensor
from airflow.providers.standard.sensors.filesystem import FileSensor
from airflow.sdk import DAG
from airflow_events import wait_for_event
from airflow_events.listeners.directory import DirectoryListener
from airflow_events.listeners.http import HttpListener
from airflow_events.listeners.kafka import KafkaListener, KafkaWatchListener
from airflow_events.listeners.nats import NatsListener
from airflow_events.listeners.postgres import PostgresListener
from airflow_events.listeners.rabbitmq import RabbitMQListener
from airflow_events.listeners.redis import RedisListener, RedisWatchListener
from airflow_events.listeners.sqs import SqsListener
from airflow_events.listeners.timer import TimerListener
from contenders import dags, downstream
from message_queue import MessageQueueWait

QUEUE = "{{ params.queue }}"


def taken(name: str) -> dict[str, Any]:
    """Return what Airflow's operators for Kafka want to know."""
    return {
        "topics": [QUEUE],
        "apply_function": "take_message.take",
        # A group of its own for each: one that leaves a group stops all others in it for a while.
        "kafka_config_id": "kafka_{{ params.number }}" + name.removeprefix("wait"),
    }


CONTENDERS = {
    "file_ours": lambda name: (
        wait_for_event.override(task_id=name)(DirectoryListener, QUEUE, pattern="*.json", settle=0).operator
    ),
    "file_peer": lambda name: FileSensor(
        task_id=name, filepath=f"{QUEUE}/*.json", deferrable=True, poke_interval=1
    ),
    "sqs_ours": lambda name: wait_for_event.override(task_id=name)(SqsListener, QUEUE).operator,
    # It would take up to five messages at once.
    "sqs_peer": lambda name: SqsSensor(task_id=name, sqs_queue=QUEUE, deferrable=True, max_messages=1),
    "sqs_peer_1s": lambda name: SqsSensor(
        task_id=name, sqs_queue=QUEUE, deferrable=True, max_messages=1, poke_interval=1
    ),
    "redis_ours": lambda name: wait_for_event.override(task_id=name)(RedisListener, QUEUE).operator,
    "redis_watch": lambda name: (
        wait_for_event.override(task_id=name)(RedisWatchListener, QUEUE, field="v", match={"order": 1}).operator
    ),
    "postgres_ours": lambda name: wait_for_event.override(task_id=name)(PostgresListener, QUEUE).operator,
    "nats_ours": lambda name: wait_for_event.override(task_id=name)(NatsListener, QUEUE).operator,
    "rabbitmq_ours": lambda name: wait_for_event.override(task_id=name)(RabbitMQListener, QUEUE).operator,
    "kafka_ours": lambda name: wait_for_event.override(task_id=name)(KafkaListener, QUEUE, group="ours").operator,
    "kafka_watch": lambda name: (
        wait_for_event.override(task_id=name)(
            KafkaWatchListener, QUEUE, match={"order": "{{ run_id }} " + name}
        ).operator
    ),
    "kafka_peer": lambda name: AwaitMessageSensor(task_id=name, **taken(name)),
    "kafka_peer_1s": lambda name: AwaitMessageSensor(task_id=name, poll_interval=1, **taken(name)),
    "kafka_queue": lambda name: MessageQueueWait(task_id=name, **taken(name)),
}

DAGS = dags(CONTENDERS, {"queue": "none", "number": "0"}, 1, 10)

# Nothing follows, since it is the waits that are to be seen.
with DAG("steady", schedule=None, params={"queue": "none"}, max_active_runs=100_000, max_active_tasks=100_000):
    wait_for_event.override(task_id="wait")(KafkaListener, QUEUE, group="steady")

with DAG("mixed_3", schedule=None, params={"queue": "none"}, max_active_runs=100_000, max_active_tasks=100_000):
    wait_for_event.override(task_id="timer")(TimerListener, "2100-01-01T00:00:00Z")
    sent = wait_for_event.override(task_id="http")(HttpListener, key="{{ run_id }}-http")
    match = {"order": "{{ run_id }} watch"}
    watched = wait_for_event.override(task_id="watch")(KafkaWatchListener, QUEUE, match=match)
    sent.operator >> downstream.override(task_id="after_http")()
    watched.operator >> downstream.override(task_id="after_watch")()
