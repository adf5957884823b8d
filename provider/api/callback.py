"""
Addresses for those who have no Airflow account: each is for one wait, signed, and expires.

Workers and triggerers sign, in templates and tasks; the API server checks. So nothing of Airflow's database is
imported here. The signature is that of a JSON Web Token (PyJWT, which compares in constant time), with a key that
signs nothing else, so that no other token of Airflow is taken for one of these, nor one of these for another.

The token is a parameter named ``token`` and no part of the path: under that name Airflow's access log masks it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import urlencode

import jwt
from airflow.sdk.configuration import conf
from airflow.sdk.log import mask_secret
from airflow_events import settings
from airflow_events.errors import EventsError
from airflow_events.listeners.base import Wait

log = logging.getLogger(__name__)

_ALGORITHM = "HS256"
_AUDIENCE = "airflow-events-callback"


class TokenInvalid(EventsError):
    """A token that nobody signed here."""


class TokenExpired(EventsError):
    """A token whose time is over."""


@dataclass(frozen=True)
class Token:
    """
    What a valid token says.

    :param issued: a clear of the wait after this makes the token invalid.
    :param made_by: the task instance, by the UUID of its try, in whose run it was made. A run that is made again
        under the same id has others. None if it is not said, as in tokens of earlier versions.
    """

    wait: Wait
    issued: datetime
    made_by: uuid.UUID | None = None


def callback_url(
    ti: Any, task_id: str, *, map_index: int = -1, expires_in: timedelta | float = timedelta(days=7)
) -> str:
    """
    Return an address by which somebody without an account can send one event to a wait of this run.

    In a template: ``{{ macros.airflow_events.callback_url(ti, "approval") }}``. Whoever has the address can send
    the event; it is good for this wait of this run only, and not after the wait was cleared or ``expires_in`` is
    over.

    :param ti: any task instance of the run.
    :param task_id: of the wait.
    :param expires_in: a timedelta or seconds.
    :raises ValueError: there is no secret to sign with, or no ``[api] base_url``.
    """
    seconds = expires_in.total_seconds() if isinstance(expires_in, timedelta) else float(expires_in)
    base_url = conf.get("api", "base_url", fallback="") or ""
    if not base_url.startswith("http"):
        raise ValueError(f"callback_url needs the address of the API server, and [api] base_url is {base_url!r}")
    token = sign(Wait(ti.dag_id, ti.run_id, task_id, map_index), seconds, made_by=getattr(ti, "id", None))
    _mask(token)
    return f"{base_url.rstrip('/')}/events/callback?{urlencode({'token': token})}"


def _mask(token: str) -> None:
    """Keep a token out of the log and the rendered fields of the task that makes it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        mask_secret(token)
    # In a triggerer's loop the call would wait for that loop.


def sign(wait: Wait, seconds: float, *, made_by: uuid.UUID | None = None) -> str:
    """Return a token for a wait that expires after so many seconds."""
    now = time.time()
    claims: dict[str, Any] = {
        "aud": _AUDIENCE,
        "iat": now,
        "exp": now + seconds,
        "wait": [wait.dag_id, wait.run_id, wait.task_id, wait.map_index],
    }
    if made_by is not None:
        claims["by"] = str(made_by)
    return jwt.encode(claims, _secret(), algorithm=_ALGORITHM)


def check(token: str) -> Token:
    """
    Return what a token says.

    :raises TokenInvalid: it was not signed with this deployment's secret, or there is none.
    :raises TokenExpired: it was, and its time is over.
    """
    try:
        key = _secret()
    except ValueError as error:
        log.warning("A signed URL is refused: %s", error)
        raise TokenInvalid("the URL is not valid: there is no secret here to check it with") from None
    try:
        claims = jwt.decode(
            token,
            key,
            algorithms=[_ALGORITHM],
            audience=_AUDIENCE,
            # The clock of who signed may be ahead; when it signed matters only against that of a clear.
            options={"require": ["exp", "iat", "aud"], "verify_iat": False},
        )
    except jwt.ExpiredSignatureError:
        raise TokenExpired("the URL has expired") from None
    except jwt.PyJWTError:
        raise TokenInvalid("the URL is not valid") from None
    dag_id, run_id, task_id, map_index = claims["wait"]
    return Token(
        Wait(dag_id, run_id, task_id, map_index),
        datetime.fromtimestamp(claims["iat"], timezone.utc),
        uuid.UUID(claims["by"]) if "by" in claims else None,
    )


def _secret() -> bytes:
    secret = settings.callback_secret()
    if not secret:
        raise ValueError(
            "signed URLs are signed with [events] callback_secret or [api] secret_key; set one, "
            "to the same for API servers, workers and triggerers"
        )
    return hashlib.sha256(f"{_AUDIENCE}:{secret}".encode()).digest()
