"""Moments of the wall clock, for all who wait for one in an event loop."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from datetime import datetime, timezone

from airflow_events.listeners.support.shared import OnePerLoop

# Seconds. Looking at the clock in steps bounds by how much a moment is late after it was set forward.
_LONGEST_SLEEP = 60.0
# How many moments go off in one turn of the event loop; the others of that moment follow in the next turns.
_AT_ONCE = 100


class Clock(OnePerLoop):
    """
    One heap of moments for all of an event loop, and one call for the next of them.

    A moment is compared with the wall clock, which may be set, so no moment goes off before it has come.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._gone = 0
        self._call: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Count the moments that somebody waits for."""
        return len(self._heap) - self._gone

    def until(self, moment: datetime) -> asyncio.Future[None]:
        """Return what can be awaited until ``moment``; it is done already if that has come."""
        due = moment.timestamp()
        future = asyncio.get_running_loop().create_future()
        if due <= _now():
            future.set_result(None)
            return future
        future.add_done_callback(self._see_whether_cancelled)
        heapq.heappush(self._heap, (due, next(self._order), future))
        if self._heap[0][2] is future:
            self._call_next()
        return future

    def _see_whether_cancelled(self, future: asyncio.Future[None]) -> None:
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
