"""Connections to PostgreSQL, made of an Airflow connection; what goes over them; its refusals, as our errors."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from airflow_events.errors import SourceMisconfigured
from airflow_events.listeners.support.connections import (
    check_files,
    connection,
    endpoints,
    flag,
    known_extras,
    misconfigured,
)
from airflow_events.listeners.support.shared import connected
from psycopg import AsyncClientCursor, AsyncConnection, errors, pq, sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.types.string import TextLoader

if TYPE_CHECKING:
    from airflow.sdk import Connection

# Seconds for which a hub waits for notifications, after which it sees new waits.
BLOCK = 0.5
LOST = (
    errors.OperationalError,
    errors.InterfaceError,
    errors.ReadOnlySqlTransaction,
    # After which the server hangs up; they are the role's or the server's settings.
    errors.IdleInTransactionSessionTimeout,
    errors.lookup("25P04"),  # transaction_timeout, since PostgreSQL 17
    OSError,
)
# Seconds that a statement may take, unless the user's own statement_timeout is shorter.
LONGEST = 300
LIMIT = f"""
SELECT set_config('statement_timeout', '{LONGEST}s', true)
WHERE NOT current_setting('statement_timeout')::interval BETWEEN '1 ms' AND '{LONGEST} s'
"""
# Seconds that a hub's look may take: a watch's is two statements.
SERVE_WITHIN = 2 * LONGEST + 60
# Seconds within which a server confirms acknowledgements: a proxy may take them, and never answer.
ANSWER = 60.0
# Seconds that a hub waits in one piece: after `SERVE_WITHIN` it would be taken for silent.
LONGEST_PAUSE = 60.0

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
_FILES = ("sslcert", "sslkey", "sslrootcert", "sslcrl")
# What libpq says of a value that it cannot use, before it has asked any server.
_UNUSABLE = re.compile(
    r"connection is bad: (.*: )?(invalid \"?\w+\"? value|weak sslmode|definition of service|could not parse)"
    r"|could not match"
)


def coordinates(system: str, database: str, table: str, oid: int, row: int | str) -> str:
    """
    Return what tells a row from every other. Its form is frozen: whose an event is, hangs on it.

    :param system: see `system_of`.
    :param table: its name, with the schema's; ``oid`` tells it from one that is made again by that name.
    """
    return json.dumps([system, database, table, oid, str(row)], ensure_ascii=False)


async def system_of(connection: AsyncConnection[Any]) -> str:
    """
    Return which servers a connection is of: a primary and its standbys have one identifier.

    Where the user may not ask for it, it is the connection's host and port, as they are written.
    """
    try:
        [[(system,)]] = await run(connection, "SELECT system_identifier::text FROM pg_control_system()")
    except (errors.InsufficientPrivilege, errors.UndefinedFunction):
        about = connection.info.get_parameters()
        return f"{about.get('host', 'localhost')}:{about.get('port', 5432)}"
    return str(system)


def codec_of(encoding: str) -> str:
    """Return what Python calls an encoding of a database; one that it does not know is read as UTF-8."""
    name = re.sub("^WIN", "cp", encoding) if encoding != "SQL_ASCII" else "utf-8"
    try:
        return codecs.lookup(name).name
    except LookupError:
        return "utf-8"


class _RawLoader(Loader):
    def load(self, data: Buffer) -> bytes:
        return bytes(data)


@contextlib.contextmanager
def refusals(name: str) -> Iterator[None]:
    """Say what the server refused, and where."""
    try:
        yield
    except errors.InsufficientPrivilege as error:
        raise SourceMisconfigured(f"{name}: the connection's user may not use it: {error}") from error
    except (errors.UndefinedTable, errors.UndefinedColumn) as error:
        raise SourceMisconfigured(f"{name}: it was changed while it was in use: {error}") from error


@contextlib.contextmanager
def losses(connection: AsyncConnection[Any]) -> Iterator[None]:
    """Say of whatever ended the connection that it is lost: a pooler has words of its own for that."""
    try:
        yield
    except errors.Error as error:
        if not connection.closed or isinstance(error, LOST):
            raise
        raise errors.OperationalError(f"the connection was closed: {error}") from error


async def listen(connection: AsyncConnection[Any], channel: str) -> None:
    """Be told what is notified on ``channel``."""
    with losses(connection):
        await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))


async def run(
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
        answers = []
        with losses(connection):
            await cursor.execute(sql.SQL(query) if isinstance(query, str) else query, parameters)
            while True:
                if cursor.description is not None:
                    answers.append(await cursor.fetchall())
                if not cursor.nextset():
                    return answers


@contextlib.asynccontextmanager
async def client_of(conn_id: str) -> AsyncIterator[AsyncConnection[Any]]:
    """Use the connection by which the waits of this process acknowledge, for not longer than `ANSWER` seconds."""
    key = ("postgres client", conn_id)
    async with connected(key, lambda: connect(conn_id), AsyncConnection.close, lambda c: c.closed) as client:
        alarm = asyncio.get_running_loop().call_later(ANSWER, _hang_up, client)
        try:
            yield client
        finally:
            alarm.cancel()


def _hang_up(connection: AsyncConnection[Any]) -> None:
    """Let whoever waits for a server's answer get an error."""
    with contextlib.suppress(OSError, errors.Error), socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


async def connect(conn_id: str, *, to_write: bool = True) -> AsyncConnection[Any]:
    """
    Connect by an Airflow connection, which is read as the Postgres provider's hook does.

    :param to_write: of several hosts to the one that lets us, unless the connection says otherwise.
    :raises SourceMisconfigured: it says what cannot be used, or what libpq does not know.
    """
    found = await connection(conn_id, "postgres")
    told = known_extras(found, _OPTIONS | _HOOK)
    if flag(found, told, "iam"):
        raise misconfigured(
            found, "has the extra iam=true, and no token of AWS or Azure is fetched here; give a password"
        )
    options: dict[str, Any] = {"user": found.login, "password": found.password, "dbname": found.schema}
    options |= _where(found)
    options |= {
        name: int(value) if isinstance(value, bool) else value for name, value in told.items() if name not in _HOOK
    }
    if to_write and "," in (options["host"] or ""):
        options.setdefault("target_session_attrs", "read-write")
    given = {name: value for name, value in options.items() if value not in (None, "")}
    await check_files(found, *(given[name] for name in _FILES if name in given and given[name] != "system"))
    try:
        # Nothing is prepared at the server: a pooler may send the next statement to another one.
        return await AsyncConnection.connect(
            autocommit=True, prepare_threshold=None, **{**_DEFAULTS, **given, "client_encoding": "utf8"}
        )
    except errors.ProgrammingError as error:
        raise misconfigured(found, f"cannot be used: {error}") from error
    except errors.OperationalError as error:
        if _UNUSABLE.search(str(error)):
            raise misconfigured(found, f"cannot be used: {error}") from error
        raise


def _where(found: Connection) -> dict[str, Any]:
    """Return libpq's host and port. Of several hosts each has a port of its own, or the connection's."""
    if not found.host or found.host.startswith("/"):  # a folder with the server's socket
        return {"host": found.host, "port": found.port}
    nodes = endpoints(found)
    ports = [str(node.port or "") for node in nodes]
    return {"host": ",".join(node.host for node in nodes), "port": ",".join(ports) if any(ports) else None}
