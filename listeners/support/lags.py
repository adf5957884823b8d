"""How much is left at the sources of those who take one event after another, for the page."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Protocol

from airflow_events.listeners.support.hub import shared_log
from airflow_events.listeners.support.shared import OnePerLoop, Resource, shared

log = logging.getLogger(__name__)

# Seconds that a source has to connect, and to say how much is left.
_PATIENCE = 20.0


class Queue(Resource, Protocol):
    """What of a `airflow_events.listeners.support.queue.QueueHub` is needed here."""

    name: str

    async def connected(self) -> None:
        """Return once there is a connection."""

    async def lag(self, seeker: Any) -> int | None:
        """Return how many messages nobody has acknowledged yet, of those that ``seeker`` may get."""


class Lags(OnePerLoop):
    """
    Which queue was polled last, by whose log it is that the polls share.

    A queue that nobody polls any more, for want of room, say, is connected to for as long as it takes to ask.
    """

    def __init__(self) -> None:
        # None of what was polled by nobody yet.
        self._polled: dict[str, tuple[Hashable, Callable[[], Queue], Callable[[], Any]] | None] = {}

    def begin(self, of: str) -> None:
        """Note that it will be asked for the queue of that log."""
        self._polled[of] = None

    def note(self, key: Hashable, make: Callable[[], Queue], seek: Callable[[], Any]) -> None:
        """
        Note that it is polled.

        :param key: of the queue, as of `shared`; ``make`` likewise.
        :param seek: what the poll wants of it.
        """
        if (of := shared_log.get("")) in self._polled:
            self._polled[of] = key, make, seek

    def forget(self, of: str) -> None:
        """Note that nobody will ask for it any more."""
        self._polled.pop(of, None)

    async def of(self, log_of: str) -> int | None:
        """
        Return how many messages nobody has acknowledged yet in the queue that was polled last in that log.

        None if none was, the source does not tell, or it cannot be asked now.
        """
        if (polled := self._polled.get(log_of)) is None:
            return None
        key, make, seek = polled
        try:
            async with shared(key, make) as queue:
                return await _told(_asked(queue, seek()))
        except Exception as error:
            log.debug("%s: it is not known how much is left: %r", log_of, error)
            return None


async def _asked(queue: Queue, seeker: Any) -> int | None:
    await queue.connected()
    return await queue.lag(seeker)


async def _told(asking: Coroutine[Any, Any, int | None]) -> int | None:
    """
    Return what it returns.

    :raises TimeoutError: it took too long.
    """
    task = asyncio.ensure_future(asking)
    try:
        await asyncio.wait({task}, timeout=_PATIENCE)
        if not task.done():
            raise TimeoutError(f"the source has not answered for {_PATIENCE:.0f} s")
        return task.result()
    finally:
        task.cancel()
