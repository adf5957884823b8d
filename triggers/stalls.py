"""Noticing that the process stood still: stopped by a signal, or with its machine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

from airflow_events.listeners.shared import background

# Seconds. A shorter stall cannot have made another triggerer take over.
_STALL = 3.0  # by the wall clock, which goes on when a machine is suspended; that it may be set does no harm
_INTERVAL = 1.0

_told: dict[asyncio.AbstractEventLoop, tuple[asyncio.Task[None], set[Callable[[], None]]]] = {}


@contextlib.contextmanager
def told_to(begin_again: Callable[[], None]) -> Iterator[None]:
    """Call ``begin_again`` after each stall of this process, from the event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _told:
        told: set[Callable[[], None]] = set()
        _told[loop] = (background(_watch(told, time.time()), "stalls of this process"), told)
    task, told = _told[loop]
    told.add(begin_again)
    try:
        yield
    finally:
        told.discard(begin_again)
        if not told:
            del _told[loop]
            task.cancel()


async def _watch(told: set[Callable[[], None]], before: float) -> None:
    while True:
        await asyncio.sleep(_INTERVAL)
        now = time.time()
        if now - before > _INTERVAL + _STALL:
            for begin_again in list(told):
                begin_again()
        before = now
