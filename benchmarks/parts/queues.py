"""A message of SQS or Kafka: ours against Airflow's own, on the servers that the tests use."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from parts import Part, Rows, Stage
from parts.processes import fresh_triggerer, until_open
from parts.timers import latency_lines, note, nothing_noted

SQS = ("of_sqs", "Sqs")
KAFKA = ("of_kafka", "Kafka")
REDIS = ("of_redis", "Valkey")
POSTGRES = ("of_postgres", "PostgresJsonb")
NATS = ("of_nats", "Nats")
RABBITMQ = ("of_rabbitmq", "Quorum")


@dataclass
class Source:
    """
    What has the messages.

    :param broker: module of tests/sources, and the class in it.
    :param names: what each contender is, by its own name; ours is the first.
    :param make: makes a queue, and returns what it is called in a DAG.
    :param send: sends one message to it, whose order is that of a wait.
    """

    title: str
    broker: tuple[str, str]
    names: dict[str, str]
    make: Callable[[Any], str]
    send: Callable[[Any, str, str], None]
    remark: str

    def measure(self, stage: Stage) -> Rows:
        """From the moment that a message is sent until what follows the wait runs."""
        found: Rows = [{"name": name, **nothing_noted()} for name in self.names]
        for turn in range(stage.options.repeat):
            for row in found:
                for key, values in self._sent(stage, row["name"], turn).items():
                    row[key] += values
                print(row["name"], row["running"], flush=True)
        return [{**row, "rounds": stage.options.repeat, "spread": stage.options.spread} for row in found]

    def _sent(self, stage: Stage, name: str, turn: int) -> dict[str, list[float]]:
        """Open waits, each on a queue of its own, and send to them at moments that are spread evenly."""
        airflow, count, broker = stage.airflow, stage.options.at_once, stage.brokers[self.broker[1]]
        triggerer = fresh_triggerer(airflow)
        queues = [self.make(broker) for _ in range(count)]
        label = f"{name}-{turn}-{time.time():.0f}"
        runs = [
            airflow.run(f"{name}_1", {"queue": queue, "number": f"{n}"}, run_id=f"{label}-{n}")
            for n, queue in enumerate(queues)
        ]
        until_open(airflow, triggerer, count)
        began = time.time()
        # How long it takes depends on when a message comes, seen from who asks every so many seconds.
        draw = random.Random(turn)
        moments = [(n + draw.random()) * stage.options.spread / count for n in range(count)]
        sent = []
        for queue, run, moment in zip(queues, runs, moments, strict=True):
            time.sleep(max(0.0, began + moment - time.time()))
            sent.append(datetime.now(timezone.utc))
            self.send(broker, queue, order_of(run, "wait"))
        found = nothing_noted()
        for run, moment in zip(runs, sent, strict=True):
            assert run.finished(timeout=240) == "success", run
            note(found, run, run.tasks(), moment)
        return found

    def table(self, rows: Rows) -> str:
        lines = latency_lines(self.title, "sent", self.names, rows)
        rounds = rows[0]["rounds"]
        return "\n".join(
            [
                *lines,
                "",
                f"{rounds} rounds by turns, {len(rows[0]['running']) // rounds} waits in each, on queues of their "
                f"own; a message for each, spread over {rows[0]['spread']:g} s. {self.remark}",
            ]
        )

    def part(self) -> Part:
        return Part(self.measure, self.table, tuple(f"{name}_1" for name in self.names), (self.broker,))


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


def _send_to_sqs(broker: Any, queue: str, order: str) -> None:
    broker.client.send_message(QueueUrl=queue, MessageBody=json.dumps({"order": order}))


def _topic(broker: Any) -> str:
    broker.fresh()
    return str(broker.queue)


def _send_to_kafka(broker: Any, topic: str, order: str) -> None:
    broker.queue = topic
    broker.send({"order": order})


_SQS = Source(
    "SQS message",
    SQS,
    {
        "sqs_ours": "ours: `SqsListener`",
        "sqs_peer": "`SqsSensor(deferrable=True)`",
        "sqs_peer_1s": "`SqsSensor(deferrable=True, poke_interval=1)`",
    },
    sqs_queue,
    _send_to_sqs,
    "On an emulator, moto, with which the tests run as well: what AWS takes comes on top.",
)
_KAFKA = Source(
    "Kafka message",
    KAFKA,
    {
        "kafka_ours": "ours: `KafkaListener`",
        "kafka_watch": "ours: `KafkaWatchListener`",
        "kafka_peer": "`AwaitMessageSensor`",
        "kafka_peer_1s": "`AwaitMessageSensor(poll_interval=1)`",
        "kafka_queue": '`MessageQueueTrigger(scheme="kafka")`, for which a task defers itself',
    },
    _topic,
    _send_to_kafka,
    "Topics of one partition, one broker; each of Airflow's waits has a group of its own.",
)

PARTS = {"sqs": _SQS.part(), "kafka": _KAFKA.part()}
