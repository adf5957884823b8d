"""Connections to RabbitMQ, made of an Airflow connection; its refusals, as our errors; and the source's names."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

# The lower half of aio-pika, whose upper one connects and consumes again by itself.
import aiormq
from aiormq import exceptions
from aiormq.abc import AbstractChannel, AbstractConnection
from airflow_events.errors import SourceMisconfigured, SourceMissing
from airflow_events.listeners.rabbitmq.frames import LenientTransport
from airflow_events.listeners.support.connections import (
    Endpoint,
    connection,
    context,
    endpoints,
    flag,
    known_extras,
    misconfigured,
    number,
    secure,
)
from airflow_events.listeners.support.shared import within
from pamqp.exceptions import AMQPInternalError
from yarl import URL

if TYPE_CHECKING:
    from airflow.sdk import Connection

log = logging.getLogger(__name__)


_SCHEMES = ("amqp", "amqps")
_TYPES = (*_SCHEMES, "rabbitmq", "generic")
_FOR_TLS = ("cafile", "certfile", "keyfile", "ssl_server_hostname")
_EXTRAS = frozenset({"ssl", *_FOR_TLS, "ssl_verify", "heartbeat", "auth"})
# What the hook of apache-airflow-provider-rabbitmq calls them. In the place of a file may be what is in it.
_ALSO = {
    "ssl_ca_certs": "cafile", "ssl_ca_cert_pem": "cafile", "ssl_certfile": "certfile", "ssl_cert_pem": "certfile",
    "ssl_keyfile": "keyfile", "ssl_key_pem": "keyfile",
}  # fmt: skip
_REFUSED = {"connection_uri": "put what it says into the fields for host, port, login, password and schema"}
_LOST = (OSError, asyncio.TimeoutError)
# What a server says of a queue that is there, where the node or the process that has it is down.
_PASSING = re.compile(
    r"down or inaccessible|stopped by supervisor|due to timeout|being demoted|crashed and failed to restart"
)

# Seconds that one step may take; a broker that runs out of memory or disk stops answering those who publish.
STEP = 60.0
NO_STREAM = "{} is no stream; RabbitMQListener takes messages from other queues"


@dataclass(frozen=True)
class Source:
    """A queue of a connection."""

    conn_id: str
    queue: str

    def __str__(self) -> str:
        return f"the queue {self.queue!r} of the connection {self.conn_id!r}"


def coordinates(server: str, virtual_host: str, queue: str, message_id: str | None, delivery: str = "") -> str:
    """
    Return what tells a message of a queue from every other. Its form is frozen.

    :param server: see `place_of`.
    :param message_id: what its sender gave it; None if it has none.
    :param delivery: of a message without an id, what tells this delivery from all others.
    """
    place: list[str | None] = [server, virtual_host, queue, message_id]
    return json.dumps(place if message_id else [*place, delivery], ensure_ascii=False)


async def place_of(conn_id: str) -> tuple[str, str]:
    """
    Return which server an Airflow connection is of, as it says itself, ``host:port``; and the virtual host.

    A cluster tells its clients no name that is the same on all its nodes. So two connections that call one server
    by two names are two sources.
    """
    found = await connection(conn_id, *_TYPES)
    server = found.host or "localhost"
    return (f"{server}:{found.port}" if found.port else server), found.schema or "/"


class OnServer(abc.ABC):
    """What both hubs do with their connection; it stands before `Hub` among their bases."""

    lost: ClassVar[tuple[type[BaseException], ...]] = _LOST
    connect_within: ClassVar[float | None] = None  # each step is bounded by `within`
    serve_within: ClassVar[float | None] = None
    _server: AbstractConnection | None = None

    async def connect(self) -> None:
        await self.disconnect()  # what a refusal has left open
        await within(self._connect())

    async def disconnect(self) -> None:
        if self._server is not None:
            await within(self._server.close())

    @abc.abstractmethod
    async def _connect(self) -> None:
        """Open `_server`, and check that the source is as it must be."""


@contextlib.contextmanager
def refusals(source: Source) -> Iterator[None]:
    """Say what the server refused, and where; what may pass becomes a lost connection."""
    try:
        yield
    except (exceptions.ProbableAuthenticationError, exceptions.AuthenticationError) as error:
        raise SourceMisconfigured(f"{source}: the server refused the login: {error}") from error
    except exceptions.ConnectionNotAllowed as error:
        if "is down" in str(error) or "limit" in str(error):  # of channels, which others may close
            raise ConnectionError(str(error)) from error
        raise SourceMisconfigured(f"{source}: the server refused the connection: {error}") from error
    except exceptions.ConnectionNotImplemented as error:
        raise SourceMisconfigured(f"{source} is a stream; RabbitMQWatchListener is for these: {error}") from error
    except exceptions.ChannelAccessRefused as error:
        # The latter is said by a backend, such as LDAP, that is unreachable, and of a token that has expired.
        if "in exclusive use" in str(error) or "returned an error" in str(error):
            raise ConnectionError(str(error)) from error
        raise SourceMisconfigured(
            f"{source}: the connection's user may not use what is needed: {error}"
        ) from error
    except exceptions.ChannelLockedResource as error:
        raise SourceMisconfigured(f"{source} is exclusive to another connection: {error}") from error
    except exceptions.ChannelNotFoundEntity as error:
        if _PASSING.search(str(error)):
            raise ConnectionError(str(error)) from error
        raise SourceMissing(f"{source} is not there, and is not made: {error}") from error
    except exceptions.ChannelPreconditionFailed as error:
        if "x-stream-offset" in str(error):
            raise SourceMisconfigured(NO_STREAM.format(source)) from error
        # A message was held for longer than `consumer_timeout`; or a stream's node is down.
        if "timed out" in str(error) or "running replica" in str(error):
            raise ConnectionError(str(error)) from error
        raise SourceMisconfigured(f"{source}: the server refused what was asked of it: {error}") from error
    except exceptions.AMQPError as error:
        if isinstance(error, OSError):
            raise
        raise ConnectionError(str(error)) from error
    except RuntimeError as error:  # what the client raises for a connection that is closed
        if "closed" not in str(error):
            raise
        raise ConnectionError(str(error)) from error


async def close(channel: AbstractChannel) -> None:
    """Close a channel, if it is not closed."""
    with contextlib.suppress(Exception):
        await channel.close()


async def connect(conn_id: str) -> AbstractConnection:
    """
    Open what an Airflow connection describes; of several hosts, the first that lets us.

    :raises SourceMisconfigured: it says what cannot be used, or what is not known here.
    """
    found = await connection(conn_id, *_TYPES)
    told = _told(found)
    nodes = endpoints(found, *_SCHEMES)
    options = await _tls(found, told, nodes)
    # A host that is switched off does not even refuse.
    longest = STEP if len(nodes) == 1 else STEP / (len(nodes) + 1)
    for last, node in enumerate(nodes, 1 - len(nodes)):
        try:
            return await within(_open(found, _url(found, told, node, "context" in options), options), longest)
        except _LOST as error:
            if not last:
                raise
            log.info("%s of the connection %r does not answer: %s", node.host, conn_id, error)
    raise AssertionError("a connection has a host")


async def _open(found: Connection, url: URL, options: dict[str, Any]) -> AbstractConnection:
    try:
        server: AbstractConnection = await aiormq.connect(url, transport_factory=LenientTransport(), **options)
    except (exceptions.InvalidFrameError, AMQPInternalError) as error:  # aiormq hides what the server said; 7, 6
        raise ConnectionError(
            f"the server closes the connection when it is asked for the virtual host {found.schema or '/'!r}: "
            "is it there, and may the user have it?"
        ) from error
    return server


def _url(found: Connection, told: dict[str, Any], node: Endpoint, safe: bool) -> URL:
    login = (found.login, found.password or "") if found.login else ("guest", found.password or "guest")
    if (heartbeat := number(found, told, "heartbeat", 60)) <= 0:
        raise misconfigured(
            found, f"has the extra heartbeat={heartbeat}: a server that is gone would not be noticed"
        )
    query = {"heartbeat": str(heartbeat), "name": "airflow-events"}
    return URL.build(
        scheme="amqps" if safe else "amqp",
        host=node.host,
        port=node.port or (5671 if safe else 5672),
        user=login[0],
        password=login[1],
        path="/" if found.schema in (None, "", "/") else f"/{found.schema}",
        query=query | {"auth": told["auth"]} if "auth" in told else query,
    )


def _told(found: Connection) -> dict[str, Any]:
    """
    Return the extras under the names that they have here, of whichever package's hook they are.

    :raises SourceMisconfigured: one is not known, or is said twice.
    """
    told: dict[str, Any] = {}
    for name, value in known_extras(found, {*_EXTRAS, *_ALSO}, _REFUSED).items():
        ours = _ALSO.get(name, name)
        if ours in told:
            raise misconfigured(
                found, f"has the extra {name!r} and another that means {ours!r}, of which there may be one"
            )
        told[ours] = value
    if (auth := str(told.get("auth", "plain")).lower()) not in ("plain", "external"):
        raise misconfigured(found, f"has the extra auth={auth!r}, where 'plain' or 'external' is needed")
    return told


async def _tls(found: Connection, told: dict[str, Any], nodes: list[Endpoint]) -> dict[str, Any]:
    """Return the client's settings for TLS; none without."""
    safe = found.conn_type == "amqps" or any(node.scheme == "amqps" for node in nodes)
    if not secure(found, told, "ssl", safe, _FOR_TLS):
        return {}
    files = (told.get(name) for name in ("cafile", "certfile", "keyfile"))
    options = {"context": await context(found, *files, verify=flag(found, told, "ssl_verify", True))}
    return options | ({"server_hostname": told["ssl_server_hostname"]} if "ssl_server_hostname" in told else {})
