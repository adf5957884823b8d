"""Which queue those poll who take one event after another, so that it can be asked how much is left in it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

from airflow_events.listeners.support.hub import shared_log
from airflow_events.listeners.support.shared import OnePerLoop, Resource


class Queue(Resource, Protocol):
    """What of a `airflow_events.listeners.support.queue.QueueHub` is needed here."""

    async def connected_or_refused(self) -> None:
        """Return once there is a connection; raise what keeps it from that for long."""

    async def lag(self, seeker: Any) -> int | None:
        """Return how many messages nobody has acknowledged yet, of those that ``seeker`` may get."""


class Polled(NamedTuple):
    """
    A queue that is polled.

    :param key: as of `airflow_events.listeners.support.shared.shared`; ``make`` likewise.
    :param seek: what the poll wants of it.
    """

    key: Hashable
    make: Callable[[], Queue]
    seek: Callable[[], Any]


class Polls(OnePerLoop):
    """Which queue was polled last, by the log that the polls share."""

    def __init__(self) -> None:
        self._last: dict[str, Polled | None] = {}  # of those that are asked for

    def begin(self, log: str) -> None:
        """Note that it will be asked for that of this log."""
        self._last[log] = None

    def note(self, polled: Polled) -> None:
        """Note a poll, which is made now."""
        if (log := shared_log.get("")) in self._last:
            self._last[log] = polled

    def last(self, log: str) -> Polled | None:
        """Return that of this log; None if there was none."""
        return self._last.get(log)

    def forget(self, log: str) -> None:
        """Note that nobody will ask any more."""
        self._last.pop(log, None)
