"""Redis's client, made of an Airflow connection; its errors, as ours; and what an entry becomes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from airflow_events.errors import EventUndecodable, SourceMisconfigured
from airflow_events.listeners.support.connections import (
    Endpoint,
    check_files,
    connection,
    context,
    endpoints,
    flag,
    hosts,
    is_pem,
    known_extras,
    misconfigured,
    number,
    secure,
)
from airflow_events.listeners.support.hub import LoginRefused
from airflow_events.listeners.support.shared import OnePerLoop, connected
from airflow_events.listeners.support.timestamps import of_epoch
from airflow_events.listeners.support.values import Format, decode, digest_of
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import BlockingConnectionPool, SSLConnection
from redis.asyncio.connection import Connection as RedisConnection
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool

if TYPE_CHECKING:
    from airflow.sdk import Connection

# Milliseconds for which a hub's read blocks on the server, after which it sees new waits.
BLOCK = 500
LOST = (
    exceptions.ConnectionError,  # of which a Sentinel that knows no server is a kind
    exceptions.TimeoutError,
    exceptions.BusyLoadingError,
    exceptions.ClusterDownError,
    exceptions.RedisClusterException,
    exceptions.ClusterError,  # its nodes send the client to one another, as while slots move
    OSError,
)
# What a server answers while it changes its role, starts, or has no room: it goes away by itself, or by what
# whoever runs the server does. Of a script's error the word may be within.
_PASSING = re.compile(
    r"\b(READONLY|UNBLOCKED|LOADING|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|NOREPLICAS|MISCONF|OOM|BUSY"
    r"|max number of clients)\b"
)
# Those that the client has a class for; it takes the word away.
_PASSING_TYPES = (
    exceptions.ReadOnlyError,
    exceptions.MasterDownError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
    exceptions.OutOfMemoryError,
)
# Seconds to connect in, and that the server may take for an answer, many times `BLOCK`.
_CONNECT, _ANSWER = 10, 30
# Seconds that a Sentinel has for an answer, before another is asked.
_PATIENCE = 5
# How many acknowledge at once, of what another process received; and connections to a node of a cluster, where
# one more than there may be is refused.
_AT_ONCE, _TO_A_NODE = 4, 32
_PORT, _SENTINEL_PORT = 6379, 26379
_SAFE = ("rediss", "valkeys")
_SCHEMES = ("redis", "valkey", *_SAFE)
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
# How the Redis provider and redis-py call it, and what people write who have read Python's documentation.
_CHECKS = {
    "required": "required", "cert_required": "required", "optional": "optional", "cert_optional": "optional",
    "none": "none", "cert_none": "none",
}  # fmt: skip
_EXTRAS = frozenset({
    "db", "cluster", "startup_nodes", "ssl", "ssl_cert_reqs", "ssl_check_hostname", *_FILES,
    "sentinel_master", "sentinel_username", "sentinel_password",
})  # fmt: skip


def coordinates(server: str, stream: str, group: str, entry: str) -> str:
    """Return what tells an entry of a group from every other. Its form is frozen."""
    return json.dumps([server, stream, group, entry], ensure_ascii=False)


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
    if not source.group:
        return event
    return {**event, "group": source.group, "digest": digest_of(*itertools.chain(*fields.items()))}


def _decoded(raw: bytes, where: str) -> str:
    return str(decode(raw, "text", where))


def moment(entry: str) -> datetime | None:
    """Return when an entry was added, as its id says; None for an id that is no moment."""
    return of_epoch(int(entry.partition("-")[0]))


def text(value: Any) -> str:
    """Return what the server gave as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


@contextlib.contextmanager
def refusals(source: Source) -> Any:
    """Say what the server refused, and where; what goes away by itself becomes one of `LOST`."""
    try:
        yield
    except (exceptions.AuthenticationError, exceptions.AuthorizationError) as error:
        raise LoginRefused(f"{source}: the server refuses the connection's login: {error}") from error
    except exceptions.NoPermissionError as error:
        raise SourceMisconfigured(f"{source}: the connection's user may not use it: {error}") from error
    except exceptions.ResponseError as error:
        if isinstance(error, _PASSING_TYPES) or _PASSING.search(str(error)):
            raise exceptions.ConnectionError(f"the server answers: {error}") from error
        if isinstance(error, exceptions.AskError):  # of which what a moved slot is answered with is a kind
            raise SourceMisconfigured(
                f"{source}: the server is of a cluster; give the connection the extra cluster=true"
            ) from error
        if "DB index is out of range" in str(error):
            raise SourceMisconfigured(
                f"{source}: the server has no database of the number that the connection names"
            ) from error
        if "WRONGTYPE" not in str(error):
            raise
        raise SourceMisconfigured(f"{source}: there is a key of that name, and it is no stream") from error
    except exceptions.RedisClusterException as error:  # no node answers, or none as it should
        if isinstance(error.__cause__, exceptions.AuthenticationError):
            raise LoginRefused(
                f"{source}: the server refuses the connection's login: {error.__cause__}"
            ) from error
        if "Cluster mode is not enabled" in str(error):
            raise SourceMisconfigured(
                f"{source}: the connection says that it is of a cluster, and the server is none"
            ) from error
        raise


class _Turns(OnePerLoop):
    """Who may use such a client: that of a cluster refuses at once what it has no connection for."""

    def __init__(self) -> None:
        self.of: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(_AT_ONCE))


@contextlib.asynccontextmanager
async def client_of(conn_id: str) -> AsyncIterator[Redis]:
    """Use the client by which this process acknowledges what another one received."""
    async with (
        connected(
            ("redis client", conn_id), lambda: connect(conn_id, _AT_ONCE), lambda client: client.aclose()
        ) as client,
        _Turns.of_loop().of[conn_id],
    ):
        yield client


async def connect(conn_id: str, connections: int) -> Redis:
    """Make a client of an Airflow connection: see `named`."""
    client, _ = await named(conn_id, connections)
    return client


async def named(conn_id: str, connections: int) -> tuple[Redis, str]:
    """
    Make a client of an Airflow connection, and name its server and database, as the connection does.

    It is ``host:port/db``; with Sentinels the name of what they watch, ``name/db``; of a cluster all hosts. Redis
    has no name of its own that outlives its restart, so one server by two names is two.

    :param connections: how many the client has at most; of a cluster's, to each node.
    :raises SourceMisconfigured: it says what cannot be used, or what is not known here.
    """
    found = await connection(conn_id, *_SCHEMES)
    told = known_extras(found, _EXTRAS)
    nodes = endpoints(found, *_SCHEMES) + _startup_nodes(found, told)
    options = {
        "username": found.login or None,
        "password": None if str(found.password).lower() in ("none", "false", "") else found.password,
        "client_name": "airflow-events",
        "socket_keepalive": True,
        "socket_connect_timeout": _CONNECT,
        "socket_timeout": _ANSWER,
        **await _tls(found, told, nodes),
    }
    database = _database(found, told)
    if flag(found, told, "cluster"):
        if database or "sentinel_master" in told:
            raise misconfigured(found, "is of a cluster, which has no database but 0, and no Sentinel")
        return _of_cluster(nodes, options, connections), ",".join(sorted(_name(node) for node in nodes)) + "/0"
    if len(nodes) > 1 and "sentinel_master" not in told:
        raise misconfigured(found, "names several hosts, and neither cluster=true nor a sentinel_master")
    options |= {"db": database, "health_check_interval": 30, "max_connections": connections}
    if "sentinel_master" in told:
        return _of_sentinels(nodes, told, options), f"{told['sentinel_master']}/{database}"
    return _of_one(nodes[0], options), f"{_name(nodes[0])}/{database}"


def _name(node: Endpoint) -> str:
    return f"{node.host}:{node.port or _PORT}"


def _startup_nodes(found: Connection, told: dict[str, Any]) -> list[Endpoint]:
    """Return the further nodes of a cluster, which the Redis provider has in an extra of their own."""
    if "startup_nodes" not in told:
        return []
    if not flag(found, told, "cluster"):
        raise misconfigured(found, "has the extra 'startup_nodes', which are a cluster's, and no cluster=true")
    nodes = told["startup_nodes"]
    if isinstance(nodes, str):
        return hosts(found, nodes)
    try:
        texts = [
            node if isinstance(node, str) else Endpoint("", node["host"], None).address(node.get("port", _PORT))
            for node in nodes
        ]
    except (AttributeError, KeyError, TypeError):
        wanted = "'host:port,host:port', or a list of such texts or of {'host': …, 'port': …}"
        raise misconfigured(found, f"has the extra startup_nodes={nodes!r}, where {wanted} is needed") from None
    return hosts(found, ",".join(texts))


def _database(found: Connection, told: dict[str, Any]) -> int:
    """Return the number of the database: the extra ``db``, or the path of the connection's URI."""
    path = found.schema or ""
    if path and not path.isdecimal():
        raise misconfigured(found, f"has the schema {path!r}, where there may be the number of a database")
    database = number(found, told, "db", int(path or 0))
    if path and database != int(path):
        raise misconfigured(found, f"has the schema {path!r}, and the extra db={database}")
    return database


async def _tls(found: Connection, told: dict[str, Any], nodes: list[Endpoint]) -> dict[str, Any]:
    """Return the client's settings for TLS, and see that the files in them can be used."""
    safe = found.conn_type in _SAFE or any(node.scheme in _SAFE for node in nodes)
    if not secure(found, told, "ssl", safe, _FILES):
        return {}
    checked = str(told.get("ssl_cert_reqs", "required")).lower()
    if checked not in _CHECKS:
        wanted = "'required', 'optional' or 'none'"
        raise misconfigured(found, f"has the extra ssl_cert_reqs={checked!r}, where {wanted} is needed")
    files = {name: told[name] for name in _FILES if name in told}
    await context(found, *(files.get(name) for name in _FILES))
    await check_files(found, files.get("ssl_certfile"), files.get("ssl_keyfile"))
    if is_pem(files.get("ssl_ca_certs")):
        files["ssl_ca_data"] = files.pop("ssl_ca_certs")
    if "ssl_certfile" in files:  # redis-py before 7 sends no certificate whose key is not named, too
        files.setdefault("ssl_keyfile", files["ssl_certfile"])
    by_name = flag(found, told, "ssl_check_hostname", _CHECKS[checked] != "none")
    return {"ssl": True, "ssl_cert_reqs": _CHECKS[checked], "ssl_check_hostname": by_name, **files}


def _of_one(node: Endpoint, options: dict[str, Any]) -> Redis:
    safe = options.pop("ssl", False)
    pool = BlockingConnectionPool(
        connection_class=SSLConnection if safe else RedisConnection,
        host=node.host,
        port=node.port or _PORT,
        **options,
    )
    return Redis.from_pool(pool)


def _of_cluster(nodes: list[Endpoint], options: dict[str, Any], connections: int) -> Any:
    """Make a client of a cluster, which has the methods of one of a single server that are used here."""
    return RedisCluster(
        startup_nodes=[ClusterNode(node.host, node.port or _PORT) for node in nodes],
        max_connections=max(connections, _TO_A_NODE),
        **options,
    )


class _BySentinels(Redis):
    """A client of the server that the Sentinels say; it closes their connections with its own."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        pool: Any = self.connection_pool
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def _of_sentinels(nodes: list[Endpoint], told: dict[str, Any], options: dict[str, Any]) -> Redis:
    """Make a client that asks the Sentinels where the server is, each time it connects."""
    tls = {name: value for name, value in options.items() if name.startswith("ssl")}
    login = {name: told[f"sentinel_{name}"] for name in ("username", "password") if f"sentinel_{name}" in told}
    bounds = {"socket_timeout": _PATIENCE, "socket_connect_timeout": _PATIENCE}
    addresses = [(node.host, node.port or _SENTINEL_PORT) for node in nodes]
    sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
        addresses, sentinel_kwargs={**tls, **login, **bounds}
    )
    client: Redis = sentinel.master_for(told["sentinel_master"], _BySentinels, _SentinelPool, **options)
    return client


class _SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Whoever wants a connection when all are in use waits for one, as of a single server."""
