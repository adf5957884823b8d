"""What the listener for HTTP events says of a wait; the event itself is the API server's."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
from airflow_events.listeners.base import check_arguments
from airflow_events.listeners.http import HttpListener

NO_KEYS = ["", "a\nb", "x" * 257, 1.5, True]


@pytest.mark.parametrize("key", ["order-1", "größe", "🎉", "x" * 256])
def test_the_address_of_a_wait_is_the_digest_of_its_key(key):
    digest = hashlib.sha256(key.encode()).hexdigest()
    assert HttpListener.address(key) == HttpListener.address(key=key, schema={"type": "object"}) == digest
    assert HttpListener.address("\udcff") not in (None, HttpListener.address("?"))


def test_without_a_key_there_is_no_address():
    assert HttpListener.address() is HttpListener.address(None, schema=True) is None
    check_arguments(HttpListener, (), {"schema": True})


@pytest.mark.parametrize("key", NO_KEYS)
async def test_what_is_no_key_fails_the_wait(key):
    with pytest.raises(ValueError, match="a key is a text of 1 to 256 characters"):
        HttpListener.address(key)
    with pytest.raises(ValueError, match="a key is a text of 1 to 256 characters"):
        await HttpListener().poll_for_event(key)


@pytest.mark.parametrize("key", ["order-1", None])
async def test_a_poll_asks_nobody_and_waits_until_it_is_cancelled(key):
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(HttpListener().poll_for_event(key), 0.05)
