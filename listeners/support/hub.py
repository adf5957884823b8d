"""
One connection to a source for all the waits of a triggerer that use it, and who gets what comes over it.

A source of your own derives from `Hub`: it says how to connect, and how to serve those who wait. The hub
starts with the first wait and ends with the last (`airflow_events.listeners.support.shared`), connects again by
itself, and tells each wait, in its own task's log, what concerns it.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Coroutine
from typing import Any, ClassVar, Generic, TypeVar

from airflow.sdk.exceptions import AirflowNotFoundException
from airflow_events import settings
from airflow_events.errors import SourceMisconfigured, SourceMissing, SourceUnreachable
from airflow_events.listeners.base import current_wait
from airflow_events.listeners.support.shared import OnePerLoop, background, woken
from airflow_events.listeners.support.turns import Turns
from tenacity import RetryCallState
from tenacity.wait import wait_exponential, wait_random

log = logging.getLogger(__name__)

# Seconds that `serve` has to end when it is cancelled, less than a trigger gives a poll.
_GOODBYE = 8
# Seconds after which a hub that pauses says that it lives.
_LONGEST_PAUSE = 10.0
# Seconds between two notes that somebody else than the source is waited for.
_ELSEWHERE = 10.0
# How many waits that were given an event go on in one turn of the event loop.
_AT_ONCE = 50
# Seconds between two attempts to connect.
_PAUSES = wait_exponential(multiplier=0.2, max=15) + wait_random(0, 0.3)


class NoAnswer(ConnectionError):
    """The source was asked and has not answered in time, or its client has given up without saying why."""


class LoginRefused(SourceMisconfigured):
    """The login is refused, or has expired; it may have been renewed since the Airflow connection was read."""


shared_log: contextvars.ContextVar[str] = contextvars.ContextVar("airflow_events.shared_log")
"""Of waits that share a log: whose it is."""


class Troubles(OnePerLoop):
    """What is wrong with the sources of waits that share a log, by whose it is and by the source's name."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, str]] = {}

    def of(self, log: str) -> str:
        """Return it as a text, empty if nothing is wrong."""
        return "; ".join(self._of.get(log, {}).values())

    def note(self, log: object, source: str, trouble: str) -> None:
        """Note it, unless the log is one wait's alone."""
        if isinstance(log, str):
            self._of.setdefault(log, {})[source] = trouble

    def forget(self, source: str) -> None:
        """Note that nothing is wrong with the source any more."""
        for troubles in self._of.values():
            troubles.pop(source, None)


class Seeker:
    """
    A wait that wants an event of a hub.

    Made in the wait's own context, so that what it logs goes to its task's log.
    """

    __slots__ = ("_context", "found")

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
        """Write a line into the log of the wait's task, or, with the wait's name, of the host that it shares."""
        if self._context.get(shared_log):
            message, arguments = f"%s: {message}", (self._context.copy().run(current_wait).id, *arguments)
        self.write(level, message, *arguments)

    def write(self, level: int, message: str, *arguments: Any) -> None:
        """Write a line that is about all who wait for the source into that log."""
        self._context.copy().run(log.log, level, message, *arguments)

    @property
    def log(self) -> object:
        """What the line goes to: a log of the wait's own, or the host's."""
        return self._context.get(shared_log) or self


_S = TypeVar("_S", bound=Seeker)
_T = TypeVar("_T")


# What is said of a source, or by a secrets backend of a connection, that was there and may come again.
_GONE = (SourceMissing, AirflowNotFoundException)


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

    connect_within: ClassVar[float | None] = 60.0
    """
    Seconds within which `connect` returns, or `heard` is called; one that does not is ended, and counts as `lost`.
    So does `disconnect`, which is then left. None is for a source that bounds it itself.
    """

    serve_within: ClassVar[float | None] = 120.0
    """
    The same for `serve`. It must be several times what the source blocks for, and what its slowest request may
    take; a `serve` that makes many requests calls `heard` after each.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seekers: dict[_S, None] = {}  # in the order in which they came
        self._changed = asyncio.Event()
        self._turns = Turns(_AT_ONCE)
        self._up = asyncio.Event()
        self._refusal_came = asyncio.Event()
        self._refusal: Exception | None = None  # what `connect` or `serve` has raised last, besides `lost`
        self._asked_for = 0  # how many want a connection, and no event
        self._heard = time.monotonic()
        self._was_there = False
        self._trouble: tuple[Any, ...] | None = None  # what the waits were told, while the source is unreachable
        self._logs_told: set[object] = set()  # the logs that have it
        self._work = background(self._run(), name)

    async def take(self, seeker: _S) -> Any:
        """
        Return what ``seeker`` was given.

        :raises SourceUnreachable: the source was unreachable for longer than ``[events] unreachable_timeout``.
        """
        self.enter(seeker)
        try:
            event = await seeker.found
            await self._turns.take()
            return event
        finally:
            self.leave(seeker)

    def enter(self, seeker: _S) -> None:
        """Serve ``seeker`` from now on, until `leave` is called."""
        if self._work.done():
            self._work.result()
        self.seekers[seeker] = None
        self._changed.set()
        self.joined(seeker)
        if self._trouble is not None and seeker.log not in self._logs_told:
            self._tell_trouble(seeker)

    def leave(self, seeker: _S) -> None:
        """Serve it no more."""
        self._let_go(seeker)
        self.left(seeker)

    def _let_go(self, seeker: _S) -> None:
        self.seekers.pop(seeker, None)

    async def close(self) -> None:
        self._no_trouble()
        while not self._work.done():
            self._work.cancel()
            # A hub may have something to put back first; or its client has swallowed the cancellation.
            await asyncio.wait({self._work}, timeout=_GOODBYE)

    async def connected(self) -> None:
        """Return once there is a connection; for what is done beside `serve`."""
        self._asked_for += 1
        self._changed.set()
        try:
            await self._up.wait()
        finally:
            self._asked_for -= 1

    async def connected_or_refused(self) -> None:
        """
        Return once there is a connection; for what is not worth one attempt to connect after another.

        :raises Exception: what keeps the hub from it, and does not go away by itself.
        """
        self._refusal_came.clear()
        connected = asyncio.ensure_future(self.connected())
        refused = asyncio.ensure_future(self._refusal_came.wait())
        try:
            await asyncio.wait({connected, refused}, return_when=asyncio.FIRST_COMPLETED)
            if not connected.done():
                assert self._refusal is not None
                raise self._refusal
        finally:
            connected.cancel()
            refused.cancel()

    @property
    def is_needed(self) -> bool:
        """Whether the hub must stay although nobody waits."""
        return False

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

    def heard(self) -> None:
        """Note that the source has answered, in a `connect` or a `serve` that takes long."""
        self._heard = time.monotonic()

    async def elsewhere(self, work: Coroutine[Any, Any, _T], trouble: str = "") -> _T:
        """
        Wait for somebody else in a `connect` or a `serve`, without a bound: that is no silence of the source's.

        :param trouble: what the waits are told, once, if it takes long.
        """
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=_ELSEWHERE))[0]:
                self.heard()
                if trouble:
                    self._tell_all(logging.WARNING, "%s: %s", self.name, trouble)
                    trouble = ""
            self.heard()
            return task.result()
        finally:
            task.cancel()

    async def pause(self, seconds: float) -> None:
        """Wait, but not longer than until another seeker has come. Meanwhile the source has nothing to say."""
        self._changed.clear()
        end = time.monotonic() + seconds
        while not self._changed.is_set() and (left := end - time.monotonic()) > 0:
            await woken(self._changed, min(left, _LONGEST_PAUSE))
            self.heard()

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._connected()
                except Exception as error:
                    # These cannot be served. Those who come later are tried again: it may have been mended.
                    self._no_trouble()
                    self._refusal = error
                    self._refusal_came.set()
                    for seeker in list(self.seekers):
                        seeker.fail(error)
                    await self._disconnect()
                    await self._idle()
                    await asyncio.sleep(_pause(1))
        finally:
            await self._disconnect()

    async def _connected(self) -> None:
        """Serve, over as many connections as it takes, until something does not go away by itself."""
        away_since, attempts = time.monotonic(), 0
        lost: tuple[type[BaseException], ...] = (NoAnswer, *self.lost)
        while True:
            has_served = False
            try:
                await self._bounded(self.connect(), self.connect_within, "connect")
                self._was_there = True
                self._up.set()
                while True:
                    if all(seeker.done for seeker in self.seekers):
                        away_since, attempts = 0.0, 0  # it counts from when somebody waits
                        self._no_trouble()
                    await self._idle()
                    self.heard()
                    await self._bounded(self.serve(), self.serve_within, "serve")
                    # Only now: what lets us connect and does nothing more is unreachable, too.
                    if self._trouble is not None:
                        self._no_trouble()
                        self._logs_told.clear()  # or they would keep waits that have ended
                        self._tell_all(logging.INFO, "%s is reachable again", self.name)
                    away_since, attempts = 0.0, 0
                    has_served = True
            except Exception as error:
                if has_served and isinstance(error, LoginRefused):  # the connection is read again, once
                    log.info(
                        "%s: the login is refused that was taken before; it is read again: %s", self.name, error
                    )
                    await self._disconnect()
                    continue
                if not isinstance(error, (*lost, *_GONE) if self._was_there else lost):
                    raise
                attempts += 1
                # Of a request without an answer it counts from the last that had one.
                away_since = away_since or (self._heard if isinstance(error, NoAnswer) else time.monotonic())
                await self._disconnect()
                if time.monotonic() - away_since > settings.unreachable_timeout():
                    seconds = time.monotonic() - away_since
                    raise SourceUnreachable(self.name, seconds, error) from error
                # One error may be of a connection that had grown old.
                if self._trouble is None and (attempts > 1 or isinstance(error, NoAnswer)):
                    message = "%s cannot be reached; trying again for up to %.0f s: %s"
                    self._trouble = (message, self.name, settings.unreachable_timeout(), _text_of(error))
                    log.log(logging.WARNING, *self._trouble)
                    self._logs_told.clear()
                    for seeker in self._one_for_each_log():
                        self._tell_trouble(seeker)
                await asyncio.sleep(_pause(attempts))

    async def _bounded(self, work: Coroutine[Any, Any, None], seconds: float | None, what: str) -> None:
        """
        Do ``work``, as a task of its own: a client that cancels whoever uses it does not end the hub.

        :param seconds: how long the source may be silent; None is without end.
        :raises NoAnswer: it was silent for longer.
        """
        self.heard()
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                left = None if seconds is None else self._heard + seconds - time.monotonic()
                if left is not None and left <= 0:
                    raise NoAnswer(f"it has not answered for {seconds:.0f} s ({what})")
                await asyncio.wait({task}, timeout=left)
        finally:
            await _end(task)
        if task.cancelled():
            raise NoAnswer(f"its client has given up ({what})")
        task.result()

    def _no_trouble(self) -> None:
        self._trouble = None
        Troubles.of_loop().forget(self.name)

    def _tell_trouble(self, seeker: _S) -> None:
        assert self._trouble is not None
        message, *arguments = self._trouble
        self._logs_told.add(seeker.log)
        seeker.write(logging.WARNING, message, *arguments)
        Troubles.of_loop().note(seeker.log, self.name, message % tuple(arguments))

    def _tell_all(self, level: int, message: str, *arguments: Any) -> None:
        log.log(level, message, *arguments)
        for seeker in self._one_for_each_log():
            seeker.write(level, message, *arguments)

    def _one_for_each_log(self) -> list[_S]:
        return list({seeker.log: seeker for seeker in self.seekers}.values())

    async def _idle(self) -> None:
        while not self._is_wanted:
            self._changed.clear()
            await self._changed.wait()

    @property
    def _is_wanted(self) -> bool:
        return any(not seeker.done for seeker in self.seekers) or bool(self._asked_for and not self._up.is_set())

    async def _disconnect(self) -> None:
        self._up.clear()
        with contextlib.suppress(Exception):
            await self._bounded(self.disconnect(), self.connect_within, "disconnect")


async def _end(task: asyncio.Future[None]) -> None:
    """
    Cancel ``task``, as often as it takes.

    :raises asyncio.CancelledError: the one who waits for it was cancelled meanwhile.
    """
    cancelled = False
    while not task.done():
        task.cancel()
        try:
            await asyncio.wait({task}, timeout=_GOODBYE)
        except asyncio.CancelledError:
            cancelled = True
    if not task.cancelled():
        task.exception()  # it is looked at, so that asyncio does not complain
    if cancelled:
        raise asyncio.CancelledError


def _text_of(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _pause(attempts: int) -> float:
    state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]
    state.attempt_number = attempts
    return _PAUSES(state)
