"""
One connection to a source for all the waits of a triggerer that use it, and who gets what comes over it.

A source of your own derives from `Hub`: it says how to connect, and how to serve those who wait. The hub
starts with the first wait and ends with the last (`airflow_events.listeners.shared`), connects again by
itself, and tells each wait, in its own task's log, what concerns it.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import contextvars
import logging
import time
from typing import Any, ClassVar, Generic, TypeVar

from airflow_events import settings
from airflow_events.errors import SourceUnreachable
from airflow_events.listeners.shared import background
from airflow_events.listeners.turns import Turns
from tenacity import RetryCallState
from tenacity.wait import wait_exponential, wait_random

log = logging.getLogger(__name__)

# Seconds that `serve` has to end when it is cancelled, less than a trigger gives a poll.
_GOODBYE = 8
# How many waits that were given an event go on in one turn of the event loop.
_AT_ONCE = 50
# Seconds between two attempts to connect.
_PAUSES = wait_exponential(multiplier=0.2, max=15) + wait_random(0, 0.3)


class Seeker:
    """
    A wait that wants an event of a hub.

    Made in the wait's own context, so that what it logs goes to its task's log.
    """

    def __init__(self) -> None:
        self.found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._context = contextvars.copy_context()

    @property
    def done(self) -> bool:
        """Whether the wait has its event, has failed, or wants none any more."""
        return self.found.done()

    def give(self, event: Any) -> None:
        """Let the wait have its event, unless it is done."""
        if not self.done:
            self.found.set_result(event)

    def fail(self, error: BaseException) -> None:
        """Let the wait's poll raise ``error``, unless it is done."""
        if not self.done:
            self.found.set_exception(error)

    def tell(self, level: int, message: str, *arguments: Any) -> None:
        """Write a line into the log of the wait's task."""
        self._context.copy().run(log.log, level, message, *arguments)


_S = TypeVar("_S", bound=Seeker)


class Hub(abc.ABC, Generic[_S]):
    """
    Serves all waits on one source.

    :param name: what the source is called in logs and errors: its coordinates, and no secret.
    """

    lost: ClassVar[tuple[type[BaseException], ...]] = (OSError,)
    """
    What the client raises when the connection is gone and may come back. After it the hub connects again,
    with growing pauses. Anything else fails the waits.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seekers: dict[_S, None] = {}  # in the order in which they came
        self._changed = asyncio.Event()
        self._turns = Turns(_AT_ONCE)
        self._work = background(self._run(), name)

    async def take(self, seeker: _S) -> Any:
        """
        Return what ``seeker`` was given.

        :raises SourceUnreachable: the source was away for longer than ``[events] unreachable_timeout``.
        """
        if self._work.done():
            self._work.result()
        self.seekers[seeker] = None
        self._changed.set()
        self.joined(seeker)
        try:
            event = await seeker.found
            await self._turns.take()
            return event
        finally:
            self.seekers.pop(seeker, None)
            self.left(seeker)

    async def close(self) -> None:
        while not self._work.done():
            self._work.cancel()
            # A hub may have something to put back first; or its client has swallowed the cancellation.
            await asyncio.wait({self._work}, timeout=_GOODBYE)

    @abc.abstractmethod
    async def connect(self) -> None:
        """Connect, and check that the source is as it must be; what it raises besides `lost` fails the waits."""

    @abc.abstractmethod
    async def serve(self) -> None:
        """
        Look once for events and give them to `seekers`.

        It is called again and again while there are any. It should return within about a second, so that new
        seekers are seen; to wait, let the source block, or use `pause`.
        """

    @abc.abstractmethod
    async def disconnect(self) -> None:
        """Close what `connect` opened, or began to open."""

    def joined(self, seeker: _S) -> None:
        """Note a new seeker; for what `seekers` does not hold, such as an index."""

    def left(self, seeker: _S) -> None:
        """Forget a seeker."""

    async def pause(self, seconds: float) -> None:
        """Wait, but not longer than until another seeker has come."""
        # Not asyncio.wait_for, which before Python 3.12 may swallow the cancellation.
        self._changed.clear()
        alarm = asyncio.get_running_loop().call_later(seconds, self._changed.set)
        await self._changed.wait()
        alarm.cancel()

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._connected()
                except Exception as error:
                    # These cannot be served. Those who come later are tried anew: it may have been mended.
                    for seeker in list(self.seekers):
                        seeker.fail(error)
                    await self._disconnect()
                    await self._idle()
        finally:
            await self._disconnect()

    async def _connected(self) -> None:
        """Serve, over as many connections as it takes, until something does not go away by itself."""
        away_since, attempts = time.monotonic(), 0
        while True:
            try:
                await self.connect()
                while True:
                    if all(seeker.done for seeker in self.seekers):
                        away_since, attempts = 0.0, 0  # it counts from when somebody waits
                    await self._idle()
                    await self.serve()
                    # Only now: what lets us connect and does nothing more is away, too.
                    if attempts > 1:
                        self._tell_all(logging.INFO, "%s is there again", self.name)
                    away_since, attempts = 0.0, 0
            except self.lost as error:
                attempts += 1
                away_since = away_since or time.monotonic()
                await self._disconnect()
                if time.monotonic() - away_since > settings.unreachable_timeout():
                    seconds = time.monotonic() - away_since
                    raise SourceUnreachable(self.name, seconds, error) from error
                if attempts == 2:  # the first may be a connection that had grown old
                    message = "%s cannot be reached, which is tried again for up to %.0f s: %s"
                    self._tell_all(logging.WARNING, message, self.name, settings.unreachable_timeout(), error)
                await asyncio.sleep(_pause(attempts))

    def _tell_all(self, level: int, message: str, *arguments: Any) -> None:
        log.log(level, message, *arguments)
        for seeker in list(self.seekers):
            seeker.tell(level, message, *arguments)

    async def _idle(self) -> None:
        while not any(not seeker.done for seeker in self.seekers):
            self._changed.clear()
            await self._changed.wait()

    async def _disconnect(self) -> None:
        with contextlib.suppress(Exception):
            await self.disconnect()


def _pause(attempts: int) -> float:
    state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]
    state.attempt_number = attempts
    return _PAUSES(state)
