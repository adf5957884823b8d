"""How a trigger starts one run for a batch of events."""

from __future__ import annotations

import asyncio
import itertools
import math

from airflow_events import settings
from airflow_events.listeners.base import EventListener
from airflow_events.triggers.starting import MOST_AT_ONCE, Held, Starts, What

_SLOT = 0
# Seconds between two looks whether a listener that has failed may be asked again.
_PAUSE = 0.5


class Batches(Starts):
    """
    Gathers events, and starts a run of each full batch, or of what has come some while after the first.

    One batch at a time: the events of it are in hand, and unacknowledged at their source.
    """

    def __init__(self, what: What, most: int, within: float) -> None:
        """
        Gather batches.

        :param most: how many events one has at most.
        :param within: seconds after the first of them.
        """
        super().__init__(what)
        self._most, self._within = most, within

    def _open(self, listener: type[EventListener]) -> None:
        if self.room > self.wanting and not self._slots and not self._fails:
            gathering = asyncio.create_task(self._serve(listener, _SLOT), name=self._name())
            self._slots[_SLOT] = gathering

    def _close(self) -> None:
        if not self.room and _SLOT in self._slots:
            self._slots[_SLOT].cancel()

    async def _serve(self, listener: type[EventListener], number: int) -> None:
        try:
            while self.room and not self._fails:
                if batch := await self._gathered(listener):
                    await self._take(listener, batch)
        finally:
            self._slots.pop(number, None)
            self._changed.set()

    async def _gathered(self, listener: type[EventListener]) -> list[Held]:
        """
        Return a batch: a full one, or what has come when its time is up.

        What is gathered when this is cancelled, as there is no room any more, is given back.
        """
        batch: list[Held] = []
        polls: dict[asyncio.Task[Held | None], int] = {}
        until, is_over = math.inf, False
        try:
            while self._fitting(batch) == len(batch) < self._most and self._now() < until:
                if not self._fails:
                    self._poll_for_more(listener, polls, batch)
                elif not batch and not polls:
                    break
                left = None if math.isinf(until) else until - self._now()
                if polls:
                    await asyncio.wait(polls, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                else:  # it is asked again in a moment
                    await asyncio.sleep(_PAUSE if left is None else min(left, _PAUSE))
                batch += _done(polls)
                if batch and math.isinf(until):
                    until = self._now() + self._within
            is_over = True
        finally:
            for poll in polls:
                poll.cancel()
            if polls:
                await asyncio.wait(polls)
            batch += _done(polls)
            most = self._fitting(batch)
            self._let_go(listener, batch[most if is_over else 0 :])
        return batch[:most]

    def _fitting(self, batch: list[Held]) -> int:
        """Return how many of these a run can have: as many as are wanted, and as the API server takes at once."""
        sizes = itertools.accumulate(held.size for held in batch[: self._most])
        # A quote takes two characters within the body, and a line is about the run itself.
        most = settings.inbox_max_body() // 3
        return max(sum(size <= most for size in sizes), min(len(batch), 1))

    def _poll_for_more(
        self, listener: type[EventListener], polls: dict[asyncio.Task[Held | None], int], batch: list[Held]
    ) -> None:
        taken = {*polls.values(), *(held.wait.index for held in batch)}
        free = (number for number in itertools.count() if number not in taken)
        for number in itertools.islice(free, min(self._most - len(batch), MOST_AT_ONCE) - len(polls)):
            polls[asyncio.create_task(self._polled(listener, number), name=f"{self._name()} {number}")] = number


def _done(polls: dict[asyncio.Task[Held | None], int]) -> list[Held]:
    """Remove the polls that have ended, and return what they were given."""
    ended = [poll for poll in polls if poll.done()]
    for poll in ended:
        del polls[poll]
    return [held for poll in ended if not poll.cancelled() and (held := poll.result()) is not None]
