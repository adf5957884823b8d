"""
How far a source's log is settled: kept in the inbox, since what the source itself keeps of that may expire.

A *place* is a log that counts from 0, such as a partition of a topic. What is settled of it are ranges of offsets,
each from its first offset until before its second one: at their places, no message is ever to be delivered again.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from airflow_events.listeners.support.shared import OnePerLoop

Ranges = list[tuple[int, int]]
"""Ranges of offsets, in order, between any two of which something is left out."""


@dataclass(frozen=True)
class Known:
    """
    What is known of a source.

    :param settled: by place; a place without ranges has begun, and nothing of it is settled.
    :param owner: who knows it: the same for all that share an inbox, and empty where there is none.
    """

    settled: Mapping[str, Ranges] = field(default_factory=dict)
    owner: str = ""


Exchange = Callable[[str, Mapping[str, Ranges], Mapping[str, int]], Awaitable[Known]]


class Positions(OnePerLoop):
    """
    The positions of all sources that the waits of an event loop use.

    :ivar inbox: asks the inbox, as `exchange` does; None where there is none, as in ``dag.test()``: then nothing
        outlives the process.
    """

    def __init__(self) -> None:
        self.inbox: Exchange | None = None
        self._known: dict[str, Known] = {}

    async def exchange(
        self, source: str, settled: Mapping[str, Ranges] | None = None, begins: Mapping[str, int] | None = None
    ) -> Known:
        """
        Tell what is settled, and return what all have told so far, once it is durable.

        It may be told again, and by several processes in any order.

        :param source: what tells it from every other source, in one text; frozen.
        :param settled: by place.
        :param begins: where to begin in places that nobody has begun: all before it is settled there. In a place
            that somebody has begun, it does not count.
        """
        if self.inbox is not None:
            return await self.inbox(source, settled or {}, begins or {})
        before = self._known.get(source, Known()).settled
        self._known[source] = Known(united(before, settled or {}, begins or {}))
        return self._known[source]


def united(
    before: Mapping[str, Ranges], settled: Mapping[str, Ranges], begins: Mapping[str, int]
) -> dict[str, Ranges]:
    """Return what is settled after an exchange, by place."""
    after = {place: union(ranges) for place, ranges in before.items()}
    for place, begin in begins.items():
        after.setdefault(place, [(0, begin)] if begin > 0 else [])
    for place, ranges in settled.items():
        after[place] = union([*after.get(place, ()), *ranges])
    return after


def union(ranges: Iterable[Iterable[int]]) -> Ranges:
    """Return the same offsets by as few ranges as there can be."""
    found: Ranges = []
    for start, end in sorted(map(tuple, ranges)):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        elif start < end:
            found.append((start, end))
    return found


def after(ranges: Ranges, offset: int) -> int:
    """Return the first offset from ``offset`` on that is not settled."""
    number = bisect_right(ranges, offset, key=lambda one: one[0])
    return max(offset, ranges[number - 1][1]) if number else offset


def covered(ranges: Ranges, start: int, end: int) -> int:
    """Return how many of the offsets from ``start`` until before ``end`` are settled."""
    return sum(max(min(end, last) - max(start, first), 0) for first, last in ranges)


def digest(source: str) -> bytes:
    """Return the key under which the inbox has a source; it is frozen."""
    return hashlib.sha256(source.encode()).digest()
