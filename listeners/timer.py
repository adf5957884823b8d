"""The clock as a source: an event at a moment."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from datetime import datetime, timedelta, timezone
from typing import ClassVar
from weakref import WeakKeyDictionary

from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.moments import when

# Seconds. Looking at the clock in steps bounds by how much a timer is late after it was set forward.
_LONGEST_SLEEP = 60.0
# How many timers go off in one turn of the event loop; the others of that moment follow in the next turns.
_AT_ONCE = 100


class TimerListener(EventListener):
    """
    An event at a moment; the event is the moment, in UTC.

    There is nothing to commit, and the moment is the same in every try, so a timer needs no worker.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(self, moment: float | str | datetime | timedelta) -> datetime:
        """
        Return at ``moment``; at once if it has passed.

        :param moment: one of

            - seconds since the epoch, as a number or a string of digits;
            - a datetime; a naive one is in the DAG's time zone;
            - a string in ISO 8601, a moment (``2030-01-31T08:00``, naive likewise) or a duration
              (``PT15M``);
            - a timedelta, counted, like a duration, from the start of the run, so that it stays put
              when the wait is tried again.
        :raises ValueError: the string is none of these, or the moment is out of range.
        :raises TypeError: another type.
        """
        due = when(moment, current_wait())
        await Clock.of_loop().until(due)
        return due

    def foresee(self, moment: float | str | datetime | timedelta) -> tuple[datetime, datetime]:
        """Return ``moment``, twice: it is the event, and when it comes."""
        due = when(moment, current_wait())
        return due, due


class Clock:
    """
    One heap of moments for all the timers of an event loop, and one call for the next of them.

    A moment is compared with the wall clock, which may be set, so no moment goes off before it has come.
    """

    _of: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, Clock]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._gone = 0
        self._call: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Count the moments that somebody waits for."""
        return len(self._heap) - self._gone

    @classmethod
    def of_loop(cls) -> Clock:
        """Return the clock of the running event loop."""
        return cls._of.setdefault(asyncio.get_running_loop(), cls())

    async def until(self, moment: datetime) -> None:
        """Return at ``moment``, or at once if it has come."""
        due = moment.timestamp()
        if due <= _now():
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._heap, (due, next(self._order), future))
        if self._heap[0][2] is future:
            self._call_next()
        try:
            await future
        finally:
            if future.cancelled():
                self._forget_one()

    def _forget_one(self) -> None:
        """Count a timer that was cancelled, and sweep the heap when most of it is of that kind."""
        self._gone += 1
        if self._gone * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[2].done()]
            heapq.heapify(self._heap)
            self._gone = 0
            self._call_next()

    def _call_next(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None
        if self._heap:
            pause = min(max(self._heap[0][0] - _now(), 0.0), _LONGEST_SLEEP)
            self._call = asyncio.get_running_loop().call_later(pause, self._go_off)

    def _go_off(self) -> None:
        now = _now()
        for _ in range(_AT_ONCE):
            if not self._heap or self._heap[0][0] > now:
                break
            _, _, future = heapq.heappop(self._heap)
            if future.done():
                self._gone -= 1
            else:
                future.set_result(None)
        self._call_next()


def _now() -> float:
    return datetime.now(timezone.utc).timestamp()
