"""What a user calls something at a source; a template may have no value."""

from __future__ import annotations

import asyncio

import pytest
from airflow_events.listeners.kafka import KafkaListener, KafkaWatchListener
from airflow_events.listeners.nats import NatsListener
from airflow_events.listeners.rabbitmq import RabbitMQListener, RabbitMQWatchListener
from airflow_events.listeners.redis import RedisListener, RedisWatchListener
from airflow_events.listeners.sqs import SqsListener


@pytest.mark.parametrize("empty", ["", " ", None])
@pytest.mark.parametrize(
    ("listener", "name", "others"),
    [
        (KafkaListener, "topic", {"group": "etl"}),
        (KafkaListener, "group", {"topic": ["a", "b"]}),
        (KafkaWatchListener, "topic", {}),
        (NatsListener, "durable", {"stream": "S"}),
        (RabbitMQListener, "queue", {}),
        (RabbitMQWatchListener, "stream", {}),
        (RedisListener, "stream", {}),
        (RedisListener, "group", {"stream": "s"}),
        (RedisWatchListener, "stream", {}),
        (SqsListener, "queue", {}),
    ],
)
def test_a_name_that_is_none_is_refused_before_anything_is_asked(listener, name, others, empty):
    given = [empty] if (listener, name) == (KafkaListener, "topic") else empty
    with pytest.raises(ValueError, match=f"{name} is a name, not {empty!r}"):
        asyncio.run(listener().poll_for_event(**{name: given}, **others))


@pytest.mark.parametrize("start", ["", "yesterday", "latest", "5-", "-1"])
def test_a_start_that_redis_has_not_is_named(start):
    with pytest.raises(ValueError, match=f"start is '0', .*, not {start!r}"):
        asyncio.run(RedisListener().poll_for_event("s", start=start))


def test_a_subject_that_is_none_is_not_all_of_them():
    with pytest.raises(ValueError, match="subject is a name, not ''"):
        asyncio.run(NatsListener().poll_for_event("S", subject=""))
