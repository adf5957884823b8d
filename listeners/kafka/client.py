"""Kafka's clients, made of an Airflow connection; their errors, as ours; and a thread for their blocking calls."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from datetime import datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from airflow.sdk.exceptions import AirflowException
from airflow_events.errors import EventUndecodable, SourceMisconfigured
from airflow_events.listeners.support.connections import check_extras, connection, endpoints, extras, misconfigured
from airflow_events.listeners.support.hub import LoginRefused
from airflow_events.listeners.support.timestamps import EPOCH, of_epoch
from airflow_events.listeners.support.values import named, text_of
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicCollection
from confluent_kafka.admin import AdminClient

if TYPE_CHECKING:
    from airflow.sdk import Connection

log = logging.getLogger(__name__)

# Seconds that a broker has for an answer.
PATIENCE = 10.0
# Seconds after which a refusal is looked for, and for which another broker may still answer.
_REFUSED_FOR = 0.5

# librdkafka's own: a line for each attempt to connect would be several each second. What matters becomes ours.
_OURS: dict[str, Any] = {
    "client.id": "airflow-events",
    "log_level": 2,
    "socket.keepalive.enable": True,
}
# Unless the connection has one of them: the client refuses a pair that does not fit.
_BACKOFF: dict[str, Any] = {"reconnect.backoff.ms": 1000, "reconnect.backoff.max.ms": 2000}
_PORT = 9092
# A consumer's, unless the connection says otherwise.
_BUFFERS = {"queued.min.messages": 1000, "queued.max.messages.kbytes": 16384}

# A connection's extras, by what becomes of them. These make no sense for who takes messages.
_PRODUCERS = frozenset({
    "acks", "batch.num.messages", "batch.size", "compression.codec", "compression.level",
    "compression.type", "delivery.report.only.error", "delivery.timeout.ms", "enable.gapless.guarantee",
    "enable.idempotence", "linger.ms", "max.in.flight", "max.in.flight.requests.per.connection",
    "message.send.max.retries", "message.timeout.ms", "msg_order_cmp", "partitioner", "partitioner_cb",
    "produce.offset.report", "queue.buffering.backpressure.threshold", "queue.buffering.max.kbytes",
    "queue.buffering.max.messages", "queue.buffering.max.ms", "queuing.strategy", "request.required.acks",
    "request.timeout.ms", "retries", "sticky.partitioning.linger.ms", "transaction.timeout.ms",
    "transactional.id",
})  # fmt: skip
# Whoever had them otherwise would lose or invent events: the values that will do.
_OTHERWISE = {"enable.auto.commit": ("false", "0", "f"), "isolation.level": ("read_committed",)}
# What others need who use the same connection, and what has no effect here, and why.
_MEMBER = "the waits are no members of the group"
_OFFSETS = "an offset is committed when its message is recorded"
_SAID = "what it would be told is in the logs of the waits"
_IDLE = {
    **dict.fromkeys((
        "coordinator.query.interval.ms", "group.instance.id", "group.protocol", "group.protocol.type",
        "group.remote.assignor", "heartbeat.interval.ms", "max.poll.interval.ms", "max.poll.records",
        "partition.assignment.strategy", "session.timeout.ms",
    ), _MEMBER),
    **dict.fromkeys((
        "auto.commit.enable", "auto.commit.interval.ms", "enable.auto.offset.store", "offset.store.method",
        "offset.store.path", "offset.store.sync.interval.ms", "on_commit",
    ), _OFFSETS),
    **dict.fromkeys(("error_cb", "log_cb", "logger", "on_delivery", "stats_cb", "throttle_cb"), _SAID),
    "auto.offset.reset": "where a new group begins is said by the wait's argument 'start'",
    "allow.auto.create.topics": "no topic of messages is made here",
    "consume.callback.max.messages": "there is no such callback",
    "enable.partition.eof": "it is always so here",
}  # fmt: skip
# Those that connections usually have, for whoever misspells one. The client knows some more.
_KNOWN = frozenset({
    "bootstrap.servers", "broker.address.family", "check.crcs", "client.dns.lookup", "client.id",
    "client.rack", "connections.max.idle.ms", "debug", "enable.ssl.certificate.verification",
    "fetch.error.backoff.ms", "fetch.max.bytes", "fetch.message.max.bytes", "fetch.min.bytes",
    "fetch.wait.max.ms", "group.id", "log_level", "max.partition.fetch.bytes", "message.max.bytes",
    "metadata.broker.list", "metadata.max.age.ms", "oauth_cb", "queued.max.messages.kbytes",
    "queued.min.messages", "receive.message.max.bytes", "reconnect.backoff.max.ms", "reconnect.backoff.ms",
    "retry.backoff.max.ms", "retry.backoff.ms", "sasl.kerberos.keytab", "sasl.kerberos.kinit.cmd",
    "sasl.kerberos.principal", "sasl.kerberos.service.name", "sasl.mechanism", "sasl.mechanisms",
    "sasl.oauthbearer.client.id", "sasl.oauthbearer.client.secret", "sasl.oauthbearer.config",
    "sasl.oauthbearer.extensions", "sasl.oauthbearer.method", "sasl.oauthbearer.scope",
    "sasl.oauthbearer.token.endpoint.url", "sasl.password", "sasl.username", "security.protocol",
    "socket.connection.setup.timeout.ms", "socket.keepalive.enable", "socket.timeout.ms", "ssl.ca.location",
    "ssl.ca.pem", "ssl.certificate.location", "ssl.certificate.pem", "ssl.cipher.suites",
    "ssl.endpoint.identification.algorithm", "ssl.key.location", "ssl.key.password", "ssl.key.pem",
    "ssl.keystore.location", "ssl.keystore.password", "statistics.interval.ms",
    "topic.metadata.refresh.interval.ms", *_OTHERWISE, *_IDLE,
})  # fmt: skip
_NO_SETTING = "airflow.events.no.such.setting"
_idle_told: set[tuple[str, ...]] = set()
_DENIED = {
    KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED, KafkaError._SSL,
}  # fmt: skip
_LOGIN = {KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED}
# What is said with one of these codes though it passes: a broker, or a proxy before it, that hangs up or is busy,
# and a place of tokens that does not answer.
_PASSING = (
    "alert internal error", "broker transport failure", "timed out", "too many connects",
    "failed to acquire sasl oauthbearer token",
)  # fmt: skip
# Said of one broker, whose address is in it: that which it gives out (``advertised.listeners``).
_UNREACHED = {KafkaError._TRANSPORT, KafkaError._RESOLVE}
# What may be their consequence, and names no address.
_SILENT = {
    KafkaError._TIMED_OUT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError._WAIT_COORD,
}
_MISCONFIGURED = {
    KafkaError._INVALID_ARG, KafkaError.UNSUPPORTED_VERSION, KafkaError._UNSUPPORTED_FEATURE,
    KafkaError.TOPIC_EXCEPTION, KafkaError.INVALID_GROUP_ID, KafkaError.MSG_SIZE_TOO_LARGE,
    KafkaError.UNSUPPORTED_SASL_MECHANISM, KafkaError.POLICY_VIOLATION, KafkaError.INVALID_CONFIG,
    KafkaError.INVALID_REPLICATION_FACTOR,
}  # fmt: skip

_T = TypeVar("_T")

Place = tuple[str, int]
"""A topic, and the number of a partition."""


class BrokerUnavailable(ConnectionError):
    """The broker does not answer, or not yet as it will."""


def coordinates(cluster: str, topic_id: str, topic: str, partition: int, offset: int, group: str) -> str:
    """Return what tells a message of a group from every other. Its form is frozen."""
    return json.dumps([cluster, topic_id, topic, partition, offset, group], ensure_ascii=False)


@dataclass(frozen=True)
class Source:
    """
    Where a wait's messages are.

    :param topics: one, or several for a group.
    :param group: for which group messages are read; empty for a watch.
    """

    conn_id: str
    topics: tuple[str, ...]
    group: str = ""

    @property
    def topic(self) -> str:
        """The first one, or the only one."""
        return self.topics[0]

    def __str__(self) -> str:
        topics = f"topic{'s' * (len(self.topics) > 1)} {', '.join(map(repr, self.topics))}"
        group = f" (group {self.group!r})" if self.group else ""
        return f"the {topics}{group} of the connection {self.conn_id!r}"


class Clients:
    """
    What a connection says, for the clients that are made of it.

    :ivar trouble: the last thing a client said about the brokers on its own account, until it is asked for.
    """

    def __init__(self, source: Source, settings: dict[str, Any]) -> None:
        self.source = source
        self.trouble: KafkaError | None = None
        self._unreached = ""
        self._no_token: Exception | None = None
        self._settings = settings
        if "oauth_cb" in settings:
            self._settings = {**settings, "oauth_cb": self._noting(settings["oauth_cb"])}

    @classmethod
    async def of(cls, source: Source) -> Clients:
        """
        Read the Airflow connection.

        :raises SourceMisconfigured: it is of another type, or says what would lose events.
        """
        return cls(source, await _settings(source))

    def apart(self) -> Clients:
        """Return the same, for clients whose trouble is of no concern to those that are made of this one."""
        return Clients(self.source, self._settings)

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
        }
        with self.refusals():
            return Consumer({**_BUFFERS, **self._settings, **ours, **settings, "error_cb": self._note}, logger=log)

    def producer(self) -> Producer:
        """Make a producer, whose messages are on all brokers that are to have them when it has delivered them."""
        ours = {
            "enable.idempotence": True,
            "linger.ms": 0,
            "message.timeout.ms": round(PATIENCE * 1000),
            "message.max.bytes": 1_000_000_000,  # how large one may be, the topic says
        }
        with self.refusals():
            return Producer({**self._settings, **ours, "error_cb": self._note}, logger=log)

    def admin(self, *brokers: str) -> AdminClient:
        """Make a client that asks about topics; ``brokers`` are addresses besides those of the connection."""
        servers = ",".join([self._settings["bootstrap.servers"], *brokers])
        with self.refusals():
            settings: dict[str, Any] = {**self._settings, "bootstrap.servers": servers, "error_cb": self._note}
            return AdminClient(settings, logger=log)

    def check(self) -> None:
        """
        Say what a client that waits for messages would be silent about.

        :raises BrokerUnavailable: it has lost all brokers.
        :raises SourceMisconfigured: they do not let it in.
        """
        if self.trouble is not None:
            trouble, self.trouble = self.trouble, None
            raise self.translated(trouble)

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Turn Kafka's errors into ours."""
        try:
            yield
        except FutureTimeout as error:
            if (denied := self.denied) is not None:
                self.trouble = None
                raise self.translated(denied) from error
            raise BrokerUnavailable("the brokers have not answered in time") from error
        except (KafkaException, SystemError) as error:
            if self._no_token is not None:  # of which the client says that it took too long, or nothing
                raise BrokerUnavailable(f"there is no token for the login: {self._no_token}") from self._no_token
            # A fatal error that is raised while a report of delivery is called: Python finds that odd.
            cause = error if isinstance(error, KafkaException) else error.__cause__
            if not isinstance(cause, KafkaException):
                raise
            found = cause.args[0]
            if self.trouble is not None and _is_denied(self.trouble):
                found, self.trouble = self.trouble, None  # why it took too long
            raise self.translated(found) from error

    @property
    def denied(self) -> KafkaError | None:
        """With what a broker has refused us, as a client has said on its own account."""
        return self.trouble if self.trouble is not None and _is_denied(self.trouble) else None

    def answer(self, admin: AdminClient, asked: Future[_T]) -> _T:
        """
        Return what ``asked`` returns; soon after a broker has refused us, wait no longer.

        The client would go on to log in, several times in a second, and a login may be locked for that.
        """
        end = time.monotonic() + PATIENCE + 5
        while True:
            try:
                return asked.result(_REFUSED_FOR)
            except FutureTimeout:
                if (
                    self.denied is not None or time.monotonic() > end
                ):  # for half a second another broker could answer
                    raise
                admin.poll(0)

    def translated(self, error: KafkaError) -> Exception:
        """Return what we raise for an error of Kafka's."""
        code = error.code()
        if code == KafkaError._SSL and _is_denied(error):
            return LoginRefused(f"{self.source}: the TLS verification failed: {error.str()}")
        if _is_denied(error):
            refused = LoginRefused if code in _LOGIN else SourceMisconfigured
            return refused(f"{self.source}: the connection's user may not use it: {error.str()} ({error.name()})")
        if code in _MISCONFIGURED:
            return SourceMisconfigured(f"{self.source}: it is refused: {error.str()} ({error.name()})")
        where = f"; {self._unreached}" if code in _SILENT and self._unreached else ""
        return BrokerUnavailable(f"{error.str()} ({error.name()}){where}")

    def _noting(self, fetch: Callable[[str], Any]) -> Callable[[str], Any]:
        """Return what fetches a token as ``fetch`` does, and notes why there is none."""

        def fetched(config: str) -> Any:
            self._no_token = None
            try:
                return fetch(config)
            except Exception as error:
                self._no_token = error
                raise

        return fetched

    def _note(self, error: KafkaError) -> None:
        if error.code() in _UNREACHED:
            self._unreached = error.str()
        if _is_denied(error) or (error.code() == KafkaError._ALL_BROKERS_DOWN and not self.trouble):
            self.trouble = error


def _is_denied(error: KafkaError) -> bool:
    """Whether an error says that we are not let in, and will not be by itself."""
    return error.code() in _DENIED and not any(passing in error.str().lower() for passing in _PASSING)


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


async def _settings(source: Source) -> dict[str, Any]:
    found = await connection(source.conn_id, "kafka")
    told = extras(found)
    check_extras(found, told, told, dict.fromkeys(_PRODUCERS, "it is a producer's, and here messages are taken"))
    unknown = [name for name in told if name not in _KNOWN and not await asyncio.to_thread(_is_known, name)]
    check_extras(found, unknown, _KNOWN)
    for name, good in _OTHERWISE.items():
        if str(told.get(name, good[0])).lower() not in good:
            needed = f"{name}={good[0]!r} is needed, or nothing"
            what = f"has {name}={told[name]!r} among its extras, which would lose or invent events; {needed}"
            raise misconfigured(found, what)
    _tell_idle(found, told, source)
    settings = {name: value for name, value in told.items() if name not in _IDLE and name not in _OTHERWISE}
    settings["bootstrap.servers"] = _servers(found, settings)
    settings |= _login(found, settings)
    if others := [name for name, value in settings.items() if not isinstance(value, (str, int, float))]:
        raise misconfigured(found, f"has the extra {others[0]!r}, which is neither text nor a number")
    if _wants_tokens(settings) and (tokens := await asyncio.to_thread(_tokens, found, settings)):
        settings["oauth_cb"] = tokens
    return {**_OURS, **({} if _BACKOFF.keys() & settings.keys() else _BACKOFF), **settings}


def _is_known(name: str) -> bool:
    """Return whether the Kafka client has a setting of this name, among others than those named here."""
    try:
        # The second is no setting, so that there is never a client, whatever the first one does.
        Consumer({"group.id": "airflow-events", name: "", _NO_SETTING: ""})
    except (KafkaException, TypeError, ValueError, AttributeError) as error:
        return f'No such configuration property: "{name}"' not in str(error)
    raise AssertionError(f"{_NO_SETTING} is a setting")


def _tell_idle(found: Connection, told: dict[str, Any], source: Source) -> None:
    """Say once which extras have no effect, and why: a connection is used by others too, for whom they may be."""
    idle = {name: _IDLE[name] for name in told if name in _IDLE}
    if source.group and told.get("group.id", source.group) != source.group:
        idle["group.id"] = "the group is an argument of the wait"
    if idle and (found.conn_id, *idle) not in _idle_told:
        _idle_told.add((found.conn_id, *idle))
        reasons = "; ".join(f"{name}: {reason}" for name, reason in idle.items())
        log.warning("Extras of the connection %r that have no effect here: %s", found.conn_id, reasons)


def _servers(found: Connection, settings: dict[str, Any]) -> str:
    """Return the addresses of the brokers, from the extra for them, as the provider has it, or from the host."""
    extra = settings.pop("bootstrap.servers", None) or settings.pop("metadata.broker.list", None)
    extra = ",".join(map(str, extra)) if isinstance(extra, list) else extra
    if not found.host:
        if not extra:
            what = "has neither 'bootstrap.servers' among its extras nor a host"
            raise misconfigured(found, what)
        return str(extra)
    if not extra:
        return ",".join(each.address(_PORT) for each in endpoints(found))
    named = [_host_and_port(each) for each in str(extra).split(",")]
    for one in endpoints(found):
        if not any(one.host.lower() == host and one.port in (None, port or _PORT) for host, port in named):
            host = one.address(one.port) if one.port else one.host
            raise misconfigured(found, f"has the host {host}, and the extra bootstrap.servers={extra!r}")
    return str(extra)


def _host_and_port(server: str) -> tuple[str, int | None]:
    """Return what an address of a broker says; None where it says no port."""
    found = urlsplit(f"//{server.strip().rpartition('://')[2]}")
    with contextlib.suppress(ValueError):
        return found.hostname or "", found.port
    return server, None


def _login(found: Connection, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the login, which stands in the connection's fields or among its extras."""
    if not found.login:
        return {}
    if settings.get("sasl.username", found.login) != found.login:
        raise misconfigured(found, "has a login, and another one as the extra 'sasl.username'")
    if not str(settings.get("security.protocol", "")).lower().startswith("sasl_"):
        needed = "security.protocol=sasl_ssl (or sasl_plaintext)"
        raise misconfigured(found, f"has a login, which is used only with the extra {needed}")
    return {"sasl.username": found.login, "sasl.password": settings.get("sasl.password", found.password or "")}


def _wants_tokens(settings: dict[str, Any]) -> bool:
    """Return whether the login is by tokens that Python fetches."""
    mechanism = settings.get("sasl.mechanism") or settings.get("sasl.mechanisms")
    by_client = str(settings.get("sasl.oauthbearer.method", "")).lower() == "oidc"
    google = "managedkafka" in settings["bootstrap.servers"] and "cloud.goog" in settings["bootstrap.servers"]
    return "oauth_cb" in settings or google or (mechanism == "OAUTHBEARER" and not by_client)


def _tokens(found: Connection, settings: dict[str, Any]) -> Callable[..., Any] | None:
    """
    Return what fetches tokens, as the Kafka provider's hook has it, which blocks.

    It is the function that the extra ``oauth_cb`` names, if ``[apache_kafka] callback_allowlist`` allows it, or
    the hook's own for Amazon MSK and Google's Managed Kafka. None if the client is to do without.

    :raises SourceMisconfigured: the hook refuses it, or it or what it needs is not installed.
    """
    try:
        from airflow.providers.apache.kafka.hooks.base import KafkaBaseHook

        class Reader(KafkaBaseHook):
            def _get_client(self, config: Any) -> Any:
                return config

        hook: Any = Reader(kafka_config_id=found.conn_id)  # type: ignore[no-untyped-call]
        hook.get_connection = lambda _: SimpleNamespace(extra_dejson=dict(settings))
        tokens: Callable[..., Any] | None = hook.get_conn.get("oauth_cb")
    except (ImportError, ValueError, AttributeError, AirflowException) as error:
        raise misconfigured(
            found, f"asks for a login by tokens, and the Kafka provider has none: {error}"
        ) from error
    if tokens is not None and not callable(tokens):
        needed = "pip install 'apache-airflow-providers-apache-kafka>=2'"
        raise misconfigured(found, f"has the extra 'oauth_cb', which needs: {needed}")
    return tokens


def topic_of(clients: Clients) -> str:
    """
    Return what tells the topic from others of its name, that were before or will be after it.

    :raises BrokerUnavailable: see `described`.
    """
    return str(described(clients, clients.admin())[clients.source.topic].topic_id)


def described(clients: Clients, admin: AdminClient) -> dict[str, Any]:
    """
    Return the `TopicDescription` of each topic that is there.

    :raises BrokerUnavailable: none is, as yet. They are not made: asking a consumer could do that.
    """
    found = {}
    missing: BrokerUnavailable | None = None
    with clients.refusals():
        topics = TopicCollection(list(clients.source.topics))
        for topic, asked in admin.describe_topics(topics, request_timeout=PATIENCE).items():
            try:
                found[topic] = clients.answer(admin, asked)
            except KafkaException as error:
                admin.poll(0)  # what it has to say on its own account, such as that it is not let in
                if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise
                missing = BrokerUnavailable(
                    f"there is no such topic as {topic!r}; make it, or its first producer does"
                )
    if not found and missing is not None:
        raise missing
    return found


def moment(message: Message) -> datetime:
    """Return a message's timestamp; the epoch where it has none, or one that is no moment."""
    return published(message) or EPOCH


def published(message: Message) -> datetime | None:
    """Return a message's timestamp; the epoch where it has none, None where that is no moment."""
    return of_epoch(max(message.timestamp()[1], 0))


def place_of(message: Message, source: Source) -> str:
    """Say which message it is, for errors and logs."""
    one = Source(source.conn_id, (str(message.topic()),), source.group)
    return f"the message at offset {message.offset()} in partition {message.partition()} of {one}"


def event_of(source: Source, message: Message, value: Callable[..., Any]) -> dict[str, Any]:
    """
    Return the event that a message becomes.

    :param value: makes a value or a key of bytes, see `airflow_events.listeners.kafka.schemas.Decoder.value`.
    :raises EventUndecodable: its value or its key is not of the format that is wanted, or a header has no name.
    """
    where = place_of(message, source)
    raw: Any = message
    try:
        headers = raw.headers() or ()
    except ValueError as error:  # a header's name is no text
        raise EventUndecodable(where, "readable", f"a header's name: {error}", b"") from error
    return {
        "topic": raw.topic(),
        "partition": raw.partition(),
        "offset": raw.offset(),
        "timestamp": published(message),
        "key": value(raw.key(), raw, f"the key of {where}", key=True),
        "headers": {named(name): None if header is None else text_of(header) for name, header in headers},
        "value": value(raw.value(), raw, where),
    }
