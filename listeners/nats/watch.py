"""Watching a stream: the first message that matches, and nothing taken from others."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, ClassVar

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.log import LogHub, Message
from airflow_events.listeners.nats.client import BATCH, LOST, SECOND, Server, about_of, connect, refusals
from airflow_events.listeners.nats.messages import (
    MICROSECOND,
    Source,
    Stored,
    delivered_as,
    event_of,
    moment,
    stored_as,
)
from airflow_events.listeners.values import Format


class StreamHub(LogHub[datetime | int]):
    """
    Reads one stream for those who watch it.

    The position is the next sequence, or the moment to begin from.
    """

    lost: ClassVar[tuple[type[BaseException], ...]] = LOST

    def __init__(self, source: Source, subject: str | None, values: Format) -> None:
        self._source = source
        self._subject = subject
        self._values = values
        self._server: Server | None = None
        self._reads: tuple[str, int] | None = None  # the consumer, and what it has delivered
        self._reads_on: datetime | int | None = None
        super().__init__(str(source))

    async def connect(self) -> None:
        await self.disconnect()
        self._reads_on = None
        self._server = await connect(self._source.conn_id)
        with refusals(self._source):
            await about_of(self._server, self._source)
            await self._server.listen()

    async def disconnect(self) -> None:
        if self._server is not None:
            await self._server.close()

    async def position(self, since: datetime) -> datetime | int:
        return since

    async def read(self, position: datetime | int) -> tuple[datetime | int, list[Message]]:
        assert self._server is not None
        with refusals(self._source):
            if self._reads is None or self._reads_on != position:
                self._reads = await self._begin_at(position), 0
            consumer, delivered = self._reads
            pulled = await self._server.pull(self._source.stream, consumer, BATCH)
        messages = []
        for message in pulled:
            sequence, timestamp = stored_as(message.reply)
            delivered += 1
            if delivered_as(message.reply) != delivered:  # after which reading begins anew, at `position`
                raise ConnectionError(f"a message of {self._source} before {sequence} was not delivered")
            stored = Stored(sequence, timestamp, message.subject, dict(message.headers or {}), message.data)
            messages.append(self._message(stored))
            position = sequence + 1
        self._reads, self._reads_on = (consumer, delivered), position
        return position, messages

    async def dropped_until(self) -> datetime | None:
        assert self._server is not None
        with refusals(self._source):
            about = await about_of(self._server, self._source)
        state = about["state"]
        if state["first_seq"] <= max(about["config"].get("first_seq", 1), 1):
            return None
        return moment(state["first_ts"]) if state["messages"] else moment(state["last_ts"]) + MICROSECOND

    async def _begin_at(self, position: datetime | int) -> str:
        """Make a consumer of this connection's own, which the server ends when nobody reads from it."""
        assert self._server is not None
        config: dict[str, Any] = {
            "ack_policy": "none",
            "inactive_threshold": 30 * SECOND,
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

    def _message(self, stored: Stored) -> Message:
        try:
            return Message(stored.timestamp, event_of(self._source, stored, self._values))
        except EventUndecodable as error:
            return Message(stored.timestamp, {}, error)
