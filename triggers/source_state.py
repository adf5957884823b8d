"""How the source of a trigger that starts runs fares, as the trigger tells it for the page."""

from __future__ import annotations

import asyncio

from airflow.sdk._shared.secrets_masker import redact
from airflow_events.listeners.support.hub import Troubles, shared_log
from airflow_events.listeners.support.lags import Lags
from airflow_events.listeners.support.shared import background
from airflow_events.triggers.event import storable

# Seconds from one question of how much is left to the next, and where there was no answer.
_MEASURE_EVERY, _MEASURE_AGAIN = 20.0, 5.0
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
        Lags.of_loop().begin(self._name)
        self._measuring = background(self._measure(), f"lag of {self._name}")

    def end(self) -> None:
        """Ask no more."""
        self._measuring.cancel()
        Lags.of_loop().forget(self._name)

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

    async def _measure(self) -> None:
        while True:
            self.lag = await Lags.of_loop().of(self._name)
            await asyncio.sleep(_MEASURE_AGAIN if self.lag is None else _MEASURE_EVERY)
