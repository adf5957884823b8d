"""The signatures of webhooks, by the examples of who makes them."""

from __future__ import annotations

import hashlib
import hmac
import time

import pytest
from airflow_events.api.signatures import is_valid

# From GitHub's documentation of webhooks.
GITHUB = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
SECRET = "It's a Secret to Everybody"


def stripe(at, *, secret=SECRET, body=b"{}"):
    mac = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return {"stripe-signature": f"t={at},v0=1,v1={mac}"}


def test_github():
    assert is_valid("github", SECRET, {"x-hub-signature-256": GITHUB}, b"Hello, World!")
    assert not is_valid("github", SECRET, {"x-hub-signature-256": GITHUB}, b"Hello, World?")
    assert not is_valid("github", "another", {"x-hub-signature-256": GITHUB}, b"Hello, World!")
    assert not is_valid("github", SECRET, {}, b"Hello, World!")
    assert not is_valid("github", SECRET, {"x-hub-signature-256": "\u00e9"}, b"Hello, World!")


@pytest.mark.parametrize("off", [0, -290, 290])
def test_stripe(off):
    assert is_valid("stripe", SECRET, stripe(int(time.time()) + off), b"{}")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        stripe(1),
        stripe(int(time.time()), secret="another"),
        stripe(int(time.time()), body=b"[]"),
        {"stripe-signature": "t=\u0661,v1=1"},
        {"stripe-signature": stripe(int(time.time()))["stripe-signature"] + ",t=1"},
        {"stripe-signature": "v1=1"},
        {"stripe-signature": ",,="},
    ],
)
def test_what_stripe_did_not_sign(headers):
    assert not is_valid("stripe", SECRET, headers, b"{}")


@pytest.mark.parametrize("scheme", ["github", "stripe"])
def test_a_connection_without_a_secret_signs_nothing(scheme):
    empty = "sha256=" + hmac.new(b"", b"{}", hashlib.sha256).hexdigest()
    headers = {"x-hub-signature-256": empty, **stripe(int(time.time()), secret="")}
    assert not is_valid(scheme, "", headers, b"{}")
