"""The DAGs of ``benchmarks/compare.py`` whose waits are for messages."""

from __future__ import annotations

from typing import Any

from airflow.providers.amazon.aws.sensors.sqs import SqsSensor
from airflow.providers.apache.kafka.sensors.kafka import AwaitMessageSensor
from airflow_events import wait_for_event
from airflow_events.listeners.kafka import KafkaListener, KafkaWatchListener
from airflow_events.listeners.nats import NatsListener
from airflow_events.listeners.postgres import PostgresListener
from airflow_events.listeners.rabbitmq import RabbitMQListener
from airflow_events.listeners.redis import RedisListener, RedisWatchListener
from airflow_events.listeners.sqs import SqsListener
from contenders import dags
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
