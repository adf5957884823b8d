"""How the source of a trigger that starts runs fares, as the trigger tells it for the page."""

from __future__ import annotations

import asyncio
import logging

from airflow.sdk._shared.secrets_masker import redact
from airflow_events.listeners.support.hub import Troubles, shared_log
from airflow_events.listeners.support.polls import Polled, Polls, Queue
from airflow_events.listeners.support.shared import background, shared, within
from airflow_events.triggers.event import storable

log = logging.getLogger(__name__)

# Seconds from one question of how much is left to the next; until there is a poll; and after failures in a row.
_EVERY, _UNTIL_POLLED, _LONGEST = 20.0, 2.0, 120.0
# Seconds that a source has to connect, and to say how much is left.
_PATIENCE = 20.0
# Seconds for which polls that are open show that what failed before does not fail any more.
_IS_OVER = 10.0


class SourceState:
    """
    What is wrong with a source, and how much is left there.

    :ivar lag: how many messages nobody has acknowledged, when it was asked last; None if it does not tell.
    """

    def __init__(self, name: str) -> None:
        """:param name: of the log that the trigger's polls share."""
        self.lag: int | None = None
        self._name = name
        self._failure, self._failure_until = "", 0.0

    def begin(self) -> None:
        """Ask from now on, and of all polls that are made in this context."""
        shared_log.set(self._name)
        Polls.of_loop().begin(self._name)
        self._asking = background(self._ask(), f"lag of {self._name}")

    def end(self) -> None:
        """Ask no more."""
        self._asking.cancel()
        Polls.of_loop().forget(self._name)

    def failed(self, error: Exception, seconds: float) -> None:
        """Note why polls have failed, and that they are made again after so many seconds."""
        self._failure = f"{type(error).__name__}: {error}"
        self._failure_until = asyncio.get_running_loop().time() + seconds + _IS_OVER

    @property
    def trouble(self) -> str:
        """What is wrong, masked; empty if nothing is."""
        said = Troubles.of_loop().of(self._name)
        if not said and asyncio.get_running_loop().time() < self._failure_until:
            said = self._failure
        return storable(str(redact(said)))

    async def _ask(self) -> None:
        pause = _EVERY
        while True:
            if (polled := Polls.of_loop().last(self._name)) is None:
                await asyncio.sleep(_UNTIL_POLLED)
                continue
            begun = asyncio.get_running_loop().time()
            try:
                await self._ask_while_it_answers(polled)
            except Exception as error:
                log.debug("%s: it is not known how much is left: %r", self._name, error)
            finally:
                self.lag = None
            lasted = asyncio.get_running_loop().time() - begun
            pause = _EVERY if lasted > _EVERY + _PATIENCE else min(2 * pause, _LONGEST)
            await asyncio.sleep(pause)

    async def _ask_while_it_answers(self, polled: Polled) -> None:
        # Held, or it would connect for each question while there is no room, and nobody polls.
        async with shared(polled.key, polled.make) as queue:
            while True:
                self.lag = await within(_lag_of(queue, polled), _PATIENCE)
                await asyncio.sleep(_EVERY)


async def _lag_of(queue: Queue, polled: Polled) -> int | None:
    await queue.connected_or_refused()
    return await queue.lag(polled.seek())
