"""Connections to RabbitMQ, made of an Airflow connection; its refusals, as our errors; and the source's names."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import hashlib
import re
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

# The lower half of aio-pika. The upper one hides transactions' order and messages' raw properties.
import aiormq
from aiormq import exceptions
from aiormq.abc import AbstractChannel, AbstractConnection
from airflow_events.errors import SourceUnfit
from airflow_events.listeners.connections import connection, tls
from airflow_events.listeners.shared import connected
from pamqp.exceptions import AMQPInternalError
from yarl import URL

_T = TypeVar("_T")

_TYPES = ("amqp", "rabbitmq", "generic")
_LOST = (OSError, asyncio.TimeoutError)

# Seconds that one step may take; a broker that runs out of memory or disk stops answering those who publish.
STEP = 60.0
# Over how many queues the notes of commits are spread, since each commit reads one of them.
_SLOTS = 64

NO_STREAM = "{} is no stream; RabbitMQListener takes messages from other queues"


@dataclass(frozen=True)
class Source:
    """A queue of a connection, and the names of the queues of its claims."""

    conn_id: str
    queue: str

    def __str__(self) -> str:
        return f"the queue {self.queue!r} of the connection {self.conn_id!r}"

    # Claims and commits are found by these names, so they are frozen. A name has at most 255 bytes.

    @property
    def claims(self) -> str:
        return f"airflow-events.claims.{_readable(self.queue)}.{digest(self.queue)}"

    def claim(self, wait: str) -> str:
        return f"airflow-events.claim.{_readable(self.queue)}.{_readable(wait)}.{digest(self.queue, wait)}"

    def commits(self, identity: str) -> str:
        slot = int(digest(identity), 16) % _SLOTS
        return f"airflow-events.commits.{_readable(self.queue)}.{digest(self.queue)}.{slot}"


def digest(*parts: str) -> str:
    """Return a name for what has these names together, of 20 characters."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _readable(name: str) -> str:
    return re.sub(r"[^\w.:/+-]", "_", name, flags=re.ASCII)[:80]


class OnServer(abc.ABC):
    """What both hubs do with their connection; it stands before `Hub` among their bases."""

    lost: ClassVar[tuple[type[BaseException], ...]] = _LOST
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


async def within(work: Awaitable[_T], seconds: float = STEP) -> _T:
    """
    Do ``work`` as a task of its own.

    The client cancels whoever waits for a connection that is lost; that must not look like our own end.

    :raises ConnectionError: it was cancelled by the client, or took longer than ``seconds``.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise
    if not done:
        task.cancel()
        await asyncio.wait({task})
        raise ConnectionError(f"the server did not answer for {seconds:.0f} s")
    if task.cancelled():
        raise ConnectionError("the connection was lost")
    return task.result()


@contextlib.contextmanager
def refusals(source: Source) -> Iterator[None]:
    """Say what the server refused, and where; what may pass becomes a lost connection."""
    try:
        yield
    except (exceptions.ProbableAuthenticationError, exceptions.AuthenticationError) as error:
        raise SourceUnfit(f"{source}: the server refused the login: {error}") from error
    except exceptions.ConnectionNotAllowed as error:
        if "is down" in str(error):
            raise ConnectionError(str(error)) from error
        raise SourceUnfit(f"{source}: the server refused the connection: {error}") from error
    except exceptions.ConnectionNotImplemented as error:
        raise SourceUnfit(f"{source} is a stream; RabbitMQWatchListener is for these: {error}") from error
    except exceptions.ChannelAccessRefused as error:
        raise SourceUnfit(f"{source}: the connection's user may not use what is needed: {error}") from error
    except exceptions.ChannelLockedResource as error:
        raise SourceUnfit(f"{source} is exclusive to another connection: {error}") from error
    except exceptions.ChannelNotFoundEntity as error:
        if "down or inaccessible" in str(error):
            raise ConnectionError(str(error)) from error
        raise SourceUnfit(f"{source} is not there, and is not made: {error}") from error
    except exceptions.ChannelPreconditionFailed as error:
        if "x-stream-offset" in str(error):
            raise SourceUnfit(NO_STREAM.format(source)) from error
        raise SourceUnfit(f"{source}: the server refused a step of a claim (a policy?): {error}") from error
    except exceptions.AMQPError as error:
        if isinstance(error, OSError):
            raise
        raise ConnectionError(str(error)) from error
    except RuntimeError as error:  # what the client raises for a connection that is closed
        if "closed" not in str(error):
            raise
        raise ConnectionError(str(error)) from error


def server_of(conn_id: str) -> contextlib.AbstractAsyncContextManager[AbstractConnection]:
    """Use the connection by which the waits of this process commit and release."""
    return connected(
        ("rabbitmq client", conn_id),
        lambda: within(connect(conn_id)),
        _close_server,
        lambda server: server.is_closed,
    )


async def close(channel: AbstractChannel) -> None:
    """Close a channel, if it is not closed."""
    with contextlib.suppress(Exception):
        await channel.close()


async def _close_server(server: AbstractConnection) -> None:
    with contextlib.suppress(Exception):
        await within(server.close())


async def connect(conn_id: str) -> AbstractConnection:
    """Open what an Airflow connection describes."""
    found = await connection(conn_id, *_TYPES)
    extra = found.extra_dejson
    secure = str(extra.get("ssl", False)).lower() in ("true", "1")
    url = URL.build(
        scheme="amqps" if secure else "amqp",
        host=found.host or "localhost",
        port=found.port or (5671 if secure else 5672),
        user=found.login or "guest",
        password=found.password or "guest",
        path="/" if found.schema in (None, "", "/") else f"/{found.schema}",
        query={"heartbeat": str(int(extra.get("heartbeat") or 60)), "name": "airflow-events"},
    )
    files = (extra.get(name) for name in ("cafile", "certfile", "keyfile"))
    context = await asyncio.to_thread(tls, *files) if secure else None
    try:
        server: AbstractConnection = await aiormq.connect(url, context=context)
    except (exceptions.InvalidFrameError, AMQPInternalError) as error:  # aiormq hides what the server said; 7, 6
        raise ConnectionError(
            f"the server closes the connection when it is asked for the virtual host {found.schema or '/'!r}: "
            "is it there, and may the user have it?"
        ) from error
    return server
