"""One poll of a listener: until the event is there, the deadline has passed, or it is to begin again."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import math
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from typing import Any, NamedTuple

import greenback
from airflow.sdk.configuration import conf
from airflow_events.listeners.base import EventListener, Wait, foresees, working_for
from airflow_events.listeners.support import serde
from airflow_events.listeners.support.clock import Clock
from airflow_events.listeners.support.queue import InHand
from airflow_events.triggers.poll_steps import Steps

log = logging.getLogger(__name__)

# Seconds. Waiting in steps bounds by how much a deadline is late after the clock was set forward.
_LONGEST_PAUSE = 600.0
# Seconds that a cancelled poll has to end.
_LONGEST_GOODBYE = 10.0
# Seconds from one look to the next, and between the moments of looks: those of one moment are one request.
_LOOK_EVERY = 300.0
_LOOKS_APART = 5.0


class TimeIsUp(Exception):
    """The wait's deadline has passed, and no event came."""


class BeginAgain(Exception):
    """The poll was ended so that the wait begins again."""


class Found(NamedTuple):
    """
    What a poll has come to that somebody else has made.

    :param at: when, in seconds since the epoch.
    :param error: why there is no event; None if there is one.
    """

    at: float
    event: Any = None
    error: BaseException | None = None

    def as_future(self) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        if self.error is None:
            future.set_result(self.event)
        else:
            future.set_exception(self.error)
        return future


class Poll:
    """
    A poll of a fresh listener for a wait.

    It has a task of its own, so that a listener which swallows its cancellation cannot end the wait.

    :param look: called each few minutes while the poll goes on, and may call `begin_again`; None for no look.
    :param found: what it has come to already, and when, in seconds since the epoch; None if it has not begun.
    :ivar arrived: when its event came, in seconds since the epoch; None as long as it has not.
    """

    __slots__ = (
        "_again", "_args", "_deadline", "_found", "_kwargs", "_listener", "_look", "_task", "_wait", "arrived",
    )  # fmt: skip

    def __init__(
        self,
        listener: type[EventListener],
        wait: Wait,
        args: Any,
        kwargs: Any,
        deadline: datetime | None,
        look: Callable[[], Awaitable[None]] | None = None,
        found: Found | None = None,
    ) -> None:
        self._listener, self._wait, self._args, self._kwargs = listener, wait, args, kwargs
        self._deadline, self._look, self._found = deadline, look, found
        self._task: asyncio.Future[Any] | None = None
        self._again = False
        self.arrived: float | None = None

    @property
    def event(self) -> Any | None:
        """What was polled; None if nothing was."""
        task = self._task
        polled = task is not None and task.done() and not task.cancelled() and task.exception() is None
        return task.result() if task is not None and polled else None

    def begin_again(self) -> None:
        """End the poll, unless it has its event, with `BeginAgain`."""
        if self._task is None or not self._task.done():
            self._again = True
            if self._task is not None:
                self._task.cancel()

    async def run(self) -> Any:
        """
        Return the event as it will be read from the record, so that a replay delivers what the first delivery did.

        :raises TimeIsUp: the deadline has passed, and no event came while the poll ended.
        :raises BeginAgain: see `begin_again`.
        :raises EventNotSerializable: it cannot be recorded.
        """
        foreseen = foreseen_by(self._listener, self._wait, self._args, self._kwargs)
        at = None if foreseen is None else foreseen[1]
        # Until then there is nothing to poll: an open timer is an entry in a heap. Nothing else is held meanwhile,
        # neither a task nor a context nor another coroutine, since there may be very many.
        while not self._again and at is not None and (now := _now()) < at:
            if self._deadline is not None and self._deadline <= now:
                raise TimeIsUp
            await Clock.of_loop().until(at if self._deadline is None else min(at, self._deadline))
        if self._again:
            raise BeginAgain
        with working_for(self._wait):  # all the while, since the poll's context is then no copy of this one
            self._task = task = self._begin() if self._found is None else self._found.as_future()
            look_at = math.inf if self._look is None else next_look()
            try:
                while not task.done() and self._remaining() > 0:
                    await self._woken(task, look_at)
                    if self._look is not None and seconds_until(look_at) <= 0 and not task.done():
                        await self._look()
                        look_at = next_look()
            finally:
                await self.end()
        if task.done() and not task.cancelled():
            event = task.result()
            self.arrived = time.time() if self._found is None else self._found.at
            return serde.check(event)
        if self._again:
            raise BeginAgain
        if self._remaining() > 0:
            raise RuntimeError(f"{self._listener.__qualname__}.poll_for_event cancelled itself")
        raise TimeIsUp

    def _begin(self) -> asyncio.Task[Any]:
        portal = greenback.has_portal()
        poll = poll_once(self._listener, self._args, self._kwargs, blocking_threshold(), portal=portal)
        return asyncio.create_task(poll)

    async def end(self) -> None:
        """End what is still running of it, and give back what it was given and has not returned."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=_LONGEST_GOODBYE)
        with working_for(self._wait):
            await InHand.of_loop().poll_ended(self._listener, self._wait.id, self.event)

    async def _woken(self, task: asyncio.Future[Any], look_at: float) -> None:
        """
        Wait until the poll has ended, or some while has passed: asyncio.wait in a quarter of its memory.

        :param look_at: when it has passed at the latest, of the loop's clock.
        """
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        wake = functools.partial(_wake, woken)
        task.add_done_callback(wake)
        pause = seconds_until(look_at)
        if self._deadline is not None:
            pause = min(pause, self._remaining(), _LONGEST_PAUSE)
        alarm = None if math.isinf(pause) else loop.call_later(pause, wake)
        try:
            await woken
        finally:
            task.remove_done_callback(wake)
            if alarm is not None:
                alarm.cancel()

    def _remaining(self) -> float:
        return (self._deadline - _now()).total_seconds() if self._deadline else _LONGEST_PAUSE


def next_look() -> float:
    """Return when to look next whether a wait is still its trigger's, in seconds of the loop's clock."""
    earliest = asyncio.get_running_loop().time() + _LOOK_EVERY
    return math.ceil(earliest / _LOOKS_APART) * _LOOKS_APART


def seconds_until(moment: float) -> float:
    """Return how many seconds are left until a moment of the loop's clock."""
    return moment - asyncio.get_running_loop().time()


def foreseen_by(listener: type[EventListener], wait: Wait, args: Any, kwargs: Any) -> tuple[Any, datetime] | None:
    """Return the event that the listener foresees for a wait, and when it comes; or None."""
    if not foresees(listener):
        return None

    def ask() -> tuple[Any, datetime] | None:
        with working_for(wait):
            return listener().foresee(*args, **kwargs)

    try:
        # In a context of its own: this one, kept while the wait is open, would grow by what was set in it.
        event, at = contextvars.copy_context().run(ask) or (None, None)
    except Exception:  # what is wrong with the arguments, the poll tells
        return None
    return None if at is None or at.tzinfo is None else (event, at)


def blocking_threshold() -> float:
    """Return for how many seconds a step of a poll may take before that is logged."""
    return float(conf.getfloat("triggerer", "blocked_main_thread_warning_threshold", fallback=0.2))


def poll_once(
    listener: type[EventListener], args: Any, kwargs: Any, threshold: float, *, portal: bool
) -> Steps[Any]:
    """
    Return what a fresh listener polls, to be awaited; that it blocks the loop is logged.

    :param threshold: for longer than so many seconds.
    :param portal: whether it can make Airflow's synchronous calls.
    """
    poll = listener().poll_for_event(*args, **kwargs)
    return Steps(poll, threshold, _complaint(listener.__qualname__), portal=portal)


@functools.lru_cache(maxsize=256)
def _complaint(listener: str) -> Callable[[float], None]:
    return functools.partial(
        log.warning,
        "%s.poll_for_event has blocked the triggerer for %.2f seconds, and with it every other trigger; use the "
        "source's async client, or asyncio.to_thread",
        listener,
    )


def _wake(woken: asyncio.Future[None], *_: object) -> None:
    if not woken.done():
        woken.set_result(None)


def _now() -> datetime:
    return datetime.now(timezone.utc)
