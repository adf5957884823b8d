"""
The sources that are servers, through the clients of their own that the suite of ``tests/sources`` has.

Airflow's processes load this too, so whatever only the tests need is imported where it is used.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from airflow_events import EventListener
from source import Books, Source, queue_of

# After how many deliveries a message is given up.
_FEW = 2
# Seconds after which a committed offset of Kafka's has followed what was acknowledged.
_FOLLOWS = 1.5


class Broker(Source):
    """A queue on a server; each event is a message, and its value is the event's name."""

    paths = ("no worker", "starts on a worker", "ends on a worker")
    # The listener, and the broker of ``tests/sources``: module and class.
    listener_is: ClassVar[tuple[str, str]]
    broker_is: ClassVar[tuple[str, str]]
    conn_id: ClassVar[str]

    _broker: Any = None

    @property
    def listener(self) -> type[EventListener]:  # type: ignore[override]
        module, name = self.listener_is
        return getattr(import_module(f"airflow_events.listeners.{module}"), name)  # type: ignore[no-any-return]

    @property
    def is_there(self) -> bool:
        return self._broker is not None

    @property
    def missing(self) -> str:
        return str(self._broker_class.missing)

    @property
    def _broker_class(self) -> Any:
        module, name = self.broker_is
        return getattr(import_module(module), name)

    def _make(self) -> Any:
        """Start the server; None if it is not there."""
        return self._broker_class.make()

    @contextlib.contextmanager
    def serve(self) -> Iterator[dict[str, str]]:
        self._broker = self._make()
        if self._broker is None:
            yield {}
            return
        try:
            yield {f"AIRFLOW_CONN_{self.conn_id.upper()}": json.dumps(self._broker.connection())}
        finally:
            self._broker.stop()

    def argument(self, base: str, queue: str) -> str:
        return queue

    def _of(self, base: Path) -> Any:
        """Return the broker, turned to the queue of a run."""
        self._broker.queue = queue_of(base)
        return self._broker

    def send(self, base: Path, *events: str) -> None:
        self._of(base).send(*events)

    def identity(self, event: Any) -> str:
        return str(event["value"])


class Redis(Broker):
    name = "redis"
    listener_is = ("redis", "RedisListener")
    broker_is = ("of_redis", "Valkey")
    conn_id = "redis_default"
    keywords: ClassVar[dict[str, Any]] = {"field": "v"}

    def committed(self, base: Path) -> set[str]:
        from redis import Redis

        stream = self._of(base).queue
        with Redis(port=self._broker.server.port, decode_responses=True) as client:
            [group] = client.xinfo_groups(stream)
            held = client.xpending_range(stream, "airflow", "-", "+", 100_000)
            pending = {entry["message_id"] for entry in held}
            read = client.xrange(stream, max=group["last-delivered-id"])
            return {json.loads(fields["v"]) for entry, fields in read if entry not in pending}


class Postgres(Broker):
    name = "postgresql"
    listener_is = ("postgres", "PostgresListener")
    broker_is = ("of_postgres", "PostgresJsonb")
    conn_id = "postgres_default"

    def prepare(self, base: Path) -> None:
        from airflow_events.listeners.postgres import create_table

        broker = self._of(base)
        broker.run(create_table(broker.queue, value_type=broker.value_type))

    def committed(self, base: Path) -> set[str]:
        broker = self._of(base)
        rows = broker.run(f"SELECT value FROM {broker.queue} WHERE acknowledged_at IS NOT NULL")
        return {event for (event,) in rows}


class Nats(Broker):
    """A stream that keeps what is not acknowledged, and another with all that was sent."""

    name = "nats"
    listener_is = ("nats", "NatsListener")
    broker_is = ("of_nats", "Nats")
    conn_id = "nats_default"

    def prepare(self, base: Path) -> None:
        broker = self._of(base)
        broker.make_stream(retention="workqueue")
        sent = {"name": f"{broker.queue}-sent", "subjects": [f"sent.{broker.queue}"]}
        broker.ask(lambda client: client.jetstream().add_stream(**sent))

    def send(self, base: Path, *events: str) -> None:
        broker = self._of(base)
        broker.publish(f"sent.{broker.queue}", *(json.dumps(event).encode() for event in events))
        broker.send(*events)

    def committed(self, base: Path) -> set[str]:
        return self._stored(base, "-sent") - self.free(base)

    def free(self, base: Path) -> set[str]:
        return self._stored(base)

    def _stored(self, base: Path, suffix: str = "") -> set[str]:
        broker = self._of(base)
        return {json.loads(message.data) for message in broker.stored(f"{broker.queue}{suffix}")}


class RabbitMQ(Broker):
    """
    A classic queue, and another with all that was sent: the server does not tell what it has forgotten.

    Only a quorum queue counts deliveries, so with ``few_deliveries`` it is one.
    """

    name = "rabbitmq"
    listener_is = ("rabbitmq", "RabbitMQListener")
    conn_id = "rabbitmq_default"
    acknowledges_later = True

    @property
    def _broker_class(self) -> Any:
        return getattr(import_module("of_rabbitmq"), "Quorum" if self.few_deliveries else "RabbitMQ")

    def prepare(self, base: Path) -> None:
        broker = self._of(base)
        broker.make_queue(**({"x-delivery-limit": _FEW} if self.few_deliveries else {}))
        for other in ("dead", "sent"):
            broker.declare(f"{broker.queue}.{other}")

    def send(self, base: Path, *events: str) -> None:
        broker = self._of(base)
        for event in events:
            for queue in (f"{broker.queue}.sent", broker.queue):
                broker.publish(json.dumps(event).encode(), to=queue, message_id=event)

    def committed(self, base: Path) -> set[str]:
        from deployment import until

        broker = self._of(base)
        # The server names none of those that a consumer holds, only how many.
        until(lambda: broker.unacknowledged() == len(broker.look(broker.queue)), "nobody holds a message", 15)
        sent = {json.loads(message.body) for message in broker.look(f"{broker.queue}.sent")}
        return sent - self.free(base)

    def free(self, base: Path) -> set[str]:
        broker = self._of(base)
        return {json.loads(message.body) for message in broker.look(broker.queue)}

    def dead_letters(self, base: Path) -> int:
        return len(self._of(base).dead_letters())


class Kafka(Broker):
    """A topic of several partitions; which message is where, its producer's client decides."""

    name = "kafka"
    listener_is = ("kafka", "KafkaListener")
    broker_is = ("of_kafka", "Kafka")
    conn_id = "kafka_default"

    _size: int | None = None
    _partitions: int = 6

    def scale(self, servers: int | None, partitions: int | None) -> None:
        self._size = servers
        self._partitions = partitions or self._partitions

    @property
    def servers(self) -> Sequence[Any]:
        return self._broker.servers if self._size else ()  # type: ignore[no-any-return]

    def _make(self) -> Any:
        if self._size is None:
            return super()._make()
        return import_module("of_kafka").KafkaCluster.make(self._size)

    def prepare(self, base: Path) -> None:
        from confluent_kafka.admin import AdminClient, NewTopic

        broker = self._of(base)
        admin = AdminClient(broker.bootstrap)  # which has to outlive what it was asked
        [made] = admin.create_topics([NewTopic(broker.queue, self._partitions)]).values()
        made.result(60)

    def send(self, base: Path, *events: str) -> None:
        # Whatever dies meanwhile, each is to be there once.
        once = {"enable.idempotence": True, "message.timeout.ms": 0}
        self._of(base).produce(*({"value": json.dumps(event).encode()} for event in events), **once)

    def committed(self, base: Path) -> set[str]:
        time.sleep(_FOLLOWS)
        offsets = self._of(base).committed()
        return {event for place, event in self._events(base).items() if place[1] < offsets[place[0]][0]}

    def books(self, base: Path, delivered: dict[str, Any]) -> Books:
        """Read the topic and the committed offsets, which the next wait moves on if the last one could not."""
        broker, problems = self._of(base), []
        sent = self._events(base)
        got = {(event["partition"], event["offset"]): name for name, event in delivered.items()}
        if got != sent:
            wrong = sorted(got.items() ^ sent.items())
            problems.append(f"delivered, or in the topic, and not both: {wrong[:10]}")
        found = {
            "committed offsets, by partition": " ".join(str(offset) for offset, _ in broker.committed().values()),
            "ends of the partitions": " ".join(map(str, broker.ends().values())),
        }
        return Books(found, problems)

    def _events(self, base: Path) -> dict[tuple[int, ...], str]:
        """Return the topic's events by partition and offset."""
        from confluent_kafka import TopicPartition

        broker = self._of(base)
        ends = {number: end for number, end in broker.ends().items() if end}
        consumer, found = broker.consumer("nobody"), {}
        consumer.assign([TopicPartition(broker.queue, number, 0) for number in ends])
        while len(found) < sum(ends.values()):
            message = consumer.poll(30)
            assert message is not None and message.error() is None, f"{len(found)} of {ends}"
            found[message.partition(), message.offset()] = json.loads(message.value())
        consumer.close()
        return found


class Sqs(Broker):
    """A standard queue. SQS cannot say what was deleted, and the emulator's notes can."""

    name = "sqs"
    listener_is = ("sqs", "SqsListener")
    broker_is = ("of_sqs", "Sqs")
    conn_id = "aws_default"
    acknowledges_later = True
    keywords: ClassVar[dict[str, Any]] = {"lease": 10.0}

    def prepare(self, base: Path) -> None:
        broker = self._of(base)
        broker.client.create_queue(QueueName=broker.queue)
        if self.few_deliveries:
            broker.client.create_queue(QueueName=broker.dead_letter)
            broker.redrive(_FEW)

    def dead_letters(self, base: Path) -> int:
        broker = self._of(base)
        return sum(broker.counts(broker.url_of(broker.dead_letter)))

    def committed(self, base: Path) -> set[str]:
        return set(map(json.loads, self._of(base).deleted()))


BROKERS: tuple[Source, ...] = (Redis(), Postgres(), Nats(), RabbitMQ(), Kafka(), Sqs())
