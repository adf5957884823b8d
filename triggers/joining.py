"""Which hosts of this triggerer have waits that they have not seen: what hands a wait to one tells it so."""

from __future__ import annotations

import asyncio

from airflow_events.listeners.support.shared import OnePerLoop, woken


class Joined(OnePerLoop):
    """One event of asyncio for each host that runs in this loop."""

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}

    def tell(self, host: str) -> None:
        """Say that a wait has joined; nobody need be there who is told."""
        if (event := self._events.get(host)) is not None:
            event.set()

    async def told(self, host: str, within: float) -> None:
        """Return when a wait has joined since this was called last, or so many seconds have passed."""
        event = self._events.setdefault(host, asyncio.Event())
        await woken(event, within)
        event.clear()

    def forget(self, host: str) -> None:
        """Tell it nothing any more: it runs here no longer."""
        self._events.pop(host, None)
