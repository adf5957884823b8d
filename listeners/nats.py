"""NATS JetStream: a durable consumer as a queue, and a stream as a log."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import heapq
import json
import logging
import re
import ssl
import time
from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from airflow_events import settings
from airflow_events.errors import EventLost, EventUndecodable, SourceUnfit
from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.connections import connection
from airflow_events.listeners.hub import Hub, Seeker
from airflow_events.listeners.log import LogHub, Message, Watcher, since_of
from airflow_events.listeners.shared import connected, shared
from airflow_events.listeners.values import Format, Match, OnUndecodable, check_choices, decode

try:
    from nats import errors
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js.errors import APIError, NotFoundError, ServerError, ServiceUnavailableError
except ImportError as error:
    raise ImportError("a NATS listener needs: pip install airflow-provider-events[nats]") from error

log = logging.getLogger(__name__)

DEFAULT = "nats_default"
BUCKET = "airflow-events"

Start = Literal["all", "new"]

# Seconds for which a hub's pull waits for a message, after which it sees new waits.
_BLOCK = 0.5
# Seconds after which a pull that found something ends although it could hold more.
_MORE = 0.01
# Seconds within which the server must have answered.
_PATIENCE = 5.0
# How many messages are pulled at once, and how many waits looked up at once.
_BATCH = 100
# Seconds within which every wait is looked up anew: another triggerer may have claimed for it.
_ROUND = 30.0
# Of a consumer that is made here. Each claim is a pending acknowledgement; the server's own limit is 1000.
_MAX_ACK_PENDING = 10_000
# Seconds. After these JetStream gives out again what a triggerer pulled and, having died, claimed for nobody.
_ACK_WAIT = 30

_SECOND = 10**9
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)

# The server's error codes.
_WRONG_REVISION = (10071, 10164)
_THERE_ALREADY = (10013, 10058, 10105, 10148)
_NO_JETSTREAM = (10035, 10039, 10076)

_LOST = (
    OSError,
    asyncio.TimeoutError,
    errors.ConnectionClosedError,
    errors.ConnectionDrainingError,
    errors.NoRespondersError,
    errors.OutboundBufferLimitError,
    errors.StaleConnectionError,
    ServiceUnavailableError,
    ServerError,
)


class NatsListener(EventListener):
    """
    Take a message of a stream through a durable consumer: each message goes to one wait, exactly once.

    Claims and commits are keys of a key-value bucket; the acknowledgement, which JetStream takes from anybody,
    follows the commit. The event is

    ``{"stream", "durable", "id", "sequence", "subject", "headers", "timestamp", "value", "bucket",
    "nats_conn_id"}``, ``timestamp`` a datetime in UTC, of when the stream stored the message; ``headers`` a dict
    of strings.

    How long a message stays, the stream's limits and its retention decide. One that is dropped before a wait had
    it is gone.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        stream: str,
        *,
        subject: str | None = None,
        durable: str = "airflow",
        values: Format = "json",
        on_undecodable: OnUndecodable = "fail",
        deliver_policy: Start = "all",
        claim_timeout: float | timedelta = 3600.0,
        require_persistence: bool = True,
        bucket: str = BUCKET,
        nats_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return when there is a message that no other wait on the consumer has, the oldest first.

        :param stream: its name. It must be there.
        :param subject: of which subjects, with wildcards; None is all of them, or those of a consumer that is
            there already.
        :param durable: the consumer's name. It is made if it is not there. Each consumer gets every message.
        :param values: of what format the message is; see `airflow_events.listeners.values.decode`.
        :param on_undecodable: what to do with a message that is not: ``fail`` fails the wait and leaves the
            message to others, ``skip`` acknowledges it, with a warning, and waits on.
        :param deliver_policy: where a consumer that is not there yet begins: ``all`` at the stream's first
            message, ``new`` at the next one.
        :param claim_timeout: after how many seconds a message that a wait has claimed and not committed goes to
            another. A wait that still lives loses nothing by it: its commit is refused, and it waits on.
        :param require_persistence: refuse a stream, a consumer or a bucket that is kept in memory.
        :param bucket: where claims and commits are kept. It is made if it is not there.
        :param nats_conn_id: an Airflow connection of type ``nats`` or ``generic``; ``docs/sources/nats.md`` says
            what may stand in it.
        :raises SourceUnfit: the connection is of another type; there is no such stream; the stream, the consumer
            or the bucket would lose events; the user may not use them.
        :raises SourceUnreachable: the server was away for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        check_choices(values, on_undecodable)
        if deliver_policy not in ("all", "new"):
            raise ValueError(f"deliver_policy is 'all' or 'new', not {deliver_policy!r}")
        source = _Source(nats_conn_id, stream, durable, bucket)
        wait = current_wait().id
        lapse = claim_timeout if isinstance(claim_timeout, timedelta) else timedelta(seconds=claim_timeout)
        key = ("nats", source, subject, deliver_policy, require_persistence)
        while True:
            make = lambda: _QueueHub(source, subject, deliver_policy, require_persistence)  # noqa: E731
            async with shared(key, make) as hub:
                message = await hub.take(_Taker(wait, lapse))
            try:
                event = _event(source, message, values)
            except EventUndecodable as error:
                async with _server(nats_conn_id) as server:
                    claims = _Claims(server, source)
                    if on_undecodable == "fail":
                        await claims.release(message.id, wait)
                        raise
                    await claims.commit(message.id, wait)
                log.warning("Passed over, and acknowledged: %s", error)
            else:
                return {**event, "durable": durable, "bucket": bucket, "nats_conn_id": nats_conn_id}

    async def event_checkpointed(self, event: Any) -> None:
        """Note for ``[events] commit_memory`` seconds who has the message, and acknowledge it."""
        source = _Source(event["nats_conn_id"], event["stream"], event["durable"], event["bucket"])
        async with _server(source.conn_id) as server:
            await _Claims(server, source).commit(event["id"], current_wait().id)

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Let another wait have the message at once."""
        stream = args[0] if args else kwargs["stream"]
        conn_id, wait = kwargs.get("nats_conn_id", DEFAULT), current_wait().id
        source = _Source(conn_id, stream, kwargs.get("durable", "airflow"), kwargs.get("bucket", BUCKET))
        async with _server(conn_id) as server:
            claims = _Claims(server, source)
            message = event["id"] if event is not None else await claims.chosen(wait)
            if message is not None:
                await claims.release(message, wait)


class NatsWatchListener(EventListener):
    """
    Wait for the first message of a stream that matches, and take nothing away.

    The event is as of `NatsListener`, without ``durable``, ``bucket`` and ``nats_conn_id``.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        stream: str,
        *,
        match: dict[str, Any] | str | None = None,
        since: datetime | str | timedelta | None = None,
        subject: str | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "skip",
        nats_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return the first message that matches, stored at ``since`` or later.

        :param match: see `airflow_events.listeners.values.Match`.
        :param since: a moment, or a timedelta from the start of the run; None is the start of the run.
        :param subject: of which subjects, with wildcards; None is all of them.

        The other parameters and errors are as of `NatsListener.poll_for_event`; here an undecodable message is
        passed over, with a warning in the triggerer's log, unless ``on_undecodable`` is ``fail``.
        """
        check_choices(values, on_undecodable)
        watcher = Watcher(Match(match), since_of(since, current_wait()), on_undecodable)
        source = _Source(nats_conn_id, stream)
        key = ("nats watch", source, subject, values)
        async with shared(key, lambda: _StreamHub(source, subject, values)) as hub:
            return dict(await hub.take(watcher))


@dataclass(frozen=True)
class _Source:
    conn_id: str
    stream: str
    durable: str = ""
    bucket: str = ""

    def __post_init__(self) -> None:
        # These become parts of subjects, where such a character would lead elsewhere.
        for what, name in (("stream", self.stream), ("durable", self.durable or "-")):
            if not name or re.search(r"[\s.*>/\\]", name):
                raise ValueError(f"{what} is a name without spaces, dots, slashes and wildcards, not {name!r}")
        if self.bucket and not re.fullmatch(r"[A-Za-z0-9_-]+", self.bucket):
            raise ValueError(f"bucket is a name of letters, digits, '_' and '-', not {self.bucket!r}")

    def __str__(self) -> str:
        durable = f" (consumer {self.durable!r})" if self.durable else ""
        return f"the stream {self.stream!r}{durable} of the connection {self.conn_id!r}"


@dataclass(frozen=True)
class _Stored:
    """A message as its stream has it."""

    sequence: int
    timestamp: datetime
    subject: str
    headers: dict[str, str]
    data: bytes

    @property
    def id(self) -> str:
        return _id(self.sequence, self.timestamp)


def _id(sequence: int, timestamp: datetime) -> str:
    """
    Name a message of a stream: its sequence, and when it was stored, in microseconds since the epoch.

    The sequence alone begins anew in a stream that is deleted and made again, or restored. Claims and commits are
    kept under it, so its format is frozen.
    """
    return f"{sequence}-{(timestamp - _EPOCH) // _MICROSECOND}"


@dataclass(frozen=True)
class _Key:
    """A key of the bucket; revision 0 is one that is not there."""

    revision: int = 0
    value: dict[str, str] = field(default_factory=dict)

    @property
    def wait(self) -> str | None:
        """Whose the message is; None of one that is free."""
        return self.value.get("wait")

    @property
    def committed(self) -> bool:
        return "committed" in self.value

    @property
    def left(self) -> float:
        """Seconds until the claim lapses, below 0 if it has."""
        until = self.value.get("until")
        return (datetime.fromisoformat(until) - _now()).total_seconds() if until else -1.0

    def is_anothers(self, wait: str) -> bool:
        """Whether ``wait`` cannot have the message: it is committed, by whomever, or another holds it."""
        return self.committed or (self.wait != wait and self.left > 0)


class _Claims:
    """
    Who has which message of a consumer.

    A wait's key has the message that the wait has chosen, so that all who poll for it choose one. A message's
    key has the wait that claimed or committed it. Both change by compare-and-set only, and the message's key
    alone decides: a choice is no claim, and an acknowledgement no commit.

    To claim is to write the wait's key, then the message's, then to look whether the wait's is still the same.
    Whoever dies in between leaves a choice, which the next who polls for that wait makes a claim, or a message
    that is free, which JetStream gives out again. To commit is to write the message's key, then to acknowledge.
    Whoever dies in between leaves a committed message that JetStream gives out again; it is acknowledged then.
    """

    def __init__(self, server: _Server, source: _Source) -> None:
        self.server = server
        self._source = source
        self._prefix = f"$KV.{source.bucket}.{source.stream}.{source.durable}"

    async def message(self, message: str) -> _Key:
        """Return a message's key."""
        return await self._get(f"{self._prefix}.message.{message}")

    async def chosen(self, wait: str) -> str | None:
        """Return the message that ``wait`` has chosen last."""
        return (await self._get(self._of(wait))).value.get("message")

    async def choose(self, wait: str, lapse: timedelta, message: str, reply: str) -> _Stored | None:
        """Return what `held` does, after it chose ``message`` for a wait that holds none."""
        found, revision = await self.held(wait, lapse)
        if found is None:
            await self._put(self._of(wait), revision, {"wait": wait, "message": message, "reply": reply})
            found, _ = await self.held(wait, lapse)
        return found

    async def held(self, wait: str, lapse: timedelta) -> tuple[_Stored | None, int]:
        """
        Return the message that ``wait`` holds, and the revision of its choice.

        The message that it has chosen is claimed for it, if it is not another's; who made the choice may be dead.
        """
        while True:
            choice = await self._get(self._of(wait))
            if "message" not in choice.value:  # it is not there, or was deleted
                return None, choice.revision
            message, reply = choice.value["message"], choice.value["reply"]
            mark = await self.message(message)
            if mark.is_anothers(wait):
                return None, choice.revision
            stored = await self.server.message(self._source.stream, seq=int(message.partition("-")[0]))
            if stored is None or stored.id != message:  # the stream has dropped it: there is nothing to deliver
                return None, choice.revision
            if mark.wait == wait and mark.left > 0:
                return stored, choice.revision
            claim = {"wait": wait, "until": (_now() + lapse).isoformat(), "reply": reply}
            if not await self._put(f"{self._prefix}.message.{message}", mark.revision, claim):
                continue
            await self.server.later(reply, lapse.total_seconds())
            if (await self._get(self._of(wait))).revision == choice.revision:
                return stored, choice.revision
            await self.release(message, wait)  # a slower poll than another, which chose anew meanwhile

    async def commit(self, message: str, wait: str) -> None:
        """
        Note that a message is delivered to ``wait``, which has claimed it, and acknowledge it.

        :raises EventLost: another wait has it.
        """
        while True:
            mark = await self.message(message)
            if mark.wait != wait:
                holder = mark.wait or "nobody (the claim was given back, or its key is gone)"
                raise EventLost(f"the message {message} of {self._source} is held by {holder}")
            note = {"wait": wait, "committed": _now().isoformat(), "reply": mark.value["reply"]}
            key = f"{self._prefix}.message.{message}"
            if mark.committed or await self._put(key, mark.revision, note):
                break
        try:
            await self.server.request(mark.value["reply"], b"+ACK")
        except errors.NoRespondersError:
            log.debug("%s has no such consumer any more", self._source)
        except asyncio.TimeoutError:  # JetStream gives it out again, and is told then
            log.debug("The acknowledgement of %s was not confirmed by %s", message, self._source)

    async def release(self, message: str, wait: str) -> None:
        """Free a message that ``wait`` has claimed and not committed; of any other it changes nothing."""
        while True:
            mark = await self.message(message)
            if mark.wait != wait or mark.committed:
                return
            reply = mark.value["reply"]
            free = {"released": _now().isoformat()}
            if await self._put(f"{self._prefix}.message.{message}", mark.revision, free):
                await self.server.later(reply, 0)
                return

    def _of(self, wait: str) -> str:
        # A wait's name may have characters that no subject has.
        return f"{self._prefix}.wait.{hashlib.sha256(wait.encode()).hexdigest()[:32]}"

    async def _get(self, key: str) -> _Key:
        # Not a direct get, which a replica may answer that is behind.
        found = await self.server.message(f"KV_{self._source.bucket}", last_by_subj=key)
        if found is None or not found.data:
            return _Key(found.sequence if found else 0)
        return _Key(found.sequence, json.loads(found.data))

    async def _put(self, key: str, revision: int, value: dict[str, str]) -> bool:
        """Write a key whose revision is still ``revision``; return whether it was."""
        headers = {"Nats-Expected-Last-Subject-Sequence": str(revision)}
        try:
            _checked(await self.server.request(key, json.dumps(value, ensure_ascii=False).encode(), headers))
        except APIError as error:
            if error.err_code not in _WRONG_REVISION:
                raise
            return False
        return True


class _Taker(Seeker):
    """A wait for a message that no other has."""

    def __init__(self, wait: str, lapse: timedelta) -> None:
        super().__init__()
        self.wait = wait
        self.lapse = lapse
        self.looked_up = 0.0  # by the monotonic clock; 0 is never


class _QueueHub(Hub[_Taker]):
    """Claims messages for the waits on one consumer."""

    lost: ClassVar[tuple[type[BaseException], ...]] = _LOST

    def __init__(self, source: _Source, subject: str | None, deliver_policy: Start, persistent: bool) -> None:
        self._source = source
        self._subject = subject
        self._deliver_policy = deliver_policy
        self._persistent = persistent
        self._server: _Server | None = None
        self._keeps = timedelta.max
        super().__init__(str(source))

    async def connect(self) -> None:
        await self.disconnect()
        self._server = server = await _connect(self._source.conn_id)
        with _refusals(self._source):
            config = (await _about(server, self._source))["config"]
            self._check_storage("the stream", config["storage"])
            await self._connect_bucket(server, config)
            await self._connect_consumer(server, config)
            await server.listen()
        for seeker in self.seekers:
            seeker.looked_up = 0.0

    async def disconnect(self) -> None:
        if self._server is not None:
            await self._server.close()

    async def serve(self) -> None:
        assert self._server is not None
        claims = _Claims(self._server, self._source)
        with _refusals(self._source):
            waiting = [seeker for seeker in self.seekers if not seeker.done]
            fresh = [seeker for seeker in waiting if not seeker.looked_up]
            # The others one after the other, all within a round.
            turn = max(10, round(len(waiting) * _BLOCK / _ROUND))
            for batch in _batches(fresh or heapq.nsmallest(turn, waiting, key=lambda seeker: seeker.looked_up)):
                await _all(self._look_up(claims, seeker) for seeker in batch)
            if wanting := self._wanting():
                most = min(_BATCH, len(wanting))
                pulled = await self._server.pull(self._source.stream, self._source.durable, most)
                # Some may have gone meanwhile.
                offers = zip_longest(pulled, list(self._wanting().items())[: len(pulled)], fillvalue=None)
                await _all(self._offer(claims, message, wait) for message, wait in offers if message is not None)

    def _wanting(self) -> dict[str, timedelta]:
        return {seeker.wait: seeker.lapse for seeker in self.seekers if not seeker.done}

    async def _look_up(self, claims: _Claims, seeker: _Taker) -> None:
        if seeker.lapse > self._keeps:
            seeker.fail(self._unfit("the bucket", "max_age", f"{self._keeps}", f"claim_timeout, {seeker.lapse}"))
            return
        found, _ = await claims.held(seeker.wait, seeker.lapse)
        seeker.looked_up = time.monotonic()
        if found is not None:
            seeker.give(found)

    async def _offer(self, claims: _Claims, pulled: Msg, to: tuple[str, timedelta] | None) -> None:
        """Let a wait have a message, unless the message has been given already or the wait has another."""
        message = _id(*_stored_as(pulled.reply))
        mark = await claims.message(message)
        if mark.committed:
            await claims.server.publish(pulled.reply, b"+ACK")
        elif mark.left > 0:
            await claims.server.later(pulled.reply, mark.left)
        else:
            found = await claims.choose(*to, message, pulled.reply) if to is not None else None
            if found is None or found.id != message:
                await claims.server.later(pulled.reply, 0)
            if found is not None and to is not None:
                await self._give(claims, to[0], found)

    async def _give(self, claims: _Claims, wait: str, found: _Stored) -> None:
        seekers = [seeker for seeker in self.seekers if seeker.wait == wait]
        for seeker in seekers:
            seeker.give(found)
        if not seekers:  # it was ended while the message was claimed for it
            await claims.release(found.id, wait)

    async def _connect_bucket(self, server: _Server, stream: dict[str, Any]) -> None:
        """Make the bucket if it is not there, and check it."""
        name, needed = f"KV_{self._source.bucket}", timedelta(seconds=settings.commit_memory())
        try:
            about = await server.api(f"STREAM.INFO.{name}")
        except NotFoundError:
            age = _nanoseconds(max([needed, *(seeker.lapse for seeker in self.seekers)]))
            await server.make(
                f"STREAM.CREATE.{name}",
                name=name,
                description="Claims and commits of airflow-provider-events",
                subjects=[f"$KV.{self._source.bucket}.>"],
                max_msgs_per_subject=1,
                max_age=age,
                discard="new",
                storage="file",
                num_replicas=stream["num_replicas"],
                duplicate_window=min(age, 120 * _SECOND),
                allow_rollup_hdrs=True,
                deny_delete=True,
            )
            about = await server.api(f"STREAM.INFO.{name}")
        config = about["config"]
        self._check_storage("the bucket", config["storage"])
        if max(config.get("max_msgs", -1), config.get("max_bytes", -1)) > 0 and config.get("discard") != "new":
            raise self._unfit("the bucket", "discard", "old", "'new', as it has a limit (max_msgs or max_bytes)")
        self._keeps = timedelta(microseconds=config["max_age"] // 1000) if config.get("max_age") else timedelta.max
        if self._keeps < needed:
            raise self._unfit("the bucket", "max_age", f"{self._keeps}", f"[events] commit_memory, {needed}")

    async def _connect_consumer(self, server: _Server, stream: dict[str, Any]) -> None:
        """Make the consumer if it is not there, and check it."""
        path = f"{self._source.stream}.{self._source.durable}"
        try:
            about = await server.api(f"CONSUMER.INFO.{path}")
        except NotFoundError:
            limit = (stream.get("consumer_limits") or {}).get("max_ack_pending") or _MAX_ACK_PENDING
            config = {
                "durable_name": self._source.durable,
                "description": "Waits of airflow-provider-events",
                "deliver_policy": self._deliver_policy,
                "ack_policy": "explicit",
                "ack_wait": _ACK_WAIT * _SECOND,
                "max_deliver": -1,
                "max_ack_pending": limit,
            }
            if self._subject is not None:
                config["filter_subject"] = self._subject
            request = {"stream_name": self._source.stream, "config": config, "action": "create"}
            await server.make(f"CONSUMER.DURABLE.CREATE.{path}", **request)
            about = await server.api(f"CONSUMER.INFO.{path}")
        config = about["config"]
        self._check_storage("the consumer", "memory" if config.get("mem_storage") else "file")
        filters = config.get("filter_subjects") or [config.get("filter_subject") or ">"]
        needed = {
            "ack_policy": (config["ack_policy"] == "explicit", "'explicit'"),
            "deliver_subject": (not config.get("deliver_subject"), "none: a consumer that is pulled from"),
            "max_deliver": (config.get("max_deliver", -1) <= 0, "-1: it may give up no message"),
            "inactive_threshold": (not config.get("inactive_threshold"), "none: it stays while no wait waits"),
            "filter_subject": (self._subject is None or filters == [self._subject], f"{self._subject!r}"),
        }
        for key, (fits, value) in needed.items():
            if not fits:
                raise self._unfit("the consumer", key, str(config.get(key) or filters), value)

    def _check_storage(self, what: str, storage: str) -> None:
        if self._persistent and storage != "file":
            raise self._unfit(what, "storage", storage, "'file', or require_persistence=False")

    def _unfit(self, what: str, key: str, found: str, needed: str) -> SourceUnfit:
        name = f" {self._source.bucket!r}" if what == "the bucket" else ""
        return SourceUnfit(f"{self._source}: {what}{name} would lose events: {key} is {found!r}; needed: {needed}")


class _StreamHub(LogHub[datetime | int]):
    """
    Reads one stream for those who watch it.

    The position is the next sequence, or the moment to begin from.
    """

    lost: ClassVar[tuple[type[BaseException], ...]] = _LOST

    def __init__(self, source: _Source, subject: str | None, values: Format) -> None:
        self._source = source
        self._subject = subject
        self._values = values
        self._server: _Server | None = None
        self._reads: tuple[str, int] | None = None  # the consumer, and what it has delivered
        self._reads_on: datetime | int | None = None
        super().__init__(str(source))

    async def connect(self) -> None:
        await self.disconnect()
        self._reads_on = None
        self._server = await _connect(self._source.conn_id)
        with _refusals(self._source):
            await _about(self._server, self._source)
            await self._server.listen()

    async def disconnect(self) -> None:
        if self._server is not None:
            await self._server.close()

    async def position(self, since: datetime) -> datetime | int:
        return since

    async def read(self, position: datetime | int) -> tuple[datetime | int, list[Message]]:
        assert self._server is not None
        with _refusals(self._source):
            if self._reads is None or self._reads_on != position:
                self._reads = await self._begin_at(position), 0
            consumer, delivered = self._reads
            pulled = await self._server.pull(self._source.stream, consumer, _BATCH)
        messages = []
        for message in pulled:
            sequence, timestamp = _stored_as(message.reply)
            delivered += 1
            if _delivered_as(message.reply) != delivered:  # after which reading begins anew, at `position`
                raise ConnectionError(f"a message of {self._source} before {sequence} was not delivered")
            stored = _Stored(sequence, timestamp, message.subject, dict(message.headers or {}), message.data)
            messages.append(self._message(stored))
            position = sequence + 1
        self._reads, self._reads_on = (consumer, delivered), position
        return position, messages

    async def dropped_until(self) -> datetime | None:
        assert self._server is not None
        with _refusals(self._source):
            about = await _about(self._server, self._source)
        state = about["state"]
        if state["first_seq"] <= max(about["config"].get("first_seq", 1), 1):
            return None
        return _moment(state["first_ts"]) if state["messages"] else _moment(state["last_ts"]) + _MICROSECOND

    async def _begin_at(self, position: datetime | int) -> str:
        """Make a consumer of this connection's own, which the server ends when nobody reads from it."""
        assert self._server is not None
        config: dict[str, Any] = {
            "ack_policy": "none",
            "inactive_threshold": 30 * _SECOND,
            "mem_storage": True,
            "num_replicas": 1,
        }
        if isinstance(position, datetime):
            start = position.astimezone(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")
            config |= {"deliver_policy": "by_start_time", "opt_start_time": start}
        else:
            config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": position}
        if self._subject is not None:
            config["filter_subject"] = self._subject
        stream = self._source.stream
        about = await self._server.api(f"CONSUMER.CREATE.{stream}", stream_name=stream, config=config)
        return str(about["name"])

    def _message(self, stored: _Stored) -> Message:
        try:
            return Message(stored.timestamp, _event(self._source, stored, self._values))
        except EventUndecodable as error:
            return Message(stored.timestamp, {}, error)


def _event(source: _Source, message: _Stored, values: Format) -> dict[str, Any]:
    return {
        "stream": source.stream,
        "id": message.id,
        "sequence": message.sequence,
        "subject": message.subject,
        "headers": message.headers,
        "timestamp": message.timestamp,
        "value": decode(message.data, values, f"the message {message.sequence} of {source}"),
    }


def _stored_as(reply: str) -> tuple[int, datetime]:
    """Return a delivered message's sequence in the stream, and when it was stored."""
    tokens = _tokens(reply)
    # Cut, not rounded, to microseconds: as in `_moment`.
    return int(tokens[1]), _EPOCH + int(tokens[3]) // 1000 * _MICROSECOND


def _delivered_as(reply: str) -> int:
    """Return a delivered message's sequence in its consumer."""
    return int(_tokens(reply)[2])


def _tokens(reply: str) -> list[str]:
    """Return what follows the consumer's name in the subject that a message is acknowledged by."""
    tokens = reply.split(".")  # $JS.ACK.[domain.account.]stream.consumer.deliveries.sequence...
    return tokens[4:] if len(tokens) == 9 else tokens[6:]


def _moment(text: str) -> datetime:
    """Read the server's form of a moment, which has up to nine digits after the point."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00") + int(fraction[:6].ljust(6, "0")) * _MICROSECOND


def _headers(raw: bytes) -> dict[str, str]:
    """Read a message's headers as the client does: of those that are there twice, the last."""
    lines = (line.partition(b":") for line in raw.split(b"\r\n")[1:])
    return {name.strip().decode("utf-8", "replace"): value.strip().decode("utf-8", "replace")
            for name, colon, value in lines if colon}  # fmt: skip


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _nanoseconds(span: timedelta) -> int:
    return span // _MICROSECOND * 1000


def _batches(seekers: list[_Taker]) -> Iterator[list[_Taker]]:
    for start in range(0, len(seekers), _BATCH):
        yield seekers[start : start + _BATCH]


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it at once, and raise what one of them raised after all have ended."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def _about(server: _Server, source: _Source) -> dict[str, Any]:
    try:
        return await server.api(f"STREAM.INFO.{source.stream}")
    except NotFoundError as error:
        raise SourceUnfit(f"{source}: there is no such stream; make it, as it is never made here") from error


@contextlib.contextmanager
def _refusals(source: _Source) -> Iterator[None]:
    """Say what the server refused, and where."""
    try:
        yield
    except APIError as error:
        if isinstance(error, _LOST):
            raise
        raise SourceUnfit(f"{source}: the server refuses it: {error.description} ({error.err_code})") from error


def _checked(answer: Msg) -> dict[str, Any]:
    """
    Return what the server answered.

    :raises APIError: an error.
    """
    found: dict[str, Any] = json.loads(answer.data)
    if "error" in found:
        APIError.from_error(found["error"])
    return found


class _Server:
    """A connection to NATS, which is not mended: who uses it connects anew."""

    def __init__(self, conn_id: str) -> None:
        self._conn_id = conn_id
        self._client = Client()
        self._inbox = ""
        self._arrived: asyncio.Queue[Msg | None] = asyncio.Queue()  # None: something is wrong
        self._trouble: Exception | None = None
        self._denied: Exception | None = None

    @property
    def closed(self) -> bool:
        return self._client.is_closed

    async def open(self, servers: list[str], **options: Any) -> None:
        """
        Connect to one of ``servers``.

        :raises SourceUnfit: the server does not let this user in, or asks for no TLS where we want it.
        :raises OSError: none of them answers.
        """
        tls = options.get("tls") is not None
        try:
            await self._client.connect(
                servers,
                name="airflow-events",
                allow_reconnect=False,
                connect_timeout=round(_PATIENCE),
                reconnect_time_wait=0,
                max_reconnect_attempts=1,
                ping_interval=30,
                error_cb=self._note,
                closed_cb=self._closed,
                **options,
            )
        except errors.NoServersError as error:
            raise ConnectionError(str(self._trouble or error)) from (self._trouble or error)
        except errors.Error as error:
            if "auth" in str(error).lower():
                raise SourceUnfit(f"the connection {self._conn_id!r} is not let in: {error}") from error
            raise ConnectionError(str(error)) from error
        except ImportError as error:
            raise SourceUnfit(f"the connection {self._conn_id!r} needs: pip install nkeys") from error
        if not self._client.is_connected:
            raise ConnectionError(str(self._trouble or "the server ended the connection"))
        # The client itself goes on in the clear if the server does not ask for TLS.
        if tls and not getattr(self._client, "_server_info", {}).get("tls_required", False):
            raise SourceUnfit(f"the connection {self._conn_id!r} wants TLS, and the server asks for none")

    async def close(self) -> None:
        ending = asyncio.ensure_future(self._client.close())
        await asyncio.wait(
            [ending], timeout=2
        )  # after a TLS handshake that failed, the client would wait for ever
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)

    async def request(self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None) -> Msg:
        """
        Return the answer.

        :raises SourceUnfit: there was none, and the user lacks a permission.
        """
        try:
            return await self._client.request(subject, payload, timeout=_PATIENCE, headers=headers)
        except asyncio.TimeoutError as error:
            if self._denied is None:
                raise
            raise SourceUnfit(f"the connection {self._conn_id!r} may not use it: {self._denied}") from error

    async def publish(self, subject: str, payload: bytes) -> None:
        await self._client.publish(subject, payload)

    async def later(self, reply: str, seconds: float) -> None:
        """Let a message be given out again, by the subject that it is acknowledged by, after some seconds."""
        delay = round(max(seconds, 0.05) * _SECOND)
        await self.publish(reply, b"-NAK" if seconds <= 0 else b'-NAK {"delay": %d}' % delay)

    async def api(self, what: str, **request: Any) -> dict[str, Any]:
        """
        Ask JetStream.

        :raises APIError: it refuses.
        """
        try:
            answer = await self.request(f"$JS.API.{what}", json.dumps(request).encode() if request else b"")
        except errors.NoRespondersError as error:
            silent = "nobody answers for JetStream: is it enabled on the server, and in this account?"
            raise ServiceUnavailableError(code=503, description=silent) from error
        try:
            return _checked(answer)
        except APIError as error:
            if error.err_code in _NO_JETSTREAM:
                raise SourceUnfit(f"the connection {self._conn_id!r}: {error.description}") from error
            raise

    async def make(self, what: str, **request: Any) -> None:
        """Ask JetStream to make something, unless another triggerer has made it meanwhile."""
        try:
            await self.api(what, **request)
        except APIError as error:
            if error.err_code not in _THERE_ALREADY:
                raise

    async def message(self, stream: str, **which: Any) -> _Stored | None:
        """Return a stream's message of a sequence (``seq``), or its last of a subject (``last_by_subj``)."""
        try:
            found = (await self.api(f"STREAM.MSG.GET.{stream}", **which))["message"]
        except NotFoundError:
            return None
        headers, data = (base64.b64decode(found.get(part) or "") for part in ("hdrs", "data"))
        return _Stored(found["seq"], _moment(found["time"]), found["subject"], _headers(headers), data)

    async def listen(self) -> None:
        """Begin to receive what `pull` asks for."""
        self._inbox = self._client.new_inbox()
        # The requests are the limit.
        await self._client.subscribe(self._inbox, cb=self._receive, pending_msgs_limit=0, pending_bytes_limit=0)

    async def pull(self, stream: str, consumer: str, batch: int) -> list[Msg]:
        """Return up to ``batch`` messages that are there, or wait for the first for up to `_BLOCK` seconds."""
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        found = await self._pull(subject, 1, _BLOCK)
        if found and batch > 1:
            found += await self._pull(subject, batch - 1, _MORE)
        return found

    async def _pull(self, subject: str, batch: int, seconds: float) -> list[Msg]:
        request = {"batch": batch, "expires": round(seconds * _SECOND)}
        await self._client.publish(subject, json.dumps(request).encode(), reply=self._inbox)
        found: list[Msg] = []
        while len(found) < batch:
            message = await self._next(seconds + _PATIENCE)
            if message.reply:
                found.append(message)
                continue
            status = dict(message.headers or {})  # which every pull ends with that did not get all
            if status.get("Status") == "408":
                break
            reason = status.get("Description") or f"status {status.get('Status')}"
            if reason.startswith("Exceeded Max"):
                raise SourceUnfit(f"the connection {self._conn_id!r}: a pull of {batch} is refused: {reason}")
            raise ConnectionError(f"{subject} ended: {reason}")
        return found

    async def _next(self, seconds: float) -> Msg:
        alarm = asyncio.get_running_loop().call_later(seconds, self._arrived.put_nowait, None)
        try:
            message = await self._arrived.get()
        finally:
            alarm.cancel()
        if message is None:
            raise ConnectionError(str(self._trouble or "the connection was closed, or a pull was not answered"))
        return message

    async def _receive(self, message: Msg) -> None:
        self._arrived.put_nowait(message)

    async def _closed(self) -> None:
        self._arrived.put_nowait(None)

    async def _note(self, error: Exception) -> None:
        self._trouble = error
        if "permissions violation" in str(error).lower():
            self._denied = error


def _server(conn_id: str) -> contextlib.AbstractAsyncContextManager[_Server]:
    """Use the connection by which the waits of this process commit and release."""
    return connected(
        ("nats server", conn_id), lambda: _connect(conn_id), _Server.close, lambda server: server.closed
    )


async def _connect(conn_id: str) -> _Server:
    """Connect as an Airflow connection says."""
    found = await connection(conn_id, "nats", "generic")
    extra = found.extra_dejson
    servers = _urls(found.host or "localhost", found.port or 4222)
    options: dict[str, Any] = {
        "user": found.login or None,
        "password": (found.password or "") if found.login else None,
        "token": extra.get("token"),
        "nkeys_seed_str": extra.get("nkey_seed"),
        "user_credentials": extra.get("credentials"),
    }
    secure = str(extra.get("tls", False)).lower() in ("true", "1") or servers[0].startswith(("tls:", "wss:"))
    try:
        if options["user_credentials"]:
            await asyncio.to_thread(Path(options["user_credentials"]).read_bytes)
        if secure or any(extra.get(f"tls_{name}") for name in ("ca", "cert", "key", "hostname")):
            options["tls"] = await asyncio.to_thread(_tls, extra)
            options["tls_hostname"] = extra.get("tls_hostname")
    except OSError as error:  # of which ssl.SSLError is a kind
        raise SourceUnfit(f"the connection {conn_id!r}: a file that it names cannot be used: {error}") from error
    server = _Server(conn_id)
    try:
        await server.open(servers, **options)
    except BaseException:
        await server.close()
        raise
    return server


def _urls(host: str, port: int) -> list[str]:
    """Return the URLs of a connection's hosts, which are separated by commas, and may be URLs already."""
    urls = []
    for part in host.split(","):
        url = part.strip().rstrip("/")
        url = url if "://" in url else f"nats://{url}"
        urls.append(url if urlsplit(url).port else f"{url}:{port}")
    return urls


def _tls(extra: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=extra.get("tls_ca"))
    if extra.get("tls_cert"):
        context.load_cert_chain(extra["tls_cert"], extra.get("tls_key"))
    return context
