"""A wait as Airflow's database has it: its task instance, what it wants, and its row in the inbox."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow.api_fastapi.common.dagbag import create_dag_bag
from airflow.models.taskinstance import TaskInstance
from airflow.utils.sqlalchemy import with_row_locks
from airflow.utils.state import DagRunState, TaskInstanceState
from airflow_events.api.refusals import NoSuchWait, TooEarly, Unreadable
from airflow_events.inbox import legacy, tasks
from airflow_events.inbox.entries import End, Phase
from airflow_events.inbox.models import LATEST, SINGLE, EventWait
from airflow_events.inbox.transactions import NOT_PARKED
from airflow_events.listeners.base import EventListener, Wait, is_template
from airflow_events.listeners.http import HttpListener
from airflow_events.waits.arguments import decoded, kwargs_of
from sqlalchemy import select, update
from sqlalchemy.orm import Session

_LISTENER = f"{HttpListener.__module__}:{HttpListener.__qualname__}"
# Airflow writes the source of the class into the serialized DAG for a mapped task, and nothing better.
_MAPPED_LISTENER = f"class {HttpListener.__qualname__}("
# Class paths of triggers are frozen, and an API server needs nothing of theirs.
_TRIGGER = "airflow_events.triggers.event.EventTrigger"

_ENDED = frozenset(
    {
        TaskInstanceState.SUCCESS,
        TaskInstanceState.FAILED,
        TaskInstanceState.SKIPPED,
        TaskInstanceState.UPSTREAM_FAILED,
        TaskInstanceState.REMOVED,
    }
)

# Longest name of a sender that a row holds.
_LONGEST_NAME = 250

_NO_EVENT: dict[str, Any] = dict.fromkeys(
    ("event", "recorded_after", "delivered_at", "reason", "expires", "receipt")
)


@dataclass
class WaitRow:
    """
    A wait whose task instance this transaction has locked, and after it its row in the inbox.

    :param task: the task instance as it was then.
    :param operator: of the serialized DAG; None if that has no such task any more.
    :param wants: what ``WaitForEventOperator.event_wait`` says, without ``schema`` where that is unknown.
    :param trigger: the arguments of its trigger, or of that which it had before it was parked; None while the wait
        is not deferred.
    :param row: None if it has never begun, and nothing was sent to it.
    :param listener: what it is of, for the metrics.
    :param ending: where `end` puts how the task ends, for who ends many at once by `tasks.end`;
        None: it ends the task itself.
    """

    session: Session
    wait: Wait
    task: tasks.Task
    ti: TaskInstance
    operator: Any
    wants: dict[str, Any]
    trigger: dict[str, Any] | None
    row: EventWait | None
    listener: type[EventListener] = HttpListener
    ending: list[tuple[tasks.Task, End]] | None = None

    @classmethod
    def lock(cls, session: Session, wait: Wait) -> WaitRow:
        """
        Lock a wait until the end of the transaction, and read it.

        :raises NoSuchWait: it is not there, or is not for HTTP events.
        """
        if (found := cls._lock(session, wait, skip_locked=False)) is None:
            raise NoSuchWait(f"there is no task instance {wait.id}")
        return found

    @classmethod
    def lock_if_free(
        cls, session: Session, wait: Wait, listener: type[EventListener] = HttpListener
    ) -> WaitRow | None:
        """
        Do what `lock` does, or return None if it is not there, or another transaction has locked it.

        :param listener: what it is known to be of, or of a subclass; of `HttpListener` it has to be itself.
        :raises NoSuchWait: it is not for HTTP events, or its DAG is gone.
        """
        return cls._lock(session, wait, listener, skip_locked=True)

    @classmethod
    def _lock(
        cls, session: Session, wait: Wait, listener: type[EventListener] = HttpListener, *, skip_locked: bool
    ) -> WaitRow | None:
        names = (wait.dag_id, wait.task_id, wait.run_id, wait.map_index)
        task = tasks.lock_one(session, *names, skip_locked=skip_locked)
        if task is None:
            return None
        ti = session.scalars(
            select(TaskInstance).where(TaskInstance.id == task.id).execution_options(populate_existing=True)
        ).one()
        row = _row(session, task)
        trigger = _trigger(ti, row)
        dag = _dag_bag().get_dag_for_run(ti.dag_run, session=session)
        operator = dag.get_task(wait.task_id) if dag is not None and dag.has_task(wait.task_id) else None
        wants = _wants(operator, trigger)
        if wants is None or (listener is HttpListener and wants["listener"] != _LISTENER):
            raise NoSuchWait(f"{wait.id} does not wait for HTTP events: it is no wait of HttpListener")
        if wait.map_index < 0 and operator is not None and operator.get_needs_expansion():
            raise TooEarly(f"{wait.id} is mapped, and not expanded yet: name its map_index then")
        return cls(session, wait, task, ti, operator, wants, trigger, row, listener)

    @property
    def ended(self) -> bool:
        """Whether the task has ended, or will not begin because its run has."""
        run_ended = self.ti.dag_run.state in (DagRunState.SUCCESS, DagRunState.FAILED)
        return self.task.state in _ENDED or (run_ended and not self.begun)

    @property
    def waiting(self) -> bool:
        """Whether the wait is deferred, so that it can be ended here."""
        return self.trigger is not None

    @property
    def begun(self) -> bool:
        """Whether the task is at work: deferred, on a worker, or between the two."""
        return self.waiting or self.task.state == TaskInstanceState.RUNNING or self.resuming

    @property
    def resuming(self) -> bool:
        """Whether it is on its way from its trigger to a worker."""
        under_way = (TaskInstanceState.SCHEDULED, TaskInstanceState.QUEUED, TaskInstanceState.RUNNING)
        return self.task.state in under_way and self.ti.next_method is not None

    @property
    def mapped_over(self) -> bool:
        """Whether a task is mapped over what the wait returns."""
        if self.trigger and self.trigger.get("mapped_over"):
            return True
        return self.wait.map_index < 0 and next(iter(self.operator.iter_mapped_dependants()), None) is not None

    @property
    def address(self) -> bytes | None:
        """Of the key that it has; None if it has none, or has not begun since it was cleared last."""
        return self.row.address if self.row is not None and self.row.clears == self.task.clears else None

    def record(self) -> EventWait | None:
        """Return the row if it has an event, or a rejection, that counts now; or None."""
        row = self.row
        if row is None or row.phase is None:
            return None
        if row.expires is not None and row.expires < now():  # by then no beginning had taken it
            return None
        only_of_this_clear = row.phase == Phase.REJECTED or not self.wants["replay"]
        return None if only_of_this_clear and row.record_clears != self.task.clears else row

    def write(self, phase: Phase, record_id: str, *, by: str, **values: Any) -> None:
        """
        Put an event, or a rejection, in the place of any earlier one.

        :param by: who sends it.
        :param values: further columns.
        """
        if self.row is None:
            self.row = _new_row(self.task, listener=HttpListener.__qualname__)
            self.session.add(self.row)
        moment = now()
        told = {
            **_NO_EVENT,
            "phase": phase.value,
            "record_id": record_id,
            "record_clears": self.task.clears,
            "recorded_at": moment,
            "committed_at": moment if phase is Phase.COMMITTED else None,
            "sent_by": name_of(by),
            **values,
        }
        for name, value in told.items():
            setattr(self.row, name, value)
        self.session.flush()
        if self.task.trigger_timeout is not None:  # the event wins over the deadline
            self.session.execute(
                update(TaskInstance)
                .where(TaskInstance.id == self.task.id)
                .values(trigger_timeout=None)
                .execution_options(synchronize_session=False)
            )

    def end(self, how: End) -> None:
        """
        End the task of a deferred wait that has an event or a rejection.

        :raises Exception: what Airflow says of an outlet that it cannot register.
        """
        assert self.row is not None
        moment = now()
        if self.ending is None or how.outlets:  # Airflow may refuse an outlet: that is for this task alone
            tasks.end(self.session, [(self.task, how)], moment)
        else:
            self.ending.append((self.task, how))
        self.row.finished_by = self.row.generation
        self.row.delivered_at = moment if how.state == "success" else None
        for name, value in NOT_PARKED.items():
            setattr(self.row, name, value)
        self.session.flush()

    def note(self, event: str, by: str, **about: Any) -> None:
        """Write a line into Airflow's audit log."""
        tasks.note(self.session, self.task, event, by, about)


def until(ttl: timedelta) -> datetime:
    """Return when something expires that is to be kept for so long, as a row can hold it."""
    return min(now() + ttl, LATEST)


def now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(timezone.utc)


def name_of(sender: str) -> str:
    """Return the name of a sender as rows have it."""
    return sender[:_LONGEST_NAME]


@functools.cache
def _dag_bag() -> Any:
    return create_dag_bag()


def _row(session: Session, task: tasks.Task) -> EventWait | None:
    """Lock and return a wait's row; what an earlier edition recorded elsewhere becomes one."""
    columns = (EventWait.dag_id, EventWait.task_id, EventWait.run_id, EventWait.map_index)
    is_it = [column == value for column, value in zip(columns, task.key, strict=True)]
    query = with_row_locks(
        select(EventWait).where(*is_it, EventWait.place == SINGLE), session, of=EventWait, key_share=False
    )
    row = session.scalars(query.execution_options(populate_existing=True)).one_or_none()
    if row is None and (earlier := legacy.records(session, [task]).get(task.key, {}).get(SINGLE)):
        row = _new_row(task, **earlier)
        session.add(row)
        session.flush()
    return row


def _new_row(task: tasks.Task, **values: Any) -> EventWait:
    names = dict(zip(("dag_id", "task_id", "run_id", "map_index"), task.key, strict=True))
    return EventWait(**names, place=SINGLE, **{"generation": 0, "clears": 0, **values})


def _trigger(ti: TaskInstance, row: EventWait | None) -> dict[str, Any] | None:
    """Return the arguments of the trigger that a deferred wait has, or had before it was parked; or None."""
    if ti.state != TaskInstanceState.DEFERRED:
        return None
    try:
        if ti.trigger is not None:
            return dict(decoded(ti.trigger.kwargs)) if ti.trigger.classpath == _TRIGGER else None
        return dict(kwargs_of(row.parked)) if row is not None and row.parked else None
    except Exception as error:
        name = Wait(ti.dag_id, ti.run_id, ti.task_id, ti.map_index).id
        said = f"what {name} waits for cannot be read: is [core] fernet_key another one? Clear it"
        raise Unreadable(said) from error


def _wants(operator: Any, trigger: dict[str, Any] | None) -> dict[str, Any] | None:
    """
    Return what a wait says of itself; None of another task.

    Whatever it is made of, once it has begun its trigger has the arguments as they are.
    """
    if operator is None:
        return None
    if getattr(operator, "is_mapped", False):
        wants = _mapped_wants(operator, trigger)
    else:
        face = getattr(operator, "event_wait", None)
        wants = None if face is None else dict(json.loads(face))
    if wants is not None and trigger is not None:
        wants.setdefault("schema", trigger["listener_kwargs"].get("schema"))
    return wants


def _mapped_wants(operator: Any, trigger: dict[str, Any] | None) -> dict[str, Any] | None:
    partial = operator.partial_kwargs
    if trigger is not None:
        return {"listener": trigger["listener"], "replay": partial.get("replay", True)}
    if not str(partial.get("listener", "")).startswith(_MAPPED_LISTENER):
        return None
    wants = {"listener": _LISTENER, "replay": partial.get("replay", True)}
    if isinstance(kwargs := partial.get("listener_kwargs"), dict):
        if _is_known(schema := kwargs.get("schema")):
            wants["schema"] = schema
    elif isinstance(mapped := operator.expand_input.value, Mapping) and "listener_kwargs" not in mapped:
        wants["schema"] = None
    return wants


def _is_known(value: Any) -> bool:
    """Whether an argument of a serialized DAG is the same at run time: no template, and no output of a task."""
    if isinstance(value, dict):
        return all(map(_is_known, value.values()))
    if isinstance(value, list):
        return all(map(_is_known, value))
    return not is_template(value) and isinstance(value, (str, int, float, bool, type(None)))
