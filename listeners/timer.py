"""The clock as a source: an event at a moment."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from airflow_events.listeners.base import EventListener, Wait, current_wait, is_template
from airflow_events.listeners.support.clock import Clock
from airflow_events.listeners.support.timestamps import when


class TimerListener(EventListener):
    """
    An event at a moment; the event is the moment, in UTC.

    There is nothing to commit, and the moment is the same in every try, so a timer needs no worker.
    """

    async def poll_for_event(self, moment: float | str | datetime | timedelta) -> datetime:
        """
        Return at ``moment``; at once if it has passed.

        :param moment: one of

            - seconds since the epoch, as a number or a string of digits;
            - a datetime; a naive one is in the DAG's time zone;
            - a string in ISO 8601, a moment (``2030-01-31T08:00``, naive likewise) or a duration
              (``PT15M``);
            - a timedelta, counted, like a duration, from the start of the run, so that it stays put
              when the wait is tried again.
        :raises ValueError: the string is none of these, or the moment is out of range.
        :raises TypeError: another type.
        """
        due = when(moment, current_wait())
        await Clock.of_loop().until(due)
        return due

    @classmethod
    def check_arguments(cls, moment: Any) -> None:
        if not is_template(moment):
            try:
                when(moment, Wait("", "", "", run_start=datetime.now(timezone.utc)))
            except TypeError as error:
                raise ValueError(str(error)) from None

    def foresee(self, moment: float | str | datetime | timedelta) -> tuple[datetime, datetime]:
        """Return ``moment``, twice: it is the event, and when it comes."""
        due = when(moment, current_wait())
        return due, due
