"""Redis's client, made of an Airflow connection; its errors, as ours; and what an entry becomes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from airflow_events.errors import EventUndecodable, SourceUnfit
from airflow_events.listeners.connections import connection
from airflow_events.listeners.shared import connected
from airflow_events.listeners.values import Format, decode
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import BlockingConnectionPool, Connection, SSLConnection

# Milliseconds for which a hub's read blocks on the server, after which it sees new waits.
BLOCK = 500
LOST = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.BusyLoadingError, OSError)
_TLS = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_keyfile", "ssl_certfile", "ssl_check_hostname")


@dataclass(frozen=True)
class Source:
    """A stream of a connection, and the consumer group; watches have none."""

    conn_id: str
    stream: str
    group: str = ""

    def __str__(self) -> str:
        group = f" (group {self.group!r})" if self.group else ""
        return f"the stream {self.stream!r}{group} of the connection {self.conn_id!r}"


def event_of(
    source: Source, entry: str, fields: dict[bytes, bytes], field: str | None, values: Format
) -> dict[str, Any]:
    """
    Return the event that an entry becomes.

    :raises EventUndecodable: it has no such field, or that is not of the format.
    """
    where = f"the entry {entry} of {source}"
    value: Any
    if field is None:
        value = {_decoded(name, where): _decoded(content, where) for name, content in fields.items()}
    elif field.encode() not in fields:
        there = ", ".join(repr(name) for name in fields)
        raise EventUndecodable(where, values, f"it has no field {field!r}, only {there}", b"")
    else:
        value = decode(fields[field.encode()], values, f"the field {field!r} of {where}")
    event = {"stream": source.stream, "id": entry, "timestamp": moment(entry), "value": value}
    return event if not source.group else {**event, "group": source.group}


def _decoded(raw: bytes, where: str) -> str:
    return str(decode(raw, "text", where))


def moment(entry: str) -> datetime:
    """Return when an entry was added, as its id says."""
    return datetime.fromtimestamp(int(entry.partition("-")[0]) / 1000, timezone.utc)


def text(value: Any) -> str:
    """Return what the server gave as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


@contextlib.contextmanager
def refusals(source: Source) -> Any:
    """Say what the server refused, and where."""
    try:
        yield
    except (exceptions.AuthenticationError, exceptions.AuthorizationError) as error:
        raise SourceUnfit(f"{source}: the server refuses the connection's login: {error}") from error
    except exceptions.NoPermissionError as error:
        raise SourceUnfit(f"{source}: the connection's user may not use it: {error}") from error
    except exceptions.ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
        raise SourceUnfit(f"{source}: there is a key of that name, and it is no stream") from error


def client_of(conn_id: str) -> contextlib.AbstractAsyncContextManager[Redis]:
    """Use the client by which the waits of this process commit and release."""
    return connected(("redis client", conn_id), lambda: connect(conn_id, 4), Redis.aclose)


async def connect(conn_id: str, connections: int) -> Redis:
    """Make a client of an Airflow connection, which is read as the Redis provider's hook does."""
    found = await connection(conn_id, "redis")
    extra = found.extra_dejson
    if extra.get("cluster"):
        raise SourceUnfit(f"the connection {conn_id!r} is of a cluster, which is not supported yet")
    secure = str(extra.get("ssl", False)).lower() in ("true", "1")
    tls = {name: extra[name] for name in _TLS if name in extra} if secure else {}
    password = None if str(found.password).lower() in ("none", "false", "") else found.password
    pool = BlockingConnectionPool(
        connection_class=SSLConnection if secure else Connection,
        max_connections=connections,
        host=found.host or "localhost",
        port=found.port or 6379,
        username=found.login or None,
        password=password,
        db=int(extra.get("db") or 0),
        client_name="airflow-events",
        health_check_interval=30,
        **tls,
    )
    return Redis.from_pool(pool)
