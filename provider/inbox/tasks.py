"""Task instances under a lock, and how they end: what Airflow's execution API does for one, done for many."""

from __future__ import annotations

import functools
import json
import logging
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from airflow.configuration import conf
from airflow.models.asset import AssetActive
from airflow.models.dagrun import DagRun
from airflow.models.log import Log
from airflow.models.taskinstance import TaskInstance
from airflow.models.taskmap import TaskMap
from airflow.models.trigger import TRIGGER_FAIL_REPR, TriggerFailureReason, handle_event_submit
from airflow.models.xcom import XComModel
from airflow.triggers.base import TriggerEvent
from airflow.utils.sqlalchemy import with_row_locks
from airflow.utils.state import TaskInstanceState
from airflow_events.inbox.database import begin_writing, in_transaction, once_committed
from airflow_events.inbox.entries import End
from sqlalchemy import case, delete, func, insert, null, select, tuple_, update
from sqlalchemy.orm import Session, joinedload
from sqlalchemy.sql import ColumnElement

log = logging.getLogger(__name__)

_MOST_RETRIES = 5  # of a task, while it is looked for by its names
_ENDS = {"success": TaskInstanceState.SUCCESS, "skipped": TaskInstanceState.SKIPPED}


@dataclass(frozen=True)
class Task:
    """
    A task instance as it was when this transaction locked it.

    :param clears: its ``max_tries``, which grows with each clear and by nothing else.
    :param run_start: when its run started; if it was cleared, when it was created.
    :param run_created: when its run was created, which no clear changes.
    """

    id: uuid.UUID
    dag_id: str
    task_id: str
    run_id: str
    map_index: int
    state: str | None
    try_number: int
    clears: int
    start_date: datetime | None
    trigger_id: int | None
    trigger_timeout: datetime | None
    dag_run_id: int
    logical_date: datetime | None
    run_start: datetime | None
    run_created: datetime | None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """``dag_id``, ``task_id``, ``run_id`` and ``map_index``, in the order of Airflow's foreign keys."""
        return self.dag_id, self.task_id, self.run_id, self.map_index

    @property
    def name(self) -> str:
        """As `airflow_events.listeners.base.Wait.id`."""
        return f"{self.dag_id}/{self.run_id}/{self.task_id}/{self.map_index}"

    @property
    def is_deferred(self) -> bool:
        """Whether it waits."""
        return self.state == TaskInstanceState.DEFERRED


# Airflow earlier than 3.2 did not note it.
_RUN_CREATED = func.coalesce(DagRun.created_at, DagRun.run_after)
# A clear makes the run start again, so that Airflow does not know any more when it first did.
_RUN_START = case((DagRun.clear_number > 0, _RUN_CREATED), else_=DagRun.start_date)

_COLUMNS = (
    TaskInstance.id,
    TaskInstance.dag_id,
    TaskInstance.task_id,
    TaskInstance.run_id,
    TaskInstance.map_index,
    TaskInstance.state,
    TaskInstance.try_number,
    TaskInstance.max_tries.label("clears"),
    TaskInstance.start_date,
    TaskInstance.trigger_id,
    TaskInstance.trigger_timeout,
    DagRun.id.label("dag_run_id"),
    DagRun.logical_date,
    _RUN_START.label("run_start"),
    _RUN_CREATED.label("run_created"),
)


def lock(session: Session, ids: Collection[uuid.UUID]) -> dict[uuid.UUID, Task]:
    """
    Lock task instances until the end of the transaction, in the order of their ids; return those that are there.

    All transactions of the inbox lock task instances first and in this order, so that no two wait for each other.
    """
    return {task.id: task for task in _lock(session, TaskInstance.id.in_(sorted(ids)))}


def lock_one(
    session: Session, dag_id: str, task_id: str, run_id: str, map_index: int, *, skip_locked: bool = False
) -> Task | None:
    """
    Lock a task instance by its names, whatever its try; return None if it is not there.

    :param skip_locked: return None also if another transaction has locked it.
    """
    begin_writing(session)
    names = (dag_id, task_id, run_id, map_index)
    columns = (TaskInstance.dag_id, TaskInstance.task_id, TaskInstance.run_id, TaskInstance.map_index)
    is_it = [column == name for column, name in zip(columns, names, strict=True)]
    # By its id, since MySQL would lock the record of the names before that of the id, and keep it where another
    # transaction has the other. A retry gives it another id.
    for _ in range(_MOST_RETRIES):
        id = session.scalar(select(TaskInstance.id).where(*is_it))
        if id is None:
            return None
        for task in _lock(session, TaskInstance.id == id, skip_locked=skip_locked):
            return task if task.key == names else None  # MySQL takes names for equal that end in other spaces
        if skip_locked:
            return None
    return None


def _lock(session: Session, which: ColumnElement[bool], *, skip_locked: bool = False) -> list[Task]:
    begin_writing(session)
    query = (
        select(*_COLUMNS)
        # MySQL, left alone, may lock what it reads on its way, in the order of another index.
        .prefix_with("STRAIGHT_JOIN", dialect="mysql")
        .with_hint(TaskInstance, "FORCE INDEX (PRIMARY)", "mysql")
        .select_from(TaskInstance)
        .join(DagRun, (DagRun.dag_id == TaskInstance.dag_id) & (DagRun.run_id == TaskInstance.run_id))
        .where(which)
        .order_by(TaskInstance.id)
    )
    locked = with_row_locks(query, session, of=TaskInstance, key_share=False, skip_locked=skip_locked)
    return [Task(**row._mapping) for row in session.execute(locked)]


def end(session: Session, ending: Sequence[tuple[Task, End]], now: datetime) -> None:
    """
    End task instances that this transaction has locked.

    :raises Exception: what Airflow says of an outlet that cannot be registered; so entries that have outlets are
        better ended alone.
    """
    here = [(task, how) for task, how in ending if how.state in _ENDS]
    for task, how in ending:
        if how.state == "failed":
            _fail(session, task, how)
        elif how.state not in _ENDS:
            _resume(session, task, how)
    if not here:
        return
    _push(session, here, now)
    for task, how in here:
        if how.outlets:
            _register(session, task, how)
    for state in sorted({how.state for _, how in here}):
        _set_state(session, [task for task, how in here if how.state == state], _ENDS[state], now)
    _clear_states(session, [task for task, how in here if how.state == "success"])
    once_committed(session, lambda: _after(here))


def _resume(session: Session, task: Task, how: End) -> None:
    """Hand a task to a worker."""
    ti = session.get(TaskInstance, task.id)
    assert ti is not None
    handle_event_submit(TriggerEvent(dict(how.payload or {})), task_instance=ti, session=session)


def _fail(session: Session, task: Task, how: End) -> None:
    """Fail a try as Airflow does whose trigger has raised: on a worker, since callbacks and retries hang on it."""
    traceback = dict(how.payload or {}).get("traceback")
    _execute(
        session,
        update(TaskInstance)
        .where(TaskInstance.id == task.id)
        .values(
            state=TaskInstanceState.SCHEDULED,
            scheduled_dttm=datetime.now(timezone.utc),
            trigger_id=None,
            next_method=TRIGGER_FAIL_REPR,
            next_kwargs={"error": TriggerFailureReason.TRIGGER_FAILURE, "traceback": traceback},
        ),
    )


def _push(session: Session, ending: Sequence[tuple[Task, End]], now: datetime) -> None:
    """Write XComs, and how many tasks are mapped over them."""
    values, replaced, lengths = [], [], []
    for task, how in ending:
        for key, value in how.xcoms.items():
            replaced.append((task.dag_run_id, task.task_id, task.map_index, key))
            values.append(
                {
                    "dag_run_id": task.dag_run_id,
                    "task_id": task.task_id,
                    "map_index": task.map_index,
                    "key": key,
                    "dag_id": task.dag_id,
                    "run_id": task.run_id,
                    "value": value,
                    "dag_result": how.dag_result and key == "return_value",
                    "timestamp": now,
                }
            )
        if how.mapped_length is not None:
            lengths.append({**_of(task), "length": how.mapped_length, "keys": None})
    if values:
        columns = (XComModel.dag_run_id, XComModel.task_id, XComModel.map_index, XComModel.key)
        _execute(session, delete(XComModel).where(tuple_(*columns).in_(replaced)))
        session.execute(insert(XComModel), values)
    if lengths:
        mapped = [task.key for task, how in ending if how.mapped_length is not None]
        columns_of_map = (TaskMap.dag_id, TaskMap.task_id, TaskMap.run_id, TaskMap.map_index)
        _execute(session, delete(TaskMap).where(tuple_(*columns_of_map).in_(mapped)))
        session.execute(insert(TaskMap), lengths)


def _register(session: Session, task: Task, how: End) -> None:
    from airflow.api_fastapi.execution_api.datamodels.asset import AssetProfile

    ti = session.get(TaskInstance, task.id)
    assert ti is not None
    outlets = [AssetProfile(**outlet) for outlet in how.outlets]
    _check_active(session, outlets)
    callbacks: Sequence[Callable[[], None]] | None
    callbacks = TaskInstance.register_asset_changes_in_db(ti, outlets, [], session=session)
    for callback in callbacks or ():  # Airflow 3.3.0 returns None, and calls them itself
        once_committed(session, callback)


def _check_active(session: Session, outlets: Sequence[Any]) -> None:
    """
    Refuse outlets as Airflow refuses them before it runs a task; to register them here, it only warns.

    :raises ValueError: one is not active: another DAG has its name or URI, say.
    """
    assets = {(one.name, one.uri) for one in outlets if one.type == "Asset"}
    if not assets:
        return
    columns = AssetActive.name, AssetActive.uri
    active = {tuple(row) for row in session.execute(select(*columns).where(tuple_(*columns).in_(assets)))}
    if inactive := sorted(str(name) for name, uri in assets - active):
        raise ValueError(f"the task has inactive assets as outlets: {', '.join(inactive)}")


def _set_state(session: Session, tasks: Sequence[Task], state: TaskInstanceState, now: datetime) -> None:
    query = update(TaskInstance).where(TaskInstance.id.in_([task.id for task in tasks]))
    query = TaskInstance.duration_expression_update(now, query, session.get_bind())
    _execute(
        session,
        query.values(
            state=state,
            trigger_id=None,
            trigger_timeout=None,
            next_method=None,
            next_kwargs=null(),
            updated_at=now,
        ),
    )
    session.execute(
        insert(Log),
        [
            {
                **_of(task),
                "dttm": now,
                "event": state.value,
                "try_number": task.try_number,
                "logical_date": task.logical_date,
            }
            for task in tasks
        ],
    )


def _clear_states(session: Session, tasks: Iterable[Task]) -> None:
    if not conf.getboolean("state_store", "clear_on_success", fallback=False):
        return
    from airflow.state import TaskScope, get_state_backend

    for task in tasks:
        scope = TaskScope(dag_id=task.dag_id, run_id=task.run_id, task_id=task.task_id, map_index=task.map_index)
        get_state_backend().clear(scope, session=session)


def _of(task: Task) -> dict[str, Any]:
    return {"dag_id": task.dag_id, "task_id": task.task_id, "run_id": task.run_id, "map_index": task.map_index}


def _execute(session: Session, statement: Any) -> None:
    session.execute(statement.execution_options(synchronize_session=False))


def _after(ended: Sequence[tuple[Task, End]]) -> None:
    """Do what Airflow does when a task has ended, once nobody can undo it."""
    states = {task.id: _ENDS[how.state] for task, how in ended}
    _count(ended)
    _schedule_soon(sorted({task.dag_run_id for task, _ in ended}))
    if _has_listeners() or conf.getboolean("traces", "otel_on", fallback=False):
        _beside().submit(in_transaction, lambda session: _tell(session, states))


def _count(ended: Iterable[tuple[Task, End]]) -> None:
    from airflow._shared.observability.metrics import stats

    for task, how in ended:
        stats.incr("ti.finish", tags={"dag_id": task.dag_id, "task_id": task.task_id, "state": how.state})


def _schedule_soon(dag_run_ids: Sequence[int]) -> None:
    """
    Let the scheduler look at these runs first.

    It takes some runs in each of its loops, those that it has looked at longest ago, so that of a thousand runs
    one would wait for its turn. A run that it has in hand just now it looks at anyway.
    """

    def look(session: Session) -> None:
        begin_writing(session)
        free = select(DagRun.id).where(DagRun.id.in_(dag_run_ids)).order_by(DagRun.id)
        ids = session.scalars(with_row_locks(free, session, of=DagRun, skip_locked=True, key_share=False)).all()
        if ids:
            _execute(session, update(DagRun).where(DagRun.id.in_(ids)).values(last_scheduling_decision=None))

    in_transaction(look)


@functools.cache
def _beside() -> ThreadPoolExecutor:
    """Return the thread in which listeners are told, which may take their time, and no wait of others."""
    return ThreadPoolExecutor(1, thread_name_prefix="airflow-events-listeners")


def _has_listeners() -> bool:
    from airflow.listeners.listener import get_listener_manager

    return bool(get_listener_manager().has_listeners)


def _tell(session: Session, states: Mapping[uuid.UUID, TaskInstanceState]) -> None:
    """Tell Airflow's listeners and its tracing, as Airflow's API does for what it ends."""
    from airflow.api_fastapi.execution_api.routes import task_instances
    from airflow.listeners.listener import get_listener_manager

    hooks: Any = get_listener_manager().hook
    emit_span: Any = task_instances._emit_task_span
    by_state: dict[TaskInstanceState, list[TaskInstance]] = defaultdict(list)
    query = select(TaskInstance).options(joinedload(TaskInstance.dag_run)).where(TaskInstance.id.in_(states))
    for ti in session.scalars(query):
        by_state[states[ti.id]].append(ti)
    for state, tis in by_state.items():
        skipped = state == TaskInstanceState.SKIPPED
        hook = hooks.on_task_instance_skipped if skipped else hooks.on_task_instance_success
        for ti in tis:
            for tell in (
                functools.partial(hook, previous_state=TaskInstanceState.DEFERRED, task_instance=ti),
                functools.partial(emit_span, ti, state),
            ):
                try:
                    tell()
                except Exception:
                    log.exception("A listener, or tracing, failed for the end of %s", ti)


def note(session: Session, task: Task, event: str, by: str, about: Mapping[str, Any]) -> None:
    """Write a line into Airflow's audit log."""
    session.add(Log(event, owner=by, extra=json.dumps(about), **_of(task), logical_date=task.logical_date))
