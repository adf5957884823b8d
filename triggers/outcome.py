"""What a trigger tells the worker that resumes the task: small, typed, and read in one place."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from airflow_events.errors import UnknownOutcome
from airflow_events.listeners.support import serde


@dataclass(frozen=True)
class Arrived:
    """
    What is delivered. It is recorded and committed, unless it stands for what has not come.

    :param at: when it was polled, in seconds since the epoch; None if it was recorded before.
    """

    event: Any
    at: float | None = None


@dataclass(frozen=True)
class TimedOut:
    """
    The wait's time was up before an event came.

    :param arrived: of a task that waits for many: how many have come; None of others.
    """

    deadline: datetime
    arrived: int | None = None


@dataclass(frozen=True)
class Rejected:
    """
    Somebody has rejected the wait.

    :param reason: what they gave as the reason.
    """

    reason: str = ""
    by: str = ""


Outcome = Arrived | TimedOut | Rejected


def why_on_worker(finish_on_worker: bool | str | None) -> str | None:
    """Return why a worker ends the task, as a trigger was told; None if none does."""
    if not finish_on_worker:
        return None
    return finish_on_worker if isinstance(finish_on_worker, str) else "the version that began the wait said so"


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
        case TimedOut(deadline, arrived):
            value = deadline
            more = {} if arrived is None else {"arrived": arrived}
        case Rejected(reason, by):
            value = {"reason": reason, "by": by}
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
            return TimedOut(serde.decode(value), payload.get("arrived"))
        case {"outcome": "Rejected", "value": str(value)}:
            return Rejected(**(serde.decode(value) or {}))
    raise UnknownOutcome(
        f"the trigger sent {payload!r:.200}, and this version reads the outcomes Arrived, TimedOut and Rejected; "
        "run one version of airflow-provider-events in triggerers and workers"
    )
