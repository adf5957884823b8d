"""What a trigger tells the worker that resumes the task: small, typed, and read in one place."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from airflow_events.errors import UnknownOutcome
from airflow_events.listeners import serde


@dataclass(frozen=True)
class Arrived:
    """
    The event, for the worker to record and commit unless a record says that this was done.

    :param at: when it was polled, in seconds since the epoch; None if it was recorded before.
    """

    event: Any
    at: float | None = None


@dataclass(frozen=True)
class Batch:
    """Some of the events that a task waits for, by their indexes, for the worker to record and commit."""

    events: dict[int, Any]


@dataclass(frozen=True)
class Gathered:
    """All events are recorded and committed; the worker finds them among the task's XComs."""


@dataclass(frozen=True)
class TimedOut:
    """The wait's time was up before an event came."""

    deadline: datetime


@dataclass(frozen=True)
class Rejected:
    """Somebody has rejected the wait; the record says who, and why."""


Outcome = Arrived | Batch | Gathered | TimedOut | Rejected


def encode(outcome: Outcome) -> dict[str, Any]:
    """
    Write an outcome as the payload of a ``TriggerEvent``.

    The value is JSON text: on its way through the triggerer's pipe and ``next_kwargs`` Airflow would turn
    tuples into lists.
    """
    more: dict[str, Any] = {}
    match outcome:
        case Arrived(event, at):
            value = event
            more = {} if at is None else {"at": at}
        case TimedOut(deadline):
            value = deadline
        case Batch(events):
            value = list(events.items())
        case Gathered() | Rejected():
            value = None
    return {"outcome": type(outcome).__name__, "value": serde.encode(value), **more}


def decode(payload: Any) -> Outcome:
    """
    Read what `encode` wrote.

    :raises UnknownOutcome: the payload is something else.
    """
    match payload:
        case {"outcome": "Arrived", "value": str(value)}:
            return Arrived(serde.decode(value), payload.get("at"))
        case {"outcome": "TimedOut", "value": str(value)}:
            return TimedOut(serde.decode(value))
        case {"outcome": "Batch", "value": str(value)}:
            return Batch(dict(serde.decode(value)))
        case {"outcome": "Gathered"}:
            return Gathered()
        case {"outcome": "Rejected"}:
            return Rejected()
    raise UnknownOutcome(
        f"the trigger sent {payload!r:.200}, and this version reads the outcomes Arrived, Batch, Gathered, "
        "TimedOut and Rejected; run one version of airflow-provider-events in triggerers and workers"
    )
