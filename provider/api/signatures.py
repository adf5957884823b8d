"""The signatures of webhooks: HMAC-SHA256 over the body, in the header that each sender has for it."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping

# Seconds. How old a signature with a time in it may be; what Stripe's own libraries take.
_TOLERANCE = 300

GITHUB = "x-hub-signature-256"
STRIPE = "stripe-signature"
HEADERS = {"github": GITHUB, "stripe": STRIPE}


def is_valid(scheme: str, secret: str, headers: Mapping[str, str], body: bytes) -> bool:
    """
    Whether ``body`` was signed with ``secret``, compared in constant time.

    :param scheme: ``github``: ``X-Hub-Signature-256: sha256=<hex>``; ``stripe``:
        ``Stripe-Signature: t=<seconds>,v1=<hex>``, of which there may be several and which is not to be older
        than five minutes.
    """
    if not secret:
        return False
    if scheme == "github":
        return _is(headers.get(GITHUB, ""), "sha256=" + _hmac(secret, body))
    fields = [part.strip().partition("=") for part in headers.get(STRIPE, "").split(",")]
    times = [value for name, _, value in fields if name == "t"]
    if len(times) != 1 or not times[0].isdecimal() or not times[0].isascii() or len(times[0]) > 12:
        return False
    if abs(time.time() - int(times[0])) > _TOLERANCE:
        return False
    wanted = _hmac(secret, times[0].encode() + b"." + body)
    return any([_is(value, wanted) for name, _, value in fields if name == "v1"])  # noqa: C419 (all are compared)


def _hmac(secret: str, body: bytes) -> str:
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def _is(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())
