"""Connections to NATS, made of an Airflow connection, and JetStream's answers and refusals."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from airflow_events.errors import SourceUnfit
from airflow_events.listeners.connections import connection, tls
from airflow_events.listeners.nats.messages import Source, Stored, headers_of, moment
from airflow_events.listeners.shared import connected
from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.errors import APIError, NotFoundError, ServerError, ServiceUnavailableError

# Seconds for which a hub's pull waits for a message, after which it sees new waits.
BLOCK = 0.5
# Seconds after which a pull that found something ends although it could hold more.
_MORE = 0.01
# Seconds within which the server must have answered.
_PATIENCE = 5.0

# How many messages are pulled at once, and how many waits looked up at once.
BATCH = 100

SECOND = 10**9

# The server's error codes.
_THERE_ALREADY = (10013, 10058, 10105, 10148)
_NO_JETSTREAM = (10035, 10039, 10076)

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


@contextlib.contextmanager
def refusals(source: Source) -> Iterator[None]:
    """Say what the server refused, and where."""
    try:
        yield
    except APIError as error:
        if isinstance(error, LOST):
            raise
        raise SourceUnfit(f"{source}: the server refuses it: {error.description} ({error.err_code})") from error


async def about_of(server: Server, source: Source) -> dict[str, Any]:
    """
    Return what JetStream says of a stream.

    :raises SourceUnfit: there is none.
    """
    try:
        return await server.api(f"STREAM.INFO.{source.stream}")
    except NotFoundError as error:
        raise SourceUnfit(f"{source}: there is no such stream; make it, as it is never made here") from error


def checked(answer: Msg) -> dict[str, Any]:
    """
    Return what the server answered.

    :raises APIError: an error.
    """
    found: dict[str, Any] = json.loads(answer.data)
    if "error" in found:
        APIError.from_error(found["error"])
    return found


class Server:
    """A connection to NATS, which is not mended: who uses it connects anew."""

    def __init__(self, conn_id: str) -> None:
        self._conn_id = conn_id
        self._client = Client()
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

        :raises SourceUnfit: the server does not let this user in, or asks for no TLS where we want it.
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
            if "auth" in str(error).lower():
                raise SourceUnfit(f"the connection {self._conn_id!r} is not let in: {error}") from error
            raise ConnectionError(str(error)) from error
        except ImportError as error:
            raise SourceUnfit(f"the connection {self._conn_id!r} needs: pip install nkeys") from error
        if not self._client.is_connected:
            raise ConnectionError(str(self._trouble or "the server ended the connection"))
        # The client itself goes on in the clear if the server does not ask for TLS.
        if tls and not getattr(self._client, "_server_info", {}).get("tls_required", False):
            raise SourceUnfit(f"the connection {self._conn_id!r} wants TLS, and the server asks for none")

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

        :raises SourceUnfit: there was none, and the user lacks a permission.
        """
        try:
            return await self._client.request(subject, payload, timeout=_PATIENCE, headers=headers)
        except asyncio.TimeoutError as error:
            if self._denied is None:
                raise
            raise SourceUnfit(f"the connection {self._conn_id!r} may not use it: {self._denied}") from error

    async def publish(self, subject: str, payload: bytes) -> None:
        await self._client.publish(subject, payload)

    async def later(self, reply: str, seconds: float) -> None:
        """Let a message be given out again, by the subject that it is acknowledged by, after some seconds."""
        delay = round(max(seconds, 0.05) * SECOND)
        await self.publish(reply, b"-NAK" if seconds <= 0 else b'-NAK {"delay": %d}' % delay)

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
                raise SourceUnfit(f"the connection {self._conn_id!r}: {error.description}") from error
            raise

    async def make(self, what: str, **request: Any) -> None:
        """Ask JetStream to make something, unless another triggerer has made it meanwhile."""
        try:
            await self.api(what, **request)
        except APIError as error:
            if error.err_code not in _THERE_ALREADY:
                raise

    async def message(self, stream: str, **which: Any) -> Stored | None:
        """Return a stream's message of a sequence (``seq``), or its last of a subject (``last_by_subj``)."""
        try:
            found = (await self.api(f"STREAM.MSG.GET.{stream}", **which))["message"]
        except NotFoundError:
            return None
        headers, data = (base64.b64decode(found.get(part) or "") for part in ("hdrs", "data"))
        return Stored(found["seq"], moment(found["time"]), found["subject"], headers_of(headers), data)

    async def listen(self) -> None:
        """Begin to receive what `pull` asks for."""
        self._inbox = self._client.new_inbox()
        # The requests are the limit.
        await self._client.subscribe(self._inbox, cb=self._receive, pending_msgs_limit=0, pending_bytes_limit=0)

    async def pull(self, stream: str, consumer: str, batch: int) -> list[Msg]:
        """Return up to ``batch`` messages that are there, or wait for the first for up to `BLOCK` seconds."""
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        found = await self._pull(subject, 1, BLOCK)
        if found and batch > 1:
            found += await self._pull(subject, batch - 1, _MORE)
        return found

    async def _pull(self, subject: str, batch: int, seconds: float) -> list[Msg]:
        request = {"batch": batch, "expires": round(seconds * SECOND)}
        await self._client.publish(subject, json.dumps(request).encode(), reply=self._inbox)
        found: list[Msg] = []
        while len(found) < batch:
            message = await self._next(seconds + _PATIENCE)
            if message.reply:
                found.append(message)
                continue
            status = dict(message.headers or {})  # which every pull ends with that did not get all
            if status.get("Status") == "408":
                break
            reason = status.get("Description") or f"status {status.get('Status')}"
            if reason.startswith("Exceeded Max"):
                raise SourceUnfit(f"the connection {self._conn_id!r}: a pull of {batch} is refused: {reason}")
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
    """Use the connection by which the waits of this process commit and release."""
    return connected(
        ("nats server", conn_id), lambda: connect(conn_id), Server.close, lambda server: server.closed
    )


async def connect(conn_id: str) -> Server:
    """Connect as an Airflow connection says."""
    found = await connection(conn_id, "nats", "generic")
    extra = found.extra_dejson
    servers = _urls(found.host or "localhost", found.port or 4222)
    options: dict[str, Any] = {
        "user": found.login or None,
        "password": (found.password or "") if found.login else None,
        "token": extra.get("token"),
        "nkeys_seed_str": extra.get("nkey_seed"),
        "user_credentials": extra.get("credentials"),
    }
    secure = str(extra.get("tls", False)).lower() in ("true", "1") or servers[0].startswith(("tls:", "wss:"))
    try:
        if options["user_credentials"]:
            await asyncio.to_thread(Path(options["user_credentials"]).read_bytes)
        if secure or any(extra.get(f"tls_{name}") for name in ("ca", "cert", "key", "hostname")):
            files = (extra.get(name) for name in ("tls_ca", "tls_cert", "tls_key"))
            options["tls"] = await asyncio.to_thread(tls, *files)
            options["tls_hostname"] = extra.get("tls_hostname")
    except OSError as error:  # of which ssl.SSLError is a kind
        raise SourceUnfit(f"the connection {conn_id!r}: a file that it names cannot be used: {error}") from error
    server = Server(conn_id)
    try:
        await server.open(servers, **options)
    except BaseException:
        await server.close()
        raise
    return server


def _urls(host: str, port: int) -> list[str]:
    """Return the URLs of a connection's hosts, which are separated by commas, and may be URLs already."""
    urls = []
    for part in host.split(","):
        url = part.strip().rstrip("/")
        url = url if "://" in url else f"nats://{url}"
        urls.append(url if urlsplit(url).port else f"{url}:{port}")
    return urls
