"""Looking for what was recorded before a wait began, which is seldom there."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from airflow_events.listeners.shared import OnePerLoop, background

log = logging.getLogger(__name__)

# Seconds between a look that failed and the next.
_PAUSE = 5.0


class Lookups(OnePerLoop):
    """
    A queue of looks for all waits of an event loop, which are taken one after the other.

    Each asks Airflow, and a triggerer's supervisor answers one request in each of its loops. That an event which
    comes meanwhile is behind one of them at most is the order of `Requests`; this queue is instead of a task for
    each of thousands of waits that begin, which would stand there for minutes.
    """

    def __init__(self) -> None:
        # In the order of their turns, with a mark by which a look is known that was added anew while it was taken.
        self._looks: OrderedDict[Callable[[], Awaitable[None]], object] = OrderedDict()
        self._work: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Count the looks that are still to come."""
        return len(self._looks)

    def add(self, look: Callable[[], Awaitable[None]]) -> None:
        """Call ``look`` when it is its turn, and again if that fails, until it was called or is discarded."""
        self._looks[look] = object()
        if self._work is None or self._work.done():
            self._work = background(self._take_turns(), "looks for what is recorded already")

    def discard(self, look: Callable[[], Awaitable[None]]) -> None:
        """Do not call ``look`` any more."""
        self._looks.pop(look, None)

    async def _take_turns(self) -> None:
        while self._looks:
            look, mark = next(iter(self._looks.items()))
            try:
                await look()
            except Exception:
                log.warning("Could not see whether an event is recorded already", exc_info=True)
                await asyncio.sleep(_PAUSE)
                if look in self._looks:
                    self._looks.move_to_end(look)  # the others first
                continue
            if self._looks.get(look) is mark:
                del self._looks[look]
