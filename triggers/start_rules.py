"""What of an event says whether it starts a run, beside which others, and of what logical date."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow_events.listeners.support import timestamps
from airflow_events.listeners.support.values import Match, expression


class NoLogicalDate(ValueError):
    """An event has something else than a moment where its run's logical date is to come from."""


class Rules:
    """
    What `start_on.override` says of events, each rule about an event in the JSON shapes that its run has it in.

    :param match: as of `Match`, as JSON; None takes every event.
    :param key: a JMESPath expression; None is for events without keys.
    :param logical_date: a JMESPath expression; None is for runs without a logical date.
    :raises ValueError: an expression is none.
    :raises TypeError: ``match`` is of another type.
    """

    def __init__(self, match: str | None = None, key: str | None = None, logical_date: str | None = None) -> None:
        self._match = None if match is None else Match(json.loads(match))
        self._key = None if key is None else expression("key", key)
        self._logical_date = None if logical_date is None else expression("logical_date", logical_date)

    def wants(self, event: Any) -> bool:
        """Whether it starts a run."""
        return self._match is None or self._match.matches(event)

    def key_of(self, event: Any) -> str | None:
        """Return its key, as a run has it in its conf: one that is no text as JSON; None if it has no key."""
        found = None if self._key is None else self._key(event)
        return found if found is None or isinstance(found, str) else json.dumps(found, sort_keys=True)

    def logical_date_of(self, event: Any) -> str | None:
        """
        Return its run's logical date, as ISO 8601 in UTC; None if it is to have none, or the event says none.

        :raises NoLogicalDate: it is no moment.
        """
        found = None if self._logical_date is None else self._logical_date(event)
        return None if found is None else _moment(found).isoformat()


# Within what Airflow's databases hold (MySQL's end in 2038), and not at its end: of a second that is full, logical
# dates are moved on.
_EARLIEST, _LATEST = datetime(1970, 1, 2, tzinfo=timezone.utc), datetime(9999, 12, 30, tzinfo=timezone.utc)


def _moment(found: Any) -> datetime:
    """Return a moment that an event has as text or as seconds since the epoch, in UTC unless it says otherwise."""
    try:
        if isinstance(found, bool) or not isinstance(found, (int, float, str)):
            raise TypeError(f"it is of type {type(found).__name__}")
        parsed = timestamps.parsed(found) if isinstance(found, str) else found
        if isinstance(parsed, timedelta):
            raise ValueError("it is a duration")
        moment = timestamps.in_utc(parsed, timezone.utc)
        if not _EARLIEST <= moment <= _LATEST:
            raise ValueError("Airflow's databases hold no such moment")
        return moment
    except (ValueError, TypeError) as error:
        raise NoLogicalDate(f"the logical date cannot be {found!r}: {error}") from error
