"""Watching a log, such as a stream or a topic: the first message that matches, and nothing taken from others."""

from __future__ import annotations

import abc
import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Generic, TypeVar

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.base import Wait, current_wait
from airflow_events.listeners.hub import Hub, Seeker
from airflow_events.listeners.moments import when
from airflow_events.listeners.shared import shared
from airflow_events.listeners.values import Index, Match, OnUndecodable

log = logging.getLogger(__name__)

# How many messages are kept for waits that come a little late; the log is read again for those that come later.
_RECENT = 10_000

# Seconds for which matching may hold the triggerer's loop.
_LONGEST_WORK = 0.02

_P = TypeVar("_P")


@dataclass(frozen=True)
class Message:
    """
    A message of a log.

    :param timestamp: when it was published, as the log says.
    :param event: what a wait gets for it; its ``value`` is what `Match` looks at.
    :param undecodable: why it has no value.
    """

    timestamp: datetime
    event: dict[str, Any]
    undecodable: EventUndecodable | None = None


class Watcher(Seeker):
    """A wait for the first message that matches, published at ``since`` or later."""

    def __init__(self, match: Match, since: datetime, on_undecodable: OnUndecodable = "skip") -> None:
        super().__init__()
        self.match = match
        self.since = since
        self.on_undecodable = on_undecodable


class LogHub(Hub[Watcher], Generic[_P]):
    """
    Reads a log once for all who watch it.

    It reads on from where it is, and goes back only for a wait whose ``since`` lies before what it has read
    lately. Who comes while it reads from further back is served in the same reading.
    """

    def __init__(self, name: str) -> None:
        self._index = Index()
        self._new: list[Watcher] = []
        self._position: _P | None = None
        self._recent: deque[Message] = deque()
        self._recent_from = datetime.max.replace(tzinfo=timezone.utc)
        super().__init__(name)

    @abc.abstractmethod
    async def position(self, since: datetime) -> _P:
        """Return where to read on from so that nothing published at ``since`` or later is missed."""

    @abc.abstractmethod
    async def read(self, position: _P) -> tuple[_P, list[Message]]:
        """Return what comes after ``position``, and the position after that; wait for at most a second."""

    @abc.abstractmethod
    async def dropped_until(self) -> datetime | None:
        """Return until when messages may be gone from the log already, or None if none are."""

    def joined(self, seeker: Watcher) -> None:
        self._index.add(seeker, seeker.match)
        self._new.append(seeker)

    def left(self, seeker: Watcher) -> None:
        self._index.remove(seeker, seeker.match)

    async def serve(self) -> None:
        if new := {watcher: None for watcher in self._new if not watcher.done}:
            await self._begin(list(new))
        self._new = [watcher for watcher in self._new if not watcher.done and watcher not in new]
        if self._position is None:
            return
        self._position, messages = await self.read(self._position)
        await self._offer(messages)
        for message in messages:
            self._remember(message)

    async def _begin(self, new: list[Watcher]) -> None:
        dropped = await self.dropped_until()
        for watcher in new:
            if dropped is not None and watcher.since < dropped:
                watcher.tell(
                    logging.WARNING,
                    "%s has dropped messages until %s, and this wait looks from %s on: its event may be gone",
                    self.name,
                    dropped.isoformat(timespec="seconds"),
                    watcher.since.isoformat(timespec="seconds"),
                )
        earliest = min(watcher.since for watcher in new)
        if self._position is None or earliest < self._recent_from:
            self._position = await self.position(earliest)
            self._recent.clear()
            self._recent_from = earliest
            return
        await self._offer(list(self._recent), set(new))

    async def _offer(self, messages: list[Message], only: set[Watcher] | None = None) -> None:
        began = time.monotonic()
        for message in messages:
            if time.monotonic() - began > _LONGEST_WORK:  # let other triggers have the loop
                await asyncio.sleep(0)
                began = time.monotonic()
            if message.undecodable is not None:
                self._report(message, message.undecodable)
                continue
            for watcher in self._index.find(message.event["value"]):
                if (only is None or watcher in only) and message.timestamp >= watcher.since:
                    watcher.give(message.event)

    def _report(self, message: Message, error: EventUndecodable) -> None:
        log.warning("%s: passed over: %s", self.name, error)
        for watcher in self.seekers:
            if message.timestamp >= watcher.since and watcher.on_undecodable == "fail":
                watcher.fail(error)

    def _remember(self, message: Message) -> None:
        self._recent.append(message)
        if len(self._recent) > _RECENT:
            self._recent_from = max(self._recent_from, self._recent.popleft().timestamp + timedelta.resolution)


async def first_match(
    key: Hashable,
    make: Callable[[], LogHub[Any]],
    match: dict[str, Any] | str | None,
    since: datetime | str | timedelta | None,
    on_undecodable: OnUndecodable,
) -> dict[str, Any]:
    """
    Return the first message that matches, of a log that all who watch it read by one hub.

    :param key: of the hub, in this event loop; ``make`` makes it for the first who watches.
    :param match: see `airflow_events.listeners.values.Match`.
    :param since: see `since_of`.
    :raises ValueError: ``match`` or ``since`` is none.
    """
    watcher = Watcher(Match(match), since_of(since, current_wait()), on_undecodable)
    async with shared(key, make) as hub:
        return dict(await hub.take(watcher))


def since_of(since: datetime | str | timedelta | None, wait: Wait) -> datetime:
    """
    Return from when on a watch looks.

    :param since: a datetime or ISO 8601, naive in the DAG's time zone; a timedelta from the start of the run;
        None is the start of the run.
    :raises ValueError: the string is no moment, or the run has no start to count from.
    """
    return when(timedelta() if since is None else since, wait)
