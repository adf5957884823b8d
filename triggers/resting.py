"""
Waits of a host that watch a log, and are no coroutine for as long as nothing is found for them.

There may be a hundred thousand. Each is an object among those whom the hub of the log serves. With what is found
for it, it begins, and goes the way of every wait.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import zlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.support import serde
from airflow_events.listeners.support.hub import shared_log
from airflow_events.listeners.support.shared import leave, use
from airflow_events.listeners.support.watching import Watch, Watcher, watch_of
from airflow_events.triggers import reference
from airflow_events.triggers.polling import Found

log = logging.getLogger(__name__)

_LONGEST_PAUSE = 600.0  # seconds


class Rests:
    """
    Those of one host.

    Made in the context of the host's trigger, so that what concerns one of them is in the host's log.

    :param wake: called once for each that is to begin, with its task instance, what its trigger was made of, the
        generation, and what was found; or None, if its time is up.
    """

    def __init__(self, wake: Callable[[str, str, int, Found | None], None]) -> None:
        self._wake = wake
        self._all: dict[str, _Resting] = {}
        self._keys: dict[Hashable, Hashable] = {}  # of hubs: those of many waits are equal
        self.context = contextvars.copy_context()

    def __contains__(self, ti: object) -> bool:
        return ti in self._all

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def take(self, ti: str, kwargs: str, generation: int, left: float | None) -> bool:
        """
        Let a wait rest, if it can; return whether it does.

        What is wrong with it is told by the one that begins in its place.

        :param kwargs: of its trigger, as text.
        :param left: seconds until its time is up; None for no end.
        """
        try:
            watch = _watch_of(kwargs)
            if watch is None:
                return False
            key = self._keys.setdefault(watch.key, watch.key)
            resting = _Resting(self, ti, zlib.compress(kwargs.encode(), 1), generation, watch, key)
        except Exception:
            return False
        self._all[ti] = resting
        if left is not None:
            self._wait_until(time.time() + left, resting)
        return True

    def _wait_until(self, moment: float, resting: _Resting) -> None:
        left = moment - time.time()
        if left <= 0:
            self.end(resting.ti, wakes=True)
        else:  # in steps, which bounds by how much it is late after the clock was set forward
            pause = min(left, _LONGEST_PAUSE)
            resting.alarm = asyncio.get_running_loop().call_later(pause, self._wait_until, moment, resting)

    def end(self, ti: str, wakes: bool = False, found: Found | None = None) -> None:
        """Let a wait rest no longer; nothing if it does not."""
        resting = self._all.pop(ti, None)
        if resting is None:
            return
        resting.leave()
        if wakes:
            self.context.copy().run(self._wake, ti, resting.told(), resting.generation, found)

    def end_all(self) -> None:
        for ti in list(self._all):
            self.end(ti)


class _Resting(Watcher):
    """One of them, among those whom the hub serves, and without anything of asyncio's."""

    __slots__ = ("_done", "_kwargs", "_rests", "alarm", "generation", "hub", "key", "ti")

    def __init__(self, rests: Rests, ti: str, kwargs: bytes, generation: int, watch: Watch, key: Hashable) -> None:
        # Not that of `Seeker`, which makes a future, and a copy of the context.
        self.match, self.since, self.on_undecodable = watch.match, watch.since, watch.on_undecodable
        self._rests, self.ti, self._kwargs, self.generation, self.key = rests, ti, kwargs, generation, key
        self.alarm: asyncio.TimerHandle | None = None
        self._done = False
        self.hub = use(key, watch.make)
        try:
            self.hub.enter(self)
        except BaseException:
            leave(self.key)
            raise

    def told(self) -> str:
        """Return what its trigger was made of."""
        return zlib.decompress(self._kwargs).decode()

    def leave(self) -> None:
        """Be served no more."""
        self._done = True
        if self.alarm is not None:
            self.alarm.cancel()
        self.hub.leave(self)
        leave(self.key)

    @property
    def done(self) -> bool:
        return self._done

    def give(self, event: Any) -> None:
        self._rests.end(self.ti, True, Found(time.time(), dict(event)))

    def fail(self, error: BaseException) -> None:
        self._rests.end(self.ti, True, Found(time.time(), error=error))

    def tell(self, level: int, message: str, *arguments: Any) -> None:
        self.write(level, f"%s: {message}", _wait_of(serde.decode(self.told())).id, *arguments)

    def write(self, level: int, message: str, *arguments: Any) -> None:
        self._rests.context.copy().run(log.log, level, message, *arguments)

    @property
    def log(self) -> object:
        return self._rests.context[shared_log]


def _watch_of(kwargs: str) -> Watch | None:
    told = serde.decode(kwargs)
    wait = _wait_of(told)
    if wait.run_created is None:  # it was handed over by an earlier version, and where it looks from is not known
        return None
    with working_for(wait):
        return watch_of(reference.load(told["listener"]), told["listener_args"], told["listener_kwargs"])


def _wait_of(told: Any) -> Wait:
    return Wait(**told["wait"])
