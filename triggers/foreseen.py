"""What a wait does ahead of an event that its listener foresees, so that there is nothing to do when it comes."""

from __future__ import annotations

import contextvars
import random
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow.sdk.bases.xcom import BaseXCom
from airflow.sdk.execution_time.xcom import XCom
from airflow_events.listeners.base import EventListener, Wait, foresees, working_for
from airflow_events.listeners.commit import Record

# Before the moment of an event: from when and until when a wait writes ahead. It makes two requests, of which a
# triggerer's supervisor answers one in each of its loops, and thousands of waits may have the same moment.
_FROM = timedelta(minutes=30)
_UNTIL = timedelta(seconds=1)


class Foreseen:
    """
    The event of a wait, known before it comes.

    A triggerer's supervisor answers one request in each of its loops, so a thousand timers of one moment that
    each write something when it comes would end one by one. So nothing is written then: the record, which is
    none until that moment, and the return value are written at some moment before. Nobody reads that one until
    the task has succeeded.

    :param event: as it will be polled.
    :param at: when.
    :param record: what is written, or about to be, ahead of it; None as long as nothing is.
    :param is_written: whether record and return value are.
    """

    __slots__ = ("_write_at", "at", "event", "is_written", "record")

    def __init__(self, event: Any, at: datetime) -> None:
        self.event = event
        self.at = at
        self.record: Record | None = None
        self.is_written = False
        self._write_at = None
        if (now := datetime.now(timezone.utc)) + _UNTIL < at:
            latest = at - _UNTIL
            earliest = max(now, latest - _FROM)
            self._write_at = earliest + random.random() * (latest - earliest)

    def to_be_written_at(self, deadline: datetime | None) -> datetime | None:
        """Return when to call `write`; None if it is not to be called, or was."""
        return None if deadline is not None and deadline <= self.at else self._write_at

    async def write(self, write: Callable[[Record], Awaitable[None]], record: Record) -> None:
        """Write ahead of the event; should that fail, it is done when the event comes."""
        self._write_at, self.record = None, record
        try:
            await write(record)
        except Exception:
            return
        self.is_written = True


def foresee(listener: type[EventListener], wait: Wait, args: Any, kwargs: Any) -> Foreseen | None:
    """
    Return what the listener foresees, or None.

    None too if the deployment has an XCom backend of its own: what a success brings along passes it by.
    """
    if XCom is not BaseXCom:
        return None
    found = foreseen_by(listener, wait, args, kwargs)
    return None if found is None else Foreseen(*found)


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
