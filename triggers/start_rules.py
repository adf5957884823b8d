"""What of an event says whether it starts a run, beside which others, and of what logical date."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import jmespath
from airflow_events.listeners.support import timestamps
from airflow_events.listeners.support.values import Match


class NoLogicalDate(ValueError):
    """An event has something else than a moment where its run's logical date is to come from."""


@dataclass(frozen=True)
class Key:
    """
    Of whose runs one is active at a time.

    :param text: as a run has it in its conf.
    :param digest: what tells it from every other, in hex; it is part of run ids, and frozen.
    """

    text: str
    digest: str

    @classmethod
    def of(cls, found: Any) -> Key:
        text = found if isinstance(found, str) else json.dumps(found, sort_keys=True)
        return cls(text, hashlib.sha256(text.encode()).hexdigest()[:16])


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
        self._key = _finds("key", key)
        self._logical_date = _finds("logical_date", logical_date)

    def wants(self, event: Any) -> bool:
        """Whether it starts a run."""
        return self._match is None or self._match.matches(event)

    def key_of(self, event: Any) -> Key | None:
        """Return its key; None if it has none."""
        found = None if self._key is None else self._key(event)
        return None if found is None else Key.of(found)

    def logical_date_of(self, event: Any) -> str | None:
        """
        Return its run's logical date, as ISO 8601 in UTC; None if it is to have none, or the event says none.

        :raises NoLogicalDate: it is no moment.
        """
        found = None if self._logical_date is None else self._logical_date(event)
        return None if found is None else _moment(found).isoformat()


def _finds(name: str, expression: str | None) -> Callable[[Any], Any] | None:
    if expression is None:
        return None
    try:
        search = jmespath.compile(expression).search
    except jmespath.exceptions.JMESPathError as error:
        raise ValueError(f"{name} is no JMESPath expression: {error}") from error

    def find(event: Any) -> Any:
        try:
            return search(event)
        except Exception:  # a function that does not take such a value: a JMESPathError, or what Python raises
            return None

    return find


def _moment(found: Any) -> datetime:
    """Return a moment that an event has as text or as seconds since the epoch, in UTC unless it says otherwise."""
    try:
        if isinstance(found, bool) or not isinstance(found, (int, float, str)):
            raise TypeError(f"it is of type {type(found).__name__}")
        parsed = timestamps.parsed(found) if isinstance(found, str) else found
        if isinstance(parsed, timedelta):
            raise ValueError("it is a duration")
        if isinstance(parsed, datetime):
            return (parsed if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
        return datetime.fromtimestamp(parsed, timezone.utc)
    except (ValueError, TypeError, OverflowError, OSError) as error:
        raise NoLogicalDate(f"the logical date cannot be {found!r}: {error}") from error
