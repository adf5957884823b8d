"""The waits of a stage, page by page; the database does the filtering, the sorting and the cutting."""

from __future__ import annotations

import enum
import functools
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow.configuration import conf
from airflow.jobs.job import Job
from airflow.models.dag import DagModel
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from airflow.utils.state import TaskInstanceState
from airflow_events.inbox.entries import Phase
from airflow_events.inbox.models import SINGLE, EventHost, EventWait
from airflow_events.inbox.transactions import has_event
from airflow_events.waits import arguments, tables
from airflow_events.waits.tables import Key
from sqlalchemy import and_, case, func, or_, select, tuple_
from sqlalchemy.orm import Session, aliased
from sqlalchemy.sql import ColumnElement


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

    :param heartbeat: its last one.
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
    :param listener: the listener's class name; None for a mapped wait that has not begun.
    :param call: listener and arguments as the call that they are: rendered once the wait has begun, before that
        as its trigger has them; None if it has none yet.
    :param since: when this try began, or was queued.
    :param deadline: None if it waits for ever, or has not begun.
    :param holder: the process that began it last: ``host:pid``.
    :param triggerer: None if it is not deferred, or no triggerer has it yet.
    :param sign_of_life: of the triggerer that has it, or of the worker that runs it.
    :param phase: of its event; None if nothing is recorded.
    :param recorded: when the event was recorded; of many the last.
    :param ended: when the task ended.
    :param seconds_to_delivery: from the record to the task's success.
    :param arrived: of a task that waits for many events: how many have come; None of others.
    :param wanted: how many it waits for; likewise, and None where nobody tells any more.
    :param dag_state: None if its DAG is as it should be.
    :param hosted: whether it shares the trigger that polls for it with others.
    :param shared_by: of one that is hosted: for how many waits its host polls; None if nobody may know.
    :param log_of: of one that is hosted: in whose log what its poll logs is found.
    :param trouble: likewise: what is wrong with the sources of its host; None if nothing is.
    :param parked: whether it waits without a trigger, since nobody has to poll for its event.
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
    holder: str | None
    triggerer: Triggerer | None
    sign_of_life: datetime | None
    phase: str | None
    recorded: datetime | None
    ended: datetime | None
    seconds_to_delivery: float | None
    arrived: int | None = None
    wanted: int | None = None
    dag_state: DagState | None = None
    parked: bool = False
    hosted: bool = False
    shared_by: int | None = None
    log_of: str | None = None
    trouble: str | None = None

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

    :param open: by the name of their listener; of mapped waits that have not begun: ``WaitForEventOperator``.
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
    sort = [column.is_(None), column.desc() if descending else column.asc(), *_KEY]
    # First which ones, and then all about these: a database that sorts all of it at once takes six times as long.
    ids = _IDS.where(*where).order_by(*sort)
    cut = ids.limit(limit + 1).offset(offset).subquery()
    rows = session.execute(_ROWS.join(cut, cut.c.id == TaskInstance.id).order_by(*sort)).all()
    total = None if stage is Stage.ENDED else _count(session, where)
    return Page(_summaries(session, stage, rows[:limit], dag_ids), total, len(rows) > limit)


def count(session: Session) -> Counted:
    """Count the waits."""
    waiting = Counter[str]()
    statement: Any = select(_LISTENER, func.count())
    rows: Any = session.execute(
        tables.joined(statement).where(*_in_stage(Stage.OPEN)).group_by(EventWait.listener, _OPERATOR_NAME)
    )
    for name, number in rows:
        waiting[name or tables.OPERATOR] += number
    return Counted(dict(waiting), _count(session, _in_stage(Stage.RECORDED)))


def one(session: Session, key: Key, *, dag_ids: Collection[str] | None = None) -> Summary | None:
    """
    Return one wait, or None if there is no such task instance, or it is no wait.

    :param dag_ids: as of `find`: of others, whose host it shares, nothing is told.
    """
    is_uncommitted = TaskInstance.id.in_(_UNCOMMITTED).label("is_uncommitted")
    is_wait = or_(tables.of_our_operator(), tables.of_our_trigger(), EventWait.place.is_not(None))
    row = session.execute(
        _ROWS.add_columns(is_uncommitted).where(is_wait, *tables.is_(TaskInstance, key))
    ).one_or_none()
    if row is None:
        return None
    rests = Stage.ENDED if row.state in tables.ENDED else Stage.OPEN
    return _summaries(session, Stage.RECORDED if row.is_uncommitted else rests, [row], dag_ids)[0]


# A task that ends in the triggerer at a later try keeps the end of the try before.
_ENDED = case(
    (TaskInstance.end_date >= TaskInstance.start_date, TaskInstance.end_date), else_=TaskInstance.updated_at
)
_OPERATOR_NAME = TaskInstance.custom_operator_name
_LISTENER = func.coalesce(EventWait.listener, _OPERATOR_NAME)

_WANTED = (
    TaskInstance.dag_id,
    TaskInstance.run_id,
    TaskInstance.task_id,
    TaskInstance.map_index,
    TaskInstance.state,
    TaskInstance.try_number,
    TaskInstance.max_tries,
    TaskInstance.operator,
    _OPERATOR_NAME,
    TaskInstance.queued_dttm,
    TaskInstance.start_date,
    _ENDED.label("end_date"),
    TaskInstance.last_heartbeat_at,
    EventWait.place,
    EventWait.listener,
    EventWait.call,
    EventWait.wanted,
    EventWait.holder,
    EventWait.since,
    EventWait.deadline,
    EventWait.phase,
    EventWait.record_clears,
    EventWait.expires,
    EventWait.recorded_at,
    EventWait.delivered_at,
    # They may be long, and take long to decrypt: the row of a wait that has begun tells what they do.
    case(
        (
            or_(
                EventWait.since.is_(None),
                func.coalesce(EventWait.listener, "") == "",
                func.coalesce(EventWait.call, "") == "",
                and_(TaskInstance.operator == tables.OF_MANY, EventWait.wanted.is_(None)),
            ),
            func.coalesce(EventWait.parked, Trigger.encrypted_kwargs),
        )
    ).label("encrypted_kwargs"),
    EventWait.host,
    EventWait.host.is_not(None).label("is_hosted"),
    and_(TaskInstance.trigger_id.is_(None), EventWait.parked.is_not(None), EventWait.host.is_(None)).label(
        "is_parked"
    ),
    EventHost.log_of,
    EventHost.waits.label("shared_by"),
    EventHost.trouble,
    Job.id.label("job_id"),
    Job.hostname.label("job_hostname"),
    Job.state.label("job_state"),
    Job.latest_heartbeat,
)
_KEY = (TaskInstance.dag_id, TaskInstance.run_id, TaskInstance.task_id, TaskInstance.map_index)
_COLUMNS: dict[Order, Any] = {
    Order.DAG: TaskInstance.dag_id,
    Order.RUN: TaskInstance.run_id,
    Order.TASK: TaskInstance.task_id,
    Order.LISTENER: _LISTENER,
    Order.STATE: TaskInstance.state,
    Order.SINCE: func.coalesce(TaskInstance.start_date, TaskInstance.queued_dttm),
    Order.DEADLINE: func.coalesce(EventWait.deadline, TaskInstance.trigger_timeout),
    Order.TRIGGERER: Job.hostname,
    Order.SIGN_OF_LIFE: func.coalesce(Job.latest_heartbeat, TaskInstance.last_heartbeat_at),
    Order.ENDED: _ENDED,
}

# What is the same in each request is put together once: that takes as long as everything else in a list.
_IDS, _ROWS, _NUMBER = (
    tables.joined(statement) for statement in (select(TaskInstance.id), select(*_WANTED), select(func.count()))
)
_recorded = aliased(EventWait)
# The ids of the task instances that have an event, at any place, recorded and not committed.
_UNCOMMITTED = (
    select(TaskInstance.id).join(_recorded, tables.of(_recorded)).where(_recorded.phase == Phase.RECORDED.value)
)


def _count(session: Session, where: Iterable[ColumnElement[bool]]) -> int:
    return int(session.scalar(_NUMBER.where(*where)) or 0)


@functools.cache
def _in_stage(stage: Stage) -> tuple[ColumnElement[bool], ...]:
    if stage is Stage.RECORDED:
        return (TaskInstance.id.in_(_UNCOMMITTED),)
    committed = TaskInstance.id.not_in(_UNCOMMITTED)
    if stage is Stage.OPEN:
        is_wait = or_(tables.of_our_operator(), tables.of_our_trigger(), EventWait.parked.is_not(None))
        return is_wait, TaskInstance.state.in_(tables.OPEN), committed
    return tables.of_our_operator(), TaskInstance.state.in_(tables.ENDED), committed  # its trigger is gone


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
        (_LISTENER, listener),
    ):
        if value:
            where.append(column == value)
    if text:
        where.append(or_(*(column.icontains(text, autoescape=True) for column in (*_KEY[:3], _LISTENER))))
    return where


@dataclass(frozen=True)
class _Places:
    """What the places of a task tell in a list that waits for many events: how many have come, and the last."""

    arrived: int
    uncommitted: int
    recorded: datetime | None

    @property
    def phase(self) -> Phase:
        return Phase.RECORDED if self.uncommitted else Phase.COMMITTED


def _summaries(
    session: Session, stage: Stage, rows: Sequence[Any], dag_ids: Collection[str] | None
) -> list[Summary]:
    keys: list[Key] = [(row.dag_id, row.run_id, row.task_id, row.map_index) for row in rows]
    places = _places(session, keys)
    dags = _dag_states(session, {row.dag_id for row in rows})
    summaries = [
        _summary(stage, row, places.get(key), dags[row.dag_id]) for row, key in zip(rows, keys, strict=True)
    ]
    return summaries if dag_ids is None else _without_others(session, rows, summaries, frozenset(dag_ids))


def _without_others(
    session: Session, rows: Sequence[Any], summaries: Iterable[Summary], dag_ids: frozenset[str]
) -> list[Summary]:
    """Leave out what hosts tell of waits of other DAGs: a host is for the waits of all."""
    hosts = {row.host for row in rows if row.host is not None and (row.log_of or row.trouble or row.shared_by)}
    query = select(EventWait.host, EventWait.dag_id).where(EventWait.host.in_(sorted(hosts))).distinct()
    mixed = {host for host, dag_id in session.execute(query) if dag_id not in dag_ids} if hosts else set()
    told = []
    for row, one in zip(rows, summaries, strict=True):
        if one.log_of is not None and one.log_of.partition("/")[0] not in dag_ids:
            one = replace(one, log_of=None)
        if row.host in mixed:
            trouble = one.trouble and "a source of the waits that share its trigger cannot be reached"
            one = replace(one, shared_by=None, trouble=trouble)
        told.append(one)
    return told


def _places(session: Session, keys: Sequence[Key]) -> dict[Key, _Places]:
    if not keys:
        return {}
    columns = (EventWait.dag_id, EventWait.run_id, EventWait.task_id, EventWait.map_index)
    uncommitted = func.sum(case((EventWait.phase == Phase.RECORDED.value, 1), else_=0))
    rows = session.execute(
        select(*columns, func.count(), uncommitted, func.max(EventWait.recorded_at))
        .where(tuple_(*columns).in_(keys), EventWait.place != SINGLE, EventWait.phase.is_not(None))
        .group_by(*columns)
    )
    return {(row[0], row[1], row[2], row[3]): _Places(int(row[4]), int(row[5]), row[6]) for row in rows}


def _dag_states(session: Session, dag_ids: Collection[str]) -> dict[str, DagState | None]:
    states: dict[str, DagState | None] = dict.fromkeys(dag_ids, DagState.GONE)
    columns = select(DagModel.dag_id, DagModel.is_paused, DagModel.is_stale)
    for dag_id, is_paused, is_stale in session.execute(columns.where(DagModel.dag_id.in_(dag_ids))):
        states[dag_id] = DagState.GONE if is_stale else DagState.PAUSED if is_paused else None
    return states


def _summary(stage: Stage, row: Any, places: _Places | None, dag_state: DagState | None) -> Summary:
    deferred = arguments.read(row.encrypted_kwargs, in_full=False) if row.encrypted_kwargs else None
    named = row.listener or (deferred.listener if deferred else None)
    deadline = row.deadline
    if row.since is None:
        deadline = deferred.deadline if deferred else None
    ended = row.end_date if row.state in tables.ENDED else None
    wanted = row.wanted if row.wanted is not None else (deferred.wanted if deferred else None)
    arrived = places.arrived if places else None
    if arrived is None and (wanted is not None or row.operator == tables.OF_MANY):
        arrived = 0
    phase: str | None = None
    recorded: datetime | None = None
    if places:
        phase, recorded = places.phase.value, places.recorded
    elif has_event(row, row.max_tries, datetime.now(timezone.utc)):
        phase, recorded = row.phase, row.recorded_at
    seconds = None
    if row.state == "success" and recorded is not None and (delivered := row.delivered_at or ended) is not None:
        seconds = max((delivered - recorded).total_seconds(), 0.0)
    hosted = row.state == TaskInstanceState.DEFERRED and bool(row.is_hosted)
    return Summary(
        dag_id=row.dag_id,
        run_id=row.run_id,
        task_id=row.task_id,
        map_index=row.map_index,
        state=row.state,
        stage=stage,
        try_number=row.try_number,
        listener=named or (row.custom_operator_name if row.custom_operator_name != row.operator else None),
        call=row.call or (deferred.call if deferred else None),
        since=row.start_date or row.queued_dttm,
        deadline=deadline,
        holder=row.holder,
        triggerer=triggerer_of(row),
        sign_of_life=row.latest_heartbeat or (row.last_heartbeat_at if row.state == "running" else None),
        phase=phase,
        recorded=recorded,
        ended=ended,
        seconds_to_delivery=seconds,
        arrived=arrived,
        wanted=wanted,
        dag_state=dag_state,
        parked=row.state == TaskInstanceState.DEFERRED and bool(row.is_parked),
        hosted=hosted,
        shared_by=row.shared_by if hosted else None,
        log_of=row.log_of if hosted else None,
        trouble=row.trouble if hosted else None,
    )


def triggerer_of(row: Any) -> Triggerer | None:
    """Return who has a trigger, of a row with its job's columns; None if nobody has."""
    if row.job_id is None:
        return None
    heartbeat = row.latest_heartbeat
    threshold = timedelta(seconds=conf.getfloat("triggerer", "triggerer_health_check_threshold"))
    recent = heartbeat is not None and datetime.now(timezone.utc) - heartbeat < threshold
    return Triggerer(row.job_id, row.job_hostname, heartbeat, recent and row.job_state == "running")
