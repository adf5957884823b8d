"""What a task that waits for many events waits for, and what it delivers."""

from __future__ import annotations

import base64
import bz2
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from airflow_events.listeners.base import describe
from airflow_events.listeners.support import serde

# Of texts with more characters than this, trigger rows have the compressed form, since one is 64 KB in MySQL.
_LONG = 10_000
_PACKED = "bz2:"


@dataclass(frozen=True)
class Calls:
    """
    The calls of ``poll_for_event``, one for each event.

    They travel as text, since Airflow would keep each of thousands of arguments as several objects, several times.

    :param arguments: of each: a mapping is its keyword arguments, a list or tuple its positional ones, and
        anything else its only one.
    :param common: keyword arguments of all of them.
    """

    arguments: Sequence[Any]
    common: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.arguments)

    def of(self, index: int) -> tuple[Sequence[Any], dict[str, Any]]:
        """Return the positional and the keyword arguments of one."""
        argument = self.arguments[index]
        if isinstance(argument, Mapping):
            return (), {**self.common, **argument}
        positional = argument if isinstance(argument, (list, tuple)) else (argument,)
        return positional, dict(self.common)

    def digest(self, index: int) -> str:
        """
        Name the arguments of one, so that a change of them is seen: 32 bytes, in hex.

        Frozen, since records bear it. Those of the first edition had 9 bytes of it, and the others are 0.
        """
        return self._digests[index]

    def describe(self, listener: str, *, others: bool = True) -> str:
        """Write the first of them in a line, and how many others there are."""
        if not self.arguments:
            return f"{listener}, of no arguments"
        args, kwargs = self.of(0)
        more = f" and {len(self) - 1:,} more" if others and len(self) > 1 else ""
        return f"{describe(listener, args, kwargs)}{more}"

    def encode(self) -> str:
        """Write them as text that `decode` reads."""
        return serde.encode({"arguments": list(self.arguments), "common": dict(self.common)})

    @classmethod
    def decode(cls, text: str) -> Calls:
        """Read what `encode` wrote, packed or not."""
        return cls(**serde.decode(unpacked(text)))

    @classmethod
    def prepared(cls, text: str) -> Calls:
        """Read what `encode` wrote, and do what takes a while with thousands of them; to be called in a thread."""
        calls = cls.decode(text)
        _ = calls._digests
        return calls

    @cached_property
    def _digests(self) -> list[str]:
        common = _digest(dict(self.common), "")
        return [_digest(argument, common).ljust(64, "0") for argument in self.arguments]


def packed(text: str) -> str:
    """Return what `Calls.encode` wrote as it stands in trigger rows: the same text always makes the same."""
    if len(text) < _LONG:
        return text
    return _PACKED + base64.b64encode(bz2.compress(text.encode())).decode()


def unpacked(text: str) -> str:
    """Return what was given to `packed`; a text that was not packed stays as it is."""
    if not text.startswith(_PACKED):
        return text
    return bz2.decompress(base64.b64decode(text.removeprefix(_PACKED))).decode()


def _digest(value: Any, more: str) -> str:
    text = json.dumps(serde.as_json(value), sort_keys=True)
    return hashlib.blake2b(f"{text} {more}".encode(), digest_size=9).hexdigest()


def result(events: Mapping[int, Any], count: int, first: int | None, default: Sequence[Any] = ()) -> list[Any]:
    """
    Return what the task delivers.

    :param events: by their indexes.
    :param count: how many were waited for.
    :param first: as of ``WaitForEventsOperator``.
    :param default: what stands in the place of an event that is missing: a list of one item.
    """
    if first is not None:
        return [(index, events[index]) for index in sorted(events)]
    return [events[index] if index in events else default[0] for index in range(count)]
