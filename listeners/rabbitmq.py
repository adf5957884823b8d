"""
RabbitMQ: a queue as a queue, and a stream as a log.

An AMQP acknowledgement cannot leave the channel that got the message, and a commit is made by another process
than the poll. So a claim moves the message: into a queue of the wait's own, from which the commit takes it.

All that is decided is decided by one classic queue of the broker at a time: whoever is its exclusive consumer
holds it, reads all of it, and writes to it over the same channel, so that a holder whose connection ends has
written before the next one reads, or never. There are three kinds of them:

``airflow-events.claim.*``
    What one wait has claimed of one source: the message itself. Whoever leaves it empty deletes it.
``airflow-events.claims.*``
    One for each source: which claims there are, so that they are found when they lapse. It stays.
``airflow-events.commits.*``
    `_SLOTS` for each source: who committed what. Each note expires after ``[events] commit_memory`` seconds, and
    the queue after twice that.

A message moves in three steps, of which each is durable before the next. The last is one transaction:

1. The claim's name is written down; a copy goes to the claim queue, with a note beside it, *pending*, that is not
   persistent.
2. A note *moved* goes to the claim queue, and the message is acknowledged: ``tx.commit``.

A client that dies cannot divide a transaction. A copy with *pending* and without *moved* was never acknowledged:
the message is still in its queue, and the copy is dropped. If *pending* is gone as well the broker has been
restarted, which can divide a transaction; the copy is then kept, for it may be all that there is. So nothing is
lost, and what is doubled by it is found at the commit: a message that the broker gives out again says so, and
counts as the one with its ``message_id`` that somebody has committed before.
"""

from __future__ import annotations

import abc
import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import re
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, ClassVar, TypeVar

from airflow_events import settings
from airflow_events.errors import EventLost, EventUndecodable, SourceUnfit
from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.connections import connection
from airflow_events.listeners.hub import Hub, Seeker
from airflow_events.listeners.log import LogHub, Message, Watcher, since_of
from airflow_events.listeners.shared import connected, shared
from airflow_events.listeners.values import Format, Match, OnUndecodable, check_choices, decode

try:
    # The lower half of aio-pika. The upper one hides transactions' order and messages' raw properties.
    import aiormq
    from aiormq import exceptions
    from aiormq.abc import AbstractChannel, AbstractConnection, DeliveredMessage
    from pamqp.commands import Basic
    from pamqp.exceptions import AMQPInternalError
    from yarl import URL
except ImportError as error:
    raise ImportError("a RabbitMQ listener needs: pip install airflow-provider-events[rabbitmq]") from error

log = logging.getLogger(__name__)

_T = TypeVar("_T")

DEFAULT = "rabbitmq_default"
_TYPES = ("amqp", "rabbitmq", "generic")
_LOST = (OSError, asyncio.TimeoutError)

# Seconds between two looks at a queue that was empty, and at the list of claims.
_EMPTY = 0.25
_LOOK = 2.0
# Seconds after which a claim that has not lapsed is looked at, to forget it if it is finished.
_FINISHED = 5.0
# Seconds that one step may take; a broker that runs out of memory or disk stops answering those who publish.
_STEP = 60.0
# Seconds for which a queue that somebody else holds is tried again. It is held for milliseconds.
_PATIENCE = 10.0
# Seconds by which the clocks of two triggerers may differ.
_SKEW = 5.0
# Over how many queues the notes of commits are spread, since each commit reads one of them.
_SLOTS = 64
# Milliseconds; the longest that RabbitMQ takes.
_LONGEST = 2**32 - 1

# The header that says what a message of ours is, as JSON.
_HEADER = "x-airflow-events"
_SET_ASIDE = "x-airflow-events-was-"
# Headers that the broker would act on have another name in the copy: CC and BCC would send it elsewhere, too, and
# where x-death names the queue, the broker may drop it.
_ACTED_ON = ("CC", "BCC", "x-death")
_PROPERTIES = (
    "content_type", "content_encoding", "priority", "correlation_id", "reply_to", "timestamp", "message_type",
    "app_id",
)  # fmt: skip
_WATCHED_AT_ONCE = 500
_NO_STREAM = "{} is no stream; RabbitMQListener takes messages from other queues"


class RabbitMQListener(EventListener):
    """
    Take a message of a queue, classic or quorum: each goes to one wait, exactly once.

    The claim is a queue of the wait's own, into which the message is moved. The event is

    ``{"queue", "id", "claim", "timestamp", "value", "exchange", "routing_key", "message_id", "content_type",
    "headers", "properties", "rabbitmq_conn_id"}``. ``timestamp`` is the message's own, a datetime in UTC or None;
    ``headers`` are JSON shapes, bytes among them as text or Base64; ``properties`` has what else was set.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        queue: str,
        *,
        values: Format = "json",
        on_undecodable: OnUndecodable = "fail",
        claim_timeout: float | timedelta = 3600.0,
        unique_message_ids: bool = True,
        require_durable: bool = True,
        rabbitmq_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return when there is a message that no other wait has, in the queue's order.

        :param queue: its name. It must be there: it is not made.
        :param values: of what format the body is; see `airflow_events.listeners.values.decode`.
        :param on_undecodable: what to do with a message that is not: ``fail`` fails the wait and puts the message
            back, ``skip`` commits it, with a warning, and waits on.
        :param claim_timeout: after how many seconds a message that a wait has claimed and not committed goes back
            to the queue, to its end. A wait that still lives loses nothing by it: its commit is refused, and it
            waits on.
        :param unique_message_ids: whether two messages with the same ``message_id``, body and timestamp are one,
            sent once. It is asked only about a message that the broker gives out again. False keeps both, always.
        :param require_durable: refuse a queue that is not durable, deletes itself, or is exclusive.
        :param rabbitmq_conn_id: an Airflow connection of type ``amqp``, ``rabbitmq`` or ``generic``. Its schema is
            the virtual host, ``/`` by default; extras are ``ssl``, ``cafile``, ``certfile``, ``keyfile``, and
            ``heartbeat`` in seconds.
        :raises SourceUnfit: the connection is of another type, or refused; there is no such queue; it is a stream,
            or not durable; the user may not use it, or may not make the queues of the claims.
        :raises SourceUnreachable: the server was away for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        check_choices(values, on_undecodable)
        source = _Source(rabbitmq_conn_id, queue)
        wait = current_wait().id
        lapse = claim_timeout.total_seconds() if isinstance(claim_timeout, timedelta) else float(claim_timeout)
        key = ("rabbitmq", source, require_durable)
        while True:
            async with shared(key, lambda: _QueueHub(source, require_durable)) as hub:
                claim = await hub.take(_Consumer(wait, lapse, unique_message_ids))
            try:
                return {**_event(source, claim, values), "rabbitmq_conn_id": rabbitmq_conn_id}
            except EventUndecodable as error:
                async with _server(rabbitmq_conn_id) as server:
                    if on_undecodable == "fail":
                        await _within(_put_back(server, source, wait, claim.claim))
                        raise
                    await _within(_commit(server, source, wait, claim.id, claim.claim))
                log.warning("Passed over, and committed: %s", error)

    async def event_checkpointed(self, event: Any) -> None:
        """Drop the message, and note for ``[events] commit_memory`` seconds who did."""
        source = _Source(event["rabbitmq_conn_id"], event["queue"])
        async with _server(source.conn_id) as server:
            await _within(_commit(server, source, current_wait().id, event["id"], event["claim"]))

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Put the message back, to the queue's end."""
        source = _Source(kwargs.get("rabbitmq_conn_id", DEFAULT), args[0] if args else kwargs["queue"])
        async with _server(source.conn_id) as server:
            await _within(_put_back(server, source, current_wait().id))


class RabbitMQWatchListener(EventListener):
    """
    Wait for the first message of a stream that matches, and take nothing away.

    The event is as of `RabbitMQListener`, with the message's ``offset`` in the stream in the place of ``id`` and
    ``claim``.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        stream: str,
        *,
        match: dict[str, Any] | str | None = None,
        since: datetime | str | timedelta | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "skip",
        rabbitmq_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return the first message that matches, published at ``since`` or later.

        When it was published, its header ``timestamp_in_ms`` says, or its property ``timestamp``, which counts for
        the whole second. The broker tells no other: a message without them counts as published when it is read.

        :param stream: the name of a queue of type ``stream``. It must be there: it is not made.
        :param match: see `airflow_events.listeners.values.Match`.
        :param since: a moment, or a timedelta from the start of the run; None is the start of the run.

        The other parameters and errors are as of `RabbitMQListener.poll_for_event`; here an undecodable message is
        passed over, with a warning in the triggerer's log, unless ``on_undecodable`` is ``fail``.
        """
        check_choices(values, on_undecodable)
        watcher = Watcher(Match(match), since_of(since, current_wait()), on_undecodable)
        source = _Source(rabbitmq_conn_id, stream)
        async with shared(("rabbitmq watch", source, values), lambda: _StreamHub(source, values)) as hub:
            return {**await hub.take(watcher)}


@dataclass(frozen=True)
class _Source:
    conn_id: str
    queue: str

    def __str__(self) -> str:
        return f"the queue {self.queue!r} of the connection {self.conn_id!r}"

    # Claims and commits are found by these names, so they are frozen. A name has at most 255 bytes.

    @property
    def claims(self) -> str:
        return f"airflow-events.claims.{_readable(self.queue)}.{_digest(self.queue)}"

    def claim(self, wait: str) -> str:
        return f"airflow-events.claim.{_readable(self.queue)}.{_readable(wait)}.{_digest(self.queue, wait)}"

    def commits(self, identity: str) -> str:
        slot = int(_digest(identity), 16) % _SLOTS
        return f"airflow-events.commits.{_readable(self.queue)}.{_digest(self.queue)}.{slot}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _readable(name: str) -> str:
    return re.sub(r"[^\w.:/+-]", "_", name, flags=re.ASCII)[:80]


@dataclass
class _Claim:
    """
    A message in a claim queue.

    :ivar id: the message's identity, over all moves of it.
    :ivar claim: this move's own.
    :ivar at: when it was made, in seconds since the epoch; ``until``: when it lapses.
    :ivar again: whether it may be a double: the broker had given it out before, or it was put back before.
    :ivar tags: the delivery tags of the copy and its notes, for who holds the queue.
    """

    id: str
    claim: str
    at: float
    until: float
    again: bool
    about: dict[str, Any]
    message: DeliveredMessage
    tags: list[int] = field(default_factory=list)


class _Held:
    """
    A queue of ours of which this is the exclusive consumer, and all that is in it.

    :ivar channel: over which alone it may be written to.
    """

    def __init__(self, name: str, channel: AbstractChannel) -> None:
        self.name = name
        self.channel = channel
        self.messages: dict[int, DeliveredMessage] = {}

    async def receive(self, message: DeliveredMessage) -> None:
        self.messages[_tag(message)] = message

    async def read(self) -> None:
        """Receive all that is there: what the broker has sent before it answers is here."""
        while (await self.channel.queue_declare(self.name, passive=True)).message_count:
            pass

    async def drop(self, *tags: int) -> None:
        for tag in tags:
            if self.messages.pop(tag, None) is not None:
                await self.channel.basic_ack(tag)

    def notes(self) -> list[tuple[int, dict[str, Any]]]:
        return [(tag, json.loads(message.body)) for tag, message in self.messages.items()]

    def claims(self) -> tuple[list[_Claim], list[int]]:
        """Return the claims that stand, and the delivery tags of what is left of others."""
        copies: dict[str, _Claim] = {}
        notes: dict[str, dict[str, list[int]]] = {}
        for tag, message in self.messages.items():
            about = _about(message)
            kind, claim = about.get("kind", ""), about.get("claim", "")
            if kind == "copy" and claim not in copies:
                when = about["at"], about["until"]
                copies[claim] = _Claim(about["id"], claim, *when, about["again"], about, message, tags=[tag])
            else:
                notes.setdefault(claim, {}).setdefault(kind, []).append(tag)
        standing, rest = [], []
        for claim, found in copies.items():
            beside = notes.pop(claim, {})
            found.tags += [tag for tags in beside.values() for tag in tags]
            if "moved" in beside or "pending" not in beside:
                standing.append(found)
            else:  # its mover died before it acknowledged the message
                rest += found.tags
        rest += [tag for kinds in notes.values() for tags in kinds.values() for tag in tags]
        return standing, rest


class _Busy(TimeoutError):
    """Somebody else holds a queue for longer than it takes."""


@contextlib.asynccontextmanager
async def _hold(
    server: AbstractConnection,
    name: str,
    *,
    expires: int | None = None,
    transaction: bool = False,
    stays: bool = False,
) -> AsyncIterator[_Held]:
    """
    Hold a queue of ours, made if it is not there; see the module's docstring.

    :param expires: after how many milliseconds the broker deletes it if nobody has used it.
    :param transaction: what is written and acknowledged takes effect at ``tx_commit``.
    :param stays: it is not deleted when it is left empty. Only such a queue may others write to.
    :raises _Busy: somebody else holds it.
    """
    arguments: dict[str, Any] = {"x-queue-type": "classic", **({"x-expires": expires} if expires else {})}
    passive, patience = False, time.monotonic() + _PATIENCE
    while True:
        channel = await server.channel(publisher_confirms=not transaction)
        held = _Held(name, channel)
        try:
            if transaction:
                await channel.tx_select()
            await channel.queue_declare(name, durable=True, passive=passive, arguments=arguments)
            consumer = (await channel.basic_consume(name, held.receive, exclusive=True)).consumer_tag or ""
            await held.read()
            break
        except exceptions.ChannelPreconditionFailed:  # [events] commit_memory was another when it was made
            if passive or expires is None:
                raise
            passive = True
        except exceptions.ChannelNotFoundEntity as error:  # whoever held it has left it empty
            if time.monotonic() > patience or "no queue" not in str(error):
                raise
            passive = False
        except exceptions.ChannelAccessRefused as error:
            if "in exclusive use" not in str(error):
                raise
            if time.monotonic() > patience:
                raise _Busy(f"the queue {name!r} is held by somebody else") from error
            await asyncio.sleep(0.03)
        except BaseException:
            await _close(channel)
            raise
    try:
        yield held
        if transaction:
            await channel.tx_commit()
        if not stays and not held.messages:
            # What came until now is here once the broker has answered, and what comes from now on keeps the queue.
            await channel.basic_cancel(consumer)
            if not held.messages:
                with contextlib.suppress(exceptions.ChannelPreconditionFailed):
                    await channel.queue_delete(name, if_empty=True, if_unused=True)
    finally:
        await _close(channel)


async def _close(channel: AbstractChannel) -> None:
    with contextlib.suppress(Exception):
        await channel.close()


async def _claims_of(held: _Held) -> list[_Claim]:
    standing, rest = held.claims()
    await held.drop(*rest)
    return standing


async def _claim(
    server: AbstractConnection, source: _Source, wait: str, lapse: float, unique: bool, take: bool = True
) -> _Claim | None:
    """
    Return what the wait has claimed; if that is nothing, claim the next message.

    :param take: False claims nothing.
    :return: None if the wait has nothing, and there is no message.
    """
    async with _hold(server, source.claim(wait), transaction=True) as held:
        channel = held.channel
        if standing := await _claims_of(held):
            await channel.tx_commit()
            return standing[0]
        if not take:
            return None
        message = await channel.basic_get(source.queue)
        if isinstance(message.delivery, Basic.GetEmpty):
            return None
        about = _newly_claimed(message, lapse, unique)
        note = {"claim": about["claim"], "wait": wait, "until": about["until"]}
        await channel.queue_declare(source.claims, durable=True, arguments={"x-queue-type": "classic"})
        await channel.basic_publish(_json(note), routing_key=source.claims, properties=_own("claim", about, True))
        await channel.basic_publish(message.body, routing_key=held.name, properties=_copied(message, about))
        await channel.basic_publish(b"", routing_key=held.name, properties=_own("pending", about, False))
        await channel.tx_commit()
        await channel.basic_publish(b"", routing_key=held.name, properties=_own("moved", about, True))
        await channel.basic_ack(_tag(message))
        await channel.tx_commit()
        await held.read()
        return (await _claims_of(held))[0]


def _memory() -> int:
    return min(round(settings.commit_memory() * 1000), _LONGEST)


async def _commit(server: AbstractConnection, source: _Source, wait: str, identity: str, stamp: str) -> None:
    """
    Commit a claim of the wait.

    :raises EventLost: another wait has the message, or had it committed, or somebody else took it.
    """
    what = f"the message {identity} of {source}"
    with _refusals(source):
        async with (
            _hold(server, source.commits(identity), expires=min(2 * _memory(), _LONGEST)) as commits,
            _hold(server, source.claim(wait)) as held,
        ):
            standing = next((claim for claim in await _claims_of(held) if claim.claim == stamp), None)
            found = _committed(commits, identity, stamp, standing)
            if found is None:
                if standing is None:
                    raise EventLost(f"{what} is not claimed by {wait} any more: its claim lapsed, or was released")
                note = {"id": identity, "claim": stamp, "wait": wait, "again": standing.again, "at": standing.at}
                properties = _own("commit", note, True)
                properties.expiration = str(_memory())
                await commits.channel.basic_publish(_json(note), routing_key=commits.name, properties=properties)
                await commits.read()
            if standing is not None:
                await held.drop(*standing.tags)
            if found is not None and (found["claim"] != stamp or found["wait"] != wait):
                raise EventLost(f"{what} was committed by {found['wait']}")


async def _put_back(
    server: AbstractConnection, source: _Source, wait: str, stamp: str | None = None, lapsed: bool = False
) -> None:
    """
    Put what the wait has claimed and not committed back into its queue.

    :param stamp: which claim; None is all of them.
    :param lapsed: only what has lapsed.
    """
    with _refusals(source):
        async with _hold(server, source.claim(wait)) as held:
            found = await _claims_of(held)
        for identity, claim in [(claim.id, claim.claim) for claim in found]:
            if stamp not in (None, claim):
                continue
            # In the order of a commit, so that the two do not wait for each other.
            async with (
                _hold(server, source.commits(identity), expires=min(2 * _memory(), _LONGEST)) as commits,
                _hold(server, source.claim(wait)) as held,
            ):
                for standing in await _claims_of(held):
                    if standing.claim != claim or (lapsed and standing.until > time.time()):
                        continue
                    if _committed(commits, identity, claim, standing) is None:
                        await _return(held.channel, source, standing)
                    await held.drop(*standing.tags)


async def _return(channel: AbstractChannel, source: _Source, claim: _Claim) -> None:
    try:
        properties = _restored(claim)
        await channel.basic_publish(
            claim.message.body, routing_key=source.queue, properties=properties, mandatory=True
        )
    except exceptions.DeliveryError as error:
        raise SourceUnfit(f"{source} does not take a message back, which stays claimed: {error}") from error


def _committed(commits: _Held, identity: str, stamp: str, claim: _Claim | None) -> dict[str, Any] | None:
    """Return the note of who committed the claim, or the same message by another claim."""
    same = [note for _, note in commits.notes() if note["id"] == identity]
    for note in same:
        if note["claim"] == stamp:
            return note
    for note in same:
        # Two that were both given out for the first time are two messages, whatever their sender calls them. One
        # that was given out for the first time is a double only of what was given out again after it.
        if claim is None or claim.again or (note["again"] and claim.at < note["at"] + _SKEW):
            return note
    return None


class _Consumer(Seeker):
    def __init__(self, wait: str, lapse: float, unique: bool) -> None:
        super().__init__()
        self.wait = wait
        self.lapse = lapse
        self.unique = unique
        self.looked = False


class _OnServer(abc.ABC):
    """What both hubs do with their connection; it stands before `Hub` among their bases."""

    lost: ClassVar[tuple[type[BaseException], ...]] = _LOST
    _server: AbstractConnection | None = None

    async def connect(self) -> None:
        await self.disconnect()  # what a refusal has left open
        await _within(self._connect())

    async def disconnect(self) -> None:
        if self._server is not None:
            await _within(self._server.close())

    @abc.abstractmethod
    async def _connect(self) -> None:
        """Open `_server`, and check that the source is as it must be."""


class _QueueHub(_OnServer, Hub[_Consumer]):
    """Claims messages for the waits on one queue, and puts back what has lapsed."""

    def __init__(self, source: _Source, require_durable: bool) -> None:
        self._source = source
        self._require_durable = require_durable
        self._channel: AbstractChannel | None = None
        self._next_look = 0.0
        self._check_at: dict[str, float] = {}
        super().__init__(str(source))

    async def _connect(self) -> None:
        with _refusals(self._source):
            self._server = await _connect(self._source.conn_id)
            self._channel = await self._server.channel()
            await self._channel.queue_declare(self._source.queue, passive=True)
            await _check(self._server, self._source, self._require_durable)
            # What a claim needs: to make queues, to write through the default exchange, and to read.
            async with _hold(self._server, self._source.claim(""), transaction=True) as held:
                await held.channel.basic_publish(b"", routing_key=held.name, properties=_own("pending", {}, False))
                await held.channel.tx_commit()
                await held.read()
                await _claims_of(held)
        self._next_look = 0.0

    async def serve(self) -> None:
        assert self._server is not None and self._channel is not None
        with _refusals(self._source):
            await self._look()
            count = (await _within(self._channel.queue_declare(self._source.queue, passive=True))).message_count
            for seeker in [seeker for seeker in self.seekers if not seeker.done]:
                if not count:
                    break
                if seeker.done:  # by what another one of the same wait was given
                    continue
                with contextlib.suppress(_Busy):
                    claim = await _within(
                        _claim(self._server, self._source, seeker.wait, seeker.lapse, seeker.unique)
                    )
                    if claim is None:
                        count = 0
                        break
                    self._give(seeker.wait, claim)
        if not count:
            await self.pause(_EMPTY)

    def _give(self, wait: str, claim: _Claim) -> None:
        for seeker in [seeker for seeker in self.seekers if seeker.wait == wait]:
            seeker.give(claim)

    async def _look(self) -> None:
        """Find what the waits here have claimed before, what has lapsed, and what is finished."""
        new = [seeker for seeker in self.seekers if not seeker.looked]
        if not new and time.monotonic() < self._next_look:
            return
        with contextlib.suppress(_Busy):
            await _within(self._look_at_claims(), 10 * _STEP)
            for seeker in new:
                seeker.looked = True
        self._next_look = time.monotonic() + _LOOK

    async def _look_at_claims(self) -> None:
        assert self._server is not None
        waits = {seeker.wait: seeker for seeker in self.seekers if not seeker.done}
        async with _hold(self._server, self._source.claims, stays=True) as claims:
            notes = claims.notes()
            now = time.time()
            first_seen = {note["claim"]: now + _FINISHED for _, note in notes}
            self._check_at = {claim: self._check_at.get(claim, at) for claim, at in first_seen.items()}
            for tag, note in notes:
                wait, name = note["wait"], note["claim"]
                if wait in waits:
                    seeker = waits[wait]
                    with contextlib.suppress(_Busy):
                        found = await _claim(
                            self._server, self._source, wait, seeker.lapse, seeker.unique, take=False
                        )
                        if found is not None:
                            self._give(wait, found)
                            continue
                elif note["until"] <= now:
                    try:
                        await _within(_put_back(self._server, self._source, wait, name, lapsed=True))
                    except _Busy:
                        continue
                    except SourceUnfit as error:
                        log.warning("A claim of %s has lapsed and is kept: %s", wait, error)
                        continue
                elif self._check_at[name] > now:
                    continue
                self._check_at[name] = now + 10 * _FINISHED
                with contextlib.suppress(_Busy):
                    async with _hold(self._server, self._source.claim(wait)) as held:
                        if not any(claim.claim == name for claim in await _claims_of(held)):
                            await claims.drop(tag)


class _StreamHub(_OnServer, LogHub[Any]):
    """Reads one stream for those who watch it; a position is an offset, or a moment until it is known."""

    def __init__(self, source: _Source, values: Format) -> None:
        self._source = source
        self._values = values
        self._channel: AbstractChannel | None = None
        self._at: int | datetime | None = None
        self._arrived: asyncio.Queue[DeliveredMessage] = asyncio.Queue()
        super().__init__(str(source))

    async def _connect(self) -> None:
        with _refusals(self._source):
            self._server = await _connect(self._source.conn_id)
            channel = await self._server.channel()
            await channel.queue_declare(self._source.queue, passive=True)
            await _close(channel)
        self._at = None

    async def position(self, since: datetime) -> int | datetime:
        return since.replace(microsecond=0)

    async def read(self, position: int | datetime) -> tuple[int | datetime, list[Message]]:
        with _refusals(self._source):
            if self._at != position:
                await _within(self._read_from(position))
            assert self._channel is not None
            raw = await _soon(self._arrived, 0.5)
            messages: list[Message] = []
            last = raw
            while raw is not None:
                last, offset = raw, _offset(self._source, raw)
                if isinstance(position, datetime) or offset >= position:  # the broker begins at a whole chunk
                    position = offset + 1
                    messages.append(self._message(offset, raw))
                enough = len(messages) >= _WATCHED_AT_ONCE or self._arrived.empty()
                raw = None if enough else self._arrived.get_nowait()
            if last is not None:
                await _within(self._channel.basic_ack(_tag(last), multiple=True))
            if self._channel.is_closed:
                raise ConnectionResetError(f"{self._source} stopped sending")
        self._at = position
        return position, messages

    async def dropped_until(self) -> datetime | None:
        assert self._server is not None
        with _refusals(self._source):
            first = await _within(self._first(self._server))
        return _published(first)[0] if first is not None and _offset(self._source, first) > 0 else None

    async def _first(self, server: AbstractConnection) -> DeliveredMessage | None:
        arrived: asyncio.Queue[DeliveredMessage] = asyncio.Queue()
        channel = await server.channel()
        try:
            if not (await channel.queue_declare(self._source.queue, passive=True)).message_count:
                return None
            await self._consume(channel, arrived, "first", 1)
            return await _soon(arrived, 1.0)
        finally:
            await _close(channel)

    async def _read_from(self, position: int | datetime) -> None:
        assert self._server is not None
        if self._channel is not None:
            await _close(self._channel)
        self._arrived = asyncio.Queue()
        self._channel = await self._server.channel()
        await self._consume(self._channel, self._arrived, position, _WATCHED_AT_ONCE)
        self._at = position

    async def _consume(
        self, channel: AbstractChannel, into: asyncio.Queue[DeliveredMessage], start: Any, at_once: int
    ) -> None:
        async def receive(message: DeliveredMessage) -> None:
            into.put_nowait(message)

        await channel.basic_qos(prefetch_count=at_once)
        await channel.basic_consume(self._source.queue, receive, arguments={"x-stream-offset": start})

    def _message(self, offset: int, raw: DeliveredMessage) -> Message:
        timestamp, latest = _published(raw)
        event: dict[str, Any] = {"queue": self._source.queue, "offset": offset, "timestamp": timestamp}
        try:
            event["value"] = decode(raw.body, self._values, f"the message {offset} of {self._source}")
        except EventUndecodable as error:
            return Message(latest, {}, error)
        headers = {name: value for name, value in _headers(raw).items() if name != "x-stream-offset"}
        return Message(latest, {**event, **_described(raw, headers), "rabbitmq_conn_id": self._source.conn_id})


async def _soon(queue: asyncio.Queue[_T], seconds: float) -> _T | None:
    # Not asyncio.wait_for, which before Python 3.12 may lose what came as the time was up.
    next_one = asyncio.ensure_future(queue.get())
    try:
        await asyncio.wait({next_one}, timeout=seconds)
        return next_one.result() if next_one.done() else None
    finally:
        next_one.cancel()


def _offset(source: _Source, message: DeliveredMessage) -> int:
    offset = _headers(message).get("x-stream-offset")
    if not isinstance(offset, int):
        raise SourceUnfit(_NO_STREAM.format(source))
    return offset


def _published(message: DeliveredMessage) -> tuple[datetime | None, datetime]:
    """Return when a message says that it was published, and the latest moment that this may mean."""
    milliseconds = _headers(message).get("timestamp_in_ms")
    if isinstance(milliseconds, int):
        exactly = datetime.fromtimestamp(milliseconds / 1000, timezone.utc)
        return exactly, exactly + timedelta(microseconds=999)
    stamp = _timestamp(message)
    if stamp is None:
        return None, datetime.now(timezone.utc)
    return stamp, stamp + timedelta(microseconds=0 if stamp.microsecond else 999_999)


def _timestamp(message: DeliveredMessage) -> datetime | None:
    stamp = message.header.properties.timestamp
    if stamp is None or stamp.tzinfo is not None:
        return stamp
    return stamp.replace(tzinfo=timezone.utc)


def _event(source: _Source, claim: _Claim, values: Format) -> dict[str, Any]:
    about, message = claim.about, claim.message
    headers = {name: value for name, value in _headers(message).items() if name != _HEADER}
    event = {
        "queue": source.queue,
        "id": claim.id,
        "claim": claim.claim,
        "timestamp": _timestamp(message),
        "value": decode(message.body, values, f"the message {claim.id} of {source}"),
        **_described(message, {name.removeprefix(_SET_ASIDE): value for name, value in headers.items()}),
        "exchange": about["exchange"],
        "routing_key": about["routing_key"],
        "message_id": about["message_id"],
    }
    for name in ("user_id", "expiration"):
        if about.get(name) is not None:
            event["properties"][name] = about[name]
    return event


def _described(message: DeliveredMessage, headers: dict[str, Any]) -> dict[str, Any]:
    properties = message.header.properties
    others = [name for name in _PROPERTIES if name not in ("content_type", "timestamp")]
    return {
        "exchange": getattr(message.delivery, "exchange", ""),
        "routing_key": getattr(message.delivery, "routing_key", ""),
        "message_id": properties.message_id,
        "content_type": properties.content_type,
        "headers": _plain(headers),
        "properties": {
            name: getattr(properties, name) for name in others if getattr(properties, name) not in (None, "")
        },
    }


def _plain(value: Any) -> Any:
    """Write a header's value in shapes that JSON has, and datetimes."""
    if isinstance(value, dict):
        return {str(name): _plain(content) for name, content in value.items()}
    if isinstance(value, list):
        return [_plain(content) for content in value]
    if isinstance(value, (bytes, bytearray)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, datetime) and value.tzinfo is None:
        return value.replace(tzinfo=timezone.utc)
    return value


def _sendable(value: Any) -> Any:
    """Write a header's value as the client takes it; bytes it gives are none that it takes."""
    if isinstance(value, dict):
        return {name: _sendable(content) for name, content in value.items()}
    if isinstance(value, list):
        return [_sendable(content) for content in value]
    return bytearray(value) if isinstance(value, bytes) else value


def _headers(message: DeliveredMessage) -> dict[str, Any]:
    return dict(message.header.properties.headers or {})


def _about(message: DeliveredMessage) -> dict[str, Any]:
    """Return what we wrote on a message; an empty dict if it is none of ours."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        about = json.loads(_headers(message)[_HEADER])
        if isinstance(about, dict):
            return about
    return {}


def _tag(message: DeliveredMessage) -> int:
    return int(getattr(message.delivery, "delivery_tag", 0))


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _own(kind: str, about: dict[str, Any], persistent: bool) -> Basic.Properties:
    """Return the properties of a note."""
    header: dict[str, Any] = {_HEADER: json.dumps({"kind": kind, "claim": about.get("claim", "")})}
    return Basic.Properties(headers=header, delivery_mode=2 if persistent else 1, content_type="application/json")


def _newly_claimed(message: DeliveredMessage, lapse: float, unique: bool) -> dict[str, Any]:
    """Return what is written on the copy of a message that is claimed."""
    properties, before = message.header.properties, _about(message)
    back = before.get("kind") == "back"
    sent = before if back else {}
    message_id = sent["message_id"] if back else properties.message_id
    if back:
        identity = sent["id"]
    elif unique and message_id:
        stamp = str(properties.timestamp)
        identity = _digest(message_id, stamp, hashlib.sha256(message.body).hexdigest())
    else:
        identity = uuid.uuid4().hex
    return {
        "kind": "copy",
        "id": identity,
        "claim": uuid.uuid4().hex,
        "at": time.time(),
        "until": time.time() + lapse,
        "again": back or bool(getattr(message.delivery, "redelivered", False)),
        "exchange": sent.get("exchange", getattr(message.delivery, "exchange", "")),
        "routing_key": sent.get("routing_key", getattr(message.delivery, "routing_key", "")),
        "message_id": message_id or None,
        "user_id": sent.get("user_id", properties.user_id),
        "expiration": properties.expiration,
    }


def _copied(message: DeliveredMessage, about: dict[str, Any]) -> Basic.Properties:
    """Return the properties of the copy: the message's, without those that the broker would act on."""
    headers = {name: _sendable(value) for name, value in _headers(message).items() if name != "x-delivery-count"}
    headers = {(_SET_ASIDE + name if name in _ACTED_ON else name): value for name, value in headers.items()}
    return _with(message, about["message_id"] or about["id"], {**headers, _HEADER: json.dumps(about)})


def _restored(claim: _Claim) -> Basic.Properties:
    """Return the properties with which a message goes back to its queue."""
    headers = {name: _sendable(value) for name, value in _headers(claim.message).items()}
    if (deaths := headers.pop(f"{_SET_ASIDE}x-death", None)) is not None:
        headers["x-death"] = deaths
    kept = ("id", "exchange", "routing_key", "message_id", "user_id")
    headers[_HEADER] = json.dumps({"kind": "back", **{name: claim.about[name] for name in kept}})
    properties = _with(claim.message, claim.about["message_id"] or claim.id, headers)
    properties.expiration = claim.about["expiration"]
    return properties


def _with(message: DeliveredMessage, message_id: str, headers: dict[str, Any]) -> Basic.Properties:
    kept = {name: getattr(message.header.properties, name) for name in _PROPERTIES}
    return Basic.Properties(**kept, message_id=message_id, headers=headers, delivery_mode=2)


async def _within(work: Awaitable[_T], seconds: float = _STEP) -> _T:
    """
    Do ``work`` as a task of its own.

    The client cancels whoever waits for a connection that is lost; that must not look like our own end.

    :raises ConnectionError: it was cancelled by the client, or took longer than ``seconds``.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise
    if not done:
        task.cancel()
        await asyncio.wait({task})
        raise ConnectionError(f"the server did not answer for {seconds:.0f} s")
    if task.cancelled():
        raise ConnectionError("the connection was lost")
    return task.result()


@contextlib.contextmanager
def _refusals(source: _Source) -> Iterator[None]:
    """Say what the server refused, and where; what may pass becomes a lost connection."""
    try:
        yield
    except (exceptions.ProbableAuthenticationError, exceptions.AuthenticationError) as error:
        raise SourceUnfit(f"{source}: the server refused the login: {error}") from error
    except exceptions.ConnectionNotAllowed as error:
        if "is down" in str(error):
            raise ConnectionError(str(error)) from error
        raise SourceUnfit(f"{source}: the server refused the connection: {error}") from error
    except exceptions.ConnectionNotImplemented as error:
        raise SourceUnfit(f"{source} is a stream; RabbitMQWatchListener is for these: {error}") from error
    except exceptions.ChannelAccessRefused as error:
        raise SourceUnfit(f"{source}: the connection's user may not use what is needed: {error}") from error
    except exceptions.ChannelLockedResource as error:
        raise SourceUnfit(f"{source} is exclusive to another connection: {error}") from error
    except exceptions.ChannelNotFoundEntity as error:
        if "down or inaccessible" in str(error):
            raise ConnectionError(str(error)) from error
        raise SourceUnfit(f"{source} is not there, and is not made: {error}") from error
    except exceptions.ChannelPreconditionFailed as error:
        if "x-stream-offset" in str(error):
            raise SourceUnfit(_NO_STREAM.format(source)) from error
        raise SourceUnfit(f"{source}: the server refused a step of a claim (a policy?): {error}") from error
    except exceptions.AMQPError as error:
        if isinstance(error, OSError):
            raise
        raise ConnectionError(str(error)) from error
    except RuntimeError as error:  # what the client raises for a connection that is closed
        if "closed" not in str(error):
            raise
        raise ConnectionError(str(error)) from error


async def _check(server: AbstractConnection, source: _Source, require_durable: bool) -> None:
    """
    Refuse a queue that would lose messages.

    AMQP tells nothing about a queue but where a declaration differs from it. This one always differs, by a value
    that no queue can have, so it never makes one.
    """
    channel = await server.channel()
    probe: dict[str, Any] = {"x-overflow": "airflow-events-asks"}
    try:
        await channel.queue_declare(source.queue, durable=True, arguments=probe)
    except exceptions.ChannelAccessRefused:  # without the permission to configure it, it cannot be known
        return
    except exceptions.ChannelPreconditionFailed as error:
        text = str(error)
        if "'x-queue-type'" in text and "'stream'" in text:
            raise SourceUnfit(f"{source} is a stream; RabbitMQWatchListener is for these") from error
        for argument, what in (("durable", "is not durable"), ("auto_delete", "deletes itself when it is unused")):
            if f"inequivalent arg '{argument}'" in text and require_durable:
                raise SourceUnfit(
                    f"{source} {what}, so that messages are lost which no wait has had yet; declare it as durable "
                    "and not auto-delete, or give require_durable=False"
                ) from error
    finally:
        await _close(channel)


def _server(conn_id: str) -> contextlib.AbstractAsyncContextManager[AbstractConnection]:
    """Use the connection by which the waits of this process commit and release."""
    return connected(
        ("rabbitmq client", conn_id),
        lambda: _within(_connect(conn_id)),
        _close_server,
        lambda server: server.is_closed,
    )


async def _close_server(server: AbstractConnection) -> None:
    with contextlib.suppress(Exception):
        await _within(server.close())


async def _connect(conn_id: str) -> AbstractConnection:
    """Open what an Airflow connection describes."""
    found = await connection(conn_id, *_TYPES)
    extra = found.extra_dejson
    secure = str(extra.get("ssl", False)).lower() in ("true", "1")
    url = URL.build(
        scheme="amqps" if secure else "amqp",
        host=found.host or "localhost",
        port=found.port or (5671 if secure else 5672),
        user=found.login or "guest",
        password=found.password or "guest",
        path="/" if found.schema in (None, "", "/") else f"/{found.schema}",
        query={"heartbeat": str(int(extra.get("heartbeat") or 60)), "name": "airflow-events"},
    )
    context = await asyncio.to_thread(_tls, extra) if secure else None
    try:
        server: AbstractConnection = await aiormq.connect(url, context=context)
    except (exceptions.InvalidFrameError, AMQPInternalError) as error:  # aiormq hides what the server said; 7, 6
        raise ConnectionError(
            f"the server closes the connection when it is asked for the virtual host {found.schema or '/'!r}: "
            "is it there, and may the user have it?"
        ) from error
    return server


def _tls(extra: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=extra.get("cafile"))
    if extra.get("certfile"):
        context.load_cert_chain(extra["certfile"], extra.get("keyfile"))
    return context
