"""The moments that users write: of a timer, and since when a watch looks."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any

import pendulum
from airflow_events.listeners.base import Wait

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

# A string of nine or more digits is a time since the epoch; ISO 8601 has none of that form.
_EPOCH = re.compile(r"\d{9,12}(\.\d*)?")

# Seconds since the epoch; a number below is a date that a native template has made one of.
_EARLIEST = 100_000_000


def of_epoch(milliseconds: float) -> datetime | None:
    """Return the moment so many milliseconds after the epoch, in UTC; None if that is out of range."""
    try:
        return datetime.fromtimestamp(0, timezone.utc) + timedelta(milliseconds=milliseconds)
    except (OverflowError, ValueError):
        return None


def when(moment: float | str | datetime | timedelta, wait: Wait) -> datetime:
    """Work out the moment, in UTC; parameters and errors as of `TimerListener.poll_for_event`."""
    if isinstance(moment, str):
        moment = parsed(moment)
    if isinstance(moment, timedelta):
        if wait.run_start is None:
            raise ValueError(f"{moment} counts from the start of the run, and {wait.id} has none")
        try:
            moment = wait.run_start + moment
        except OverflowError as error:
            raise ValueError(f"{moment} after the start of the run is out of range") from error
    if isinstance(moment, bool) or not isinstance(moment, (int, float, datetime)):
        raise TypeError(
            "a timer takes seconds since the epoch, a datetime, an ISO 8601 string or a timedelta, "
            f"not {moment!r} of type {type(moment).__qualname__}"
        )
    return in_utc(moment, wait.tz)


def check_since(since: Any) -> None:
    """
    Check from when on a watch is to look; what is None or no text and no number is left to `when`.

    :raises ValueError: it is a text that is no moment, or a number that is too small for one.
    """
    if isinstance(since, str):
        parsed(since)
    elif isinstance(since, (int, float)) and since < _EARLIEST:
        raise ValueError(f"since is a moment, and {since!r} neither one nor seconds since the epoch")


def in_zone(moment: datetime, zone: tzinfo) -> datetime:
    """
    Return a naive datetime in a time zone.

    Of an hour that a clock change repeats it is the second, as wherever Airflow reads a naive datetime, whatever
    its ``fold`` says; in an hour that is skipped it is as much later.
    """
    if isinstance(zone, pendulum.Timezone):
        return zone.convert(moment.replace(fold=1))
    return moment.replace(tzinfo=zone)


def in_utc(moment: float | datetime, zone: tzinfo) -> datetime:
    """
    Return seconds since the epoch, or a datetime, as a datetime in UTC.

    :param zone: of a naive datetime.
    :raises ValueError: it is out of range.
    """
    if not isinstance(moment, datetime):
        try:
            moment = datetime.fromtimestamp(moment, timezone.utc)
        except (OverflowError, OSError, ValueError) as error:
            raise ValueError(f"{moment!r} seconds since the epoch is out of range (milliseconds?)") from error
    if moment.tzinfo is None:
        moment = in_zone(moment, zone)
    # A plain datetime: the event should not depend on a library's class.
    return datetime.fromtimestamp(moment.timestamp(), timezone.utc)


def parsed(text: str) -> float | datetime | timedelta:
    """
    Return what a text says: seconds since the epoch, a moment, or a duration.

    :raises ValueError: it is none of them.
    """
    text = text.strip()
    if _EPOCH.fullmatch(text):
        return float(text)
    if text == "now":  # which pendulum takes, and which would be another moment each time
        raise ValueError("'now' is neither ISO 8601 nor seconds since the epoch")
    try:
        parsed = pendulum.parse(text, exact=True, tz=None)
    except ValueError as error:
        raise ValueError(f"{text!r} is neither ISO 8601 nor seconds since the epoch: {error}") from error
    if isinstance(parsed, pendulum.Duration) and not isinstance(parsed, pendulum.Interval):
        if parsed.years or parsed.months:
            raise ValueError(
                f"{text!r} has years or months, which are not always as long; say it in weeks or days"
            )
        return timedelta(seconds=parsed.total_seconds())
    if isinstance(parsed, datetime):
        return parsed
    if isinstance(parsed, pendulum.Date):
        return datetime(parsed.year, parsed.month, parsed.day)
    raise ValueError(f"{text!r} is a {type(parsed).__name__.lower()}, and a timer needs a moment or a duration")
