"""Kafka's clients, made of an Airflow connection; their errors, as ours; and a thread for their blocking calls."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

from airflow_events.errors import SourceUnfit
from airflow_events.listeners.connections import connection
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient

log = logging.getLogger(__name__)

# Seconds that a broker has for an answer.
PATIENCE = 10.0

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
# librdkafka's own: a line for each attempt to connect would be several each second. What matters becomes ours.
_OURS = {"client.id": "airflow-events", "log_level": 2, "reconnect.backoff.max.ms": 2000}
# Of a connection, what only this package can say.
_CALLBACKS = ("error_cb", "stats_cb", "throttle_cb", "on_commit", "on_delivery", "logger")
_DENIED = {
    KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED, KafkaError._SSL,
}  # fmt: skip
_UNFIT = {
    KafkaError._INVALID_ARG, KafkaError.UNSUPPORTED_VERSION, KafkaError._UNSUPPORTED_FEATURE,
    KafkaError.TOPIC_EXCEPTION, KafkaError.INVALID_GROUP_ID, KafkaError.MSG_SIZE_TOO_LARGE,
    KafkaError.UNSUPPORTED_SASL_MECHANISM, KafkaError.POLICY_VIOLATION, KafkaError.INVALID_CONFIG,
    KafkaError.INVALID_REPLICATION_FACTOR,
}  # fmt: skip
_FENCED = {
    KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError.INVALID_PRODUCER_ID_MAPPING,
    KafkaError.PRODUCER_FENCED,
}  # fmt: skip

_T = TypeVar("_T")


class Away(ConnectionError):
    """The broker does not answer, or not yet as it will."""


class Fenced(Exception):
    """Another process has begun to write since."""


@dataclass(frozen=True)
class Source:
    """
    Where a wait's messages are.

    :param group: of which group a message is taken; empty for a watch.
    :param ledger: what the topics that hold the group's claims and commits are named by.
    """

    conn_id: str
    topic: str
    group: str = ""
    ledger: str = ""

    def __str__(self) -> str:
        group = f" (group {self.group!r})" if self.group else ""
        return f"the topic {self.topic!r}{group} of the connection {self.conn_id!r}"


class Clients:
    """
    What a connection says, for the clients that are made of it.

    :ivar trouble: the last thing a client said about the brokers on its own account, until it is asked for.
    """

    def __init__(self, source: Source, settings: dict[str, Any]) -> None:
        self.source = source
        self.trouble: KafkaError | None = None
        self._settings = settings

    @classmethod
    async def of(cls, source: Source) -> Clients:
        """
        Read the Airflow connection.

        :raises SourceUnfit: it is of another type, or says what would lose events.
        """
        return cls(source, await _settings(source.conn_id))

    def consumer(self, **settings: Any) -> Consumer:
        """Make a consumer that is no member of a group, whatever ``group.id`` says."""
        ours = {
            "group.id": self.source.group or self._settings.get("group.id") or "airflow-events",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "allow.auto.create.topics": False,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            "enable.partition.eof": True,
            "queued.min.messages": 1000,
            "queued.max.messages.kbytes": 16384,
        }
        with self.refusals():
            return Consumer({**self._settings, **ours, **settings, "error_cb": self._note}, logger=log)

    def producer(self, transactional_id: str) -> Producer:
        """Make a producer for transactions."""
        ours = {
            "transactional.id": transactional_id,
            "transaction.timeout.ms": 15_000,
            "enable.idempotence": True,
            "acks": "all",
            "linger.ms": 0,
            "compression.type": "lz4",
        }
        with self.refusals():
            return Producer({**self._settings, **ours, "error_cb": self._note}, logger=log)

    def admin(self) -> AdminClient:
        """Make a client that asks about topics."""
        with self.refusals():
            settings: dict[str, Any] = {**self._settings, "error_cb": self._note}
            return AdminClient(settings, logger=log)

    def check(self) -> None:
        """
        Say what a client that waits for messages would be silent about.

        :raises Away: it has lost all brokers.
        :raises SourceUnfit: they do not let it in.
        """
        if self.trouble is not None:
            trouble, self.trouble = self.trouble, None
            raise self.translated(trouble)

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Turn Kafka's errors into ours."""
        try:
            yield
        except (KafkaException, SystemError) as error:
            # A fatal error that is raised while a report of delivery is called: Python finds that odd.
            cause = error if isinstance(error, KafkaException) else error.__cause__
            if not isinstance(cause, KafkaException):
                raise
            found = cause.args[0]
            if self.trouble is not None and self.trouble.code() in _DENIED:
                found, self.trouble = self.trouble, None  # why it took too long
            raise self.translated(found) from error

    def translated(self, error: KafkaError) -> Exception:
        """Return what we raise for an error of Kafka's."""
        code = error.code()
        if code in _FENCED:
            return Fenced(error.str())
        if code == KafkaError._SSL:
            return SourceUnfit(f"{self.source}: there is no trust between it and us: {error.str()}")
        if code in _DENIED:
            return SourceUnfit(
                f"{self.source}: the connection's user may not use it: {error.str()} ({error.name()})"
            )
        if code in _UNFIT:
            return SourceUnfit(f"{self.source}: it is refused: {error.str()} ({error.name()})")
        return Away(f"{error.str()} ({error.name()})")

    def _note(self, error: KafkaError) -> None:
        if error.code() in _DENIED or (error.code() == KafkaError._ALL_BROKERS_DOWN and not self.trouble):
            self.trouble = error


class Worker:
    """A thread for blocking calls, one at a time: no trigger waits for them."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def do(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Return what ``work`` returns. A cancellation does not end it; what is asked next comes after it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def end(self) -> None:
        """Let it end after what it does now."""
        self._thread.shutdown(wait=False)


async def _settings(conn_id: str) -> dict[str, Any]:
    found = await connection(conn_id, "kafka")
    settings = {name: value for name, value in found.extra_dejson.items() if name not in _CALLBACKS}
    if not settings.get("bootstrap.servers"):
        if not found.host:
            raise SourceUnfit(
                f"the connection {conn_id!r} has neither 'bootstrap.servers' among its extras nor a host"
            )
        settings["bootstrap.servers"] = f"{found.host}:{found.port or 9092}"
    if found.login:
        settings.setdefault("sasl.username", found.login)
        settings.setdefault("sasl.password", found.password or "")
    for name, unwanted, wanted in (
        ("enable.auto.commit", "true", "false"),
        ("isolation.level", "read_uncommitted", "read_committed"),
    ):
        if str(settings.get(name, wanted)).lower() == unwanted:
            raise SourceUnfit(
                f"the connection {conn_id!r} has {name}={settings[name]!r} among its extras, which would lose or "
                f"invent events; {name}={wanted!r} is needed, or nothing"
            )
    return {**_OURS, **settings}


def partitions_of(clients: Clients, admin: AdminClient) -> list[int]:
    """
    Return the numbers of the topic's partitions.

    :raises Away: there is no such topic, as yet. It is not made: asking a consumer could do that.
    """
    from confluent_kafka import TopicCollection

    topic = clients.source.topic
    with clients.refusals():
        [asked] = admin.describe_topics(TopicCollection([topic]), request_timeout=PATIENCE).values()
        try:
            return sorted(partition.id for partition in asked.result(PATIENCE + 5).partitions)
        except KafkaException as error:
            admin.poll(0)  # what it has to say on its own account, such as that it is not let in
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise Away("there is no such topic; make it, or its first producer does") from error
            raise


def moment(message: Message) -> datetime:
    """Return a message's timestamp; the epoch where it has none."""
    return _EPOCH + timedelta(milliseconds=max(message.timestamp()[1], 0))


def event_of(source: Source, message: Message, value: Callable[..., Any]) -> dict[str, Any]:
    """
    Return the event that a message becomes.

    :param value: makes a value or a key of bytes, see `airflow_events.listeners.kafka.schemas.Decoder.value`.
    :raises EventUndecodable: its value or its key is not of the format that is wanted.
    """
    where = f"the message at offset {message.offset()} in partition {message.partition()} of {source}"
    raw: Any = message
    return {
        "topic": source.topic,
        "partition": raw.partition(),
        "offset": raw.offset(),
        "timestamp": moment(message),
        "key": value(raw.key(), raw, f"the key of {where}", key=True),
        "headers": {name: None if header is None else header.decode("utf-8", "replace")
                    for name, header in raw.headers() or ()},
        "value": value(raw.value(), raw, where),
    }  # fmt: skip
