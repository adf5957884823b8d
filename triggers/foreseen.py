"""What a wait does ahead of an event that its listener foresees, so that there is nothing to do when it comes."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from airflow.sdk.bases.xcom import BaseXCom
from airflow.sdk.execution_time.xcom import XCom
from airflow_events.listeners.base import EventListener, Wait, foresees, working_for

# Seconds before the moment of an event: when the first and when the last return value is written ahead. Each is a
# request, of which a triggerer's supervisor answers one in each of its loops.
_FROM = 600.0
_UNTIL = 1.0


class Foreseen:
    """
    The event of a wait, known before it comes.

    A triggerer's supervisor answers one request in each of its loops, so a thousand timers of one moment that
    each write something when it comes would end one by one. So nothing is written then: the record comes with
    the task's success, and the return value is written at some moment before. Nobody reads it until the task
    has succeeded.

    :param event: as it will be polled.
    :param at: when.
    """

    __slots__ = ("_at", "_write_at", "event", "is_written")

    def __init__(self, event: Any, at: datetime) -> None:
        self.event = event
        self.is_written = False
        self._at = at
        latest = at.timestamp() - _UNTIL
        now = time.time()
        self._write_at = random.uniform(max(now, latest - _FROM), latest) if now < latest else None

    def seconds_until_written(self, deadline: datetime | None) -> float | None:
        """Return in how many seconds to call `write`; None if it is not to be called."""
        if self._write_at is None or (deadline is not None and deadline <= self._at):
            return None
        return self._write_at - time.time()

    async def write(self, deliver: Callable[[Any], Awaitable[None]]) -> None:
        """Write the return value ahead; should that fail, it is written when the event comes."""
        self._write_at = None
        try:
            await deliver(self.event)
        except Exception:
            return
        self.is_written = True


def foresee(listener: type[EventListener], wait: Wait, args: Any, kwargs: Any) -> Foreseen | None:
    """
    Return what the listener foresees, or None.

    None too if the deployment has an XCom backend of its own: what a success brings along passes it by.
    """
    if not foresees(listener) or XCom is not BaseXCom:
        return None
    try:
        with working_for(wait):
            found = listener().foresee(*args, **kwargs)
    except Exception:  # what is wrong with the arguments, the poll tells
        return None
    return None if found is None else Foreseen(*found)
