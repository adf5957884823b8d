"""
How the inbox knows that a triggerer of its own deployment asks: by a token that is signed with what both have.

Triggerers sign, API servers check, and so nothing of Airflow's database is imported here. The key is derived from
Airflow's Fernet key with a label, so that it signs nothing else, and no other token of Airflow is taken for one of
these. Read once for each process, as Airflow reads its Fernet key.
"""

from __future__ import annotations

import base64
import functools
import hmac
import os
import time

import jwt
from airflow_events import settings
from airflow_events.errors import InboxKeyMissing, InboxTokenRefused

_ALGORITHM = "HS256"
_AUDIENCE = "airflow-events-inbox"
_LABEL = b"airflow-events-inbox:1"
_FERNET_BYTES = 32
# Seconds.
_LIFE = 300
_USE = 120  # of one token, so that it has a while to go whenever it is sent
_LEEWAY = 60  # by how much clocks may differ

# The last token, when it was signed, and in which process.
_signed: tuple[str, float, int] = ("", 0.0, 0)
# By how many seconds the clock of the API server is ahead of this process's, as far as that matters.
_ahead = 0.0


def sign(*, fresh: bool = False) -> str:
    """
    Return a token for the next request.

    :param fresh: not the last one again.
    :raises InboxKeyMissing: there is nothing to sign with.
    """
    global _signed
    token, at, pid = _signed
    now = time.time() + _ahead
    if fresh or not at <= now < at + _USE or pid != os.getpid():
        from airflow.utils.net import get_hostname

        pid = os.getpid()
        claims = {"aud": _AUDIENCE, "iat": int(now), "exp": int(now) + _LIFE, "sub": f"{get_hostname()}:{pid}"}
        token = jwt.encode(claims, keys()[0], algorithm=_ALGORITHM)
        _signed = token, now, pid
    return token


def follow_clock(moment: float) -> None:
    """
    Sign from now on by the clock of the API server, which has refused a token.

    :param moment: what that one shows, in seconds since the epoch.
    """
    global _ahead
    _ahead = moment - time.time()


def check(token: str) -> str:
    """
    Return which process signed a token, as ``host:pid``.

    :raises InboxTokenRefused: it is not good, or not any more.
    :raises InboxKeyMissing: there is nothing to check with.
    """
    for key in keys():
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[_ALGORITHM],
                audience=_AUDIENCE,
                leeway=_LEEWAY,
                options={"require": ["aud", "exp", "iat", "sub"]},
            )
        except jwt.InvalidSignatureError:
            continue
        except jwt.ExpiredSignatureError:
            raise InboxTokenRefused("the token has expired; do the clocks differ?") from None
        except jwt.ImmatureSignatureError:
            raise InboxTokenRefused("the token's issue time is in the future; do the clocks differ?") from None
        except (jwt.PyJWTError, ValueError):
            raise InboxTokenRefused("this is no token for the inbox") from None
        return str(claims["sub"])
    raise InboxTokenRefused(
        "the token is signed with another key than this API server's; triggerers and API servers need the same "
        "[core] fernet_key, or [events] inbox_secret where it is set"
    )


@functools.cache
def keys() -> tuple[bytes, ...]:
    """
    Return the keys: the first signs, all are accepted.

    :raises InboxKeyMissing: there is none.
    """
    if secret := settings.inbox_secret():
        return (_derived(secret.encode()),)
    # The configuration of the Task SDK does not know the default: it would answer "{FERNET_KEY}".
    from airflow.configuration import conf

    listed = [key.strip() for key in (conf.get("core", "fernet_key", fallback="") or "").split(",")]
    if not any(listed):
        raise InboxKeyMissing(
            "requests to the inbox are signed with a key derived from [core] fernet_key, which is empty: set it, "
            "or [events] inbox_secret, to the same for API servers and triggerers"
        )
    return tuple(_derived(_decoded(key)) for key in listed if key)


def _decoded(key: str) -> bytes:
    try:
        decoded = base64.urlsafe_b64decode(key)
    except ValueError:
        decoded = b""
    if len(decoded) != _FERNET_BYTES:
        raise InboxKeyMissing(
            "[core] fernet_key is not a valid Fernet key (32 bytes in URL-safe base64); set it, or "
            "[events] inbox_secret, for API servers and triggerers"
        )
    return decoded


def _derived(secret: bytes) -> bytes:
    return hmac.digest(secret, _LABEL, "sha256")
