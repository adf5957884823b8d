"""The waits of a stage, page by page; the database does the filtering, the sorting and the cutting."""

from __future__ import annotations

import enum
import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow.configuration import conf
from airflow.jobs.job import Job
from airflow.models.dag import DagModel
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from airflow.models.xcom import XComModel
from airflow_events.listeners.commit import is_to_come
from airflow_events.triggers.record import DEADLINE_KEY, PROGRESS_KEY, RECORD_KEY
from airflow_events.waits import arguments, tables
from airflow_events.waits.tables import Key
from sqlalchemy import Text, case, cast, func, or_, select, tuple_
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement, Select


class Stage(str, enum.Enum):
    """Where a wait stands. A wait is in one of them."""

    RECORDED = "recorded"
    """Its event is recorded and not committed, whatever has become of the task: somebody should look."""
    OPEN = "open"
    """It waits, is about to begin, or is about to be tried again."""
    ENDED = "ended"
    """It succeeded, failed or was skipped."""


class Order(str, enum.Enum):
    """What waits are sorted by; in the database, so not by what only the trigger knows."""

    DAG = "dag_id"
    RUN = "run_id"
    TASK = "task_id"
    LISTENER = "listener"
    STATE = "state"
    SINCE = "since"
    DEADLINE = "deadline"
    TRIGGERER = "triggerer"
    SIGN_OF_LIFE = "sign_of_life"
    ENDED = "ended"


@dataclass(frozen=True)
class Triggerer:
    """
    Who has the trigger.

    :param heartbeat: its last sign of life.
    :param alive: whether that is recent, by ``[triggerer] triggerer_health_check_threshold``.
    """

    id: int
    hostname: str | None
    heartbeat: datetime | None
    alive: bool


class DagState(str, enum.Enum):
    """Why nothing of a DAG is started, though its waits take their events."""

    PAUSED = "paused"
    GONE = "gone"
    """Its file is, or no DAG in it has this id any more."""


@dataclass(frozen=True)
class Summary:
    """
    One wait in a list. Moments are in UTC.

    :param state: of the task instance.
    :param listener: the listener's class name; None for a mapped wait that is not deferred.
    :param call: listener and arguments as the call that they are, templates not rendered; None if it is not
        deferred, since only its trigger tells.
    :param since: when this try began, or was queued.
    :param deadline: None if it waits for ever, or has not begun.
    :param triggerer: None if it is not deferred, or no triggerer has it yet.
    :param sign_of_life: of the triggerer that has it, or of the worker that runs it.
    :param phase: of its record; None if nothing is recorded that an XCom shows.
    :param recorded: when the event was recorded; None for records of versions before 0.1.
    :param ended: when the task ended.
    :param seconds_to_delivery: from the record to the end of the task.
    :param arrived: of a task that waits for many events: how many have come; None of others.
    :param wanted: how many it waits for; likewise.
    :param dag_state: None if its DAG is as it should be.
    """

    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    state: str | None
    stage: Stage
    try_number: int
    listener: str | None
    call: str | None
    since: datetime | None
    deadline: datetime | None
    triggerer: Triggerer | None
    sign_of_life: datetime | None
    phase: str | None
    recorded: datetime | None
    ended: datetime | None
    seconds_to_delivery: float | None
    arrived: int | None = None
    wanted: int | None = None
    dag_state: DagState | None = None

    @property
    def key(self) -> Key:
        return self.dag_id, self.run_id, self.task_id, self.map_index


@dataclass(frozen=True)
class Page:
    """
    Some of the waits of a stage.

    :param total: how many there are in all; None where counting would read every task instance (ended ones).
    :param more: whether there are some after these.
    """

    waits: Sequence[Summary]
    total: int | None
    more: bool


@dataclass(frozen=True)
class Counted:
    """
    How many waits there are.

    :param open: by the name of their listener; of mapped waits that is ``WaitForEventOperator``.
    :param uncommitted: whose event is recorded and not committed.
    """

    open: dict[str, int]
    uncommitted: int


def find(
    session: Session,
    stage: Stage,
    *,
    dag_ids: Collection[str] | None = None,
    dag_id: str | None = None,
    run_id: str | None = None,
    task_id: str | None = None,
    listener: str | None = None,
    text: str | None = None,
    order: Order | None = None,
    descending: bool | None = None,
    limit: int = 50,
    offset: int = 0,
) -> Page:
    """
    Return a page of the waits of a stage.

    :param dag_ids: only waits of these DAGs, those that somebody may see; None means all.
    :param text: what dag, run, task or listener contain, in any case.
    :param order: None means the oldest first, and of ended waits the latest.
    """
    order = order or (Order.ENDED if stage is Stage.ENDED else Order.SINCE)
    if descending is None:
        descending = order is Order.ENDED
    where = [*_in_stage(stage), *_that_match(dag_ids, dag_id, run_id, task_id, listener, text)]
    column = _COLUMNS[order]
    # No dialect agrees with another on where NULL belongs; here it is always last.
    sort = [column.is_(None), column.desc() if descending else column.asc(), *_UNIQUE]
    rows = session.execute(
        _joined(select(*_WANTED)).where(*where).order_by(*sort).limit(limit + 1).offset(offset)
    ).all()
    total = None if stage is Stage.ENDED else _count(session, where)
    return Page(_summaries(session, stage, rows[:limit]), total, len(rows) > limit)


def count(session: Session) -> Counted:
    """Count the waits."""
    waiting = Counter[str]()
    statement: Any = select(TaskInstance.custom_operator_name, func.count())
    rows: Any = session.execute(
        _joined(statement).where(*_in_stage(Stage.OPEN)).group_by(TaskInstance.custom_operator_name)
    )
    for name, number in rows:
        waiting[name or tables.OPERATOR] += number
    return Counted(dict(waiting), _count(session, _in_stage(Stage.RECORDED)))


def one(session: Session, key: Key) -> Summary | None:
    """Return one wait, or None if there is no such task instance, or it is no wait."""
    where = or_(tables.of_a_wait(), tables.has_record())
    row = session.execute(
        _joined(select(*_WANTED, _IS_UNCOMMITTED)).where(where, *tables.is_(TaskInstance, key))
    ).one_or_none()
    if row is None:
        return None
    rests = Stage.ENDED if row.state in tables.ENDED else Stage.OPEN
    return _summaries(session, Stage.RECORDED if row.uncommitted else rests, [row])[0]


_IS_UNCOMMITTED = TaskInstance.id.in_(tables.uncommitted()).label("uncommitted")

# A task that ends in the triggerer at a later try keeps the end of the try before.
_ENDED = case(
    (TaskInstance.end_date >= TaskInstance.start_date, TaskInstance.end_date), else_=TaskInstance.updated_at
)

_WANTED = (
    TaskInstance.dag_id,
    TaskInstance.run_id,
    TaskInstance.task_id,
    TaskInstance.map_index,
    TaskInstance.state,
    TaskInstance.try_number,
    TaskInstance.operator,
    TaskInstance.custom_operator_name,
    TaskInstance.queued_dttm,
    TaskInstance.start_date,
    _ENDED.label("end_date"),
    TaskInstance.trigger_timeout,
    TaskInstance.last_heartbeat_at,
    Trigger.encrypted_kwargs,
    Job.id.label("job_id"),
    Job.hostname.label("job_hostname"),
    Job.state.label("job_state"),
    Job.latest_heartbeat,
)
_UNIQUE = (TaskInstance.dag_id, TaskInstance.run_id, TaskInstance.task_id, TaskInstance.map_index)
_COLUMNS: dict[Order, Any] = {
    Order.DAG: TaskInstance.dag_id,
    Order.RUN: TaskInstance.run_id,
    Order.TASK: TaskInstance.task_id,
    Order.LISTENER: TaskInstance.custom_operator_name,
    Order.STATE: TaskInstance.state,
    Order.SINCE: func.coalesce(TaskInstance.start_date, TaskInstance.queued_dttm),
    Order.DEADLINE: TaskInstance.trigger_timeout,
    Order.TRIGGERER: Job.hostname,
    Order.SIGN_OF_LIFE: func.coalesce(Job.latest_heartbeat, TaskInstance.last_heartbeat_at),
    Order.ENDED: _ENDED,
}


def _joined(statement: Select[Any]) -> Select[Any]:
    return (
        statement.select_from(TaskInstance)
        .outerjoin(Trigger, Trigger.id == TaskInstance.trigger_id)
        .outerjoin(Job, Job.id == Trigger.triggerer_id)
    )


def _count(session: Session, where: Iterable[ColumnElement[bool]]) -> int:
    return int(session.scalar(_joined(select(func.count())).where(*where)) or 0)


def _in_stage(stage: Stage) -> list[ColumnElement[bool]]:
    if stage is Stage.RECORDED:
        return [TaskInstance.id.in_(tables.uncommitted())]
    states = tables.OPEN if stage is Stage.OPEN else tables.ENDED
    return [tables.of_a_wait(), TaskInstance.state.in_(states), TaskInstance.id.not_in(tables.uncommitted())]


def _that_match(
    dag_ids: Collection[str] | None = None,
    dag_id: str | None = None,
    run_id: str | None = None,
    task_id: str | None = None,
    listener: str | None = None,
    text: str | None = None,
) -> list[ColumnElement[bool]]:
    where: list[ColumnElement[bool]] = []
    if dag_ids is not None:
        where.append(TaskInstance.dag_id.in_(dag_ids))
    for column, value in (
        (TaskInstance.dag_id, dag_id),
        (TaskInstance.run_id, run_id),
        (TaskInstance.task_id, task_id),
        (TaskInstance.custom_operator_name, listener),
    ):
        if value:
            where.append(column == value)
    if text:
        where.append(
            or_(*(column.icontains(text, autoescape=True) for column in (*_UNIQUE[:3], _COLUMNS[Order.LISTENER])))
        )
    return where


@dataclass(frozen=True)
class _Kept:
    """What the XComs of a wait tell in a list."""

    phase: str | None = None
    recorded: datetime | None = None
    deadline: datetime | None = None
    arrived: int | None = None
    wanted: int | None = None


def _summaries(session: Session, stage: Stage, rows: Sequence[Any]) -> list[Summary]:
    kept = _kept(session, [(row.dag_id, row.run_id, row.task_id, row.map_index) for row in rows])
    dags = _dag_states(session, {row.dag_id for row in rows})
    return [_summary(stage, row, kept, dags[row.dag_id]) for row in rows]


def _dag_states(session: Session, dag_ids: Collection[str]) -> dict[str, DagState | None]:
    states: dict[str, DagState | None] = dict.fromkeys(dag_ids, DagState.GONE)
    columns = select(DagModel.dag_id, DagModel.is_paused, DagModel.is_stale)
    for dag_id, is_paused, is_stale in session.execute(columns.where(DagModel.dag_id.in_(dag_ids))):
        states[dag_id] = DagState.GONE if is_stale else DagState.PAUSED if is_paused else None
    return states


def _summary(stage: Stage, row: Any, all_kept: dict[Key, _Kept], dag_state: DagState | None) -> Summary:
    kept = all_kept.get((row.dag_id, row.run_id, row.task_id, row.map_index), _Kept())
    deferred = arguments.read(row.encrypted_kwargs, in_full=False) if row.encrypted_kwargs else None
    listener = row.custom_operator_name if row.custom_operator_name != row.operator else None
    ended = row.end_date if row.state in tables.ENDED else None
    wanted = kept.wanted or (deferred.wanted if deferred else None)
    seconds = None
    if row.state == "success" and ended is not None and kept.recorded is not None:
        seconds = max((ended - kept.recorded).total_seconds(), 0.0)
    return Summary(
        dag_id=row.dag_id,
        run_id=row.run_id,
        task_id=row.task_id,
        map_index=row.map_index,
        state=row.state,
        stage=stage,
        try_number=row.try_number,
        listener=deferred.listener if deferred else listener,
        call=deferred.call if deferred else None,
        since=row.start_date or row.queued_dttm,
        deadline=kept.deadline or (deferred.deadline if deferred else None),
        triggerer=_triggerer(row),
        sign_of_life=row.latest_heartbeat or (row.last_heartbeat_at if row.state == "running" else None),
        phase=kept.phase,
        recorded=kept.recorded,
        ended=ended,
        seconds_to_delivery=seconds,
        arrived=None if wanted is None else kept.arrived or 0,
        wanted=wanted,
        dag_state=dag_state,
    )


def _triggerer(row: Any) -> Triggerer | None:
    if row.job_id is None:
        return None
    heartbeat = row.latest_heartbeat
    threshold = timedelta(seconds=conf.getfloat("triggerer", "triggerer_health_check_threshold"))
    recent = heartbeat is not None and datetime.now(timezone.utc) - heartbeat < threshold
    return Triggerer(row.job_id, row.job_hostname, heartbeat, recent and row.job_state == "running")


def _unwrapped(text: str) -> dict[str, Any]:
    """Read a record that came with a task's success, and is text within JSON; anything else is nothing."""
    try:
        told = json.loads(json.loads(text))
    except (TypeError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _kept(session: Session, keys: Sequence[Key]) -> dict[Key, _Kept]:
    """Read what the XComs of a page of waits tell, without their events, which may be large."""
    if not keys:
        return {}
    which = tuple_(XComModel.dag_id, XComModel.run_id, XComModel.task_id, XComModel.map_index).in_(keys)
    found: dict[Key, dict[str, Any]] = {}
    phase = XComModel.value["phase"].as_string()
    for row in session.execute(
        select(
            XComModel.dag_id,
            XComModel.run_id,
            XComModel.task_id,
            XComModel.map_index,
            phase.label("phase"),
            XComModel.value["recorded_at"].as_string().label("recorded_at"),
            XComModel.value["foreseen"].as_string().label("foreseen"),
            case((phase.is_(None), cast(XComModel.value, Text))).label("text"),
        ).where(which, XComModel.key == RECORD_KEY)
    ):
        told = {"phase": row.phase, "recorded_at": row.recorded_at} if row.text is None else _unwrapped(row.text)
        recorded_at = told.get("recorded_at")
        recorded = datetime.fromisoformat(recorded_at) if recorded_at else None
        if row.foreseen is not None and is_to_come(recorded):
            continue
        found.setdefault((row.dag_id, row.run_id, row.task_id, row.map_index), {}).update(
            phase=told.get("phase"), recorded=recorded
        )
    for row in session.execute(
        select(
            XComModel.dag_id,
            XComModel.run_id,
            XComModel.task_id,
            XComModel.map_index,
            XComModel.key,
            XComModel.value,
        ).where(which, XComModel.key.in_((DEADLINE_KEY, PROGRESS_KEY)))
    ):
        kept = found.setdefault((row.dag_id, row.run_id, row.task_id, row.map_index), {})
        if row.key == DEADLINE_KEY:
            kept.update(deadline=arguments.deadline(row.value))
        elif isinstance(row.value, dict):
            kept.update(arrived=row.value.get("arrived"), wanted=row.value.get("of"))
    return {key: _Kept(**values) for key, values in found.items()}
