"""What the trigger of a wait was given: listener, arguments, deadline. Secrets are masked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from airflow._shared.secrets_masker import redact
from airflow.models.trigger import Trigger
from airflow.serialization.enums import Encoding
from airflow.serialization.serialized_objects import BaseSerialization
from airflow_events.listeners.base import describe
from airflow_events.listeners.support.masking import masked, masked_call
from airflow_events.triggers.calls import Calls
from airflow_events.triggers.outcome import why_on_worker
from airflow_events.triggers.reference import display_name

# Of thousands of arguments.
_MOST_SHOWN = 100


@dataclass(frozen=True)
class Arguments:
    """
    What a trigger was given.

    :param call: listener and arguments as the call that they are; templates stand there as they were written,
        and once the wait has begun, its row has them rendered.
    :param on_worker_because: why a worker ends the task, None if none does.
    :param wanted: how many events it waits for, if it is one that waits for many.
    :param deadline: None if there is none, or if it counts from the wait's beginning, which its row has.
    """

    listener: str
    call: str
    deadline: datetime | None
    timeout: float | None
    on_worker_because: str | None
    wanted: int | None = None


def read(encrypted_kwargs: str, *, in_full: bool = True) -> Arguments | None:
    """
    Return what a trigger's row holds, or None if this process has another Fernet key or cannot read it.

    :param in_full: if False, of a task that waits for many events only how many they are.
    """
    try:
        told = kwargs_of(encrypted_kwargs)
        listener = display_name(told["listener"])
    except Exception:  # one row that cannot be read must not hide the others
        return None
    if "calls" in told:
        return _of_many(listener, told, in_full)
    # Listeners of users are not loaded in an API server, and so their positional arguments have no names here.
    args, kwargs = masked_call(None, told.get("listener_args") or [], told.get("listener_kwargs") or {}, redact)
    return Arguments(
        listener=listener,
        call=told.get("shown") or describe(listener, args, kwargs),
        deadline=utc(told.get("deadline")),
        timeout=told.get("timeout"),
        on_worker_because=why_on_worker(told.get("finish_on_worker")),
    )


def _of_many(listener: str, told: dict[str, Any], in_full: bool) -> Arguments:
    return Arguments(
        listener=listener,
        call=told.get("shown") or _call_of_many(listener, told, in_full),
        deadline=utc(told.get("deadline")),
        timeout=told.get("timeout"),
        on_worker_because=why_on_worker(told.get("finish_on_worker")),
        wanted=told.get("first") or told["count"],
    )


def _call_of_many(listener: str, told: dict[str, Any], in_full: bool) -> str:
    call = f"{listener}, {told['count']:,} times"
    if not in_full:
        return call
    calls = Calls.decode(told["calls"])
    arguments, common = masked(calls.arguments[:_MOST_SHOWN], redact), masked(dict(calls.common), redact)
    return f"{call}, the first of them {Calls(arguments, common).describe(listener, others=False)}"


def kwargs_of(encrypted: str) -> Any:
    """
    Return the arguments of a trigger as its row, or that of a parked wait, has them.

    :raises Exception: this process has another Fernet key, or cannot read them.
    """
    return decoded(Trigger._decrypt_kwargs(encrypted))


def decoded(value: Any) -> Any:
    """Undo the encoding that arguments of a serialized DAG still have in the trigger's row."""
    if isinstance(value, dict):
        if Encoding.VAR in value or Encoding.VAR.value in value:
            return BaseSerialization.deserialize(value)
        return {key: decoded(item) for key, item in value.items()}
    return [decoded(item) for item in value] if isinstance(value, list) else value


def utc(moment: Any) -> datetime | None:
    """Return a moment as a plain datetime in UTC, or None if it is none."""
    return datetime.fromtimestamp(moment.timestamp(), timezone.utc) if isinstance(moment, datetime) else None


def jsonable(value: Any) -> Any:
    """Return ``value`` as JSON shapes, to be looked at and not to be read back."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return value.isoformat() if isinstance(value, datetime) else str(value)
