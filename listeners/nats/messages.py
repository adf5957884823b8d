"""How a stream has its messages, and what one becomes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from airflow_events.listeners.support.timestamps import EPOCH
from airflow_events.listeners.support.values import Format, decode, named, text_of
from nats.aio.msg import Msg

MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class Source:
    """A stream of a connection, and the consumer; watches have none."""

    conn_id: str
    stream: str
    durable: str = ""

    def __post_init__(self) -> None:
        # These become parts of subjects, where such a character would lead elsewhere.
        for what, name in (("stream", self.stream), ("durable", self.durable or "-")):
            if not name or re.search(r"[\s.*>/\\]", name):
                raise ValueError(f"{what} is a name without spaces, dots, slashes and wildcards, not {name!r}")

    def __str__(self) -> str:
        durable = f" (consumer {self.durable!r})" if self.durable else ""
        return f"the stream {self.stream!r}{durable} of the connection {self.conn_id!r}"


@dataclass(frozen=True)
class Stored:
    """A message as its stream has it."""

    sequence: int
    timestamp: datetime
    subject: str
    headers: dict[str, str]
    data: bytes


def event_of(source: Source, message: Stored, values: Format) -> dict[str, Any]:
    """
    Return the event that a message becomes.

    :raises EventUndecodable: it is not of that format.
    """
    return {
        "stream": source.stream,
        "sequence": message.sequence,
        "subject": message.subject,
        "headers": {named(name): text_of(header.encode()) for name, header in message.headers.items()},
        "timestamp": message.timestamp,
        # As a signal has it, and the marker of a key that was deleted.
        "value": None
        if values == "json" and not message.data
        else decode(message.data, values, f"the message {message.sequence} of {source}"),
    }


def covers(pattern: str, subject: str) -> bool:
    """Whether a subject with wildcards has ``subject``, which has none."""
    wanted, there = pattern.split("."), subject.split(".")
    for place, token in enumerate(wanted):
        if token == ">":
            return place < len(there)
        if place >= len(there) or token not in ("*", there[place]):
            return False
    return len(wanted) == len(there)


def stored_of(message: Msg) -> Stored:
    """Return what a consumer has delivered."""
    sequence, timestamp = stored_as(message.reply)
    return Stored(sequence, timestamp, message.subject, dict(message.headers or {}), message.data)


def stored_as(reply: str) -> tuple[int, datetime]:
    """Return a delivered message's sequence in the stream, and when it was stored."""
    tokens = _tokens(reply)
    # Cut, not rounded, to microseconds: as in `moment`.
    return int(tokens[1]), EPOCH + int(tokens[3]) // 1000 * MICROSECOND


def delivered_as(reply: str) -> int:
    """Return a delivered message's sequence in its consumer."""
    return int(_tokens(reply)[2])


def _tokens(reply: str) -> list[str]:
    """Return what follows the consumer's name in the subject that a message is acknowledged by."""
    tokens = reply.split(".")  # $JS.ACK.[domain.account.]stream.consumer.deliveries.sequence...
    return tokens[4:] if len(tokens) == 9 else tokens[6:]


def moment(text: str) -> datetime:
    """Read the server's form of a moment, which has up to nine digits after the point."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00") + int(fraction[:6].ljust(6, "0")) * MICROSECOND


def headers_of(raw: bytes) -> dict[str, str]:
    """
    Read a message's headers: of those that are there twice, the last; what is no UTF-8 is replaced.

    What the server says of itself, in the first line, is ``Status`` and ``Description``.
    """
    first, *lines = raw.decode("utf-8", "replace").split("\r\n")
    status, _, description = first.partition(" ")[2].strip().partition(" ")
    said = {name: value for name, value in (("Status", status), ("Description", description)) if value}
    parts = (line.partition(":") for line in lines)
    return {**said, **{name.strip(): value.strip() for name, colon, value in parts if name.strip() and colon}}
