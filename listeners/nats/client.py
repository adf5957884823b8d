"""Connections to NATS, made of an Airflow connection, and JetStream's answers and refusals."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from airflow_events.errors import SourceMisconfigured, SourceMissing
from airflow_events.listeners.nats.messages import Source, headers_of
from airflow_events.listeners.support.connections import (
    check_files,
    connection,
    context,
    endpoints,
    flag,
    known_extras,
    misconfigured,
    secure,
)
from airflow_events.listeners.support.shared import connected
from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.errors import APIError, NotFoundError, ServerError, ServiceUnavailableError

if TYPE_CHECKING:
    from airflow.sdk import Connection

# Seconds for which a hub's pull waits for a message, after which it sees new waits.
BLOCK = 0.5
# Seconds after which a pull that found something ends although it could hold more.
_MORE = 0.01
# Seconds within which the server must have answered.
_PATIENCE = 5.0

# How many messages are pulled at once.
BATCH = 100

SECOND = 10**9

# The server's error codes.
_THERE_ALREADY = (10013, 10058, 10105, 10148)
_NO_JETSTREAM = (10035, 10039, 10076)
_NO_PEERS = 10005  # a node that is needed for what is to be made is unreachable; refused as a bad request

_PORT = 4222
_SCHEMES = ("nats", "tls", "ws", "wss")
_SAFE = ("tls:", "wss:")
_TYPES = (*_SCHEMES, "generic")
# The extras that are a login, and what the client calls them.
_LOGINS = {"token": "token", "nkey_seed": "nkeys_seed_str", "credentials": "user_credentials"}
_BY_KEY = frozenset({_LOGINS["nkey_seed"], _LOGINS["credentials"]})
_FIRST = "tls_handshake_first"
_FOR_TLS = ("tls_ca", "tls_cert", "tls_key", "tls_hostname")
_EXTRAS = frozenset({*_LOGINS, "tls", *_FOR_TLS, _FIRST})

LOST = (
    OSError,
    asyncio.TimeoutError,
    errors.ConnectionClosedError,
    errors.ConnectionDrainingError,
    errors.NoRespondersError,
    errors.OutboundBufferLimitError,
    errors.StaleConnectionError,
    ServiceUnavailableError,
    ServerError,
)


def coordinates(stream: str, created: str, durable: str, sequence: int) -> str:
    """
    Return what tells a message of a consumer from every other. Its form is frozen.

    :param created: when the stream was made, as the server writes it: a stream that is made again counts from one.
    """
    return json.dumps([stream, created, durable, sequence], ensure_ascii=False)


@contextlib.contextmanager
def refusals(source: Source) -> Iterator[None]:
    """Say what the server refused, and where."""
    try:
        yield
    except APIError as error:
        if isinstance(error, LOST):
            raise
        if error.err_code == _NO_PEERS:
            raise ConnectionError(f"{error.description} ({error.err_code})") from error
        raise SourceMisconfigured(
            f"{source}: the server refuses it: {error.description} ({error.err_code})"
        ) from error


async def about_of(server: Server, source: Source) -> dict[str, Any]:
    """
    Return what JetStream says of a stream.

    :raises SourceMissing: there is none.
    """
    try:
        return await server.api(f"STREAM.INFO.{source.stream}")
    except NotFoundError as error:
        raise SourceMissing(
            f"{source}: there is no such stream; create it, as it is not created automatically"
        ) from error


def checked(answer: Msg) -> dict[str, Any]:
    """
    Return what the server answered.

    :raises APIError: an error.
    """
    found: dict[str, Any] = json.loads(answer.data)
    if "error" in found:
        APIError.from_error(found["error"])
    return found


class _Client(Client):
    """
    The client, which by itself stops reading at a message whose subject or headers it cannot read.

    It says nothing of it to those who wait for an answer. JetStream stores such messages. And what it makes of
    headers differs from version to version, while a message has to be the same when it comes again.
    """

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        readable = subject.decode("utf-8", "backslashreplace").encode()
        await super()._process_msg(sid, readable, reply, data, headers)

    async def _process_headers(self, headers: bytes | None) -> dict[str, str] | None:
        return headers_of(headers) if headers else None


class Server:
    """A connection to NATS, which is not mended: who uses it connects again."""

    def __init__(self, conn_id: str) -> None:
        self._conn_id = conn_id
        self._client = _Client()
        self._inbox = ""
        self._arrived: asyncio.Queue[Msg | None] = asyncio.Queue()  # None: something is wrong
        self._trouble: Exception | None = None
        self._denied: Exception | None = None

    @property
    def closed(self) -> bool:
        return self._client.is_closed

    async def open(self, servers: list[str], **options: Any) -> None:
        """
        Connect to one of ``servers``.

        :raises SourceMisconfigured: the server does not let this user in, or asks for no TLS where we want it.
        :raises OSError: none of them answers.
        """
        tls = options.get("tls") is not None
        try:
            await self._client.connect(
                servers,
                name="airflow-events",
                allow_reconnect=False,
                connect_timeout=round(_PATIENCE),
                reconnect_time_wait=0,
                max_reconnect_attempts=1,
                ping_interval=30,
                error_cb=self._note,
                closed_cb=self._closed,
                **options,
            )
        except errors.NoServersError as error:
            raise ConnectionError(str(self._trouble or error)) from (self._trouble or error)
        except errors.Error as error:
            # The server lets some seconds pass for the login, and a slow network, or a busy loop, more than that.
            if "auth" in str(error).lower() and "timeout" not in str(error).lower():
                raise SourceMisconfigured(
                    f"the connection {self._conn_id!r} is refused: authentication failed: {error}"
                ) from error
            raise ConnectionError(str(error)) from error
        except ImportError as error:
            raise SourceMisconfigured(f"the connection {self._conn_id!r} needs: pip install nkeys") from error
        except Exception as error:
            if isinstance(error, LOST) or not options.keys() & _BY_KEY:
                raise
            # What the libraries raise of an invalid file or key, they do not document.
            raise SourceMisconfigured(
                f"the connection {self._conn_id!r} has credentials or an nkey seed that cannot be used: {error!r}"
            ) from error
        if not self._client.is_connected:
            raise ConnectionError(str(self._trouble or "the server ended the connection"))
        # The client itself goes on in the clear if the server does not ask for TLS. A proxy may end that of wss.
        by_websocket = self._client.connected_url is not None and self._client.connected_url.scheme == "wss"
        if tls and not by_websocket and not getattr(self._client, "_server_info", {}).get("tls_required", False):
            raise SourceMisconfigured(f"the connection {self._conn_id!r} wants TLS, and the server asks for none")

    async def close(self) -> None:
        ending = asyncio.ensure_future(self._client.close())
        await asyncio.wait(
            [ending], timeout=2
        )  # after a TLS handshake that failed, the client would wait for ever
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)

    async def request(self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None) -> Msg:
        """
        Return the answer.

        :raises SourceMisconfigured: there was none, and the user lacks a permission.
        """
        try:
            return await self._client.request(subject, payload, timeout=_PATIENCE, headers=headers)
        except asyncio.TimeoutError as error:
            if self._denied is None:
                raise
            raise SourceMisconfigured(
                f"the connection {self._conn_id!r} may not use it: {self._denied}"
            ) from error

    def has_room(self, payload: bytes, headers: dict[str, str]) -> bool:
        """Whether the server takes a message of that size."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return len(f"NATS/1.0\r\n{lines}\r\n".encode()) + len(payload) <= self._client.max_payload

    async def publish(self, subject: str, payload: bytes) -> None:
        await self._client.publish(subject, payload)

    async def api(self, what: str, **request: Any) -> dict[str, Any]:
        """
        Ask JetStream.

        :raises APIError: it refuses.
        """
        try:
            answer = await self.request(f"$JS.API.{what}", json.dumps(request).encode() if request else b"")
        except errors.NoRespondersError as error:
            silent = "nobody answers for JetStream: is it enabled on the server, and in this account?"
            raise ServiceUnavailableError(code=503, description=silent) from error
        try:
            return checked(answer)
        except APIError as error:
            if error.err_code in _NO_JETSTREAM:
                # As after its disk was full, until the server is started again.
                raise SourceMissing(f"the connection {self._conn_id!r}: {error.description}") from error
            raise

    async def make(self, what: str, **request: Any) -> None:
        """Ask JetStream to make something, unless another triggerer has made it meanwhile."""
        try:
            await self.api(what, **request)
        except APIError as error:
            if error.err_code not in _THERE_ALREADY:
                raise

    async def listen(self) -> None:
        """Begin to receive what `pull` asks for."""
        self._inbox = self._client.new_inbox()
        # The requests are the limit.
        await self._client.subscribe(self._inbox, cb=self._receive, pending_msgs_limit=0, pending_bytes_limit=0)

    async def pull(
        self, stream: str, consumer: str, batch: int, seconds: float = BLOCK, max_bytes: int | None = None
    ) -> list[Msg]:
        """
        Return up to ``batch`` messages that are there, or wait for the first.

        :param seconds: how long to wait.
        :param max_bytes: how large all but the first may be together.
        """
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        found = await self._pull(subject, 1, max(seconds, _MORE))
        if found and batch > 1:
            found += await self._pull(subject, batch - 1, _MORE, max_bytes)
        return found

    async def _pull(self, subject: str, batch: int, seconds: float, max_bytes: int | None = None) -> list[Msg]:
        request = {"batch": batch, "expires": round(seconds * SECOND)}
        if max_bytes is not None:
            request["max_bytes"] = max_bytes
        await self._client.publish(subject, json.dumps(request).encode(), reply=self._inbox)
        found: list[Msg] = []
        while len(found) < batch:
            message = await self._next(seconds + _PATIENCE)
            if message.reply:
                found.append(message)
                continue
            status = dict(message.headers or {})  # which every pull ends with that did not get all
            reason = status.get("Description") or f"status {status.get('Status')}"
            if status.get("Status") == "408" or "MaxBytes" in reason:
                break
            if reason == "Exceeded MaxWaiting":  # of pulls, those of others among them
                raise ConnectionError(f"{subject}: {reason}")
            if reason.startswith("Exceeded Max"):
                raise SourceMisconfigured(
                    f"the connection {self._conn_id!r}: a pull of {batch} is refused: {reason}"
                )
            raise ConnectionError(f"{subject} ended: {reason}")
        return found

    async def _next(self, seconds: float) -> Msg:
        alarm = asyncio.get_running_loop().call_later(seconds, self._arrived.put_nowait, None)
        try:
            message = await self._arrived.get()
        finally:
            alarm.cancel()
        if message is None:
            raise ConnectionError(str(self._trouble or "the connection was closed, or a pull was not answered"))
        return message

    async def _receive(self, message: Msg) -> None:
        self._arrived.put_nowait(message)

    async def _closed(self) -> None:
        self._arrived.put_nowait(None)

    async def _note(self, error: Exception) -> None:
        self._trouble = error
        if "permissions violation" in str(error).lower():
            self._denied = error


def server_of(conn_id: str) -> contextlib.AbstractAsyncContextManager[Server]:
    """Use the connection over which this process acknowledges what another has received."""
    return connected(
        ("nats server", conn_id), lambda: connect(conn_id), Server.close, lambda server: server.closed
    )


async def connect(conn_id: str) -> Server:
    """
    Connect as an Airflow connection says.

    :raises SourceMisconfigured: it says what cannot be used, or what is not known here.
    """
    found = await connection(conn_id, *_TYPES)
    told = known_extras(found, _EXTRAS)
    nodes = endpoints(found, *_SCHEMES)
    scheme = found.conn_type if found.conn_type in _SCHEMES else _SCHEMES[0]
    urls = [f"{node.scheme or scheme}://{node.address(_PORT)}" for node in nodes]
    options = {**_login(found, told), **await _tls(found, told, urls)}
    await check_files(found, options.get("user_credentials"))
    server = Server(conn_id)
    try:
        await server.open(urls, **options)
    except BaseException:
        await server.close()
        raise
    return server


def _login(found: Connection, told: dict[str, Any]) -> dict[str, Any]:
    """
    Return the client's settings for the login, of which there is at most one kind.

    A password without a login is a token, and so, as in NATS's own URLs, is a login without a password.
    """
    kinds = [f"the extra {name!r}" for name in _LOGINS if name in told]
    if found.login or found.password:
        kinds.append("a login or a password")
    if len(kinds) > 1:
        raise misconfigured(found, f"has {' and '.join(kinds)}, of which there may be one")
    if found.login and found.password:
        return {"user": found.login, "password": found.password}
    if found.login or found.password:
        return {"token": found.password or found.login}
    return {option: told[name] for name, option in _LOGINS.items() if name in told}


async def _tls(found: Connection, told: dict[str, Any], urls: list[str]) -> dict[str, Any]:
    # A certificate is what TLS is asked for by, too.
    first = flag(found, told, _FIRST)
    safe = first or any(url.startswith(_SAFE) for url in urls) or any(name in told for name in _FOR_TLS)
    if not secure(found, told, "tls", safe, _FOR_TLS):
        return {}
    files = await context(found, *(told.get(name) for name in ("tls_ca", "tls_cert", "tls_key")))
    return {"tls": files, "tls_hostname": told.get("tls_hostname"), **({_FIRST: True} if first else {})}
