"""Watching a stream: the first message that matches, and nothing taken from others."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, ClassVar

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
from airflow_events.listeners.support.values import Format
from airflow_events.listeners.support.watching import READ_BYTES, LogHub, Message, Reader, message_of
from nats.js.errors import APIError

_TOO_MANY_CONSUMERS = 10026


class StreamHub(LogHub[int]):
    """Reads one stream for those who watch it; a position is the next sequence."""

    lost: ClassVar[tuple[type[BaseException], ...]] = LOST

    def __init__(self, source: Source, subject: str | None, values: Format) -> None:
        self._source = source
        self._subject = subject
        self._values = values
        self._server: Server | None = None
        self._created: str | None = None
        super().__init__(str(source))

    async def connect(self) -> None:
        await self.disconnect()
        self._server = await connect(self._source.conn_id)
        with refusals(self._source):
            about = await about_of(self._server, self._source)
            await self._server.listen()
        if self._created not in (None, about["created"]):
            self.start_over("was recreated, and counts from one again")
        self._created = about["created"]

    async def disconnect(self) -> None:
        if self._server is not None:
            await self._server.close()

    async def reader(self, since: datetime, position: int | None) -> Reader[int]:
        """Make a consumer of this connection's own, which the server ends when nobody reads from it."""
        assert self._server is not None
        config: dict[str, Any] = {
            "ack_policy": "none",
            "inactive_threshold": 30 * SECOND,
            "mem_storage": True,
        }
        if position is None:
            start = since.astimezone(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")
            config |= {"deliver_policy": "by_start_time", "opt_start_time": start}
        else:
            config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": position}
        if self._subject is not None:
            config["filter_subject"] = self._subject
        stream = self._source.stream
        with refusals(self._source):
            try:
                about = await self._server.api(f"CONSUMER.CREATE.{stream}", stream_name=stream, config=config)
            except APIError as error:
                if error.err_code != _TOO_MANY_CONSUMERS:
                    raise
                # One may be ours, of a connection that was lost: the server ends it after a while.
                raise ConnectionError(
                    f"the stream has as many consumers as it may: {error.description}"
                ) from error
        begins = about["delivered"]["stream_seq"] + 1 if position is None else position
        return _ConsumerReader(self._server, self._source, str(about["name"]), self._message, begins)

    async def dropped_until(self) -> datetime | None:
        assert self._server is not None
        with refusals(self._source):
            about = await about_of(self._server, self._source)
        state = about["state"]
        if state["first_seq"] <= max(about["config"].get("first_seq", 1), 1):
            return None
        return moment(state["first_ts"]) if state["messages"] else moment(state["last_ts"]) + MICROSECOND

    def _message(self, stored: Stored) -> Message:
        return message_of(
            stored.timestamp,
            len(stored.data) + sum(len(name) + len(content) for name, content in stored.headers.items()),
            f"the message {stored.sequence} of {self._source}",
            lambda: event_of(self._source, stored, self._values),
        )


class _ConsumerReader(Reader[int]):
    """Pulls from a consumer."""

    def __init__(
        self, server: Server, source: Source, consumer: str, message: Callable[[Stored], Message], position: int
    ) -> None:
        self.position: int = position
        self._server = server
        self._source = source
        self._consumer = consumer
        self._message = message
        self._delivered = 0

    async def read(self, seconds: float) -> list[Message]:
        messages = []
        with refusals(self._source):
            pulled = await self._server.pull(self._source.stream, self._consumer, BATCH, seconds, READ_BYTES)
        for message in pulled:
            sequence, timestamp = stored_as(message.reply)
            self._delivered += 1
            if delivered_as(message.reply) != self._delivered:  # after which another reads on from `position`
                raise ConnectionError(f"a message of {self._source} before {sequence} was not delivered")
            stored = Stored(sequence, timestamp, message.subject, dict(message.headers or {}), message.data)
            messages.append(self._message(stored))
        if pulled:
            self.position = stored_as(pulled[-1].reply)[0] + 1
        return messages
