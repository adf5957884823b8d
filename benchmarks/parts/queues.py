"""Queues of the brokers that the tests use, and what sends to them."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

from parts import Stage

SQS = ("of_sqs", "Sqs")
KAFKA = ("of_kafka", "Kafka")
REDIS = ("of_redis", "Valkey")
POSTGRES = ("of_postgres", "PostgresJsonb")
NATS = ("of_nats", "Nats")
RABBITMQ = ("of_rabbitmq", "Quorum")


def fresh_queue(stage: Stage, name: str) -> tuple[Any, str]:
    """Make a queue for the contender of this name, and return its broker and what it is called in a DAG."""
    kinds = {"redis": REDIS, "sqs": SQS, "postgres": POSTGRES, "nats": NATS, "rabbitmq": RABBITMQ}
    _, broker = kinds.get(name.partition("_")[0], KAFKA)
    made = stage.brokers[broker]
    return made, sqs_queue(made) if broker == SQS[1] else _topic(made)


def send_at_once(broker: Any, orders: list[dict[str, str]]) -> None:
    """Send a message for each order, in as few requests as its client can, since the sender is not measured."""
    bodies = [json.dumps(order).encode() for order in orders]
    _SENDERS.get(broker.connection_type, lambda broker, _: broker.send(*orders))(broker, bodies)


def _to_redis(broker: Any, bodies: list[bytes]) -> None:
    with broker.client as client, client.pipeline(transaction=False) as pipeline:
        for body in bodies:
            pipeline.xadd(broker.queue, {"v": body})
        pipeline.execute()


def _to_sqs(broker: Any, bodies: list[bytes]) -> None:
    client, url = broker.client, broker.url
    for start in range(0, len(bodies), 10):  # more at once are refused
        entries = [
            {"Id": str(n), "MessageBody": body.decode()} for n, body in enumerate(bodies[start : start + 10])
        ]
        client.send_message_batch(QueueUrl=url, Entries=entries)


def _to_postgres(broker: Any, bodies: list[bytes]) -> None:
    values = [body.decode() for body in bodies]
    broker.run(f"INSERT INTO {broker.queue} (value) SELECT unnest(%s::jsonb[])", values)


def _to_nats(broker: Any, bodies: list[bytes]) -> None:
    async def publish(client: Any) -> None:
        stream = client.jetstream()
        await asyncio.gather(*(stream.publish(f"{broker.queue}.sent", body) for body in bodies))

    broker.ask(publish)


def _to_rabbitmq(broker: Any, bodies: list[bytes]) -> None:
    from pamqp.commands import Basic

    async def publish() -> None:
        channel = await broker.channel()
        await asyncio.gather(
            *(
                channel.basic_publish(
                    body,
                    routing_key=broker.queue,
                    properties=Basic.Properties(message_id=uuid.uuid4().hex, delivery_mode=2),
                )
                for body in bodies
            )
        )
        await channel.close()

    broker.do(publish())


_SENDERS = {
    "redis": _to_redis,
    "aws": _to_sqs,
    "postgres": _to_postgres,
    "nats": _to_nats,
    "amqp": _to_rabbitmq,
}


def sqs_queue(broker: Any) -> str:
    """Make a queue, and return its address."""
    broker.fresh()
    return str(broker.url)


def order_of(run: Any, task: str) -> str:
    """Return what tells the message of this wait from those of others."""
    return f"{run.run_id} {task}"


def _topic(broker: Any) -> str:
    broker.fresh()
    return str(broker.queue)
