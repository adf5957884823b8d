"""Receiving messages through a durable pull consumer, and telling JetStream what became of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from airflow_events.errors import AtRedelivery, EventUndecodable, SourceMisconfigured
from airflow_events.listeners.nats.client import (
    LOST,
    Server,
    checked,
    connect,
    coordinates,
    refusals,
    server_of,
)
from airflow_events.listeners.nats.consumer import SHORTEST, Consumer, Wanted, consumer_of, info
from airflow_events.listeners.nats.messages import Source, Stored, stored_of
from airflow_events.listeners.support.hub import Seeker
from airflow_events.listeners.support.queue import REASON, SOURCE, Delivery, QueueHub
from nats import errors
from nats.aio.msg import Msg
from nats.js.errors import NotFoundError

log = logging.getLogger(__name__)

# How many messages are pulled at once.
_MOST = 500
# Seconds without a message, after which a look tells whether the consumer may deliver none.
_LOOK_EVERY = 30.0


class Received(NamedTuple):
    """
    A message as it was delivered.

    :param id: its `coordinates`.
    :param created: when its stream was made, as the server writes it.
    :param reply: the subject to which JetStream is told what became of it.
    """

    id: str
    created: str
    reply: str
    stored: Stored


class ConsumerHub(QueueHub):
    """
    Receives messages for the waits on one consumer.

    What JetStream is told of a message names no more than stream, consumer and sequence, and of a stream that was
    made again it would be about another message. So it is told only while the consumer is the one that delivered.
    """

    lost: ClassVar[tuple[type[BaseException], ...]] = LOST

    def __init__(self, source: Source, wanted: Wanted) -> None:
        self._source = source
        self._wants = wanted
        self._server: Server | None = None
        self._consumer: Consumer | None = None
        self._again: tuple[str, int] | None = None  # where another consumer would go on, should this be deleted
        self._connecting = asyncio.Lock()
        self._looked = 0.0
        self._is_edited = False
        self.keep_every = SHORTEST / 4
        super().__init__(str(source))

    async def connect(self) -> None:
        async with self._connecting:
            await self._connect()

    async def _connect(self) -> None:
        await self.disconnect()
        self._server = server = await connect(self._source.conn_id)
        with refusals(self._source):
            consumer = await consumer_of(server, self._source, replace(self._wants, again=self._again))
            await server.listen()
        if self._consumer is not None and self._consumer.made != consumer.made:
            self.connection_lost()
        self._consumer = consumer
        self.keep_each(consumer.again_after / 4)
        self._again = consumer.stream_made, consumer.acknowledged_to
        self._is_edited = False
        self._looked = time.monotonic()

    async def disconnect(self) -> None:
        if self._server is not None:
            await self._server.close()

    async def close(self) -> None:
        await super().close()
        await self.disconnect()  # where something was given back after `serve` had ended, with the event loop

    async def server(self) -> Server:
        """Return the connection, of a hub that is connected; a new one if it has ended while nobody waited."""
        async with self._connecting:
            if self._server is None or self._server.closed:
                await self._connect()
            assert self._server is not None
            return self._server

    @property
    def consumer(self) -> Consumer:
        """The consumer, of a hub that is connected."""
        assert self._consumer is not None
        return self._consumer

    async def serve(self) -> None:
        server = await self.server()
        with refusals(self._source):
            most = min(self.wanted, self.consumer.max_batch or _MOST, _MOST)
            pulled = await server.pull(self._source.stream, self._source.durable, most) if most else []
            if pulled or time.monotonic() - self._looked >= _LOOK_EVERY:
                about = await self._same(server)
                if about is None:
                    await _tell(server, b"-NAK", (message.reply for message in pulled))
                    raise ConnectionError(f"the consumer of {self._source} was deleted, or recreated")
                if not pulled:
                    self._tell_of_a_stall(about)
                self._looked = time.monotonic()
        for message in pulled:
            self._offer(message)
        if self._is_edited:
            raise ConnectionError(f"the consumer of {self._source} was edited")  # it is checked when we connect

    def _offer(self, message: Msg) -> None:
        stored, created = stored_of(message), self.consumer.stream_made
        id = coordinates(self._source.stream, created, self._source.durable, stored.sequence)
        self.offer(id, Received(id, created, message.reply, stored))

    async def lag(self, seeker: Seeker) -> int | None:
        about = await info(await self.server(), self._source)
        return int(about["num_pending"]) + int(about["num_ack_pending"])

    async def acknowledge(self, deliveries: Mapping[str, Delivery]) -> None:
        if not deliveries:
            return
        server = await self.server()
        with refusals(self._source):
            about = await self._same(server)
            if about is None:
                self.connection_lost()
                return
            for delivery in deliveries.values():
                delivery.is_stale = not _is_delivered(about, delivery.message.stored.sequence)
            await _confirmed(server, (one.message.reply for one in deliveries.values() if not one.is_stale))

    async def give_back(self, deliveries: Mapping[str, Delivery]) -> None:
        if deliveries:
            await _tell(await self.server(), b"-NAK", _replies(deliveries))

    async def keep(self, deliveries: Mapping[str, Delivery]) -> None:
        server = await self.server()
        if await self._same(server) is None:
            self.connection_lost()
        else:
            await _tell(server, b"+WPI", _replies(deliveries))

    async def _same(self, server: Server) -> dict[str, Any] | None:
        """Return what JetStream says of the consumer; None if it is not the one that has delivered."""
        try:
            about = await info(server, self._source)
        except NotFoundError:
            return None
        if about["created"] != self.consumer.made:
            return None
        self._again = self.consumer.stream_made, about["ack_floor"]["stream_seq"]
        self._is_edited = about["config"] != self.consumer.config
        return about

    def _tell_of_a_stall(self, about: Mapping[str, Any]) -> None:
        pending, most = about["num_ack_pending"], about["config"].get("max_ack_pending", -1)
        if about.get("paused"):
            until = about["config"].get("pause_until")
            self._tell_all(logging.WARNING, "%s delivers nothing: it is paused until %s", self._source, until)
        elif 0 < most <= pending:
            message = "%s delivers nothing, since %d messages are unacknowledged, its max_ack_pending"
            self._tell_all(logging.WARNING, message, self._source, pending)


def _is_delivered(about: dict[str, Any], sequence: int) -> bool:
    """
    Whether a consumer knows that it has delivered a message.

    A server that was killed may not have written that down yet. It answers no acknowledgement of such a message,
    and delivers it again. Likewise a consumer that was made again.
    """
    return bool(sequence <= about["delivered"]["stream_seq"])


def _replies(deliveries: Mapping[str, Delivery]) -> list[str]:
    return [delivery.message.reply for delivery in deliveries.values()]


async def _tell(server: Server, what: bytes, replies: Iterable[str]) -> None:
    for reply in replies:
        await server.publish(reply, what)


async def _confirmed(server: Server, replies: Iterable[str]) -> None:
    """Acknowledge, all at once, and return when JetStream has confirmed it; raise what one of them raised."""
    asked = (server.request(reply, b"+ACK") for reply in replies)
    for outcome in await asyncio.gather(*asked, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def acknowledge(source: Source, created: str, sequence: int) -> None:
    """
    Acknowledge a message that another process has received.

    JetStream takes it from anybody, and reads no more than the sequence of what tells one delivery from another.

    :param created: when its stream was made; empty where that is not known, in events of the first edition.
    :raises AtRedelivery: the consumer does not know that it has delivered it.
    """
    async with server_of(source.conn_id) as server:
        with refusals(source):
            if not await _is_there(server, source, created):
                return
            with contextlib.suppress(NotFoundError, errors.NoRespondersError):
                if _is_delivered(await info(server, source), sequence):
                    await _confirmed(server, [f"$JS.ACK.{source.stream}.{source.durable}.1.{sequence}.1.0.0"])
                    return
    raise AtRedelivery(f"the message {sequence} of {source} is acknowledged when it comes again")


async def _is_there(server: Server, source: Source, created: str) -> bool:
    """Whether the stream is still that which was made then; with another one its messages have gone."""
    try:
        about = await server.api(f"STREAM.INFO.{source.stream}")
    except NotFoundError:
        return False
    return created in ("", about["created"])


async def bury(hub: ConsumerHub, source: Source, message: Received, subject: str, error: EventUndecodable) -> None:
    """
    Publish a message that cannot be read to a subject for such, with the reason, if the server takes both.

    :raises SourceMisconfigured: no stream stores what has that subject, or the consumer would deliver it again.
    """
    if hub.consumer.delivers(subject):
        raise SourceMisconfigured(
            f"{source}: its consumer would deliver its own dead letters, as it has {subject!r}"
        )
    if SOURCE in message.stored.headers:  # by way of a mirror, or of a stream that has this one as a source
        raise SourceMisconfigured(
            f"{source}: the message {message.stored.sequence} is a dead letter itself, of "
            f"{message.stored.headers[SOURCE]}; {subject!r} must not lead back to the stream"
        )
    headers = {name: value for name, value in message.stored.headers.items() if _may_be_kept(name)}
    headers[REASON] = _line(error.reason)
    headers[SOURCE] = _line(f"the message {message.stored.sequence} of {source}")
    headers["Nats-Msg-Id"] = _line(message.id)  # by which the stream passes over it if it comes twice
    server = await hub.server()
    room = server.has_room(message.stored.data, headers)
    try:
        with refusals(source):
            checked(await server.request(subject, message.stored.data, headers if room else None))
    except errors.NoRespondersError as refused:
        raise SourceMisconfigured(
            f"{source}: no stream has the subject of its dead letters, {subject!r}"
        ) from refused
    log.warning("Published to the dead letters in %r: %s", subject, error)


def _may_be_kept(header: str) -> bool:
    """Whether a header can be published, and is no order to the stream (``Nats-Rollup``, ``Nats-TTL``)."""
    return re.fullmatch(r"[!-9;-~]+", header) is not None and not header.lower().startswith("nats-")


def _line(text: str) -> str:
    """Return what a header can hold of a text."""
    return " ".join(text.split())[:1000]
