"""Watching a stream: the first entry that matches, and nothing taken from others."""

from __future__ import annotations

import contextlib
from datetime import datetime
from typing import Any, ClassVar

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.log import LogHub, Message
from airflow_events.listeners.redis.client import BLOCK, LOST, Source, connect, event_of, moment, refusals, text
from airflow_events.listeners.values import Format
from redis import exceptions
from redis.asyncio import Redis


class StreamHub(LogHub[str]):
    """Reads one stream for those who watch it."""

    lost: ClassVar[tuple[type[BaseException], ...]] = LOST

    def __init__(self, source: Source, field: str | None, values: Format) -> None:
        self._source = source
        self._field = field
        self._values = values
        self._client: Redis | None = None
        super().__init__(str(source))

    async def connect(self) -> None:
        self._client = await connect(self._source.conn_id, 1)
        with refusals(self._source):
            await self._client.xlen(self._source.stream)

    async def disconnect(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def position(self, since: datetime) -> str:
        return f"{max(round(since.timestamp() * 1000) - 1, 0)}-{2**64 - 1}"

    async def read(self, position: str) -> tuple[str, list[Message]]:
        assert self._client is not None
        with refusals(self._source):
            found = await self._client.xread({self._source.stream: position}, count=500, block=BLOCK)
        entries = [(text(entry), fields) for _, entries in _streams(found) for entry, fields in entries]
        return (entries[-1][0] if entries else position), [self._message(*entry) for entry in entries]

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
        try:
            event = event_of(self._source, entry, fields, self._field, self._values)
        except EventUndecodable as error:
            return Message(moment(entry), {}, error)
        return Message(event["timestamp"], event)


def _streams(found: Any) -> Any:
    return found.items() if isinstance(found, dict) else found or []
