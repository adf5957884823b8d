"""The clock as a source: an event at a moment."""

from __future__ import annotations

import asyncio
import re
from datetime import datetime, timedelta, timezone
from typing import ClassVar

import pendulum
from airflow_events.listeners.base import EventListener, Wait, current_wait

# Seconds. Sleeping in steps bounds by how much a timer is late after the system's clock was set forward.
_LONGEST_SLEEP = 60.0

# A string of nine or more digits is a time since the epoch; ISO 8601 has none of that form.
_EPOCH = re.compile(r"\d{9,12}(\.\d*)?")


class TimerListener(EventListener):
    """
    An event at a moment; the event is the moment, in UTC.

    There is nothing to commit, and the moment is the same in every try, so a timer needs no worker.
    """

    repeatable_poll: ClassVar[bool] = True

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
        while (remaining := (due - datetime.now(timezone.utc)).total_seconds()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(remaining, _LONGEST_SLEEP))
        return due


def when(moment: float | str | datetime | timedelta, wait: Wait) -> datetime:
    """Work out the moment, in UTC; parameters and errors as of `TimerListener.poll_for_event`."""
    if isinstance(moment, str):
        moment = _parse(moment.strip())
    if isinstance(moment, timedelta):
        if wait.run_start is None:
            raise ValueError(f"a timer of {moment} counts from the start of the run, and {wait.id} has none")
        moment = wait.run_start + moment
    elif isinstance(moment, (int, float)) and not isinstance(moment, bool):
        try:
            moment = datetime.fromtimestamp(moment, timezone.utc)
        except (OverflowError, OSError, ValueError) as error:
            raise ValueError(f"{moment!r} seconds since the epoch is out of range (milliseconds?)") from error
    if not isinstance(moment, datetime):
        raise TypeError(
            "a timer takes seconds since the epoch, a datetime, an ISO 8601 string or a timedelta, "
            f"not {moment!r} of type {type(moment).__qualname__}"
        )
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=wait.tz)
    # A plain datetime: the event should not depend on a library's class.
    return datetime.fromtimestamp(moment.timestamp(), timezone.utc)


def _parse(text: str) -> float | datetime | timedelta:
    if _EPOCH.fullmatch(text):
        return float(text)
    try:
        parsed = pendulum.parse(text, exact=True, tz=None)
    except ValueError as error:
        raise ValueError(f"{text!r} is neither ISO 8601 nor seconds since the epoch: {error}") from error
    if isinstance(parsed, pendulum.Duration):
        return timedelta(seconds=parsed.total_seconds())
    if isinstance(parsed, datetime):
        return parsed
    if isinstance(parsed, pendulum.Date):
        return datetime(parsed.year, parsed.month, parsed.day)
    raise ValueError(f"{text!r} is a {type(parsed).__name__.lower()}, and a timer needs a moment or a duration")
