"""
The sources that are servers, through the clients of their own that the suite of ``tests/sources`` has.

Airflow's processes load this too, so whatever only the tests need is imported where it is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from airflow_events import EventListener
from source import UNKNOWN, Books, Source, queue_of


class Broker(Source):
    """A queue on a server; each event is a message, and its value is the event's name."""

    paths = ("no worker", "ends on a worker", "starts and ends on workers")
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

    @contextlib.contextmanager
    def _stream(self, base: Path) -> Iterator[tuple[Any, str, dict[str, str]]]:
        """Yield a client, the stream, and the event of each entry."""
        from redis import Redis

        broker = self._of(base)
        with Redis(port=broker.server.port, decode_responses=True) as client:
            entries = client.xrange(broker.queue)
            yield client, broker.queue, {entry: json.loads(fields["v"]) for entry, fields in entries}

    def committed(self, base: Path) -> dict[str, str]:
        with self._stream(base) as (client, stream, events):
            keys = list(client.scan_iter(f"airflow-events:{{{stream}}}:airflow:*", count=10_000))
            return {events[key.rpartition(":")[2]]: client.get(key) for key in keys}

    def claimed(self, base: Path) -> dict[str, str]:
        with self._stream(base) as (client, stream, events):
            held = client.xpending_range(stream, "airflow", "-", "+", 100)
            return {events[entry["message_id"]]: entry["consumer"] for entry in held}

    def free(self, base: Path) -> set[str]:
        with self._stream(base) as (client, stream, events):
            [group] = client.xinfo_groups(stream)
            held = client.xpending_range(stream, "airflow", "-", "+", 100)
            released = {entry["message_id"] for entry in held if entry["consumer"] == "=released"}
            last = _place(group["last-delivered-id"])
            return {event for entry, event in events.items() if entry in released or _place(entry) > last}


def _place(entry: str) -> tuple[int, ...]:
    return tuple(int(part) for part in entry.split("-"))


class Postgres(Broker):
    name = "postgresql"
    listener_is = ("postgres", "PostgresListener")
    broker_is = ("of_postgres", "PostgresJsonb")
    conn_id = "postgres_default"

    def prepare(self, base: Path) -> None:
        from airflow_events.listeners.postgres import create_table

        broker = self._of(base)
        broker.run(create_table(broker.queue, value_type=broker.value_type))

    def committed(self, base: Path) -> dict[str, str]:
        return dict(self._rows(base, "committed_by", "committed_by IS NOT NULL"))

    def claimed(self, base: Path) -> dict[str, str]:
        return dict(self._rows(base, "claimed_by", "committed_by IS NULL AND claimed_by IS NOT NULL"))

    def free(self, base: Path) -> set[str]:
        return {event for event, _ in self._rows(base, "id", "committed_by IS NULL AND claimed_by IS NULL")}

    def _rows(self, base: Path, column: str, where: str) -> list[tuple[str, str]]:
        broker = self._of(base)
        rows: list[tuple[str, str]] = broker.run(f"SELECT value, {column} FROM {broker.queue} WHERE {where}")
        return rows


class Nats(Broker):
    name = "nats"
    listener_is = ("nats", "NatsListener")
    broker_is = ("of_nats", "Nats")
    conn_id = "nats_default"

    def prepare(self, base: Path) -> None:
        self._of(base).make_stream()

    def committed(self, base: Path) -> dict[str, str]:
        return {event: note["wait"] for event, note in self._notes(base).items() if "committed" in note}

    def claimed(self, base: Path) -> dict[str, str]:
        notes = self._notes(base).items()
        return {event: note["wait"] for event, note in notes if "wait" in note and "committed" not in note}

    def free(self, base: Path) -> set[str]:
        return {event for event, note in self._notes(base).items() if "wait" not in note}

    def _notes(self, base: Path) -> dict[str, dict[str, str]]:
        """Return what the bucket says of each event of the stream."""
        from airflow_events.listeners.nats import BUCKET
        from nats.js.errors import NotFoundError

        broker = self._of(base)
        prefix = f"$KV.{BUCKET}.{broker.queue}.airflow.message."

        async def ask(client: Any) -> dict[str, dict[str, str]]:
            stream = client.jetstream()
            notes = {}
            try:
                about = await stream.stream_info(f"KV_{BUCKET}", subjects_filter=f"{prefix}>")
            except NotFoundError:  # no bucket yet
                subjects: Any = None
            else:
                subjects = about.state.subjects
            for subject in subjects or ():
                note = await stream.get_last_msg(f"KV_{BUCKET}", subject)
                notes[int(subject.removeprefix(prefix).partition("-")[0])] = json.loads(note.data or b"{}")
            state = (await stream.stream_info(broker.queue)).state
            numbers = range(state.first_seq, state.last_seq + 1)
            events = {n: json.loads((await stream.get_msg(broker.queue, n)).data) for n in numbers}
            return {event: notes.get(number, {}) for number, event in events.items()}

        found: dict[str, dict[str, str]] = broker.ask(ask)
        return found


class RabbitMQ(Broker):
    name = "rabbitmq"
    listener_is = ("rabbitmq", "RabbitMQListener")
    broker_is = ("of_rabbitmq", "RabbitMQ")
    conn_id = "rabbitmq_default"

    def prepare(self, base: Path) -> None:
        broker = self._of(base)
        broker.declare(broker.queue, {"x-queue-type": broker.queue_type})

    def send(self, base: Path, *events: str) -> None:
        broker = self._of(base)
        for event in events:
            broker.publish(json.dumps(event).encode(), to=broker.queue, message_id=event)

    def committed(self, base: Path) -> dict[str, str]:
        # The broker's notes name messages by an id; which event that is, the events that were delivered say.
        delivered = [json.loads(file.read_text()) for file in (base / "delivered").iterdir()]
        events = {event["id"]: event["value"] for event in delivered}
        notes = [json.loads(message.body) for message in self._messages(base, "commits")]
        return {events.get(note["id"], note["id"]): note["wait"] for note in notes}

    def claimed(self, base: Path) -> dict[str, str]:
        waits = {note["claim"]: note["wait"] for note in map(_json, self._messages(base, "claims"))}
        copies = [message for message in self._messages(base, "claim") if _about(message)["kind"] == "copy"]
        return {_json(copy): waits[_about(copy)["claim"]] for copy in copies}

    def free(self, base: Path) -> set[str]:
        broker = self._of(base)
        return set(map(_json, broker.look(broker.queue)))

    def _messages(self, base: Path, kind: str) -> list[Any]:
        """Return what is in our queues of a kind, which stays there."""
        broker = self._of(base)
        names = [name for name in broker.queues() if re.match(rf"airflow-events\.{kind}\.{broker.queue}\.", name)]
        return [message for name in names for message in broker.look(name)]


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

    def committed(self, base: Path) -> dict[str, str]:
        prefix, events = f"airflow/{queue_of(base)}/", self._events(base)
        notes = self._of(base).records("airflow-events.commits")
        return {
            events[tuple(map(int, key.removeprefix(prefix).split("/")))]: note["wait"]
            for key, note in notes
            if key.startswith(prefix)
        }

    def claimed(self, base: Path) -> dict[str, str]:
        return {event: wait for event, wait in self._uncommitted(base).items() if wait}

    def free(self, base: Path) -> set[str]:
        return {event for event, wait in self._uncommitted(base).items() if not wait}

    def books(self, base: Path, delivered: dict[str, Any]) -> Books:
        """Read the committed offsets, their metadata, the state that it leads to, and the log of commits."""
        broker, problems = self._of(base), []
        key = f"airflow/{broker.queue}"
        sent = self._events(base)
        got = {(event["partition"], event["offset"]): name for name, event in delivered.items()}
        if got != sent:
            wrong = sorted(got.items() ^ sent.items())
            problems.append(f"delivered, or in the topic, and not both: {wrong[:10]}")
        offsets = broker.committed()
        ends = broker.ends()
        for number, end in ends.items():
            if offsets[number][0] != end:
                problems.append(
                    f"partition {number} ends at {end}, and the committed offset is {offsets[number][0]}"
                )
        states = {place: state for place, found, state in broker.placed("airflow-events.state") if found == key}
        place = json.loads(offsets[0][1])["airflow-events"]
        if place != max(states):
            problems.append(f"the metadata leads to offset {place}, and the last state is at {max(states)}")
        state = states.get(place, {"partitions": {}})["partitions"]
        said = {int(number): (partition["next"], partition["open"]) for number, partition in state.items()}
        if said != {number: (end, {}) for number, end in ends.items()}:
            problems.append(f"the state says {said}, and the partitions end at {ends}")
        notes = Counter(
            found for found, _ in broker.records("airflow-events.commits") if found.startswith(f"{key}/")
        )
        if notes != Counter(f"{key}/{number}/{offset}" for number, offset in got):
            often = {found: times for found, times in notes.items() if times > 1}
            problems.append(f"{len(got)} were delivered, and {len(notes)} are noted, more than once {often}")
        found = {
            "committed offsets, by partition": " ".join(str(offset) for offset, _ in offsets.values()),
            "ends of the partitions": " ".join(map(str, ends.values())),
            "claims that are open, in the state that the metadata leads to": sum(len(o) for _, o in said.values()),
            "commits noted in the ledger": notes.total(),
        }
        return Books(found, problems)

    def _uncommitted(self, base: Path) -> dict[str, str]:
        """Return who has each event that is not committed: nobody if nobody has had it, or it was given back."""
        state, found = self._of(base).state(), {}
        for (number, offset), event in self._events(base).items():
            partition = state[number]
            if offset >= partition["next"]:
                found[event] = ""
            elif (claim := partition["open"].get(str(offset))) is not None:
                found[event] = claim["wait"]
        return found

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
    """A standard queue. SQS knows no waits: who deleted a message, the receipt in what was delivered says."""

    name = "sqs"
    paths = ("ends on a worker", "starts and ends on workers")
    listener_is = ("sqs", "SqsListener")
    broker_is = ("of_sqs", "Sqs")
    conn_id = "aws_default"

    @property
    def keywords(self) -> dict[str, Any]:  # type: ignore[override]
        return {"claim_timeout": float(os.environ.get("MATRIX_CLAIM_TIMEOUT", "900"))}

    def prepare(self, base: Path) -> None:
        broker = self._of(base)
        broker.client.create_queue(QueueName=broker.queue)

    def committed(self, base: Path) -> dict[str, str]:
        delivered = [json.loads(file.read_text()) for file in (base / "delivered").iterdir()]
        waits = {event["receipt_handle"]: event["claimed_by"] for event in delivered}
        return {json.loads(body): waits.get(by, UNKNOWN) for body, by in self._of(base).deleted().items()}


def _json(message: Any) -> Any:
    return json.loads(message.body)


def _about(message: Any) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(message.header.properties.headers["x-airflow-events"])
    return about


BROKERS: tuple[Source, ...] = (Redis(), Postgres(), Nats(), RabbitMQ(), Kafka(), Sqs())
