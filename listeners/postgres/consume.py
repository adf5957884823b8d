"""Receiving the rows of a table that are not acknowledged, and acknowledging them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, ClassVar, NamedTuple

from airflow_events.errors import SourceMisconfigured, SourceMissing
from airflow_events.listeners.postgres import CHANNEL
from airflow_events.listeners.postgres.client import (
    LONGEST_PAUSE,
    LOST,
    SERVE_WITHIN,
    codec_of,
    connect,
    coordinates,
    listen,
    refusals,
    run,
    system_of,
)
from airflow_events.listeners.postgres.table import COLUMNS, TABLE, VALUES, Source, Wanted, looking, ordering
from airflow_events.listeners.support.hub import Seeker
from airflow_events.listeners.support.queue import Delivery, InHand, LookingHub
from psycopg import AsyncConnection, errors, sql

# Rows that a look takes at most.
_AT_ONCE = 500
# Rows that are counted at most.
_MOST_COUNTED = 100_000

_IDS = ("smallint", "integer", "bigint", "uuid", "text", "character varying")
_CREATED = ("timestamp with time zone",)
_ACKNOWLEDGED = (*_CREATED, "timestamp without time zone")


@dataclass(frozen=True)
class Looks:
    """How a hub looks at its table."""

    order: tuple[str, ...]
    channel: str | None
    interval: float
    require_persistence: bool


class Origin(NamedTuple):
    """Which table a row is of, whatever the connection that it was read over: see `coordinates`."""

    system: str
    database: str
    table: str
    oid: int


class Row(NamedTuple):
    """A row, its value as bytes."""

    origin: Origin
    id: int | str
    created_at: datetime | None
    raw: bytes | None


class TableHub(LookingHub):
    """
    Reads rows for the waits on one table, which say what is to be found in a row's value; None is anything.

    Every triggerer reads every row that is not acknowledged, and that no wait of its own has: whose it is, the
    inbox decides.
    """

    lost: ClassVar[tuple[type[BaseException], ...]] = LOST
    serve_within: ClassVar[float | None] = SERVE_WITHIN

    def __init__(self, source: Source, looks: Looks) -> None:
        self._source = source
        self._looks = looks
        self._order = ordering(source, looks.order)
        self._unacknowledged: sql.Composable = sql.SQL("true")
        self._value_type = ""
        self._read: sql.Composable = sql.SQL("")
        self._connection: AsyncConnection[Any] | None = None
        self._origin: Origin | None = None
        self._next_look = 0.0
        self._look_again_at = 0.0  # at what was set aside
        self._refused: dict[str, Exception] = {}  # by a message's id, why it could not be acknowledged
        self._codec: str | None = None
        super().__init__(str(source))

    async def connect(self) -> None:
        await self.disconnect()
        self._connection = await connect(self._source.conn_id)
        with refusals(self.name):
            await self._check(self._connection)
            if self._looks.channel is not None:  # before the first look, so that nothing falls between
                await listen(self._connection, self._looks.channel)
        self._next_look = 0.0

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def can_tell(self) -> None:
        """Do nothing: rows are acknowledged over another connection than they are read over."""

    async def lag(self, seeker: Seeker) -> int | None:
        # Of the whole table, whatever the wait wants of it; over a connection of its own, since `serve` hears
        # notifications over the other.
        count = sql.SQL("SELECT count(*) FROM (SELECT FROM {} WHERE {} LIMIT {}) AS counted").format(
            self._source.identifier, self._unacknowledged, _MOST_COUNTED
        )
        async with await connect(self._source.conn_id) as connection:
            [[(number,)]] = await run(connection, count)
        return int(number)

    def look_again(self) -> None:
        self._next_look = 0.0
        self._changed.set()

    async def serve(self) -> None:
        assert self._connection is not None and self._origin is not None
        async for notification in self._connection.notifies(timeout=0):
            # On a channel of their own users say what they like; on ours, which table has rows.
            if self._looks.channel != CHANNEL or notification.payload in ("", self._origin.table):
                self._next_look = 0.0
        left = self._next_look - time.monotonic()
        if left <= 0:
            try:
                await self._look(self._connection, self._origin)
            except errors.ProgrammingError as error:  # it was altered, and is checked when we connect again
                raise errors.OperationalError(str(error)) from error
        else:
            await self._until_something_comes(self._connection, min(left, LONGEST_PAUSE))

    async def _until_something_comes(self, connection: AsyncConnection[Any], seconds: float) -> None:
        """Wait for a notification, or the connection's end, or a new wait, but not for longer."""
        loop, socket = asyncio.get_running_loop(), connection.fileno()
        loop.add_reader(socket, self._changed.set)
        try:
            await self.pause(seconds)
        finally:
            loop.remove_reader(socket)

    async def _look(self, connection: AsyncConnection[Any], origin: Origin) -> None:
        self._next_look = time.monotonic() + self._looks.interval
        if self._value_type != "jsonb" and any(wanted is not None for wanted in self.waiting):
            await self._check(connection)  # it may be by now
        waiting = self._open_seekers()
        if not waiting:
            return
        wanted = {of: len(seekers) for of, seekers in waiting.items()}
        look = looking(self._source, self._order, self._unacknowledged, self._read, wanted, _AT_ONCE)
        again = self._look_again_at <= time.monotonic()
        if self.aside and again:  # what nobody could read may be mended by now, or another row by its id
            self._look_again_at, self._next_look = time.monotonic() + self._looks.interval, 0.0
        held = [str(row.id) for row in self._held(aside=not again) if row.origin == origin]
        [*_, [(oid,)]] = answers = await run(connection, look.statement, {**look.asked, "held": held}, raw=True)
        if oid != origin.oid:
            raise errors.OperationalError("the table was recreated")
        for rows, ones in zip(answers[-1 - len(look.found_by) : -1], look.found_by, strict=True):
            if len(rows) == min(_AT_ONCE, sum(wanted[one] for one in ones or (None,))):
                self._next_look = 0.0
            for row, created_at, raw, which in rows:
                self._hand_out(waiting[ones[which - 1] if ones else None], origin, row, created_at, raw)

    def _open_seekers(self) -> dict[Wanted | None, deque[Seeker]]:
        """Return the waits that have no row yet, by what they want; those that can have none fail."""
        waiting: dict[Wanted | None, deque[Seeker]] = {}
        for wanted, seekers in self.waiting.items():
            if wanted is not None and (reason := self._why_no_row_has(wanted)):
                for seeker in seekers:
                    seeker.fail(SourceMisconfigured(f"{self.name}: {reason}"))
            if some := deque(seeker for seeker in seekers if not seeker.done):
                waiting[wanted] = some
        return waiting

    def _why_no_row_has(self, wanted: Wanted) -> str:
        if self._value_type != "jsonb":
            column = self._source.columns.value
            return f"match needs a value of type jsonb, and the column {column!r} is of type {self._value_type}"
        if self._codec is not None:
            try:
                for text in (*wanted[0], *wanted[1]):
                    text.encode(self._codec)
            except UnicodeEncodeError as error:
                return f"no row can have what match wants, in the database's encoding: {error}"
        return ""

    def _hand_out(self, waiting: deque[Seeker], origin: Origin, row: Any, created_at: Any, raw: Any) -> None:
        """Give a row to the wait that has waited longest of those that want it."""
        while waiting and waiting[0].done:
            waiting.popleft()
        if not waiting:
            self._next_look = 0.0
            return
        row = row.decode() if isinstance(row, bytes) else row
        moment = created_at and created_at.replace(tzinfo=timezone.utc)
        if raw is not None and self._codec is not None:
            raw = _as_utf8(raw, self._codec)
        id = coordinates(*origin, row)
        if id in InHand.of_loop().hubs:  # a wait of another hub has been quicker, or one that wants something else
            self._next_look = 0.0
        elif (delivery := self.hold(id, Row(origin, row, moment, raw))) is not None:
            waiting.popleft().give(delivery)

    def known_by(self, delivery: Delivery) -> str:
        raw = delivery.message.raw
        return f"{delivery.id} {hashlib.sha256(raw or b'').hexdigest()}"

    def _held(self, *, aside: bool) -> Iterator[Row]:
        """Return the rows that waits of this triggerer have, by whichever hub, and, if asked, those set aside."""
        hubs = {self, *InHand.of_loop().hubs.values()}
        if aside:
            yield from (delivery.message for delivery in self.aside.values())
        for hub in hubs:
            if isinstance(hub, TableHub):
                yield from (delivery.message for delivery in hub.in_hand.values())

    async def acknowledge(self, deliveries: Mapping[str, Delivery]) -> None:
        """Acknowledge rows; those that are refused are told apart in `settle`."""
        for id in deliveries:
            self._refused.pop(id, None)
        by_table: dict[int, dict[int | str, str]] = {}
        for id, delivery in deliveries.items():
            by_table.setdefault(delivery.message.origin.oid, {})[delivery.message.id] = id
        for oid, rows in by_table.items():
            refused = await self._source.acknowledge(oid, list(rows))
            self._refused.update({rows[row]: error for row, error in refused.items()})

    async def settle(self, id: str) -> None:
        """
        Acknowledge a row.

        :raises LockNotAvailable: somebody has locked it; that can be tried again.
        :raises SourceMisconfigured: the server does not let us.
        """
        await self._acknowledging.add(id)
        if (refused := self._refused.pop(id, None)) is not None:
            raise refused
        self.forget(id)

    async def _check(self, connection: AsyncConnection[Any]) -> None:
        name, columns = self.name, self._source.columns
        [[(in_recovery,)]] = await run(connection, "SELECT pg_is_in_recovery()")
        if in_recovery:  # which may be about to end
            raise errors.OperationalError("the server is in recovery (a read-only standby); its primary is needed")
        [tables] = await run(connection, TABLE, {"table": self._source.identifier.as_string(None)})
        if not tables:
            raise SourceMissing(
                f"{name}: there is no such table, or it is not in the search path; the statements for one are "
                f"what airflow_events.listeners.postgres.create_table({self._source.table!r}) returns"
            )
        [(database, table, oid, kind, persistence, is_deletable, has_children, encoding)] = tables
        if kind != "r":
            raise SourceMisconfigured(
                f"{name}: it is of pg_class.relkind {kind!r}; an ordinary table ('r') is needed"
            )
        if has_children:
            raise SourceMisconfigured(f"{name}: other tables inherit from it, whose rows may have the same ids")
        if persistence == "u" and self._looks.require_persistence:
            raise SourceMisconfigured(
                f"{name}: it is UNLOGGED, so a crash of the server empties it; alter it with SET LOGGED, or "
                "give require_persistence=False"
            )
        [rows] = await run(connection, COLUMNS, {"oid": oid})
        found = {row[0]: _Column(*row[1:]) for row in rows}
        self._check_columns(found)
        if not found[columns.id].is_unique:
            raise SourceMisconfigured(
                f"{name}: the column {columns.id!r} needs a PRIMARY KEY or a unique index of its own"
            )
        if self._source.on_commit == "delete" and not is_deletable:
            raise SourceMisconfigured(
                f"{name}: the connection's user lacks the privilege DELETE, for on_commit='delete'"
            )
        # Of a table whose rows are deleted some may be marked, from before.
        is_marked = columns.acknowledged_at in found
        unacknowledged = self._source.statement("{acknowledged_at} IS NULL") if is_marked else sql.SQL("true")
        self._unacknowledged, self._value_type = unacknowledged, found[columns.value].type
        # The server refuses to tell text that it cannot convert, and with it all other rows.
        self._codec = None if encoding == "UTF8" or self._value_type == "bytea" else codec_of(encoding)
        as_it_is = f"convert_to({{value}}::text, '{encoding}')"
        self._read = self._source.statement("{value}" if self._codec is None else as_it_is)
        self._origin = Origin(await system_of(connection), database, table, oid)

    def _check_columns(self, found: dict[str, _Column]) -> None:
        columns, ours = self._source.columns, self._source.columns.acknowledged_at
        types: dict[str, tuple[str, ...]] = {columns.id: _IDS, columns.value: VALUES}
        types |= {name.removeprefix("-"): () for name in self._looks.order if name.removeprefix("-") not in types}
        if columns.created_at:
            types[columns.created_at] = _CREATED
        marks = self._source.on_commit == "mark"
        if marks or ours in found:
            types[ours] = _ACKNOWLEDGED
        for name, possible in types.items():
            column = found.get(name)
            if column is None:
                there = ", ".join(map(repr, found))
                raise SourceMisconfigured(f"{self.name}: it has no column {name!r}, only {there}")
            if possible and column.type not in possible:
                raise SourceMisconfigured(
                    f"{self.name}: the column {name!r} is of type {column.type}; {' or '.join(possible)} is needed"
                )
            if name == ours and column.needed:
                raise SourceMisconfigured(f"{self.name}: the column {name!r} is NOT NULL, and must not be")
            if not column.readable or (name == ours and marks and not column.writable):
                right = "UPDATE" if column.readable else "SELECT"
                raise SourceMisconfigured(
                    f"{self.name}: the connection's user lacks the privilege to {right} the column {name!r}; "
                    f"needed are SELECT on all columns that are used, and UPDATE on {ours!r} or, for "
                    "on_commit='delete', DELETE"
                )


def _as_utf8(raw: bytes, codec: str) -> bytes:
    """Return text in UTF-8; as it is, if it is not of its database's encoding."""
    try:
        return raw.decode(codec).encode()
    except UnicodeDecodeError:
        return raw


@dataclass(frozen=True)
class _Column:
    """What the catalog says of a column, as `table.COLUMNS` has it."""

    type: str
    needed: bool
    readable: bool
    writable: bool
    is_unique: bool
