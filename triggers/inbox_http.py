"""One request to the inbox in the API server: its address, its token, its certificates, and what went wrong."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime

import httpx
from airflow.sdk.configuration import conf
from airflow_events import inbox_token, settings
from airflow_events.inbox.entries import Answer, answer_of

# Seconds.
_TIMEOUT = httpx.Timeout(30, connect=10, pool=None)
_IDLE = 4.0  # until a connection is given up; uvicorn cuts it after 5
_LONGEST_RETRY_AFTER = 60.0


class Failed(Exception):
    """
    The request was not carried out, and may be the next time.

    :ivar retry_after: in how many seconds, if the API server said so.
    :ivar may_be_one: whether it may be that a single entry, or how many there are, makes it fail.
    """

    def __init__(self, reason: str, *, retry_after: float | None = None, may_be_one: bool = False) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.may_be_one = may_be_one


class Unfit(Exception):
    """The request will not be carried out as it is, however often it is sent."""


class Post:
    """
    Sends requests, over connections that it keeps.

    :ivar url: where the last one went.
    """

    def __init__(self, at_once: int) -> None:
        self.url = "an unknown address"
        self._limits = httpx.Limits(max_connections=at_once, keepalive_expiry=_IDLE)
        self._client: httpx.AsyncClient | None = None
        self._sign_fresh = False
        # Reading configuration and certificates may take long, and the threads of asyncio may all be taken.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="airflow-events-inbox")

    async def __call__(self, entries: Iterable[bytes]) -> list[Answer]:
        """
        Return the answers to entries, as the API server gave them.

        :raises Failed: there are none, for now.
        :raises Unfit: there will be none.
        """
        try:
            client, token = await asyncio.get_running_loop().run_in_executor(self._thread, self._prepare)
            response = await client.post(
                self.url,
                content=b'{"entries":[%s]}' % b",".join(entries),
                headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            )
            if response.status_code == 200:
                return [answer_of(told) for told in response.json()["answers"]]
        except Exception as error:  # whatever it is, nothing is lost by waiting
            reason = f"{type(error).__name__}: {error}"
            raise Failed(reason, may_be_one=isinstance(error, httpx.ReadTimeout)) from error
        reason = f"{response.status_code} {detail(response)}"
        if response.status_code in (413, 422):
            raise Unfit(reason)
        if response.status_code == 401:
            self._sign_fresh = True
            with contextlib.suppress(KeyError, ValueError, TypeError):  # there is none, or it is no date
                inbox_token.follow_clock(parsedate_to_datetime(response.headers["Date"]).timestamp())
        after = response.headers.get("Retry-After", "")
        raise Failed(
            reason,
            retry_after=min(float(after), _LONGEST_RETRY_AFTER) if after.isdecimal() else None,
            may_be_one=response.status_code == 500,
        )

    def _prepare(self) -> tuple[httpx.AsyncClient, str]:
        self.url = settings.inbox_url()
        token = inbox_token.sign(fresh=self._sign_fresh)
        self._sign_fresh = False
        if self._client is None:
            self._client = httpx.AsyncClient(verify=tls(), timeout=_TIMEOUT, limits=self._limits)
        return self._client, token


def tls() -> ssl.SSLContext:
    """
    Return whom to trust, and how to show who asks, where the inbox is reached by https.

    :raises OSError: a file is not there, or not what it should be.
    """
    trusted, own = settings.inbox_ca(), conf.get("api", "ssl_cert", fallback=None)
    client, key = (conf.get("api", f"client_ssl_{name}", fallback=None) for name in ("cert", "key"))
    try:
        context = ssl.create_default_context(cafile=trusted or None)
        if own:  # Airflow's own client trusts it, too
            context.load_verify_locations(own)
        if client:
            context.load_cert_chain(client, key or None)
    except OSError as error:
        files = ", ".join(filter(None, (trusted, own, client, key)))
        raise OSError(f"certificates cannot be read from {files}: {error}") from error
    return context


def detail(response: httpx.Response) -> str:
    """Return why something was refused, in one line."""
    try:
        said = str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        said = response.text
    return " ".join(said.split())[:500]
