from __future__ import annotations

import gzip
import zlib
from types import SimpleNamespace

import pytest
from airflow_events.errors import EventUndecodable
from airflow_events.listeners.rabbitmq import messages


def value_of(body, encoding):
    header = SimpleNamespace(properties=SimpleNamespace(content_encoding=encoding))
    return messages.value_of(SimpleNamespace(body=body, header=header), "text", "the message")


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (b"one two", None),
        (gzip.compress(b"one two"), "gzip"),
        (gzip.compress(b"one ") + gzip.compress(b"two") + b"\0\0", "gzip"),
        (zlib.compress(b"one two"), "deflate"),
    ],
    ids=["plain", "gzip", "of several parts", "deflate"],
)
def test_a_compressed_body_is_unpacked_to_its_end(body, encoding):
    assert value_of(body, encoding) == "one two"


@pytest.mark.parametrize(
    "body",
    [
        b"one two",
        gzip.compress(b"one two")[:-9],
        gzip.compress(b"one ") + gzip.compress(b"two")[:-9],
        gzip.compress(b"one") + b"two",
        gzip.compress(b"1" * 600) * 2,
        zlib.compress(b"1" * 2000),
    ],
    ids=["not compressed", "cut off", "the second cut off", "garbage behind", "two too large", "too large"],
)
def test_a_body_that_cannot_be_unpacked_is_undecodable(body, monkeypatch):
    monkeypatch.setattr(messages, "_LARGEST", 1000)
    with pytest.raises(EventUndecodable, match="the message is not gzip"):
        value_of(body, "gzip")
