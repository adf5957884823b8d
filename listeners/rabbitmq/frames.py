"""
Frames whose metadata the client cannot read, put such that it can: one message must not end its connection.

pamqp refuses a whole frame for a timestamp in microseconds, or for a header's name that is no UTF-8, and aiormq
then closes the connection; the broker delivers the same message to whoever comes next.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any

from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from pamqp import constants, decode, frame
from pamqp.commands import Basic
from yarl import URL

# Of a field, by its type: how many bytes it has. Of others the first four bytes say how many follow.
_SIZES = {
    b"t": 1, b"b": 1, b"B": 1, b"s": 2, b"u": 2, b"I": 4, b"i": 4, b"f": 4, b"l": 8, b"L": 8, b"d": 8, b"T": 8,
    b"D": 5, b"V": 0, b"\0": 0,
}  # fmt: skip
# The types of a message's properties, in their order. The first is said to be there by bit 15.
_SHORT = b""
_PROPERTIES = (_SHORT, _SHORT, b"F", b"B", b"B", *4 * (_SHORT,), b"T", *4 * (_SHORT,))
# Bytes of a header frame before its flags, and of a delivery between the consumer's tag and the exchange.
_BEFORE_FLAGS, _AFTER_TAG = 12, 9


class LenientTransport(TransportFactory):
    """Connects as aiormq does; what comes in goes through `Frames`."""

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        made = TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory()
        reader, writer = await made.create(url, **kwargs)
        return Frames(reader), writer  # type: ignore[return-value]


class Frames:
    """A stream of frames, as much of `asyncio.StreamReader` as aiormq uses: it reads each frame in three parts."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._ready = b""

    def at_eof(self) -> bool:
        return not self._ready and self._reader.at_eof()

    async def readexactly(self, count: int) -> bytes:
        if not self._ready:
            self._ready = await self._next()
        read, self._ready = self._ready[:count], self._ready[count:]
        return read

    async def _next(self) -> bytes:
        start = await self._reader.readexactly(constants.FRAME_HEADER_SIZE)
        if start.startswith(constants.AMQP):  # the server speaks another version, and says no more
            return start
        kind, channel, size = struct.unpack(">BHI", start)
        rest = await self._reader.readexactly(size + 1)
        if kind not in (constants.FRAME_METHOD, constants.FRAME_HEADER):
            return start + rest
        try:
            frame.unmarshal(start + rest)
        except Exception:
            payload = mended(kind, rest[:-1])
            return struct.pack(">BHI", kind, channel, len(payload)) + payload + rest[-1:]
        return start + rest


def mended(kind: int, payload: bytes) -> bytes:
    """Return a frame's payload without what cannot be read; of other frames than a message's, as it is."""
    if kind == constants.FRAME_HEADER:
        try:
            return _header(payload)
        except (ValueError, RecursionError):
            return payload[:_BEFORE_FLAGS] + b"\0\0"  # no properties at all
    try:
        return _delivery(payload) if int.from_bytes(payload[:4], "big") == Basic.Deliver.index else payload
    except ValueError:
        return payload


def _header(payload: bytes) -> bytes:
    flags = int.from_bytes(payload[_BEFORE_FLAGS : _BEFORE_FLAGS + 2], "big")
    rest, kept, written = payload[_BEFORE_FLAGS + 2 :], 0, b""
    for place, kind in enumerate(_PROPERTIES):
        bit = 1 << (15 - place)
        if not flags & bit:
            continue
        raw, rest = _split(kind, rest)
        raw = _readable(kind, raw)
        if raw:
            kept |= bit
            written += raw
    return payload[:_BEFORE_FLAGS] + kept.to_bytes(2, "big") + written


def _delivery(payload: bytes) -> bytes:
    tag, rest = _split(_SHORT, payload[4:])
    middle, rest = rest[:_AFTER_TAG], rest[_AFTER_TAG:]
    exchange, rest = _split(_SHORT, rest)
    routing_key, _ = _split(_SHORT, rest)
    return payload[:4] + tag + middle + _text(exchange) + _text(routing_key)


def _split(kind: bytes, data: bytes) -> tuple[bytes, bytes]:
    """
    Return the bytes of the value at the start of ``data``, and what is behind them.

    :raises ValueError: they are not all there.
    """
    if kind == _SHORT:
        size = 1 + int.from_bytes(data[:1], "big")
    elif (fixed := _SIZES.get(kind)) is not None:
        size = fixed
    else:
        size = 4 + int.from_bytes(data[:4], "big")
    if size > len(data):
        raise ValueError(f"{size} bytes are said, and {len(data)} are there")
    return data[:size], data[size:]


def _readable(kind: bytes, raw: bytes) -> bytes:
    """Return a value such that it can be read; nothing if it cannot."""
    if kind == _SHORT:
        return _text(raw)
    if kind == b"F":
        return _table(raw)
    try:
        decode.embedded_value(kind + raw)
    except (ValueError, OverflowError, OSError, ArithmeticError, RecursionError):
        return b""
    return raw


def _table(raw: bytes) -> bytes:
    rest, written = raw[4:], b""
    while rest:
        name, rest = _split(_SHORT, rest)
        kind, rest = rest[:1], rest[1:]
        value, rest = _split(kind, rest)
        readable = _readable(kind, value)
        if readable or not value:
            written += _text(name) + kind + readable
    return len(written).to_bytes(4, "big") + written


def _text(raw: bytes) -> bytes:
    """Return a short text as UTF-8. What is none counts as Latin-1; if it is too long then, nothing is left."""
    try:
        raw[1:].decode()
    except UnicodeDecodeError:
        text = raw[1:].decode("latin-1").encode()
        return bytes([len(text)]) + text if len(text) < 256 else b"\0"
    return raw
