"""A table as a queue: its columns, and the statements that read and acknowledge its rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from airflow_events.errors import SourceMisconfigured
from airflow_events.listeners.postgres.client import LIMIT, client_of, refusals, run
from airflow_events.listeners.support.values import Match
from psycopg import AsyncConnection, errors, sql

OnCommit = Literal["mark", "delete"]

_TEXTS = ("json", "jsonb", "text", "character varying", "character")
VALUES = (*_TEXTS, "bytea")
# That somebody has a row, or the table, for the moment.
_LOCKED = (errors.LockNotAvailable, errors.DeadlockDetected)
# What one row of many may be refused for: also a constraint, a trigger's own error.
_OF_ROWS = (*_LOCKED, errors.IntegrityError, errors.RaiseException, errors.DataError)

CREATE = """\
CREATE TABLE {table} (
    {id} bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    {value} {type},
    {created_at} timestamptz NOT NULL DEFAULT clock_timestamp(){acknowledged}
);
{index}-- Who waits is told at once. Without it events are seen at the next look, poll_interval seconds apart.
CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify(TG_ARGV[0], TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME);
    RETURN NULL;
END $$;
CREATE TRIGGER airflow_events_notify AFTER INSERT ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION {function}({channel});
"""

ACKNOWLEDGED = """,
    {acknowledged_at} timestamptz  -- null until a wait has recorded the event"""

INDEX = """\
-- What is still to be taken, in its order. Without it each look reads past all that was ever acknowledged.
CREATE INDEX ON {table} ({id}) WHERE {acknowledged_at} IS NULL;
"""

CREATE_DEAD_LETTERS = """\
CREATE TABLE {table} (
    id text,     -- of the row that could not be read
    value text,  -- as PostgreSQL writes a bytea, if it is no text
    reason text,
    at timestamptz
);
"""


# Each of these is one message to the server, which carries it out as one transaction or not at all, whatever
# becomes of the client: nobody dies holding a lock. An isolation level that somebody chose as a default, a
# commit that does not wait for the disk, or a lock of somebody's forgotten session must not come in.
_READ = f"""
SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ ONLY;
SET LOCAL lock_timeout = '2s';
{LIMIT};
"""
_WRITE = f"""
SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE;
SELECT set_config('lock_timeout', %(patience)s, true);
SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off';
{LIMIT};
"""

# No lock: one that is held until the event is recorded would block the acknowledgement, and pins what vacuum may
# remove. No position either: a transaction that took its number early may commit late.
LOOK = f"""{_READ}
{{rows}}
SELECT to_regclass({{name}})::oid
"""

# What is to be taken at all, and is in nobody's hand.
_OPEN = "{unacknowledged} AND {id} IS NOT NULL AND {id} <> ALL(%(held)s)"

# The first rows, whatever they are.
ANY = f"""
SELECT {{id}}, {{timestamp}}, {{read}}, 0 FROM {{table}} WHERE {_OPEN}
ORDER BY {{order}} LIMIT %(wanted)s;
"""

# For each value that is wanted in the same fields, the first rows with it, and which value it is.
MATCHING = f"""
SELECT id, created_at, value, which FROM (
    SELECT
        {{id}} AS id, {{timestamp}} AS created_at, {{read}} AS value, airflow_events_which AS which,
        airflow_events_most AS most,
        row_number() OVER (PARTITION BY airflow_events_which ORDER BY {{order}}) AS nth
    FROM {{table}} JOIN unnest({{texts}}, {{most}}::int[]) WITH ORDINALITY
        AS airflow_events_wanted({{names}}, airflow_events_most, airflow_events_which) ON {{equal}}
    WHERE {_OPEN}
) AS found WHERE nth <= most ORDER BY nth, which LIMIT {{limit}};
"""

# A table that was made again has rows by the same ids, and they are others.
_WHICH = "{id} = ANY(%(ids)s) AND coalesce(to_regclass({name})::oid = %(oid)s::oid, true)"

_MARK = f"""{_WRITE}
UPDATE {{table}} SET {{acknowledged_at}} = clock_timestamp() WHERE {_WHICH} AND {{acknowledged_at}} IS NULL;
SELECT {{id}} FROM {{table}} WHERE {_WHICH} AND {{acknowledged_at}} IS NULL
"""

_DELETE = f"""{_WRITE}
DELETE FROM {{table}} WHERE {_WHICH};
SELECT {{id}} FROM {{table}} WHERE {_WHICH}
"""

_BURY = f"""{_WRITE}
INSERT INTO {{dead_letters}} (id, value, reason, at)
VALUES (%(id)s, %(value)s, %(reason)s, clock_timestamp())
"""


TABLE = """
SELECT
    current_database(), n.nspname || '.' || c.relname, c.oid, c.relkind, c.relpersistence,
    has_table_privilege(c.oid, 'DELETE'), EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid),
    current_setting('server_encoding')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%(table)s)
"""


COLUMNS = """
SELECT
    a.attname,
    (
        WITH RECURSIVE kinds(oid) AS (
            SELECT a.atttypid
            UNION SELECT t.typbasetype FROM pg_type t JOIN kinds USING (oid) WHERE t.typtype = 'd'
        )
        SELECT format_type(oid, NULL) FROM kinds JOIN pg_type t USING (oid) WHERE t.typtype <> 'd'
    ) AS type,
    a.attnotnull AS needed,
    has_column_privilege(a.attrelid, a.attnum, 'SELECT') AS readable,
    has_column_privilege(a.attrelid, a.attnum, 'UPDATE') AS writable,
    EXISTS (
        SELECT FROM pg_index i
        WHERE i.indrelid = a.attrelid AND i.indisunique AND i.indisvalid AND i.indimmediate
        AND i.indpred IS NULL AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum
    ) AS is_unique
FROM pg_attribute a
WHERE a.attrelid = %(oid)s AND a.attnum > 0 AND NOT a.attisdropped
"""


@dataclass(frozen=True)
class Columns:
    """How the table calls what is called so here."""

    id: str = "id"
    value: str = "value"
    created_at: str | None = "created_at"
    acknowledged_at: str = "acknowledged_at"


@dataclass(frozen=True)
class Source:
    """A table of a connection, and what becomes of a row that is acknowledged."""

    conn_id: str
    table: str
    columns: Columns
    on_commit: OnCommit

    def __str__(self) -> str:
        return f"the table {self.table!r} of the connection {self.conn_id!r}"

    @property
    def identifier(self) -> sql.Identifier:
        return identifier(*self.table.split("."))

    def statement(self, text: str, **more: sql.Composable) -> sql.Composed:
        """Put the table's names, quoted, into a statement."""
        names = {field.name: getattr(self.columns, field.name) for field in fields(self.columns)}
        identifiers = {name: identifier(column) for name, column in names.items() if column}
        timestamp: sql.Composable = sql.SQL("NULL")
        if self.columns.created_at:  # Python has no infinite moments, nor any before Christ
            timestamp = sql.SQL(
                "CASE WHEN {0} BETWEEN '0001-01-02' AND '9999-12-30' THEN {0} AT TIME ZONE 'UTC' END"
            ).format(identifiers["created_at"])
        name = sql.Literal(self.identifier.as_string(None))
        given = {"table": self.identifier, "name": name, "timestamp": timestamp, **identifiers, **more}
        return sql.SQL(text).format(**given)

    async def acknowledge(self, oid: int | None, rows: Sequence[int | str]) -> dict[int | str, Exception]:
        """
        Mark rows as acknowledged, or delete them; of those that are gone, or marked already, change nothing.

        :param oid: the table's, when they were read; None if that is not known.
        :return: why it could not, of those that it could not.
        """
        with refusals(str(self)):
            async with client_of(self.conn_id) as client:
                try:
                    return await self._acknowledge(client, oid, rows, "2s")
                except _OF_ROWS:  # of which the others must not suffer
                    refused: dict[int | str, Exception] = {}
                    for row in rows:
                        refused |= await self._acknowledge_one(client, oid, row)
                    return refused

    async def _acknowledge_one(
        self, client: AsyncConnection[Any], oid: int | None, row: int | str
    ) -> dict[int | str, Exception]:
        try:
            return await self._acknowledge(client, oid, [row], "50ms")
        except _LOCKED:
            return {row: errors.LockNotAvailable(f"{self}: somebody has locked the row {row}, or the table")}
        except _OF_ROWS as error:
            return {row: SourceMisconfigured(f"{self}: the row {row} cannot be acknowledged: {error}")}

    async def _acknowledge(
        self, client: AsyncConnection[Any], oid: int | None, rows: Sequence[int | str], patience: str
    ) -> dict[int | str, Exception]:
        statement = self.statement(_MARK if self.on_commit == "mark" else _DELETE)
        ids = [str(row) for row in rows]  # as text, to which the server gives the column's type
        [*_, left] = await run(client, statement, {"oid": oid, "ids": ids, "patience": patience})
        unchanged = {str(row) for (row,) in left}
        return {
            row: SourceMisconfigured(
                f"{self}: the server has not acknowledged the row {row}, without an error: a policy of row-level "
                "security or a trigger keeps the connection's user from it"
            )
            for row in rows
            if str(row) in unchanged
        }

    async def bury(self, row: int | str, raw: bytes | None, reason: str, dead_letters: str) -> None:
        """Add a row that cannot be read to the table for such."""
        statement = self.statement(_BURY, dead_letters=identifier(*dead_letters.split(".")))
        with refusals(f"{self}, and its dead letters in {dead_letters!r}"):
            async with client_of(self.conn_id) as client:
                told = {"id": str(row), "value": _text_of(raw), "reason": reason.replace("\0", "\\0")}
                await run(client, statement, {**told, "patience": "2s"})


def source_of(
    conn_id: str, table: str, columns: Mapping[str, str | None] | None, on_commit: OnCommit = "mark"
) -> Source:
    """
    Return the table that a user has named.

    :raises ValueError: it is no name of a table, or ``columns`` has something else than its columns.
    """
    check_table(table)
    if on_commit not in ("mark", "delete"):
        raise ValueError(f"on_commit is 'mark' or 'delete', not {on_commit!r}")
    known = [field.name for field in fields(Columns)]
    for name, column in (columns or {}).items():
        if name not in known:
            raise ValueError(f"columns maps {', '.join(map(repr, known))}, not {name!r}")
        if not column and name != "created_at":
            raise ValueError(f"the table needs a column for {name!r}, not {column!r}")
    _check_quotable(*filter(None, (columns or {}).values()))
    return Source(conn_id, table, Columns(**(columns or {})), on_commit)  # type: ignore[arg-type]


def check_table(table: str, name: str = "table") -> None:
    """
    Check what a user calls a table.

    :param name: of the parameter.
    :raises ValueError: it is no name of a table.
    """
    parts = table.split(".")
    if len(parts) > 2 or not all(parts):
        raise ValueError(f"{name} is 'table' or 'schema.table', not {table!r}")
    _check_quotable(table)


Wanted = tuple[tuple[str, ...], tuple[str, ...]]
"""Fields of a value, and what each of them must be."""


def wanted_of(match: Mapping[str, Any] | None) -> Wanted | None:
    """
    Return what a user wants to find in rows; None if it is anything.

    :raises TypeError: it is no mapping of fields to text, numbers or booleans.
    """
    if match is None:
        return None
    if not isinstance(match, Mapping) or not match:
        raise TypeError(
            f"match is a mapping of fields of the value to what they must be, or None, not {match!r}: the server "
            "looks for rows, and knows no JMESPath"
        )
    for field, value in match.items():
        if not isinstance(field, str) or not isinstance(value, (str, int, float)):
            raise TypeError(f"match maps fields to text, numbers or booleans, not {field!r} to {value!r}")
    key = Match({field: _without_exponent(value) for field, value in match.items()}).key
    assert key is not None
    return key


def _without_exponent(value: Any) -> Any:
    """Return a number near zero, 1e-05 say, as PostgreSQL writes it; what is whole `Match` writes so."""
    return format(Decimal(repr(value)), "f") if isinstance(value, float) and "e-" in repr(value) else value


class Look(NamedTuple):
    """
    One look at a table.

    :ivar asked: its parameters.
    :ivar found_by: of each of its answers but the last, what its rows have, numbered from 1; nothing if they are
        any.
    """

    statement: sql.Composed
    asked: dict[str, Any]
    found_by: list[list[Wanted]]


def looking(
    source: Source,
    order: sql.Composable,
    unacknowledged: sql.Composable,
    read: sql.Composable,
    wanted: Mapping[Wanted | None, int],
    limit: int,
) -> Look:
    """
    Return the statement of a look; its parameter ``held`` is still to be given.

    :param read: the value, as it is read.
    :param wanted: what waits want, and how many of them; None is any row.
    :param limit: how many rows an answer has at most.
    """
    more = {"order": order, "unacknowledged": unacknowledged, "read": read, "limit": sql.Literal(limit)}
    asked: dict[str, Any] = {}
    parts: list[sql.Composable] = []
    by_fields: dict[tuple[str, ...], list[Wanted]] = {}
    for one in wanted:
        if one is not None:
            by_fields.setdefault(one[0], []).append(one)
    if None in wanted:
        asked["wanted"] = min(wanted[None], limit)
        parts.append(source.statement(ANY, **more))

    def parameter(value: Any) -> sql.Placeholder:  # in which there may be a percent sign
        name = f"asked_{len(asked)}"
        asked[name] = value
        return sql.Placeholder(name)

    def field(name: str) -> sql.Composed:
        """Return a field of the value as text, in a form of which there may be an index."""
        *path, last = name.split(".")
        value = identifier(source.columns.value)
        if not path:
            return sql.SQL("({} ->> {}::text)").format(value, parameter(last))
        return sql.SQL("({} #>> {}::text[])").format(value, parameter([*path, last]))

    found_by: list[list[Wanted]] = [[]] if None in wanted else []
    for names, ones in by_fields.items():
        columns, texts, equal = [], [], []
        written = [(one, values) for one in ones for values in _as_written(one)]
        found_by.append([one for one, _ in written])
        for number, name in enumerate(names):
            column = sql.Identifier(f"airflow_events_{number}")
            columns.append(column)
            texts.append(sql.SQL("{}::text[]").format(parameter([values[number] for _, values in written])))
            equal.append(sql.SQL("{} = {}").format(field(name), column))
        parts.append(
            source.statement(
                MATCHING,
                texts=sql.SQL(", ").join(texts),
                most=parameter([wanted[one] for one, _ in written]),
                names=sql.SQL(", ").join(columns),
                equal=sql.SQL(" AND ").join(equal),
                **more,
            )
        )
    return Look(source.statement(LOOK, rows=sql.Composed(parts)), asked, found_by)


# A text that `Match` takes for JSON's may stand in a value as a template has written it.
_IN_A_TEXT = {"true": "True", "false": "False", "null": "None"}


def _as_written(one: Wanted) -> Iterable[tuple[str, ...]]:
    """Return the texts that the fields of a value may have."""
    return itertools.product(*((text, _IN_A_TEXT[text]) if text in _IN_A_TEXT else (text,) for text in one[1]))


def ordering(source: Source, order: tuple[str, ...]) -> sql.Composed:
    """Return what rows are taken by: the columns of ``order``, and then the id."""
    terms = [
        sql.SQL("{} DESC" if name.startswith("-") else "{}").format(identifier(name.removeprefix("-")))
        for name in order
    ]
    return sql.SQL(", ").join([*terms, identifier(source.columns.id)])


def identifier(*names: str) -> sql.Identifier:
    """
    Quote a name and what it is in.

    :raises ValueError: it has a percent sign.
    """
    _check_quotable(*names)
    return sql.Identifier(*names)


def _check_quotable(*names: str) -> None:
    for name in names:
        if "%" in name:  # for which psycopg has no quotes beside parameters
            raise ValueError(f"names with a percent sign are not supported: {name!r}")


def _text_of(raw: bytes | None) -> str | None:
    """Return a value as text, or as PostgreSQL writes a bytea if it is none."""
    if raw is None:
        return None
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = "\0"
    return f"\\x{raw.hex()}" if "\0" in text else text
