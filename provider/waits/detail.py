"""One wait: its life as steps, its event, its tries, and what its trigger says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from airflow._shared.secrets_masker import redact
from airflow.models.task_state_store import TaskStateStoreModel
from airflow.models.taskinstance import TaskInstance
from airflow.models.taskinstancehistory import TaskInstanceHistory
from airflow.models.trigger import TRIGGER_FAIL_REPR, Trigger
from airflow.models.xcom import XComModel
from airflow.sdk.serde import deserialize
from airflow_events.listeners.commit import Phase, is_to_come
from airflow_events.triggers.record import LOST_KEY, RECORD_KEY
from airflow_events.waits import arguments, listing, many, tables
from airflow_events.waits.listing import Summary
from airflow_events.waits.tables import Key
from sqlalchemy import select
from sqlalchemy.orm import Session

_LONGEST_EVENT = 50_000
"""Characters of JSON up to which an event is handed out whole."""


@dataclass(frozen=True)
class Step:
    """
    One step of a wait's life.

    :param at: when it was done, in UTC; None if it is not, or if nothing tells.
    :param done: whether it was.
    :param note: a sentence about it, or empty.
    """

    name: str
    done: bool
    at: datetime | None
    note: str


@dataclass(frozen=True)
class Try:
    """An earlier try of the task, or this one."""

    number: int
    state: str | None
    start: datetime | None
    end: datetime | None


@dataclass(frozen=True)
class Record:
    """
    The event of a wait, to be looked at.

    :param event: as JSON shapes; None if it is too long, see ``preview``.
    :param preview: the beginning of its JSON if that has more than 50,000 characters.
    :param length: how many characters of JSON the event is.
    :param committed: when the commit was noted; None if it was not.
    :param kept_by: ``API server`` if it came by HTTP, ``worker`` if a worker has stored it, else ``triggerer``.
    """

    phase: str
    event: Any
    preview: str | None
    length: int
    recorded: datetime | None
    committed: datetime | None
    kept_by: str
    id: str


@dataclass(frozen=True)
class Detail:
    """
    One wait in full.

    :param arguments: None if the wait is not deferred, since only its trigger tells.
    :param error: the traceback that the trigger of this try ended with, or None.
    :param takes_http_events: whether it can be sent an event, or be rejected, by a request to this Airflow.
    :param cannot_forget: why its record cannot be forgotten now, or None if it can.
    """

    summary: Summary
    record: Record | None
    arguments: arguments.Arguments | None
    steps: Sequence[Step]
    tries: Sequence[Try]
    error: str | None
    takes_http_events: bool
    cannot_forget: str | None


def show(session: Session, key: Key) -> Detail | None:
    """Return one wait; None if there is no such task instance, or if it is no wait."""
    summary = listing.one(session, key)
    if summary is None:
        return None
    ti = session.scalars(select(TaskInstance).where(*tables.is_(TaskInstance, key))).one()
    trigger = session.get(Trigger, ti.trigger_id) if ti.trigger_id else None
    told = arguments.read(trigger.encrypted_kwargs) if trigger else None
    record = read_record(session, key)
    return Detail(
        summary=summary,
        record=record,
        arguments=told,
        steps=_steps(summary, trigger, record if _is_whole(summary) else None),
        tries=_tries(session, ti, key),
        error=_error(ti),
        takes_http_events=summary.listener == "HttpListener" and record is None and summary.ended is None,
        cannot_forget=why_it_cannot_be_forgotten(summary.state, record),
    )


def why_it_cannot_be_forgotten(state: str | None, record: Record | None) -> str | None:
    """Say why the record of a wait in this state cannot be forgotten, or return None."""
    if record is None:
        return "Nothing is recorded for this wait."
    if state in tables.AT_WORK:
        return f"The task is {state}: it would record the event again. Mark it as failed first."
    return None


def read_record(session: Session, key: Key) -> Record | None:
    """Return what the operator would take for the wait's record, or None."""
    stored = session.scalars(
        select(TaskStateStoreModel).where(
            *tables.is_(TaskStateStoreModel, key), TaskStateStoreModel.key == RECORD_KEY
        )
    ).one_or_none()
    if stored is not None:
        return _record(json.loads(stored.value), stored.updated_at, "worker")
    if (found := many.read(session, key)) is not None:
        return _record(*found)
    row = _xcom(session, key, RECORD_KEY)
    record = _record(_value(row), row.timestamp, "triggerer") if row else None
    if record and record.id and read_xcom(session, key, LOST_KEY) == record.id:
        return None
    return record


def read_xcom(session: Session, key: Key, name: str) -> Any:
    """Return one of the XComs of a wait as the deployment's XCom backend reads it, or None."""
    row = _xcom(session, key, name)
    return None if row is None else _value(row)


def _xcom(session: Session, key: Key, name: str) -> XComModel | None:
    statement = select(XComModel).where(*tables.is_(XComModel, key), XComModel.key == name)
    return session.scalars(statement).one_or_none()


def _value(row: XComModel) -> Any:
    from airflow.sdk.bases.xcom import BaseXCom
    from airflow.sdk.execution_time.xcom import XCom

    if XCom.deserialize_value is not BaseXCom.deserialize_value:
        return XCom.deserialize_value(row)
    # Airflow's own would make objects of it, and the page needs none.
    return json.loads(row.value) if row.key == RECORD_KEY and isinstance(row.value, str) else row.value


def _record(stored: Any, at: datetime | None, kept_by: str) -> Record | None:
    if not isinstance(stored, dict) or "phase" not in stored:
        return None
    recorded_at = stored.get("recorded_at")
    recorded = datetime.fromisoformat(recorded_at) if recorded_at else None
    is_foreseen = bool(stored.get("foreseen"))
    if is_foreseen and is_to_come(recorded):
        return None
    try:
        event = arguments.jsonable(redact(deserialize(stored["event"])))
    except Exception:  # a class that this process may not or cannot make: as it is stored
        event = arguments.jsonable(redact(stored["event"]))
    text = json.dumps(event, ensure_ascii=False)
    is_long = len(text) > _LONGEST_EVENT
    committed = stored["phase"] == Phase.COMMITTED.value
    return Record(
        phase=stored["phase"],
        event=None if is_long else event,
        preview=text[:_LONGEST_EVENT] if is_long else None,
        length=len(text),
        recorded=recorded or (None if committed else at),
        committed=(recorded if is_foreseen else at) if committed else None,
        kept_by="API server" if stored.get("receipt") else kept_by,
        id=stored.get("id", ""),
    )


def _is_whole(summary: Summary) -> bool:
    """Whether all events are there, of a task that waits for many; others have theirs, or no record."""
    return summary.wanted is None or (summary.arrived or 0) >= summary.wanted


def _steps(summary: Summary, trigger: Trigger | None, record: Record | None) -> list[Step]:
    state = summary.state
    begun = state is not None and (summary.since is not None or record is not None)
    ended = state in tables.ENDED
    steps = [Step("Begun", begun, summary.since if begun else None, f"try {summary.try_number}" if begun else "")]
    if begun and record is None and not ended:
        where = _where(summary)
        if summary.wanted is not None:
            where = f"{summary.arrived:,} of {summary.wanted:,} arrived; {where}".rstrip("; ")
        steps.append(Step("Waiting", True, trigger.created_date if trigger else None, where))
    if record is not None and record.phase == Phase.REJECTED.value:
        told = record.event if isinstance(record.event, dict) else {}
        steps.append(Step("Rejected", True, record.recorded, f"by {told.get('by')}: {told.get('reason')}"))
    elif record is None:
        steps += [Step("Recorded", False, None, ""), Step("Committed", False, None, "")]
    else:
        steps += [
            Step("Recorded", True, record.recorded, f"by the {record.kept_by}"),
            Step("Committed", record.committed is not None, record.committed, ""),
        ]
    if ended and state != "success":
        return [*steps, Step(f"Ended: {state}", True, summary.ended, "")]
    note = (
        f"{summary.seconds_to_delivery:.1f} s after the record" if summary.seconds_to_delivery is not None else ""
    )
    return [*steps, Step("Delivered", state == "success", summary.ended if state == "success" else None, note)]


def _where(summary: Summary) -> str:
    if summary.state != "deferred":
        return ""
    if summary.triggerer is None:
        return "no triggerer has taken it on"
    where = f"in the triggerer on {summary.triggerer.hostname}"
    return where if summary.triggerer.alive else f"{where}, which gives no sign of life"


def _tries(session: Session, ti: TaskInstance, key: Key) -> list[Try]:
    rows: list[Any] = list(
        session.scalars(
            select(TaskInstanceHistory)
            .where(*tables.is_(TaskInstanceHistory, key), TaskInstanceHistory.try_number != ti.try_number)
            .order_by(TaskInstanceHistory.try_number)
        )
    )
    return [Try(row.try_number, row.state, row.start_date, row.end_date) for row in [*rows, ti]]


def _error(ti: TaskInstance) -> str | None:
    """Return what the trigger ended with; Airflow keeps it until the task goes on."""
    if ti.next_method != TRIGGER_FAIL_REPR or not isinstance(ti.next_kwargs, dict):
        return None
    told = ti.next_kwargs
    traceback = told.get("traceback")
    lines = "".join(traceback) if isinstance(traceback, list) else str(traceback or "")
    return str(redact(lines or str(told.get("error", ""))))
