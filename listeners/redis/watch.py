"""Watching a stream: the first entry that matches, and nothing taken from others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, ClassVar

from airflow_events.listeners.redis.client import LOST, Source, connect, event_of, moment, refusals, text
from airflow_events.listeners.support.values import Format
from airflow_events.listeners.support.watching import MILLISECOND, READ_BYTES, LogHub, Message, Reader, message_of
from redis import exceptions
from redis.asyncio import Redis

# How many entries are read at once, at most: the server bounds a read by nothing else.
_AT_ONCE = 100

# Seconds between two looks whether the stream is still the same.
_LOOK_EVERY = 30.0

# An entry's id, as the server compares it.
_Id = tuple[int, int]
_LAST_OF_MILLISECOND = 2**64 - 1


class StreamHub(LogHub[_Id]):
    """Reads one stream for those who watch it."""

    lost: ClassVar[tuple[type[BaseException], ...]] = LOST

    def __init__(self, source: Source, field: str | None, values: Format) -> None:
        self._source = source
        self._field = field
        self._values = values
        self._client: Redis | None = None
        self._last: _Id | None = None
        self._looked = 0.0
        super().__init__(str(source))

    async def connect(self) -> None:
        self._client = await connect(self._source.conn_id, 1)
        with refusals(self._source):
            await self._client.xlen(self._source.stream)
        await self._see_whether_it_is_the_same()

    async def serve(self) -> None:
        if time.monotonic() - self._looked > _LOOK_EVERY:
            await self._see_whether_it_is_the_same()
        await super().serve()

    async def _see_whether_it_is_the_same(self) -> None:
        last, self._looked = await self._last_id(), time.monotonic()
        if last is not None and self._last is not None and last < self._last:
            self.start_over("was recreated")
        self._last = last or self._last

    async def _last_id(self) -> _Id | None:
        """Return the id that the stream has given last; None if there is no stream, or it may not be asked."""
        assert self._client is not None
        try:
            about = await self._client.xinfo_stream(self._source.stream)
        except exceptions.ResponseError:
            return None
        milliseconds, _, number = text(about["last-generated-id"]).partition("-")
        return int(milliseconds), int(number)

    async def disconnect(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def reader(self, since: datetime, position: _Id | None) -> Reader[_Id]:
        assert self._client is not None
        before = max(int(since.timestamp() * 1000) - 1, 0), _LAST_OF_MILLISECOND
        return _EntryReader(self._client, self._source, self._message, before if position is None else position)

    async def dropped_until(self) -> datetime | None:
        assert self._client is not None
        with contextlib.suppress(exceptions.ResponseError):  # there is no such stream yet
            about = await self._client.xinfo_stream(self._source.stream)
            added = about.get("entries-added")  # since Redis 7
            if added is not None and added > about["length"]:
                first = about["first-entry"]
                return moment(text(first[0] if first else about["last-generated-id"]))
        return None

    def _message(self, entry: str, fields: dict[bytes, bytes]) -> Message:
        return message_of(
            moment(entry),
            sum(len(name) + len(content) for name, content in fields.items()),
            f"the entry {entry} of {self._source}",
            lambda: event_of(self._source, entry, fields, self._field, self._values),
            within=MILLISECOND,
        )


class _EntryReader(Reader[_Id]):
    """Reads on behind an entry's id."""

    def __init__(
        self, client: Redis, source: Source, message: Callable[[str, dict[bytes, bytes]], Message], position: _Id
    ) -> None:
        self.position: _Id = position
        self._client = client
        self._source = source
        self._message = message
        self._at_once = 1  # until it is seen how large they are

    async def read(self, seconds: float) -> list[Message]:
        after = "-".join(map(str, self.position))
        # To block for 0 is to block for ever.
        block = max(round(seconds * 1000), 1) if seconds else None
        with refusals(self._source):
            found = await self._client.xread({self._source.stream: after}, count=self._at_once, block=block)
        entries = [(text(entry), fields) for _, entries in _streams(found) for entry, fields in entries]
        messages = [self._message(*entry) for entry in entries]
        if entries:
            milliseconds, _, number = entries[-1][0].partition("-")
            self.position = int(milliseconds), int(number)
            largest = max(message.size for message in messages)
            self._at_once = min(max(READ_BYTES // max(largest, 1), 1), _AT_ONCE)
        return messages


def _streams(found: Any) -> Any:
    return found.items() if isinstance(found, dict) else found or []
