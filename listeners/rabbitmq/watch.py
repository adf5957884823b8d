"""Watching a stream: the first message that matches, and nothing taken from others."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any, TypeVar

from aiormq.abc import AbstractChannel, AbstractConnection, DeliveredMessage
from airflow_events.errors import SourceMisconfigured
from airflow_events.listeners.rabbitmq.client import NO_STREAM, OnServer, Source, close, connect, refusals
from airflow_events.listeners.rabbitmq.messages import described, headers_of, tag_of, timestamp_of, value_of
from airflow_events.listeners.support.shared import within
from airflow_events.listeners.support.timestamps import EPOCH, of_epoch
from airflow_events.listeners.support.values import Format
from airflow_events.listeners.support.watching import MILLISECOND, LogHub, Message, Reader, message_of

_T = TypeVar("_T")

# How many messages may be on their way, at most: the broker bounds them by nothing else.
_AT_ONCE = 100


class StreamHub(OnServer, LogHub[int]):
    """Reads one stream for those who watch it; a position is the next offset."""

    def __init__(self, source: Source, values: Format) -> None:
        self.source = source
        self._values = values
        self._was_cancelled = False
        super().__init__(str(source))

    async def _connect(self) -> None:
        with refusals(self.source):
            self._server = await connect(self.source.conn_id)
            channel = await self._server.channel()
            await channel.queue_declare(self.source.queue, passive=True)
            await close(channel)
        if self._was_cancelled:
            self.start_over("was taken from its readers, perhaps deleted and recreated")
            self._was_cancelled = False

    async def reader(self, since: datetime, position: int | None) -> Reader[int]:
        assert self._server is not None
        channel = await within(self._server.channel())
        # The protocol knows no moment before the epoch.
        start = max(since, EPOCH).replace(microsecond=0) if position is None else position
        arrived: asyncio.Queue[DeliveredMessage] = asyncio.Queue()
        with refusals(self.source):
            tag = await within(_consume(channel, self.source, arrived, start, _AT_ONCE))
        return _ChannelReader(self, channel, tag, arrived, position)

    def cancelled(self) -> None:
        """Note that the broker has ended a reader, as it does when the stream is deleted."""
        # A position means nothing in another stream of the name. To read again what was read does no harm.
        self._was_cancelled = True

    async def dropped_until(self) -> datetime | None:
        assert self._server is not None
        with refusals(self.source):
            first = await within(self._first(self._server))
        return _published(first)[0] if first is not None and _offset(self.source, first) > 0 else None

    async def _first(self, server: AbstractConnection) -> DeliveredMessage | None:
        arrived: asyncio.Queue[DeliveredMessage] = asyncio.Queue()
        channel = await server.channel()
        try:
            if not (await channel.queue_declare(self.source.queue, passive=True)).message_count:
                return None
            await _consume(channel, self.source, arrived, "first", 1)
            return await _soon(arrived, 1.0)
        finally:
            await close(channel)

    def message(self, offset: int, raw: DeliveredMessage) -> Message:
        where = f"the message {offset} of {self.source}"

        def event() -> dict[str, Any]:
            return {
                "queue": self.source.queue,
                "offset": offset,
                "timestamp": _published(raw)[0],
                "value": value_of(raw, self._values, where),
                **described(raw, headers_of(raw)),
                "rabbitmq_conn_id": self.source.conn_id,
            }

        published, within = _published(raw)
        return message_of(published, len(raw.body), where, event, within)


class _ChannelReader(Reader[int]):
    """Reads what arrives over a channel."""

    def __init__(
        self,
        hub: StreamHub,
        channel: AbstractChannel,
        tag: str,
        arrived: asyncio.Queue[DeliveredMessage],
        position: int | None,
    ) -> None:
        self.position = position
        self._hub = hub
        self._channel = channel
        self._tag = tag
        self._arrived = arrived
        self._first: DeliveredMessage | None = None  # by which the position is known

    async def read(self, seconds: float) -> list[Message]:
        source = self._hub.source
        messages: list[Message] = []
        with refusals(source):
            raw = self._first
            if raw is None:
                raw = await _soon(self._arrived, seconds)
            self._first = None
            if raw is not None and self.position is None:
                self.position, self._first = _offset(source, raw), raw
                return []
            last = raw
            while raw is not None:
                last, offset = raw, _offset(source, raw)
                if offset >= (self.position or 0):  # the broker begins at a whole chunk
                    self.position = offset + 1
                    messages.append(self._hub.message(offset, raw))
                enough = len(messages) >= _AT_ONCE or self._arrived.empty()
                raw = None if enough else self._arrived.get_nowait()
            if last is not None:
                await within(self._channel.basic_ack(tag_of(last), multiple=True))
            # By what of it the client tells a cancellation in all its versions.
            is_cancelled = self._tag not in getattr(self._channel, "consumers", {})
            if is_cancelled and not self._channel.is_closed:
                self._hub.cancelled()
            if is_cancelled or self._channel.is_closed:
                raise ConnectionResetError(f"{source} stopped sending")
        return messages

    async def close(self) -> None:
        await close(self._channel)


async def _consume(
    channel: AbstractChannel,
    source: Source,
    into: asyncio.Queue[DeliveredMessage],
    start: Any,
    at_once: int,
) -> str:
    async def receive(message: DeliveredMessage) -> None:
        into.put_nowait(message)

    await channel.basic_qos(prefetch_count=at_once)
    answer = await channel.basic_consume(source.queue, receive, arguments={"x-stream-offset": start})
    return str(answer.consumer_tag)


async def _soon(queue: asyncio.Queue[_T], seconds: float) -> _T | None:
    # Not asyncio.wait_for, which before Python 3.12 may lose what came as the time was up.
    next_one = asyncio.ensure_future(queue.get())
    try:
        await asyncio.wait({next_one}, timeout=seconds)
        return next_one.result() if next_one.done() else None
    finally:
        next_one.cancel()


def _offset(source: Source, message: DeliveredMessage) -> int:
    offset = headers_of(message).get("x-stream-offset")
    if not isinstance(offset, int):
        raise SourceMisconfigured(NO_STREAM.format(source))
    return offset


def _published(message: DeliveredMessage) -> tuple[datetime | None, timedelta]:
    """Return when a message says that it was published, None if it says nothing, and how much later it may be."""
    milliseconds = headers_of(message).get("timestamp_in_ms")
    exactly = of_epoch(milliseconds) if isinstance(milliseconds, int) else None
    if exactly is not None:
        return exactly, MILLISECOND
    stamp = timestamp_of(message)
    in_seconds = stamp is not None and not stamp.microsecond
    return stamp, timedelta(microseconds=999_999) if in_seconds else timedelta()
