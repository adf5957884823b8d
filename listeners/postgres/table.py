"""A table as a queue: its columns, and the statements that claim, commit and give back its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from airflow_events.errors import EventLost
from airflow_events.listeners.postgres.client import client_of, refusals, run
from psycopg import sql

_TEXTS = ("json", "jsonb", "text", "character varying", "character")
VALUES = (*_TEXTS, "bytea")

CREATE = """\
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
CLAIM = f"""{_BEGIN}
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


HELD = "SELECT {claimed_by} FROM {table} WHERE {claimed_by} = ANY(%(waits)s::text[]) AND {committed_by} IS NULL"

OLDEST_CLAIM = """
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


TABLE = """
SELECT c.oid, c.relkind, c.relpersistence, n.nspname || '.' || c.relname
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%(table)s)
"""


COLUMNS = """
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


@dataclass(frozen=True)
class Columns:
    """How the table calls what is called so here."""

    id: str = "id"
    value: str = "value"
    created_at: str | None = "created_at"
    claimed_by: str = "claimed_by"
    claimed_at: str = "claimed_at"
    committed_by: str = "committed_by"
    committed_at: str = "committed_at"


@dataclass(frozen=True)
class Source:
    """A table of a connection."""

    conn_id: str
    table: str
    columns: Columns

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
        return sql.SQL(text).format(table=self.identifier, timestamp=timestamp, **identifiers, **more)

    async def commit(self, wait: str, identity: int | str) -> None:
        """
        Mark a row that ``wait`` has claimed as committed by it.

        :raises EventLost: another wait has claimed or committed it, or nobody has, or it was deleted.
        """
        with refusals(str(self)):
            async with client_of(self.conn_id) as client:
                answers = await run(client, self.statement(_COMMIT), {"wait": wait, "id": identity})
        who, committed_by = answers[-1][0] if answers[-1] else (None, None)
        if committed_by != wait:
            holder = who or ("nobody (its claim was taken back)" if answers[-1] else "nobody (it was deleted)")
            raise EventLost(f"the row {identity} of {self} is held by {holder}")

    async def release(self, wait: str, identity: int | str | None, channel: str | None) -> None:
        """Give back what ``wait`` has claimed and not committed, or only the row ``identity``."""
        which = sql.SQL("true") if identity is None else self.statement("{id} = %(id)s")
        async with client_of(self.conn_id) as client:
            statement = self.statement(_RELEASE, which=which)
            await run(client, statement, {"wait": wait, "id": identity, "channel": channel})


def source_of(conn_id: str, table: str, columns: Mapping[str, str | None] | None) -> Source:
    """
    Return the table that a user has named.

    :raises ValueError: it is no name of a table, or ``columns`` has something else than its columns.
    """
    parts = table.split(".")
    if len(parts) > 2 or not all(parts):
        raise ValueError(f"table is 'table' or 'schema.table', not {table!r}")
    known = [field.name for field in fields(Columns)]
    for name, column in (columns or {}).items():
        if name not in known:
            raise ValueError(f"columns maps {', '.join(map(repr, known))}, not {name!r}")
        if not column and name != "created_at":
            raise ValueError(f"the table needs a column for {name!r}, not {column!r}")
    return Source(conn_id, table, Columns(**(columns or {})))  # type: ignore[arg-type]


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
    if any("%" in name for name in names):  # for which psycopg has no quotes beside parameters
        raise ValueError(f"names with a percent sign are not supported: {'.'.join(names)!r}")
    return sql.Identifier(*names)
