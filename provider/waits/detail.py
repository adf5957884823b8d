"""One wait: its life as steps, its event, its tries, and what its trigger says."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from airflow._shared.secrets_masker import redact
from airflow.models.taskinstance import TaskInstance
from airflow.models.taskinstancehistory import TaskInstanceHistory
from airflow.models.trigger import TRIGGER_FAIL_REPR, Trigger
from airflow.sdk.serde import deserialize
from airflow_events.inbox.entries import Phase
from airflow_events.inbox.models import SINGLE, EventWait
from airflow_events.inbox.transactions import has_event
from airflow_events.waits import arguments, listing, tables
from airflow_events.waits.listing import Summary
from airflow_events.waits.tables import Key
from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

_LONGEST_EVENT = 50_000
"""Characters of JSON up to which an event is handed out whole."""
_BESIDE = 8
"""Characters of a place beside its event."""


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
    The event of a wait, or of all places of a task that waits for many, to be looked at.

    :param event: as JSON shapes; None if it is too long, see ``preview``, or if the wait was rejected.
    :param preview: the beginning of its JSON if that has more than 50,000 characters.
    :param length: how many characters of JSON the event is.
    :param recorded: when it was recorded; of many the last.
    :param committed: when the commit was noted; None if it was not.
    :param delivered: when the task succeeded with it in the triggerer or by the request that brought it.
    :param sent_by: who sent it, or rejected the wait; None if it was polled.
    :param reason: why the wait was rejected.
    """

    phase: str
    event: Any
    preview: str | None
    length: int
    recorded: datetime | None
    committed: datetime | None
    delivered: datetime | None = None
    sent_by: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Detail:
    """
    One wait in full.

    :param arguments: what its trigger was given, also of a parked wait; None if the wait is not deferred.
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

    def without_event(self) -> Detail:
        """Return the same for those who may not see events, nor why there is none: an error may quote one."""
        if self.record is None:
            return replace(self, error=None)
        record = replace(self.record, event=None, preview=None, reason=None)
        steps = [
            replace(step, note=f"by {record.sent_by}") if step.name == "Rejected" else step for step in self.steps
        ]
        return replace(self, record=record, steps=steps, error=None)


def show(session: Session, key: Key, *, dag_ids: Collection[str] | None = None) -> Detail | None:
    """
    Return one wait; None if there is no such task instance, or if it is no wait.

    :param dag_ids: the DAGs that somebody may see; None means all.
    """
    summary = listing.one(session, key, dag_ids=dag_ids)
    if summary is None:
        return None
    ti = session.scalars(select(TaskInstance).where(*tables.is_(TaskInstance, key))).one()
    trigger = session.get(Trigger, ti.trigger_id) if ti.trigger_id else None
    is_single = (*tables.is_(EventWait, key), EventWait.place == SINGLE)
    single = session.scalars(select(EventWait).where(*is_single)).one_or_none()
    record = _record_of_places(session, key)
    if record is None and single is not None and has_event(single, ti.max_tries, datetime.now(timezone.utc)):
        record = _of_row(single)
    begun = single.since if single else None
    kwargs = trigger.encrypted_kwargs if trigger else None
    if single is not None and (summary.parked or summary.hosted):
        kwargs = single.parked
    return Detail(
        summary=summary,
        record=record,
        arguments=_arguments(kwargs, single) if kwargs else None,
        steps=_steps(summary, begun or summary.since, trigger, record if _is_whole(summary) else None),
        tries=_tries(session, ti, key),
        error=_error(ti),
        takes_http_events=summary.listener == "HttpListener" and record is None and summary.ended is None,
        cannot_forget=why_it_cannot_be_forgotten(summary.state, record is not None),
    )


def _arguments(kwargs: str, row: EventWait | None) -> arguments.Arguments | None:
    """Return what the trigger was given; of a wait that has begun, as its row has it, with all secrets masked."""
    told = arguments.read(kwargs)
    return told if told is None or row is None or not row.call else replace(told, call=row.call)


def why_it_cannot_be_forgotten(state: str | None, is_recorded: bool) -> str | None:
    """Say why the record of a wait in this state cannot be forgotten, or return None."""
    if not is_recorded:
        return "Nothing is recorded for this wait."
    if state in tables.AT_WORK:
        return f"The task is {state}: it would record the event again. Mark it as failed first."
    return None


def _record_of_places(session: Session, key: Key) -> Record | None:
    """
    Return what the places of a task that waits for many have, None if they have nothing.

    Of what may be a gigabyte no more is read than is shown.
    """
    of_places = (*tables.is_(EventWait, key), EventWait.place != SINGLE, EventWait.phase.is_not(None))
    # The others know it without reading what is long, and SQLite counts letters alone.
    length_of = func.length if session.get_bind().dialect.name == "sqlite" else func.octet_length
    is_uncommitted = case((EventWait.phase == Phase.RECORDED.value, 1), else_=0)
    number, length, uncommitted, recorded, committed = session.execute(
        select(
            func.count(),
            func.sum(length_of(EventWait.event)),
            func.sum(is_uncommitted),
            func.max(EventWait.recorded_at),
            func.max(EventWait.committed_at),
        ).where(*of_places)
    ).one()
    if not number:
        return None
    lengths = session.execute(
        select(EventWait.place, length_of(EventWait.event))
        .where(*of_places)
        .order_by(EventWait.place)
        .limit(_LONGEST_EVENT)
    )
    last, left = None, _LONGEST_EVENT
    for place, of_one in lengths:
        last, left = place, left - (of_one or 0) - _BESIDE
        if left < 0:
            break
    rows = session.scalars(
        select(EventWait).where(*of_places, EventWait.place <= last).order_by(EventWait.place)
    ).all()
    event, preview, shown = _shown({str(row.place): _event(row) for row in rows})
    if len(rows) < number and preview is None:
        event, preview = None, json.dumps(event, ensure_ascii=False)
    return Record(
        (Phase.RECORDED if uncommitted else Phase.COMMITTED).value,
        event,
        preview,
        shown if len(rows) == number else int(length or 0) + number * _BESIDE,
        recorded,
        None if uncommitted else committed,
    )


def _of_row(row: EventWait) -> Record:
    is_rejected = row.phase == Phase.REJECTED
    event, preview, length = (None, None, 0) if is_rejected else _shown(_event(row))
    return Record(
        row.phase or "",
        event,
        preview,
        length,
        row.recorded_at,
        row.committed_at,
        row.delivered_at,
        row.sent_by,
        row.reason,
    )


def _event(row: EventWait) -> Any:
    return _readable(json.loads(row.event or "null"))


def _readable(stored: Any) -> Any:
    """Return an event to be looked at, as JSON shapes and masked."""
    try:
        return arguments.jsonable(redact(deserialize(stored)))
    except Exception:  # a class that this process may not or cannot make: as it is stored
        return arguments.jsonable(redact(stored))


def _shown(event: Any) -> tuple[Any, str | None, int]:
    """Return the event, or the beginning of its JSON if that is too long; and how long it is."""
    text = json.dumps(event, ensure_ascii=False)
    is_long = len(text) > _LONGEST_EVENT
    return None if is_long else event, text[:_LONGEST_EVENT] if is_long else None, len(text)


def _is_whole(summary: Summary) -> bool:
    """Whether all events are there, of a task that waits for many; others have theirs, or no record."""
    if summary.arrived is None or summary.state == "success":
        return True
    return summary.wanted is not None and summary.arrived >= summary.wanted


def _steps(summary: Summary, begun: datetime | None, trigger: Trigger | None, record: Record | None) -> list[Step]:
    has_begun = begun is not None and summary.state is not None
    ended = summary.state in tables.ENDED
    if not has_begun:
        steps = [Step("Begun", False, None, "")]
    else:
        tries = f"try {summary.try_number}" if summary.try_number <= 1 else f"now try {summary.try_number}"
        steps = [Step("Begun", True, begun, tries)]
    if has_begun and record is None and not ended:
        where = _where(summary)
        if summary.arrived is not None:
            where = f"{_arrived(summary)}; {where}".rstrip("; ")
        steps.append(Step("Waiting", True, trigger.created_date if trigger else None, where))
    if record is None:
        if ended:
            return [*steps, Step(f"Ended: {summary.state}", True, summary.ended, "")]
        steps += [Step("Recorded", False, None, ""), Step("Committed", False, None, "")]
    elif record.phase == Phase.REJECTED:
        steps.append(Step("Rejected", True, record.recorded, f"by {record.sent_by}: {record.reason}"))
    else:
        steps += [
            Step("Recorded", True, record.recorded, f"sent by {record.sent_by}" if record.sent_by else ""),
            Step("Committed", record.phase == Phase.COMMITTED, record.committed, ""),
        ]
    if ended and summary.state != "success":
        return [*steps, Step(f"Ended: {summary.state}", True, summary.ended, "")]
    if summary.state != "success" or record is None:
        return [*steps, Step("Delivered", False, None, "")]
    seconds = summary.seconds_to_delivery
    note = "" if seconds is None else f"{seconds:.1f} s after the record"
    return [*steps, Step("Delivered", True, record.delivered or summary.ended, note)]


def _arrived(summary: Summary) -> str:
    return f"{summary.arrived:,}{'' if summary.wanted is None else f' of {summary.wanted:,}'} arrived"


def _where(summary: Summary) -> str:
    if summary.state != "deferred":
        return ""
    if summary.parked:
        return "parked: it needs no triggerer, and the API server ends it"
    if summary.triggerer is None and summary.hosted:
        return "no triggerer has picked up the trigger that it shares with others"
    if summary.triggerer is None:
        return "no triggerer has picked it up"
    where = f"in the triggerer on {summary.triggerer.hostname}"
    if summary.hosted:
        where = f"{where}, by a trigger that it shares with others"
        if summary.shared_by is not None:
            where = f"{where} ({summary.shared_by:,} now)"
    if not summary.triggerer.alive:
        where = f"{where}, which has no heartbeat"
    if summary.log_of:
        where = f"{where}; what it does is in the log of {summary.log_of}"
    return f"{where}; {summary.trouble}" if summary.trouble else where


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
