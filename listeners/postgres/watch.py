"""Asking a query until it has a row."""

from __future__ import annotations

import base64
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from datetime import timezone
from typing import Any, ClassVar

from airflow_events.errors import EventUndecodable, SourceMisconfigured
from airflow_events.listeners.postgres.client import (
    BLOCK,
    LIMIT,
    LONGEST_PAUSE,
    LOST,
    SERVE_WITHIN,
    connect,
    listen,
    losses,
)
from airflow_events.listeners.support.hub import Hub, Seeker
from psycopg import AsyncConnection, errors, pq
from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import Loader
from psycopg.types.datetime import TimestamptzLoader
from psycopg.types.string import TextLoader


class Question:
    """A query and its parameters; equal if both are, and the parameters' types."""

    def __init__(self, query: str, parameters: Mapping[str, Any] | Sequence[Any] | None) -> None:
        self.query = query
        self.parameters = parameters
        named = sorted(parameters.items()) if isinstance(parameters, Mapping) else parameters
        self._key = (query, repr(named))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Question) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)


class Asker(Seeker):
    """A wait for a row of a query; ``interval`` in seconds."""

    def __init__(self, question: Question, interval: float, channel: str | None) -> None:
        super().__init__()
        self.question = question
        self.interval = interval
        self.channel = channel
        self.told = False  # that it cannot be listened for it


class QueryHub(Hub[Asker]):
    """Asks one server the questions of those who watch it, each once for all who ask it."""

    lost: ClassVar[tuple[type[BaseException], ...]] = LOST
    serve_within: ClassVar[float | None] = SERVE_WITHIN

    def __init__(self, conn_id: str) -> None:
        self._conn_id = conn_id
        self._askers: dict[Question, dict[Asker, None]] = {}
        self._due: dict[Question, float] = {}
        self._channels: set[str] = set()
        self._listened: set[str] = set()  # the channels of now, and those of connections before
        self._connection: AsyncConnection[Any] | None = None
        super().__init__(f"the connection {conn_id!r}")

    async def connect(self) -> None:
        await self.disconnect()
        self._channels.clear()
        self._connection = await connect(self._conn_id, to_write=False)
        _load_as_json(self._connection)
        self._due = dict.fromkeys(self._askers, 0.0)

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    def joined(self, seeker: Asker) -> None:
        self._askers.setdefault(seeker.question, {})[seeker] = None
        # Whoever begins to listen must look once after that.
        at_once = seeker.channel is not None and seeker.channel not in self._channels
        due = 0.0 if at_once else time.monotonic() + seeker.interval
        self._due[seeker.question] = min(self._due.get(seeker.question, 0.0), due)

    def left(self, seeker: Asker) -> None:
        askers = self._askers[seeker.question]
        del askers[seeker]
        if not askers:
            del self._askers[seeker.question], self._due[seeker.question]

    async def serve(self) -> None:
        connection = self._connection
        assert connection is not None
        if not self._due:
            return
        question = min(self._due, key=self._due.__getitem__)
        left = self._due[question] - time.monotonic()
        if left <= 0:
            await self._look(connection, question)
        elif not self._channels:
            await self.pause(min(left, LONGEST_PAUSE))
        else:
            async for notification in connection.notifies(timeout=min(left, BLOCK), stop_after=1):
                for asked, askers in self._askers.items():
                    if any(asker.channel == notification.channel for asker in askers):
                        self._due[asked] = 0.0

    async def _look(self, connection: AsyncConnection[Any], question: Question) -> None:
        askers = list(self._askers[question])
        self._due[question] = time.monotonic() + min(asker.interval for asker in askers)
        try:
            askers = await self._listening(connection, askers)
            with losses(connection):
                row = await _first_row(connection, question)
        except errors.Error as error:
            if connection.closed:
                raise
            for asker in askers:
                if isinstance(error, errors.OperationalError):  # a time-out, a conflict with a standby's recovery
                    message = "%s: the query did not come to an end, and is asked again in %.0f s: %s"
                    asker.tell(logging.WARNING, message, self.name, asker.interval, error)
                else:
                    asker.fail(
                        SourceMisconfigured(f"{self.name}: the query {question.query[:200]!r} is refused: {error}")
                    )
        except (SourceMisconfigured, TypeError) as error:  # such as a mapping of parameters for a query with %s
            for asker in askers:
                asker.fail(SourceMisconfigured(f"{self.name}: {error}"))
        except (ValueError, ArithmeticError, RecursionError) as error:  # a value that Python cannot read
            where = f"{self.name}: the row of the query {question.query[:200]!r}"
            for asker in askers:
                asker.fail(EventUndecodable(where, "readable", str(error), b""))
        else:
            if row is not None:
                for asker in askers:
                    asker.give(row)

    async def _listening(self, connection: AsyncConnection[Any], askers: list[Asker]) -> list[Asker]:
        """
        Listen on the channels of those who ask, and return those who can be served; the others fail.

        A server in recovery does not listen. Where it has before, they are served without until it does again.
        """
        for channel in {asker.channel for asker in askers if asker.channel} - self._channels:
            try:
                await listen(connection, channel)
            except errors.ReadOnlySqlTransaction as error:
                for asker in askers:
                    if asker.channel == channel:
                        self._cannot_listen(asker, channel, error)
            else:
                self._channels.add(channel)
                self._listened.add(channel)
        return [asker for asker in askers if not asker.done]

    def _cannot_listen(self, asker: Asker, channel: str, error: Exception) -> None:
        if channel not in self._listened:
            asker.fail(SourceMisconfigured(f"{self.name}: the channel {channel!r} is refused: {error}"))
        elif not asker.told:
            asker.told = True
            message = "%s: nothing is told on the channel %r for a while, and the query is asked every %.0f s: %s"
            asker.tell(logging.WARNING, message, self.name, channel, asker.interval, error)


async def _first_row(connection: AsyncConnection[Any], question: Question) -> dict[str, Any] | None:
    # A server-side cursor fetches one row of however many, and takes one statement only: none that would end
    # the read-only transaction and begin to write.
    try:
        await connection.execute(f"BEGIN READ ONLY; SET LOCAL datestyle = 'ISO'; {LIMIT}")
        async with connection.cursor("airflow_events") as cursor:
            await cursor.execute(question.query, question.parameters)
            names = [column.name for column in cursor.description or ()]
            row = await cursor.fetchone()
    finally:
        if not connection.closed:
            await connection.rollback()
    if len(set(names)) < len(names):
        raise SourceMisconfigured(
            f"the query {question.query[:200]!r} has two columns of one name: {', '.join(names)}"
        )
    return None if row is None else dict(zip(names, row, strict=True))


class _JsonLoader(Loader):
    def load(self, data: Buffer) -> Any:
        return json.loads(bytes(data))


class _Base64Loader(Loader):
    def load(self, data: Buffer) -> str:
        return base64.b64encode(pq.Escaping().unescape_bytea(bytes(data))).decode()


class _FloatLoader(Loader):
    def load(self, data: Buffer) -> float | str:
        value = float(bytes(data))
        return value if math.isfinite(value) else bytes(data).decode()


class _MomentLoader(TimestamptzLoader):
    def load(self, data: Buffer) -> Any:
        try:
            return super().load(data).astimezone(timezone.utc)
        except (errors.DataError, OverflowError):  # infinite, before Christ, or too far away
            return bytes(data).decode()


# The types that are not read as the text which PostgreSQL writes for them; None is psycopg's own reading.
_READ_AS: dict[str, type[Loader] | None] = {
    **dict.fromkeys(("bool", "int2", "int4", "int8", "oid")),
    **dict.fromkeys(("json", "jsonb"), _JsonLoader),
    **dict.fromkeys(("float4", "float8"), _FloatLoader),
    "bytea": _Base64Loader,
    "timestamptz": _MomentLoader,
}


def _load_as_json(context: AdaptContext) -> None:
    """Read all types such that JSON has them, or as moments; the elements of arrays too."""
    adapters = context.adapters
    assert adapters is not None
    for about in adapters.types:
        loader = _READ_AS.get(about.name, TextLoader)
        if loader is not None:
            adapters.register_loader(about.oid, loader)
