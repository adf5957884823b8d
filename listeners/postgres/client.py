"""Connections to PostgreSQL, made of an Airflow connection; what goes over them; its refusals, as our errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from airflow_events.errors import SourceUnfit
from airflow_events.listeners.connections import connection
from airflow_events.listeners.shared import connected
from psycopg import AsyncClientCursor, AsyncConnection, errors, pq, sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.types.string import TextLoader

# Seconds for which a hub waits for notifications, after which it sees new waits.
BLOCK = 0.5
LOST = (errors.OperationalError, errors.InterfaceError, errors.ReadOnlySqlTransaction, OSError)

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


class _RawLoader(Loader):
    def load(self, data: Buffer) -> bytes:
        return bytes(data)


@contextlib.contextmanager
def refusals(name: str) -> Iterator[None]:
    """Say what the server refused, and where."""
    try:
        yield
    except errors.InsufficientPrivilege as error:
        raise SourceUnfit(f"{name}: the connection's user may not use it: {error}") from error
    except (errors.UndefinedTable, errors.UndefinedColumn) as error:
        raise SourceUnfit(f"{name}: it was changed while it was in use: {error}") from error


async def listen(connection: AsyncConnection[Any], channel: str) -> None:
    """Be told what is notified on ``channel``."""
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
        await cursor.execute(sql.SQL(query) if isinstance(query, str) else query, parameters)
        answers = []
        while True:
            if cursor.description is not None:
                answers.append(await cursor.fetchall())
            if not cursor.nextset():
                return answers


def client_of(conn_id: str) -> contextlib.AbstractAsyncContextManager[AsyncConnection[Any]]:
    """Use the connection by which the waits of this process commit and release."""
    return connected(
        ("postgres client", conn_id),
        lambda: connect(conn_id),
        AsyncConnection.close,
        lambda client: client.closed,
    )


async def connect(conn_id: str) -> AsyncConnection[Any]:
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
