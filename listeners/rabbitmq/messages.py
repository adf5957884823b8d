"""What is written on the messages of claims, and what a message becomes."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

from aiormq.abc import DeliveredMessage
from airflow_events.listeners.rabbitmq.client import Source, digest
from airflow_events.listeners.values import Format, decode
from pamqp.commands import Basic

# The header that says what a message of ours is, as JSON.
_HEADER = "x-airflow-events"
_SET_ASIDE = "x-airflow-events-was-"
# Headers that the broker would act on have another name in the copy: CC and BCC would send it elsewhere, too, and
# where x-death names the queue, the broker may drop it.
_ACTED_ON = ("CC", "BCC", "x-death")
_PROPERTIES = (
    "content_type", "content_encoding", "priority", "correlation_id", "reply_to", "timestamp", "message_type",
    "app_id",
)  # fmt: skip


@dataclass
class Claim:
    """
    A message in a claim queue.

    :ivar id: the message's identity, over all moves of it.
    :ivar claim: this move's own.
    :ivar at: when it was made, in seconds since the epoch; ``until``: when it lapses.
    :ivar again: whether it may be a double: the broker had given it out before, or it was put back before.
    :ivar tags: the delivery tags of the copy and its notes, for who holds the queue.
    """

    id: str
    claim: str
    at: float
    until: float
    again: bool
    about: dict[str, Any]
    message: DeliveredMessage
    tags: list[int] = field(default_factory=list)


def timestamp_of(message: DeliveredMessage) -> datetime | None:
    """Return a message's own timestamp, in UTC."""
    stamp = message.header.properties.timestamp
    if stamp is None or stamp.tzinfo is not None:
        return stamp
    return stamp.replace(tzinfo=timezone.utc)


def event_of(source: Source, claim: Claim, values: Format) -> dict[str, Any]:
    """
    Return the event that a claimed message becomes.

    :raises EventUndecodable: it is not of that format.
    """
    about, message = claim.about, claim.message
    headers = {name: value for name, value in headers_of(message).items() if name != _HEADER}
    event = {
        "queue": source.queue,
        "id": claim.id,
        "claim": claim.claim,
        "timestamp": timestamp_of(message),
        "value": decode(message.body, values, f"the message {claim.id} of {source}"),
        **described(message, {name.removeprefix(_SET_ASIDE): value for name, value in headers.items()}),
        "exchange": about["exchange"],
        "routing_key": about["routing_key"],
        "message_id": about["message_id"],
    }
    for name in ("user_id", "expiration"):
        if about.get(name) is not None:
            event["properties"][name] = about[name]
    return event


def described(message: DeliveredMessage, headers: dict[str, Any]) -> dict[str, Any]:
    """Return what an event says of a message besides its value."""
    properties = message.header.properties
    others = [name for name in _PROPERTIES if name not in ("content_type", "timestamp")]
    return {
        "exchange": getattr(message.delivery, "exchange", ""),
        "routing_key": getattr(message.delivery, "routing_key", ""),
        "message_id": properties.message_id,
        "content_type": properties.content_type,
        "headers": _plain(headers),
        "properties": {
            name: getattr(properties, name) for name in others if getattr(properties, name) not in (None, "")
        },
    }


def _plain(value: Any) -> Any:
    """Write a header's value in shapes that JSON has, and datetimes."""
    if isinstance(value, dict):
        return {str(name): _plain(content) for name, content in value.items()}
    if isinstance(value, list):
        return [_plain(content) for content in value]
    if isinstance(value, (bytes, bytearray)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, datetime) and value.tzinfo is None:
        return value.replace(tzinfo=timezone.utc)
    return value


def _sendable(value: Any) -> Any:
    """Write a header's value as the client takes it; bytes it gives are none that it takes."""
    if isinstance(value, dict):
        return {name: _sendable(content) for name, content in value.items()}
    if isinstance(value, list):
        return [_sendable(content) for content in value]
    return bytearray(value) if isinstance(value, bytes) else value


def headers_of(message: DeliveredMessage) -> dict[str, Any]:
    """Return a message's headers, as a dict of its own."""
    return dict(message.header.properties.headers or {})


def about_of(message: DeliveredMessage) -> dict[str, Any]:
    """Return what we wrote on a message; an empty dict if it is none of ours."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        about = json.loads(headers_of(message)[_HEADER])
        if isinstance(about, dict):
            return about
    return {}


def tag_of(message: DeliveredMessage) -> int:
    """Return by what a message is acknowledged on its channel."""
    return int(getattr(message.delivery, "delivery_tag", 0))


def as_json(value: Any) -> bytes:
    """Write a note."""
    return json.dumps(value, ensure_ascii=False).encode()


def of_note(kind: str, about: dict[str, Any], persistent: bool) -> Basic.Properties:
    """Return the properties of a note."""
    header: dict[str, Any] = {_HEADER: json.dumps({"kind": kind, "claim": about.get("claim", "")})}
    return Basic.Properties(headers=header, delivery_mode=2 if persistent else 1, content_type="application/json")


def newly_claimed(message: DeliveredMessage, lapse: float, unique: bool) -> dict[str, Any]:
    """Return what is written on the copy of a message that is claimed."""
    properties, before = message.header.properties, about_of(message)
    back = before.get("kind") == "back"
    sent = before if back else {}
    message_id = sent["message_id"] if back else properties.message_id
    if back:
        identity = sent["id"]
    elif unique and message_id:
        stamp = str(properties.timestamp)
        identity = digest(message_id, stamp, hashlib.sha256(message.body).hexdigest())
    else:
        identity = uuid.uuid4().hex
    return {
        "kind": "copy",
        "id": identity,
        "claim": uuid.uuid4().hex,
        "at": time.time(),
        "until": time.time() + lapse,
        "again": back or bool(getattr(message.delivery, "redelivered", False)),
        "exchange": sent.get("exchange", getattr(message.delivery, "exchange", "")),
        "routing_key": sent.get("routing_key", getattr(message.delivery, "routing_key", "")),
        "message_id": message_id or None,
        "user_id": sent.get("user_id", properties.user_id),
        "expiration": properties.expiration,
    }


def copied(message: DeliveredMessage, about: dict[str, Any]) -> Basic.Properties:
    """Return the properties of the copy: the message's, without those that the broker would act on."""
    headers = {name: _sendable(value) for name, value in headers_of(message).items() if name != "x-delivery-count"}
    headers = {(_SET_ASIDE + name if name in _ACTED_ON else name): value for name, value in headers.items()}
    return _with(message, about["message_id"] or about["id"], {**headers, _HEADER: json.dumps(about)})


def restored(claim: Claim) -> Basic.Properties:
    """Return the properties with which a message goes back to its queue."""
    headers = {name: _sendable(value) for name, value in headers_of(claim.message).items()}
    if (deaths := headers.pop(f"{_SET_ASIDE}x-death", None)) is not None:
        headers["x-death"] = deaths
    kept = ("id", "exchange", "routing_key", "message_id", "user_id")
    headers[_HEADER] = json.dumps({"kind": "back", **{name: claim.about[name] for name in kept}})
    properties = _with(claim.message, claim.about["message_id"] or claim.id, headers)
    properties.expiration = claim.about["expiration"]
    return properties


def _with(message: DeliveredMessage, message_id: str, headers: dict[str, Any]) -> Basic.Properties:
    kept = {name: getattr(message.header.properties, name) for name in _PROPERTIES}
    return Basic.Properties(**kept, message_id=message_id, headers=headers, delivery_mode=2)
