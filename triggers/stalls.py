"""Noticing that the process stood still: stopped by a signal, or with its machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from airflow.sdk.configuration import conf
from airflow_events.listeners.support.shared import background

_INTERVAL = 1.0  # seconds

_told: dict[asyncio.AbstractEventLoop, tuple[asyncio.Task[None], set[Callable[[], None]]]] = {}


class told_to:
    """
    Call ``begin_again`` after each stall of this process, from the event loop.

    No generator, since one is held by each open wait.
    """

    __slots__ = ("_begin_again", "_loop")

    def __init__(self, begin_again: Callable[[], None]) -> None:
        self._begin_again = begin_again

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._loop not in _told:
            told: set[Callable[[], None]] = set()
            _told[self._loop] = (background(_watch(told, time.time()), "stalls of this process"), told)
        _told[self._loop][1].add(self._begin_again)

    def __exit__(self, *_: object) -> None:
        task, told = _told[self._loop]
        told.discard(self._begin_again)
        if not told:
            del _told[self._loop]
            task.cancel()


def _shortest() -> float:
    """
    Return how many seconds a stall takes that can have made another triggerer take over.

    That happens when the last heartbeat is as old as the threshold. It was not new when the stall began, so a
    third of it counts. Below that are the stalls of every large triggerer, whose runner decodes long messages in
    one piece while its supervisor sends heartbeats.
    """
    return float(conf.getfloat("triggerer", "triggerer_health_check_threshold")) / 3


async def _watch(told: set[Callable[[], None]], before: float) -> None:
    shortest = _shortest()
    while True:
        await asyncio.sleep(_INTERVAL)
        now = time.time()  # it goes on when a machine is suspended; that it may be set does no harm
        if now - before > _INTERVAL + shortest:
            for begin_again in list(told):
                begin_again()
        before = now
