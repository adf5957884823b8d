"""What a message becomes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

from aiormq.abc import DeliveredMessage
from airflow_events.errors import EventUndecodable
from airflow_events.listeners.rabbitmq.client import Source, coordinates
from airflow_events.listeners.support.values import Format, decode, digest_of, named, text_of

_PROPERTIES = (
    "content_encoding", "priority", "correlation_id", "reply_to", "expiration", "message_type", "user_id",
    "app_id",
)  # fmt: skip
# Headers of the broker's that are not the same at each delivery.
_OF_A_DELIVERY = ("x-delivery-count", "x-acquired-count", "x-stream-offset")
_COMPRESSED = ("gzip", "x-gzip", "deflate")
_GZIP = b"\x1f\x8b"  # what it begins with
# Of zlib: of either format, whose header says which.
_EITHER = 32 + zlib.MAX_WBITS
# Bytes that a compressed body may have when it is unpacked.
_LARGEST = 64 * 2**20


@dataclass
class Received:
    """
    A message that was received, and where.

    :ivar server: see `airflow_events.listeners.rabbitmq.client.place_of`; ``virtual_host`` likewise.
    :ivar delivery: what tells this delivery from every other.
    :ivar is_rejected: whether it is to go to the queue's dead letters.
    """

    server: str
    virtual_host: str
    queue: str
    delivery: str
    message: DeliveredMessage
    is_rejected: bool = False

    @property
    def message_id(self) -> str | None:
        """What its sender gave it; None if it has none."""
        found: str | None = _plain(self.message.header.properties.message_id or None)
        return found

    @property
    def start(self) -> bytes:
        """With what its body begins."""
        return bytes(self.message.body[:200])

    @property
    def tag(self) -> int:
        """By what it is settled on its channel."""
        return tag_of(self.message)

    @property
    def id(self) -> str:
        """Its `EventListener.event_id`."""
        return coordinates(self.server, self.virtual_host, self.queue, self.message_id, self.delivery)

    @property
    def content_id(self) -> str:
        """What it is known by as one that cannot be read: all that it holds, at each delivery the same."""
        about = json.dumps(described(self.message, headers_of(self.message)), sort_keys=True, default=str)
        content = hashlib.sha256(about.encode() + b"\0" + self.message.body).hexdigest()
        return coordinates(self.server, self.virtual_host, self.queue, None, content)


def event_of(source: Source, received: Received, values: Format) -> dict[str, Any]:
    """
    Return the event that a message becomes.

    :raises EventUndecodable: it is not of that format.
    """
    message = received.message
    event = {
        "server": received.server,
        "virtual_host": received.virtual_host,
        "queue": source.queue,
        **described(message, headers_of(message)),
        "timestamp": timestamp_of(message),
        "digest": digest_of(bytes(message.body)),
        "value": value_of(message, values, f"the message {received.id} of {source}"),
        "rabbitmq_conn_id": source.conn_id,
    }
    return event if received.message_id else {**event, "delivery": received.delivery}


def value_of(message: DeliveredMessage, values: Format, where: str) -> Any:
    """
    Return what a message's body says, unpacked where it is compressed.

    :raises EventUndecodable: it is not of that format, or not compressed as it says.
    """
    body = bytes(message.body)
    encoding = str(message.header.properties.content_encoding or "").lower()
    if encoding in _COMPRESSED:
        try:
            body = _unpacked(body)
        except (ValueError, EOFError, OSError, zlib.error) as error:
            raise EventUndecodable(where, encoding, str(error), body[:200]) from error
    return decode(body, values, where)


def _unpacked(body: bytes) -> bytes:
    if body.startswith(_GZIP):  # of which several may stand one after another
        unpacked = gzip.GzipFile(fileobj=io.BytesIO(body)).read(_LARGEST + 1)
        if len(unpacked) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        return unpacked
    unpacking = zlib.decompressobj(_EITHER)
    unpacked = unpacking.decompress(body, _LARGEST)
    if not unpacking.eof:
        raise ValueError(f"it does not end, or has more than {_LARGEST} bytes")
    return unpacked


def timestamp_of(message: DeliveredMessage) -> datetime | None:
    """Return a message's own timestamp, in UTC."""
    stamp = message.header.properties.timestamp
    if stamp is None or stamp.tzinfo is not None:
        return stamp
    return stamp.replace(tzinfo=timezone.utc)


def described(message: DeliveredMessage, headers: dict[str, Any]) -> dict[str, Any]:
    """Return what an event says of a message besides its value; the same at each delivery."""
    properties = message.header.properties
    found = {name: getattr(properties, name) for name in _PROPERTIES}
    return {
        "exchange": _plain(getattr(message.delivery, "exchange", "")),
        "routing_key": _plain(getattr(message.delivery, "routing_key", "")),
        "message_id": _plain(properties.message_id or None),
        "content_type": _plain(properties.content_type),
        "headers": _plain({name: value for name, value in headers.items() if name not in _OF_A_DELIVERY}),
        "properties": {name: _plain(value) for name, value in found.items() if value not in (None, "")},
    }


def _plain(value: Any) -> Any:
    """Write metadata in shapes that can be stored: JSON's, and datetimes. Bytes that are no text become Base64."""
    if isinstance(value, dict):
        return {named(str(_plain(name))): _plain(content) for name, content in value.items()}
    if isinstance(value, list):
        return [_plain(content) for content in value]
    if isinstance(value, str):
        return text_of(value.encode(errors="surrogateescape"))
    if isinstance(value, (bytes, bytearray)):
        return text_of(bytes(value))
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, datetime) and value.tzinfo is None:
        return value.replace(tzinfo=timezone.utc)
    return value


def headers_of(message: DeliveredMessage) -> dict[str, Any]:
    """Return a message's headers, as a dict of its own."""
    return dict(message.header.properties.headers or {})


def tag_of(message: DeliveredMessage) -> int:
    """Return by what a message is settled on its channel."""
    return int(getattr(message.delivery, "delivery_tag", 0))
