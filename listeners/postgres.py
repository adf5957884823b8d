"""PostgreSQL: a table as a queue (an outbox), and a query that is asked until it has a row."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta, timezone
from typing import Any, ClassVar

from airflow_events.errors import EventLost, EventUndecodable, SourceUnfit
from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.connections import connection
from airflow_events.listeners.hub import Hub, Seeker
from airflow_events.listeners.shared import connected, shared
from airflow_events.listeners.values import Format, OnUndecodable, check_choices, decode

try:
    from psycopg import AsyncClientCursor, AsyncConnection, errors, pq, sql
    from psycopg.abc import AdaptContext, Buffer
    from psycopg.adapt import Loader
    from psycopg.types.datetime import TimestamptzLoader
    from psycopg.types.string import TextLoader
except ImportError as error:
    raise ImportError("a PostgreSQL listener needs: pip install airflow-provider-events[postgres]") from error

log = logging.getLogger(__name__)

DEFAULT = "postgres_default"
CHANNEL = "airflow_events"

# Seconds for which a hub waits for notifications, after which it sees new waits.
_BLOCK = 0.5
# Seconds to the next look when something is in the way that may be gone soon, such as a lock.
_SOON = 1.0
_LOST = (errors.OperationalError, errors.InterfaceError, errors.ReadOnlySqlTransaction, OSError)
# What concerns one statement, and goes away by itself.
_BUSY = (
    errors.LockNotAvailable,
    errors.QueryCanceled,
    errors.DeadlockDetected,
    errors.SerializationFailure,
    errors.UniqueViolation,
)

# libpq's options and what they are if the connection does not say. A server that vanished is noticed within a
# minute and not, as TCP has it, after hours.
_OPTIONS = frozenset(option.keyword.decode() for option in pq.Conninfo.get_defaults())
_DEFAULTS = {
    "application_name": "airflow-events",
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
# Extras that are for the Postgres provider's hook.
_HOOK = frozenset({"aws_conn_id", "azure_conn_id", "cluster-identifier", "cursor", "iam", "redshift"})
_HOOK |= {"redshift-serverless", "sqlalchemy_query", "sqlalchemy_scheme", "workgroup-name"}

_TEXTS = ("json", "jsonb", "text", "character varying", "character")
_VALUES = (*_TEXTS, "bytea")
_IDS = ("smallint", "integer", "bigint", "uuid", "text", "character varying")

_CREATE = """\
CREATE TABLE {table} (
    {id} bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    {value} {type},
    {created_at} timestamptz NOT NULL DEFAULT clock_timestamp(),
    {claimed_by} text,            -- the wait that has the event
    {claimed_at} timestamptz,
    {committed_by} text,          -- the wait to which it was delivered
    {committed_at} timestamptz
);
-- One claim for each wait, whoever polls for it. Needed.
CREATE UNIQUE INDEX ON {table} ({claimed_by}) WHERE {committed_by} IS NULL;
-- What is still to be taken, in its order. Without it each look reads past all that was ever delivered.
CREATE INDEX ON {table} ({id}) WHERE {committed_by} IS NULL;
-- Who waits is told at once. Without it events are seen at the next look, poll_interval seconds apart.
CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify(TG_ARGV[0], TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME);
    RETURN NULL;
END $$;
CREATE TRIGGER airflow_events_notify AFTER INSERT ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION {function}({channel});
"""

# Each of these is one message to the server, which carries it out as one transaction or not at all, whatever
# becomes of the client: nobody dies holding a lock. An isolation level that somebody chose as a default, a
# commit that does not wait for the disk, or a lock of somebody's forgotten session must not come in.
_BEGIN = """
SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE;
SET LOCAL lock_timeout = '2s';
SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off';
"""

# What the wait has, or else what nobody has. Two that poll for one wait at once may both come to the second
# step; the unique index then refuses one of them, and it begins again.
_CLAIM = f"""{_BEGIN}
UPDATE {{table}} SET {{claimed_at}} = clock_timestamp()
WHERE {{claimed_by}} = %(wait)s AND {{committed_by}} IS NULL
RETURNING {{id}}, {{timestamp}}, {{value}};

UPDATE {{table}} SET {{claimed_by}} = %(wait)s, {{claimed_at}} = clock_timestamp()
WHERE {{id}} = (
    SELECT {{id}} FROM {{table}}
    WHERE {{committed_by}} IS NULL AND (
        {{claimed_by}} IS NULL OR {{claimed_at}} IS NULL
        OR {{claimed_at}} <= clock_timestamp() - make_interval(secs => %(lapse)s)
    )
    ORDER BY {{order}} LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
) AND NOT EXISTS (SELECT FROM {{table}} WHERE {{claimed_by}} = %(wait)s AND {{committed_by}} IS NULL)
RETURNING {{id}}, {{timestamp}}, {{value}}
"""

_HELD = "SELECT {claimed_by} FROM {table} WHERE {claimed_by} = ANY(%(waits)s::text[]) AND {committed_by} IS NULL"

_OLDEST_CLAIM = """
SELECT extract(epoch FROM clock_timestamp() - min({claimed_at})) FROM {table}
WHERE {claimed_by} IS NOT NULL AND {committed_by} IS NULL
"""

_COMMIT = f"""{_BEGIN}
UPDATE {{table}} SET {{committed_by}} = %(wait)s, {{committed_at}} = clock_timestamp()
WHERE {{id}} = %(id)s AND {{claimed_by}} = %(wait)s AND {{committed_by}} IS NULL;

SELECT coalesce({{committed_by}}, {{claimed_by}}), {{committed_by}} FROM {{table}} WHERE {{id}} = %(id)s
"""

_RELEASE = f"""{_BEGIN}
WITH freed AS (
    UPDATE {{table}} SET {{claimed_by}} = NULL, {{claimed_at}} = NULL
    WHERE {{claimed_by}} = %(wait)s AND {{committed_by}} IS NULL AND {{which}}
    RETURNING {{id}}
)
SELECT pg_notify(%(channel)s, '') FROM freed WHERE %(channel)s::text IS NOT NULL
"""

_TABLE = """
SELECT c.oid, c.relkind, c.relpersistence, n.nspname || '.' || c.relname
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%(table)s)
"""

_COLUMNS = """
SELECT
    a.attname,
    format_type(CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END, NULL) AS type,
    a.atttypmod AS limited,
    a.attnotnull AS needed,
    has_column_privilege(a.attrelid, a.attnum, 'SELECT') AS readable,
    has_column_privilege(a.attrelid, a.attnum, 'UPDATE') AS writable,
    array(
        SELECT coalesce(pg_get_expr(i.indpred, i.indrelid), '') FROM pg_index i
        WHERE i.indrelid = a.attrelid AND i.indisunique AND i.indisvalid AND i.indimmediate
        AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum
    ) AS unique_where,
    format('(%%I IS NULL)', %(committed_by)s::text) AS uncommitted
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
WHERE a.attrelid = %(oid)s AND a.attnum > 0 AND NOT a.attisdropped
"""


def create_table(
    table: str, *, value_type: str = "jsonb", columns: Mapping[str, str] | None = None, channel: str = CHANNEL
) -> str:
    """
    Return the statements that make a table for `PostgresListener`, its indexes and its notifying trigger.

    They are for whoever keeps the database's schema; nothing in this package runs them.

    :param table: ``table`` or ``schema.table``.
    :param value_type: ``jsonb``, ``json``, ``text`` or ``bytea``.
    :param columns: names that are not the usual ones, as of `PostgresListener.poll_for_event`.
    :param channel: where the trigger notifies.
    """
    if value_type not in _VALUES:
        raise ValueError(f"value_type is one of {', '.join(map(repr, _VALUES))}, not {value_type!r}")
    _check_channel(channel)
    source = _source(DEFAULT, table, columns)
    if source.columns.created_at is None:
        raise ValueError("a new table has created_at")
    function = _identifier(*table.split(".")[:-1], "airflow_events_notify")
    more = {"type": sql.SQL(value_type), "function": function, "channel": sql.Literal(channel)}
    return source.statement(_CREATE, **more).as_string(None)


class PostgresListener(EventListener):
    """
    Take a row of a table: each row goes to one wait, exactly once.

    The claim, and who committed, are columns of the row itself. `create_table` has the statements for such a
    table. The event is

    ``{"table", "id", "timestamp", "value", "columns", "postgres_conn_id"}``, ``timestamp`` the row's
    ``created_at``, a datetime in UTC, and None where there is none; ``columns`` as they were given.

    Rows are marked as committed and not deleted. Delete them when ``[events] commit_memory`` seconds have passed
    since ``committed_at``: until then the row is what tells a repeated commit from somebody else's.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        table: str,
        *,
        columns: Mapping[str, str | None] | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "fail",
        order_by: str | Sequence[str] | None = None,
        channel: str | None = CHANNEL,
        poll_interval: float = 30.0,
        claim_timeout: float | timedelta = 3600.0,
        require_persistence: bool = True,
        postgres_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return when there is a row that no other wait has.

        :param table: ``table``, as the connection's search path finds it, or ``schema.table``. Written as the
            catalog has it: without quotes, and upper case is upper case.
        :param columns: how the table calls what is ``id``, ``value``, ``created_at``, ``claimed_by``,
            ``claimed_at``, ``committed_by`` and ``committed_at`` here: ``{"value": "payload"}``. Columns that are
            not in it go by these names. ``{"created_at": None}`` says that there is none.
        :param values: of what format the value is; see `airflow_events.listeners.values.decode`. ``text`` and
            ``bytes`` of a json column are its text.
        :param on_undecodable: what to do with a row that is not: ``fail`` fails the wait and leaves the row to
            others, ``skip`` commits it, with a warning, and waits on.
        :param order_by: a column or several, by which to take the rows; ``-`` in front puts the largest first.
            None is by ``id``.
        :param channel: where ``NOTIFY`` says that there are new rows. None listens nowhere.
        :param poll_interval: seconds between two looks at the table if nothing is notified.
        :param claim_timeout: after how many seconds a row that a wait has claimed and not committed goes to
            another. A wait that still lives loses nothing by it: its commit is refused, and it waits on.
        :param require_persistence: refuse an unlogged table.
        :param postgres_conn_id: an Airflow connection of type ``postgres``, as the Postgres provider has it: the
            schema is the database, the extras are libpq's options.
        :raises SourceUnfit: the connection is of another type, or has an extra that is no option of libpq; the
            table or a column is missing, or not as it must be; the user may not use it; the server is a standby.
        :raises SourceUnreachable: the server was away, or refused the login, for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        check_choices(values, on_undecodable)
        _check_channel(channel)
        source = _source(postgres_conn_id, table, columns)
        looks = _Looks(_order(order_by), channel, _seconds("poll_interval", poll_interval), require_persistence)
        wait, lapse = current_wait().id, _seconds("claim_timeout", claim_timeout)
        while True:
            async with shared(("postgres", source, looks), lambda: _TableHub(source, looks)) as hub:
                identity, created_at, raw = await hub.take(_Claimer(wait, lapse))
            try:
                value = decode(raw, values, f"the row {identity} of {source}")
            except EventUndecodable as error:
                if on_undecodable == "fail":
                    await source.release(wait, identity, channel)
                    raise
                await source.commit(wait, identity)
                log.warning("Passed over, and committed: %s", error)
            else:
                return {
                    "table": table,
                    "id": identity,
                    "timestamp": created_at,
                    "value": value,
                    "columns": dict(columns or {}),
                    "postgres_conn_id": postgres_conn_id,
                }

    async def event_checkpointed(self, event: Any) -> None:
        """Write into the row who committed it."""
        source = _source(event["postgres_conn_id"], event["table"], event["columns"])
        await source.commit(current_wait().id, event["id"])

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Let another wait have the row at once."""
        table = args[0] if args else kwargs["table"]
        source = _source(kwargs.get("postgres_conn_id", DEFAULT), table, kwargs.get("columns"))
        channel = kwargs.get("channel", CHANNEL)
        await source.release(current_wait().id, event["id"] if event else None, channel)


class PostgresWatchListener(EventListener):
    """
    Wait until a query has a row.

    The event is the first row, as a dict by the names of its columns: null, booleans, integers, floating-point
    numbers, text, json and arrays of these as they are, ``timestamptz`` as a datetime in UTC, ``bytea`` as Base64
    text, and everything else (``numeric``, ``uuid``, ``date``, ``interval``, ...) as the text that PostgreSQL
    writes for it. So are numbers and moments that JSON and Python have not: ``NaN``, ``infinity``.

    It looks at what is, and not at what was: a row that came and went between two looks is not seen, and who
    polls again may get another. Nothing is taken away.
    """

    async def poll_for_event(
        self,
        query: str,
        *,
        parameters: Mapping[str, Any] | Sequence[Any] | None = None,
        interval: float = 10.0,
        channel: str | None = None,
        postgres_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return the first row of ``query`` once it has one.

        Waits with the same query and parameters are one question to the server, and all of a triggerer share a
        connection, over which one question is asked after another: a query that takes long delays the others.

        :param query: one ``SELECT``, ``VALUES``, ``TABLE`` or ``WITH``, which is run in a read-only transaction.
            Beware of those that always have a row: ``SELECT count(*)`` wants a ``HAVING count(*) > 0``.
        :param parameters: what ``%(name)s``, or ``%s`` in their order, in the query stand for; they are bound by
            the server and never become part of its text. If there are any, a percent sign is written ``%%``.
        :param interval: seconds between two looks.
        :param channel: where ``NOTIFY`` asks for a look at once. None listens nowhere.
        :param postgres_conn_id: as of `PostgresListener.poll_for_event`; the server may be a standby.
        :raises SourceUnfit: the server refuses the query, or it has two columns of one name; see also
            `PostgresListener.poll_for_event`.
        :raises SourceUnreachable: the server was away, or refused the login, for too long.
        """
        _check_channel(channel)
        if parameters is not None and (
            isinstance(parameters, str) or not isinstance(parameters, Mapping | Sequence)
        ):
            raise TypeError(f"parameters is a mapping, a sequence or None, not {parameters!r}")
        question = _Question(query, parameters or None)
        asker = _Asker(question, _seconds("interval", interval), channel)
        async with shared(("postgres watch", postgres_conn_id), lambda: _QueryHub(postgres_conn_id)) as hub:
            return dict(await hub.take(asker))


@dataclass(frozen=True)
class _Columns:
    id: str = "id"
    value: str = "value"
    created_at: str | None = "created_at"
    claimed_by: str = "claimed_by"
    claimed_at: str = "claimed_at"
    committed_by: str = "committed_by"
    committed_at: str = "committed_at"


@dataclass(frozen=True)
class _Source:
    conn_id: str
    table: str
    columns: _Columns

    def __str__(self) -> str:
        return f"the table {self.table!r} of the connection {self.conn_id!r}"

    @property
    def identifier(self) -> sql.Identifier:
        return _identifier(*self.table.split("."))

    def statement(self, text: str, **more: sql.Composable) -> sql.Composed:
        """Put the table's names, quoted, into a statement."""
        names = {field.name: getattr(self.columns, field.name) for field in fields(self.columns)}
        identifiers = {name: _identifier(column) for name, column in names.items() if column}
        timestamp: sql.Composable = sql.SQL("NULL")
        if self.columns.created_at:  # Python has no infinite moments, nor any before Christ
            timestamp = sql.SQL(
                "CASE WHEN {0} BETWEEN '0001-01-02' AND '9999-12-30' THEN {0} AT TIME ZONE 'UTC' END"
            ).format(identifiers["created_at"])
        return sql.SQL(text).format(table=self.identifier, timestamp=timestamp, **identifiers, **more)

    async def commit(self, wait: str, identity: int | str) -> None:
        """
        Mark a row that ``wait`` has claimed as committed by it.

        :raises EventLost: another wait has claimed or committed it, or nobody has, or it was deleted.
        """
        with _refusals(str(self)):
            async with _client(self.conn_id) as client:
                answers = await _run(client, self.statement(_COMMIT), {"wait": wait, "id": identity})
        who, committed_by = answers[-1][0] if answers[-1] else (None, None)
        if committed_by != wait:
            holder = who or ("nobody (its claim was taken back)" if answers[-1] else "nobody (it was deleted)")
            raise EventLost(f"the row {identity} of {self} is held by {holder}")

    async def release(self, wait: str, identity: int | str | None, channel: str | None) -> None:
        """Give back what ``wait`` has claimed and not committed, or only the row ``identity``."""
        which = sql.SQL("true") if identity is None else self.statement("{id} = %(id)s")
        async with _client(self.conn_id) as client:
            statement = self.statement(_RELEASE, which=which)
            await _run(client, statement, {"wait": wait, "id": identity, "channel": channel})


def _source(conn_id: str, table: str, columns: Mapping[str, str | None] | None) -> _Source:
    parts = table.split(".")
    if len(parts) > 2 or not all(parts):
        raise ValueError(f"table is 'table' or 'schema.table', not {table!r}")
    known = [field.name for field in fields(_Columns)]
    for name, column in (columns or {}).items():
        if name not in known:
            raise ValueError(f"columns maps {', '.join(map(repr, known))}, not {name!r}")
        if not column and name != "created_at":
            raise ValueError(f"the table needs a column for {name!r}, not {column!r}")
    return _Source(conn_id, table, _Columns(**(columns or {})))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Looks:
    """How a hub looks at its table."""

    order: tuple[str, ...]
    channel: str | None
    interval: float
    require_persistence: bool


class _Claimer(Seeker):
    def __init__(self, wait: str, lapse: float) -> None:
        super().__init__()
        self.wait = wait
        self.lapse = lapse
        self.asked = False
        self.told = False


class _Stuck(Exception):
    """Something is in the way of one wait's claim, and may be gone soon."""


class _TableHub(Hub[_Claimer]):
    """Claims rows for the waits on one table."""

    lost: ClassVar[tuple[type[BaseException], ...]] = _LOST

    def __init__(self, source: _Source, looks: _Looks) -> None:
        self._source = source
        self._looks = looks
        self._claim = source.statement(_CLAIM, order=_ordering(source, looks.order))
        self._connection: AsyncConnection[Any] | None = None
        self._was_primary = False
        self._name_in_notifications = ""
        self._next_look = 0.0
        super().__init__(str(source))

    async def connect(self) -> None:
        await self.disconnect()
        self._connection = await _connect(self._source.conn_id)
        with _refusals(self.name):
            await self._check(self._connection)
            if self._looks.channel is not None:  # before the first look, so that nothing falls between
                await _listen(self._connection, self._looks.channel)
        self._next_look = 0.0

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def serve(self) -> None:
        waiting = [seeker for seeker in self.seekers if not seeker.done]
        assert self._connection is not None
        left = self._next_look - time.monotonic()
        if left <= 0 or not all(seeker.asked for seeker in waiting):
            with _refusals(self.name):
                self._next_look = time.monotonic() + await self._look(self._connection, waiting)
        elif self._looks.channel is None:
            await self.pause(left)
        else:
            async for notification in self._connection.notifies(timeout=min(left, _BLOCK), stop_after=1):
                if notification.payload in ("", self._name_in_notifications):
                    self._next_look = 0.0

    async def _look(self, connection: AsyncConnection[Any], waiting: list[_Claimer]) -> float:
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
        [rows] = await _run(connection, self._source.statement(_HELD), by_wait)
        held = {wait for (wait,) in rows}
        for seeker in waiting:
            if seeker.wait in held:
                with contextlib.suppress(_Stuck):
                    await self._claim_for(connection, seeker)
        if stuck or held:
            return min(self._looks.interval, _SOON)
        [[(age,)]] = await _run(connection, self._source.statement(_OLDEST_CLAIM))
        lapses = math.inf if age is None else min(seeker.lapse for seeker in waiting) - float(age)
        return min(self._looks.interval, max(lapses, _SOON))

    async def _claim_for(self, connection: AsyncConnection[Any], seeker: _Claimer) -> bool:
        """
        Whether the wait was given a row.

        :raises _Stuck: that is not to be known now.
        """
        parameters = {"wait": seeker.wait, "lapse": seeker.lapse}
        try:
            try:
                answers = await _run(connection, self._claim, parameters, raw=True)
            except errors.UniqueViolation:  # another triggerer has just claimed for this wait
                answers = await _run(connection, self._claim, parameters, raw=True)
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
        [[(in_recovery,)]] = await _run(connection, "SELECT pg_is_in_recovery()")
        if in_recovery and self._was_primary:
            raise errors.OperationalError("the server is in recovery: a standby, on which nothing can be claimed")
        if in_recovery:
            raise SourceUnfit(f"{name}: the server is in recovery (a read-only standby); its primary is needed")
        [tables] = await _run(connection, _TABLE, {"table": self._source.identifier.as_string(None)})
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
        [rows] = await _run(connection, _COLUMNS, {"oid": oid, "committed_by": columns.committed_by})
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
        types: dict[str, tuple[str, ...]] = {columns.id: _IDS, columns.value: _VALUES}
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
    """What the catalog says of a column, as `_COLUMNS` has it."""

    type: str
    limited: int
    needed: bool
    readable: bool
    writable: bool
    unique_where: list[str]
    uncommitted: str


class _Question:
    """A query and its parameters; equal if both are, and the parameters' types."""

    def __init__(self, query: str, parameters: Mapping[str, Any] | Sequence[Any] | None) -> None:
        self.query = query
        self.parameters = parameters
        named = sorted(parameters.items()) if isinstance(parameters, Mapping) else parameters
        self._key = (query, repr(named))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Question) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)


class _Asker(Seeker):
    def __init__(self, question: _Question, interval: float, channel: str | None) -> None:
        super().__init__()
        self.question = question
        self.interval = interval
        self.channel = channel


class _QueryHub(Hub[_Asker]):
    """Asks one server the questions of those who watch it, each once for all who ask it."""

    lost: ClassVar[tuple[type[BaseException], ...]] = _LOST

    def __init__(self, conn_id: str) -> None:
        self._conn_id = conn_id
        self._askers: dict[_Question, dict[_Asker, None]] = {}
        self._due: dict[_Question, float] = {}
        self._channels: set[str] = set()
        self._connection: AsyncConnection[Any] | None = None
        super().__init__(f"the connection {conn_id!r}")

    async def connect(self) -> None:
        await self.disconnect()
        self._channels.clear()
        self._connection = await _connect(self._conn_id)
        _load_as_json(self._connection)
        self._due = dict.fromkeys(self._askers, 0.0)

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    def joined(self, seeker: _Asker) -> None:
        self._askers.setdefault(seeker.question, {})[seeker] = None
        # Whoever begins to listen must look once after that.
        at_once = seeker.channel is not None and seeker.channel not in self._channels
        due = 0.0 if at_once else time.monotonic() + seeker.interval
        self._due[seeker.question] = min(self._due.get(seeker.question, 0.0), due)

    def left(self, seeker: _Asker) -> None:
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
            await self.pause(left)
        else:
            async for notification in connection.notifies(timeout=min(left, _BLOCK), stop_after=1):
                for asked, askers in self._askers.items():
                    if any(asker.channel == notification.channel for asker in askers):
                        self._due[asked] = 0.0

    async def _look(self, connection: AsyncConnection[Any], question: _Question) -> None:
        askers = list(self._askers[question])
        self._due[question] = time.monotonic() + min(asker.interval for asker in askers)
        try:
            for channel in {asker.channel for asker in askers if asker.channel} - self._channels:
                await _listen(connection, channel)
                self._channels.add(channel)
            row = await _first_row(connection, question)
        except errors.Error as error:
            if connection.closed:
                raise
            for asker in askers:
                if isinstance(error, errors.OperationalError):  # a time-out, a conflict with a standby's recovery
                    message = "%s: the query did not come to an end, and is asked again in %.0f s: %s"
                    asker.tell(logging.WARNING, message, self.name, asker.interval, error)
                else:
                    asker.fail(SourceUnfit(f"{self.name}: the query {question.query[:200]!r} is refused: {error}"))
        except SourceUnfit as error:
            for asker in askers:
                asker.fail(SourceUnfit(f"{self.name}: {error}"))
        else:
            if row is not None:
                for asker in askers:
                    asker.give(row)


async def _first_row(connection: AsyncConnection[Any], question: _Question) -> dict[str, Any] | None:
    # A server-side cursor fetches one row of however many, and takes one statement only: none that would end
    # the read-only transaction and begin to write.
    try:
        await connection.execute("BEGIN READ ONLY; SET LOCAL datestyle = 'ISO'")
        async with connection.cursor("airflow_events") as cursor:
            await cursor.execute(question.query, question.parameters)
            names = [column.name for column in cursor.description or ()]
            row = await cursor.fetchone()
    finally:
        if not connection.closed:
            await connection.rollback()
    if len(set(names)) < len(names):
        raise SourceUnfit(f"the query {question.query[:200]!r} has two columns of one name: {', '.join(names)}")
    return None if row is None else dict(zip(names, row, strict=True))


class _RawLoader(Loader):
    def load(self, data: Buffer) -> bytes:
        return bytes(data)


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


def _seconds(name: str, given: float | timedelta) -> float:
    seconds = given.total_seconds() if isinstance(given, timedelta) else float(given)
    if not 0 < seconds < 10**9:
        raise ValueError(f"{name} is a number of seconds above 0, not {given!r}")
    return seconds


def _order(order_by: str | Sequence[str] | None) -> tuple[str, ...]:
    order = (order_by,) if isinstance(order_by, str) else tuple(order_by or ())
    if not all(isinstance(name, str) and name.removeprefix("-") for name in order):
        raise ValueError(f"order_by is a column or several, each with '-' in front or without, not {order_by!r}")
    return order


def _ordering(source: _Source, order: tuple[str, ...]) -> sql.Composed:
    terms = [
        sql.SQL("{} DESC" if name.startswith("-") else "{}").format(_identifier(name.removeprefix("-")))
        for name in order
    ]
    return sql.SQL(", ").join([*terms, _identifier(source.columns.id)])


def _identifier(*names: str) -> sql.Identifier:
    if any("%" in name for name in names):  # for which psycopg has no quotes beside parameters
        raise ValueError(f"names with a percent sign are not supported: {'.'.join(names)!r}")
    return sql.Identifier(*names)


def _check_channel(channel: str | None) -> None:
    if channel is not None and not 0 < len(channel.encode()) < 64:
        raise ValueError(f"channel is a name of 1 to 63 bytes, or None, not {channel!r}")


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Say what the server refused, and where."""
    try:
        yield
    except errors.InsufficientPrivilege as error:
        raise SourceUnfit(f"{name}: the connection's user may not use it: {error}") from error
    except (errors.UndefinedTable, errors.UndefinedColumn) as error:
        raise SourceUnfit(f"{name}: it was changed while it was in use: {error}") from error


async def _listen(connection: AsyncConnection[Any], channel: str) -> None:
    await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))


async def _run(
    connection: AsyncConnection[Any],
    query: str | sql.Composed,
    parameters: dict[str, Any] | None = None,
    raw: bool = False,
) -> list[list[tuple[Any, ...]]]:
    """
    Send one message, and return the rows of each of its statements that have rows.

    :param raw: text and json as bytes.
    """
    # Several statements can be one message only if the client puts the parameters in, quoted.
    async with AsyncClientCursor(connection) as cursor:
        for name in ("text", "varchar", "bpchar", "json", "jsonb") if raw else ():
            cursor.adapters.register_loader(name, _RawLoader)
        cursor.adapters.register_loader("uuid", TextLoader)
        await cursor.execute(sql.SQL(query) if isinstance(query, str) else query, parameters)
        answers = []
        while True:
            if cursor.description is not None:
                answers.append(await cursor.fetchall())
            if not cursor.nextset():
                return answers


def _client(conn_id: str) -> contextlib.AbstractAsyncContextManager[AsyncConnection[Any]]:
    """Use the connection by which the waits of this process commit and release."""
    return connected(
        ("postgres client", conn_id),
        lambda: _connect(conn_id),
        AsyncConnection.close,
        lambda client: client.closed,
    )


async def _connect(conn_id: str) -> AsyncConnection[Any]:
    """Connect by an Airflow connection, which is read as the Postgres provider's hook does."""
    found = await connection(conn_id, "postgres")
    options: dict[str, Any] = {
        "host": found.host,
        "port": found.port,
        "user": found.login,
        "password": found.password,
        "dbname": found.schema,
    }
    for name, value in found.extra_dejson.items():
        if name in _HOOK:
            continue
        if name not in _OPTIONS:
            raise SourceUnfit(f"the connection {conn_id!r} has an extra {name!r}, which is no option of libpq")
        options[name] = int(value) if isinstance(value, bool) else value
    given = {name: value for name, value in options.items() if value not in (None, "")}
    # Nothing is prepared at the server: a pooler may send the next statement to another one.
    return await AsyncConnection.connect(
        autocommit=True, prepare_threshold=None, **{**_DEFAULTS, **given, "client_encoding": "utf8"}
    )
