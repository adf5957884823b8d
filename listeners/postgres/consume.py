"""Taking rows: each goes to one wait."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass
from datetime import timezone
from typing import Any, ClassVar

from airflow_events.errors import SourceUnfit
from airflow_events.listeners.hub import Hub, Seeker
from airflow_events.listeners.postgres.client import BLOCK, LOST, connect, listen, refusals, run
from airflow_events.listeners.postgres.table import (
    CLAIM,
    COLUMNS,
    HELD,
    OLDEST_CLAIM,
    TABLE,
    VALUES,
    Source,
    ordering,
)
from psycopg import AsyncConnection, errors

# Seconds to the next look when something is in the way that may be gone soon, such as a lock.
_SOON = 1.0
# What concerns one statement, and goes away by itself.
_BUSY = (
    errors.LockNotAvailable,
    errors.QueryCanceled,
    errors.DeadlockDetected,
    errors.SerializationFailure,
    errors.UniqueViolation,
)

_IDS = ("smallint", "integer", "bigint", "uuid", "text", "character varying")


@dataclass(frozen=True)
class Looks:
    """How a hub looks at its table."""

    order: tuple[str, ...]
    channel: str | None
    interval: float
    require_persistence: bool


class Claimer(Seeker):
    """A wait for a row that no other has; ``lapse`` in seconds."""

    def __init__(self, wait: str, lapse: float) -> None:
        super().__init__()
        self.wait = wait
        self.lapse = lapse
        self.asked = False
        self.told = False


class _Stuck(Exception):
    """Something is in the way of one wait's claim, and may be gone soon."""


class TableHub(Hub[Claimer]):
    """Claims rows for the waits on one table."""

    lost: ClassVar[tuple[type[BaseException], ...]] = LOST

    def __init__(self, source: Source, looks: Looks) -> None:
        self._source = source
        self._looks = looks
        self._claim = source.statement(CLAIM, order=ordering(source, looks.order))
        self._connection: AsyncConnection[Any] | None = None
        self._was_primary = False
        self._name_in_notifications = ""
        self._next_look = 0.0
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

    async def serve(self) -> None:
        waiting = [seeker for seeker in self.seekers if not seeker.done]
        assert self._connection is not None
        left = self._next_look - time.monotonic()
        if left <= 0 or not all(seeker.asked for seeker in waiting):
            with refusals(self.name):
                self._next_look = time.monotonic() + await self._look(self._connection, waiting)
        elif self._looks.channel is None:
            await self.pause(left)
        else:
            async for notification in self._connection.notifies(timeout=min(left, BLOCK), stop_after=1):
                if notification.payload in ("", self._name_in_notifications):
                    self._next_look = 0.0

    async def _look(self, connection: AsyncConnection[Any], waiting: list[Claimer]) -> float:
        """Claim for those who wait, and return after how many seconds to do so again."""
        stuck = set()
        nothing_for = math.inf  # nothing is left for claims that lapse in this time, or later
        for seeker in waiting:
            seeker.asked = True
            if seeker.lapse < nothing_for and not seeker.done:
                try:
                    if not await self._claim_for(connection, seeker):
                        nothing_for = seeker.lapse
                except _Stuck:
                    stuck.add(seeker)
        waiting = [seeker for seeker in waiting if not seeker.done]
        if not waiting:
            return self._looks.interval
        # A wait may have a claim that another triggerer made.
        by_wait = {"waits": [seeker.wait for seeker in waiting if seeker not in stuck]}
        [rows] = await run(connection, self._source.statement(HELD), by_wait)
        held = {wait for (wait,) in rows}
        for seeker in waiting:
            if seeker.wait in held:
                with contextlib.suppress(_Stuck):
                    await self._claim_for(connection, seeker)
        if stuck or held:
            return min(self._looks.interval, _SOON)
        [[(age,)]] = await run(connection, self._source.statement(OLDEST_CLAIM))
        lapses = math.inf if age is None else min(seeker.lapse for seeker in waiting) - float(age)
        return min(self._looks.interval, max(lapses, _SOON))

    async def _claim_for(self, connection: AsyncConnection[Any], seeker: Claimer) -> bool:
        """
        Whether the wait was given a row.

        :raises _Stuck: that is not to be known now.
        """
        parameters = {"wait": seeker.wait, "lapse": seeker.lapse}
        try:
            try:
                answers = await run(connection, self._claim, parameters, raw=True)
            except errors.UniqueViolation:  # another triggerer has just claimed for this wait
                answers = await run(connection, self._claim, parameters, raw=True)
        except _BUSY as error:
            if connection.closed:
                raise
            if not seeker.told:
                seeker.tell(logging.WARNING, "%s: it is tried again: %s", self.name, error)
                seeker.told = True
            raise _Stuck from error
        for identity, created_at, raw in answers[-2] + answers[-1]:
            moment = created_at and created_at.replace(tzinfo=timezone.utc)
            seeker.give((identity.decode() if isinstance(identity, bytes) else identity, moment, raw))
            return True
        return False

    async def _check(self, connection: AsyncConnection[Any]) -> None:
        name, columns = self.name, self._source.columns
        [[(in_recovery,)]] = await run(connection, "SELECT pg_is_in_recovery()")
        if in_recovery and self._was_primary:
            raise errors.OperationalError("the server is in recovery: a standby, on which nothing can be claimed")
        if in_recovery:
            raise SourceUnfit(f"{name}: the server is in recovery (a read-only standby); its primary is needed")
        [tables] = await run(connection, TABLE, {"table": self._source.identifier.as_string(None)})
        if not tables:
            raise SourceUnfit(
                f"{name}: there is no such table, or it is not in the search path; the statements for one are "
                f"what airflow_events.listeners.postgres.create_table({self._source.table!r}) returns"
            )
        [(oid, kind, persistence, self._name_in_notifications)] = tables
        if kind != "r":
            raise SourceUnfit(f"{name}: it is of pg_class.relkind {kind!r}; an ordinary table ('r') is needed")
        if persistence == "u" and self._looks.require_persistence:
            raise SourceUnfit(
                f"{name}: it is UNLOGGED, so a crash of the server empties it; alter it with SET LOGGED, or "
                "give require_persistence=False"
            )
        [rows] = await run(connection, COLUMNS, {"oid": oid, "committed_by": columns.committed_by})
        found = {row[0]: _Column(*row[1:]) for row in rows}
        self._check_columns(found)
        if "" not in found[columns.id].unique_where:
            raise SourceUnfit(
                f"{name}: the column {columns.id!r} needs a PRIMARY KEY or a unique index of its own"
            )
        claims = found[columns.claimed_by]
        if claims.uncommitted not in claims.unique_where:
            index = self._source.statement(
                "CREATE UNIQUE INDEX ON {table} ({claimed_by}) WHERE {committed_by} IS NULL"
            )
            raise SourceUnfit(
                f"{name}: nothing keeps a wait from having two claims; it needs: {index.as_string(None)}"
            )
        self._was_primary = True

    def _check_columns(self, found: dict[str, _Column]) -> None:
        columns = self._source.columns
        types: dict[str, tuple[str, ...]] = {columns.id: _IDS, columns.value: VALUES}
        types |= {name.removeprefix("-"): () for name in self._looks.order if name.removeprefix("-") not in types}
        ours = (columns.claimed_by, columns.committed_by, columns.claimed_at, columns.committed_at)
        types |= dict.fromkeys(ours[:2], ("text", "character varying"))
        types |= dict.fromkeys(ours[2:], ("timestamp with time zone",))
        if columns.created_at:
            types[columns.created_at] = ("timestamp with time zone",)
        for name, possible in types.items():
            column = found.get(name)
            if column is None:
                there = ", ".join(map(repr, found))
                raise SourceUnfit(f"{self.name}: it has no column {name!r}, only {there}")
            if possible and column.type not in possible:
                raise SourceUnfit(
                    f"{self.name}: the column {name!r} is of type {column.type}; {' or '.join(possible)} is needed"
                )
            if name in ours and (column.needed or (name in ours[:2] and column.limited != -1)):
                what = "NOT NULL" if column.needed else "limited in length"
                raise SourceUnfit(f"{self.name}: the column {name!r} is {what}, and must not be")
            if not column.readable or (name in ours and not column.writable):
                right = "UPDATE" if column.readable else "SELECT"
                raise SourceUnfit(
                    f"{self.name}: the connection's user has not the right to {right} the column {name!r}; needed "
                    f"are SELECT on all columns that are used, and UPDATE on {', '.join(map(repr, ours))}"
                )


@dataclass(frozen=True)
class _Column:
    """What the catalog says of a column, as `table.COLUMNS` has it."""

    type: str
    limited: int
    needed: bool
    readable: bool
    writable: bool
    unique_where: list[str]
    uncommitted: str
