"""Receiving messages over one channel, and telling RabbitMQ over the same one what became of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from aiormq import exceptions
from aiormq.abc import AbstractChannel, AbstractConnection, DeliveredMessage
from airflow_events.errors import EventUndecodable, SourceMisconfigured
from airflow_events.listeners.rabbitmq.client import (
    OnServer,
    Source,
    close,
    connect,
    place_of,
    refusals,
)
from airflow_events.listeners.rabbitmq.messages import Received
from airflow_events.listeners.support.hub import Seeker
from airflow_events.listeners.support.queue import Delivery, InHand, QueueHub
from airflow_events.listeners.support.shared import OnePerLoop, background, within

log = logging.getLogger(__name__)

# Seconds between two looks at whether the channel is open.
_LOOK = 0.5
# Seconds without a message, after which a look tells whether the queue has some for others alone.
_STALLED = 30.0
# The most that a consumer may be sent ahead.
_MOST = 65_535


class _Behind(OnePerLoop):
    """
    Messages that stand behind others with their ids, by id, and who received them.

    Of all hubs: two may receive from one queue, in two formats, say, and what a wait has is acknowledged by its
    id.
    """

    def __init__(self) -> None:
        self._of: dict[str, deque[tuple[Consumer, Received]]] = {}

    def add(self, hub: Consumer, received: Received) -> None:
        self._of.setdefault(received.id, deque()).append((hub, received))

    def next(self, id: str) -> tuple[Consumer, Received] | None:
        """Return the next one, which stands behind nothing any more."""
        if (waiting := self._of.get(id)) is None:
            return None
        found = waiting.popleft()
        if not waiting:
            del self._of[id]
        return found

    def forget(self, hub: Consumer) -> None:
        """Forget those of a hub, whose connection is gone."""
        for id, waiting in list(self._of.items()):
            self._of[id] = deque(one for one in waiting if one[0] is not hub)
            if not self._of[id]:
                del self._of[id]


class Consumer(OnServer, QueueHub):
    """
    Receives messages for the waits on one queue.

    The server may send as many messages as the waits still want (`_room`). A consumer's limit counts what it has
    sent and was not told about yet, so before it is told of such a message the consumer ends, and the next one
    begins with what is wanted then. What a channel has received, that channel alone can settle; when it closes,
    the server delivers it again.
    """

    def __init__(self, source: Source, require_durable: bool) -> None:
        self._source = source
        self._require_durable = require_durable
        self._server_name, self._virtual_host = "", ""
        self._channel: AbstractChannel | None = None
        self._tag: str | None = None  # of what consumes now
        self._room = 0
        self._of_consumer: set[int] = set()  # what the server sent to it, by delivery tag
        self._unsettled: set[int] = set()  # what it sent over the channel
        self._behind = _Behind.of_loop()
        self._consuming = asyncio.Lock()
        self._looked = 0.0  # for a stall, or when a message came
        self._is_stalled = False
        super().__init__(str(source))

    async def _connect(self) -> None:
        with refusals(self._source):
            self._server_name, self._virtual_host = await place_of(self._source.conn_id)
            self._server = await connect(self._source.conn_id)
            channel = await self._server.channel(publisher_confirms=False)
            await channel.queue_declare(self._source.queue, passive=True)
            await _check(self._server, self._source, self._require_durable)
        self._channel = channel
        self._looked = time.monotonic()

    async def disconnect(self) -> None:
        self.connection_lost()
        await super().disconnect()

    def connection_lost(self) -> None:
        super().connection_lost()
        self._channel, self._tag, self._room = None, None, 0
        self._of_consumer.clear()
        self._unsettled.clear()
        self._behind.forget(self)

    async def serve(self) -> None:
        channel = self._open_channel()
        with refusals(self._source):
            if self._tag is not None and self._tag not in channel.consumers:  # type: ignore[attr-defined]
                self._tag, self._room = None, 0  # the server has ended it: the queue was deleted, or has moved
            await within(self._consume())
            if not self._room:
                self._looked = time.monotonic()
            elif time.monotonic() - self._looked >= _STALLED:
                self._tell_of_a_stall(await within(self._waiting()))
        if self._room == self.wanted:
            await self.pause(_LOOK)

    def _tell_of_a_stall(self, ready: int) -> None:
        """Say, once, that there are messages, and that none comes though there is room for it."""
        self._looked = time.monotonic()
        if ready and not self._is_stalled:
            message = (
                "%s has %d messages ready, and none is delivered here: another consumer is its single active one, "
                "or comes first by its priority"
            )
            self._tell_all(logging.WARNING, message, self._source, ready)
        self._is_stalled = bool(ready)

    async def lag(self, seeker: Seeker) -> int | None:
        # What a consumer has, the server does not count.
        return await within(self._waiting()) + len(self._unsettled)

    async def _waiting(self) -> int:
        assert self._server is not None
        channel = await self._server.channel()  # which ends if the queue is gone
        try:
            return (await channel.queue_declare(self._source.queue, passive=True)).message_count or 0
        finally:
            await close(channel)

    @property
    def wanted(self) -> int:
        return min(super().wanted, _MOST)

    async def _consume(self) -> None:
        """Let the server send what the waits want."""
        async with self._consuming:
            if self._room == self.wanted:
                return
            channel = self._open_channel()
            await self._stop(channel)
            if not (wanted := self.wanted):
                return
            await channel.basic_qos(prefetch_count=wanted)
            self._tag, self._room = uuid.uuid4().hex, wanted
            receive = partial(self._receive, channel, self._tag)
            await channel.basic_consume(self._source.queue, receive, consumer_tag=self._tag)

    async def _stop(self, channel: AbstractChannel) -> None:
        if self._tag is not None:
            await channel.basic_cancel(self._tag)
        self._tag, self._room = None, 0
        self._of_consumer.clear()

    def left(self, seeker: Seeker) -> None:
        super().left(seeker)
        if self._room > self.wanted:
            background(self._shrink(), f"{self.name} sends less")

    async def _shrink(self) -> None:
        with contextlib.suppress(Exception):  # the next one who waits finds out
            await within(self._consume())

    async def _receive(self, channel: AbstractChannel, consumer: str, message: DeliveredMessage) -> None:
        if channel is not self._channel:
            return
        received = Received(self._server_name, self._virtual_host, self._source.queue, uuid.uuid4().hex, message)
        self._unsettled.add(received.tag)
        self._looked, self._is_stalled = time.monotonic(), False
        if consumer == self._tag:
            self._room -= 1
            self._of_consumer.add(received.tag)
        self._offer(received)
        if self._room != self.wanted:
            self._changed.set()

    def _offer(self, received: Received) -> None:
        by = InHand.of_loop().hubs.get(received.id)
        held = None if by is None else by.in_hand[received.id]
        again = held is not None and held.is_stale and held.message.content_id == received.content_id
        if held is None or again:
            self.offer(received.id, received)
        else:  # another one with the same id, which was sent twice, or is another message
            self._behind.add(self, received)

    def forget(self, id: str) -> None:
        super().forget(id)
        if id not in InHand.of_loop().hubs and (next := self._behind.next(id)) is not None:
            hub, received = next
            hub.offer(id, received)

    def known_by(self, delivery: Delivery) -> str:
        return str(delivery.message.content_id)

    async def close(self) -> None:
        self._behind.forget(self)
        await super().close()

    async def acknowledge(self, deliveries: Mapping[str, Delivery]) -> None:
        await self._tell(deliveries, _done)

    async def give_back(self, deliveries: Mapping[str, Delivery]) -> None:
        await self._tell(deliveries, _back)

    async def _tell(
        self,
        deliveries: Mapping[str, Delivery],
        tell: Callable[[AbstractChannel, Received], Awaitable[None]],
    ) -> None:
        """
        Tell the server what became of messages; return once it has processed that.

        If that fails, what it has processed cannot be known: the channel is closed, and the rest comes again.
        """
        if not deliveries:
            return
        if (channel := self._channel) is None:
            self.connection_lost()
            return
        try:
            await within(self._told(channel, deliveries, tell))
        except Exception as error:
            log.info("%s could not be told what became of %d messages: %s", self.name, len(deliveries), error)
            await close(channel)
            if channel is self._channel:
                self.connection_lost()

    async def _told(
        self,
        channel: AbstractChannel,
        deliveries: Mapping[str, Delivery],
        tell: Callable[[AbstractChannel, Received], Awaitable[None]],
    ) -> None:
        async with self._consuming:
            here: list[Received] = [one.message for one in deliveries.values()]
            here = [one for one in here if one.message.channel is channel and one.tag in self._unsettled]
            if not self._of_consumer.isdisjoint(one.tag for one in here):
                await self._stop(channel)
            for received in here:
                self._unsettled.discard(received.tag)
                await tell(channel, received)
            # The server answers in order, so it has processed all that.
            await channel.queue_declare(self._source.queue, passive=True)
        self._changed.set()

    def _open_channel(self) -> AbstractChannel:
        """
        Return the channel.

        :raises ConnectionResetError: the server has closed it, such as for a message that was held too long.
        """
        channel = self._channel
        if channel is None or channel.is_closed:
            why = "" if channel is None or channel.closing.cancelled() else channel.closing.exception()
            raise ConnectionResetError(f"{self._source}: the server closed the channel: {why}")
        return channel


async def _done(channel: AbstractChannel, received: Received) -> None:
    if received.is_rejected:
        await channel.basic_reject(received.tag, requeue=False, wait=False)
    else:
        await channel.basic_ack(received.tag, wait=False)


async def _back(channel: AbstractChannel, received: Received) -> None:
    await channel.basic_nack(received.tag, requeue=True, wait=False)


async def bury(hub: Consumer, delivery: Delivery, error: EventUndecodable) -> None:
    """Let a message that cannot be read go to the queue's dead letters, when it is acknowledged."""
    delivery.message.is_rejected = True
    log.warning("Rejected, and left to the queue's dead letter exchange: %s", error)


async def refuse(hub: Consumer, delivery: Delivery, error: EventUndecodable) -> None:
    """
    Fail a wait for a message that cannot be read, which stays unacknowledged.

    It is known by what it holds: without a `message_id` it is another one at each delivery, and would fail a wait
    each time; and with one, its sender may send what it should have been under the same.

    :raises EventUndecodable: always.
    """
    hub.set_aside(delivery)
    error.event_id = hub.known_by(delivery)
    raise error


async def _check(server: AbstractConnection, source: Source, require_durable: bool) -> None:
    """
    Refuse a queue that would lose messages.

    A queue that deletes itself would do so whenever a consumer ends, with what is in it.
    """
    lost = "so that messages are lost which no wait has had yet; declare it as"
    differs = await _difference(server, source, durable=True)
    if "inequivalent arg 'durable'" in differs:
        if require_durable:
            raise SourceMisconfigured(f"{source} is not durable, {lost} durable, or give require_durable=False")
        differs = await _difference(server, source, durable=False)
    if "'x-queue-type'" in differs and "'stream'" in differs:
        raise SourceMisconfigured(f"{source} is a stream; RabbitMQWatchListener is for these")
    if "inequivalent arg 'auto_delete'" in differs:
        raise SourceMisconfigured(f"{source} deletes itself when nobody consumes, {lost} not auto-delete")


async def _difference(server: AbstractConnection, source: Source, *, durable: bool) -> str:
    """
    Return in what a queue differs from a declaration; AMQP tells no more about it.

    This one always differs, by a value that no queue can have, so it never makes one. Without the permission to
    configure the queue nothing is told.
    """
    channel = await server.channel()
    probe: dict[str, Any] = {"x-overflow": "airflow-events-asks"}
    try:
        await channel.queue_declare(source.queue, durable=durable, arguments=probe)
    except exceptions.ChannelPreconditionFailed as error:
        return str(error)
    except exceptions.ChannelAccessRefused:
        return ""
    finally:
        await close(channel)
    return ""
