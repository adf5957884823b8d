"""Watching a stream: the first message that matches, and nothing taken from others."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

from aiormq.abc import AbstractChannel, AbstractConnection, DeliveredMessage
from airflow_events.errors import EventUndecodable, SourceUnfit
from airflow_events.listeners.log import LogHub, Message
from airflow_events.listeners.rabbitmq.client import NO_STREAM, OnServer, Source, close, connect, refusals, within
from airflow_events.listeners.rabbitmq.messages import described, headers_of, tag_of, timestamp_of
from airflow_events.listeners.values import Format, decode

_T = TypeVar("_T")

_WATCHED_AT_ONCE = 500


class StreamHub(OnServer, LogHub[Any]):
    """Reads one stream for those who watch it; a position is an offset, or a moment until it is known."""

    def __init__(self, source: Source, values: Format) -> None:
        self._source = source
        self._values = values
        self._channel: AbstractChannel | None = None
        self._at: int | datetime | None = None
        self._arrived: asyncio.Queue[DeliveredMessage] = asyncio.Queue()
        super().__init__(str(source))

    async def _connect(self) -> None:
        with refusals(self._source):
            self._server = await connect(self._source.conn_id)
            channel = await self._server.channel()
            await channel.queue_declare(self._source.queue, passive=True)
            await close(channel)
        self._at = None

    async def position(self, since: datetime) -> int | datetime:
        return since.replace(microsecond=0)

    async def read(self, position: int | datetime) -> tuple[int | datetime, list[Message]]:
        with refusals(self._source):
            if self._at != position:
                await within(self._read_from(position))
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
                await within(self._channel.basic_ack(tag_of(last), multiple=True))
            if self._channel.is_closed:
                raise ConnectionResetError(f"{self._source} stopped sending")
        self._at = position
        return position, messages

    async def dropped_until(self) -> datetime | None:
        assert self._server is not None
        with refusals(self._source):
            first = await within(self._first(self._server))
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
            await close(channel)

    async def _read_from(self, position: int | datetime) -> None:
        assert self._server is not None
        if self._channel is not None:
            await close(self._channel)
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
        headers = {name: value for name, value in headers_of(raw).items() if name != "x-stream-offset"}
        return Message(latest, {**event, **described(raw, headers), "rabbitmq_conn_id": self._source.conn_id})


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
        raise SourceUnfit(NO_STREAM.format(source))
    return offset


def _published(message: DeliveredMessage) -> tuple[datetime | None, datetime]:
    """Return when a message says that it was published, and the latest moment that this may mean."""
    milliseconds = headers_of(message).get("timestamp_in_ms")
    if isinstance(milliseconds, int):
        exactly = datetime.fromtimestamp(milliseconds / 1000, timezone.utc)
        return exactly, exactly + timedelta(microseconds=999)
    stamp = timestamp_of(message)
    if stamp is None:
        return None, datetime.now(timezone.utc)
    return stamp, stamp + timedelta(microseconds=0 if stamp.microsecond else 999_999)
