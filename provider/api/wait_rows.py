"""A wait as Airflow's database has it: its task instance, what it wants, its record."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow.api_fastapi.common.dagbag import create_dag_bag
from airflow.models.log import Log
from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XComModel
from airflow.sdk.execution_time.xcom import XCom
from airflow.state import TaskScope, get_state_backend
from airflow.utils.state import DagRunState, TaskInstanceState
from airflow_events.api.refusals import NoSuchWait
from airflow_events.listeners import serde
from airflow_events.listeners.base import Wait
from airflow_events.listeners.commit import Phase, Record
from airflow_events.listeners.http import KEY, HttpListener
from airflow_events.triggers.event import EventTrigger
from airflow_events.triggers.record import LOST_KEY, RECORD_KEY
from airflow_events.waits import tables
from airflow_events.waits.arguments import decoded
from sqlalchemy import select
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import ColumnElement

_LISTENER = f"{HttpListener.__module__}:{HttpListener.__qualname__}"
# Airflow writes the source of the class into the serialized DAG for a mapped task, and nothing better.
_MAPPED_LISTENER = f"class {HttpListener.__qualname__}("
_TRIGGER = f"{EventTrigger.__module__}.{EventTrigger.__qualname__}"

# By how much the clocks of scheduler, triggerers and API servers may differ. When a wait begins within this of
# the moment at which an early event lapses, it has the event.
_CLOCKS = timedelta(seconds=60)

_ENDED = frozenset(
    {
        TaskInstanceState.SUCCESS,
        TaskInstanceState.FAILED,
        TaskInstanceState.SKIPPED,
        TaskInstanceState.UPSTREAM_FAILED,
        TaskInstanceState.REMOVED,
    }
)


@dataclass(frozen=True)
class WaitRow:
    """
    A wait whose task instance this transaction has locked.

    :param wants: what ``WaitForEventOperator.event_wait`` says, without ``schema`` where that is unknown.
    :param trigger: the arguments of its trigger; None while the wait is not deferred.
    """

    session: Session
    wait: Wait
    ti: TaskInstance
    task: Any
    wants: dict[str, Any]
    trigger: dict[str, Any] | None

    @classmethod
    def lock(cls, session: Session, wait: Wait) -> WaitRow:
        """
        Lock a wait's task instance until the end of the transaction, and read it.

        :raises NoSuchWait: it is not there, or is not for HTTP events.
        """
        key = (wait.dag_id, wait.run_id, wait.task_id, wait.map_index)
        tables.lock(session, key)
        where = tables.is_(TaskInstance, key)
        ti = session.scalar(select(TaskInstance).where(*where).execution_options(populate_existing=True))
        if ti is None:
            raise NoSuchWait(f"there is no task instance {wait.id}")
        return cls._read(session, wait, ti)

    @classmethod
    def _read(cls, session: Session, wait: Wait, ti: TaskInstance) -> WaitRow:
        trigger = _trigger(ti)
        dag = _dag_bag().get_dag_for_run(ti.dag_run, session=session)
        task = dag.get_task(wait.task_id) if dag is not None and dag.has_task(wait.task_id) else None
        wants = _wants(task, trigger)
        if wants is None or wants["listener"] != _LISTENER:
            raise NoSuchWait(f"{wait.id} does not wait for HTTP events: it is no wait of HttpListener")
        return cls(session, wait, ti, task, wants, trigger)

    @property
    def ended(self) -> bool:
        """Whether the task has ended, or will not begin because its run has."""
        run_ended = self.ti.dag_run.state in (DagRunState.SUCCESS, DagRunState.FAILED)
        return self.ti.state in _ENDED or (run_ended and not self.begun)

    @property
    def waiting(self) -> bool:
        """Whether the wait is deferred, so that it can be ended here."""
        return self.trigger is not None

    @property
    def begun(self) -> bool:
        """Whether somebody may have read the record already: a worker, or the trigger."""
        return self.waiting or self.ti.state == TaskInstanceState.RUNNING or self.resuming

    @property
    def resuming(self) -> bool:
        """Whether it is on its way from its trigger to a worker."""
        under_way = (TaskInstanceState.SCHEDULED, TaskInstanceState.QUEUED, TaskInstanceState.RUNNING)
        return self.ti.state in under_way and self.ti.next_method is not None

    @property
    def mapped_over(self) -> bool:
        """Whether a task is mapped over what the wait returns."""
        if self.trigger and self.trigger.get("mapped_over"):
            return True
        return self.wait.map_index < 0 and next(iter(self.task.iter_mapped_dependants()), None) is not None

    @property
    def generation(self) -> int:
        """Grows with each clear of the task instance, and never by a retry."""
        return int(self.ti.max_tries)

    @property
    def key(self) -> str | None:
        """The key that the wait has told, if it has one."""
        return None if (told := self._pull(KEY)) is None else str(told)

    def record(self) -> Record | None:
        """Return the record that counts for this generation, or None."""
        stored = self._in_store()
        if not self.wants["replay"]:
            if stored is None or stored["generation"] != self.generation:
                return None
        else:
            stored = self._in_xcom() or stored
        if stored is None:
            return None
        record = Record.from_dict(stored)
        if record.phase is Phase.REJECTED and record.event["generation"] != self.generation:
            return None  # a clear has undone it
        return None if record.lapsed and not self._may_have_taken(record) else record

    @property
    def has_earlier_record(self) -> bool:
        """Whether there is a record that does not count any more, and that a worker may be forgetting."""
        return self._in_store() is not None

    def _may_have_taken(self, record: Record) -> bool:
        if not self.begun or self.ti.start_date is None:
            return False
        assert record.until is not None
        return record.until > self.ti.start_date - _CLOCKS

    def write(self, record: Record) -> None:
        """
        Put a record in the place of any earlier one.

        As an XCom for the trigger and in the task state store for a worker, since each reaches only its own.
        """
        self.set_xcom(RECORD_KEY, record.as_dict())
        stored = {**record.as_dict(), "generation": self.generation}
        get_state_backend().set(
            self._scope, RECORD_KEY, serde.encode(stored), expires_at=None, session=self.session
        )

    def set_xcom(self, key: str, value: Any, *, dag_result: bool = False) -> None:
        """Write an XCom as a worker would: through the XCom backend, if there is one."""
        where: dict[str, Any] = {
            "key": key,
            "dag_id": self.wait.dag_id,
            "run_id": self.wait.run_id,
            "task_id": self.wait.task_id,
            "map_index": self.wait.map_index,
        }
        XComModel.set(
            value=XCom.serialize_value(value, **where),
            serialize=False,
            dag_result=dag_result,
            session=self.session,
            **where,
        )

    def note(self, event: str, by: str, **about: Any) -> None:
        """Write a line into Airflow's audit log."""
        self.session.add(Log(event=event, task_instance=self.ti, owner=by, extra=json.dumps(about)))

    @property
    def _scope(self) -> TaskScope:
        return TaskScope(self.wait.dag_id, self.wait.run_id, self.wait.task_id, self.wait.map_index)

    def _in_store(self) -> dict[str, Any] | None:
        text = get_state_backend().get(self._scope, RECORD_KEY, session=self.session)
        return None if text is None else dict(serde.decode(text))

    def _in_xcom(self) -> dict[str, Any] | None:
        found = self._pull(RECORD_KEY)
        if found is None or (found.get("id") and found["id"] == self._pull(LOST_KEY)):
            return None
        return dict(found)

    def _pull(self, key: str) -> Any:
        row = self.session.execute(select(XComModel.key, XComModel.value).where(*self._xcom(key))).one_or_none()
        return None if row is None else XCom.deserialize_value(row)

    def _xcom(self, key: str) -> list[ColumnElement[bool]]:
        return [
            XComModel.dag_run_id == self.ti.dag_run.id,
            XComModel.task_id == self.wait.task_id,
            XComModel.map_index == self.wait.map_index,
            XComModel.key == key,
        ]


def now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(timezone.utc)


@functools.cache
def _dag_bag() -> Any:
    return create_dag_bag()


def _trigger(ti: TaskInstance) -> dict[str, Any] | None:
    """Return the arguments of the trigger that a deferred wait has, or None."""
    if ti.state != TaskInstanceState.DEFERRED or ti.trigger is None or ti.trigger.classpath != _TRIGGER:
        return None
    return dict(decoded(ti.trigger.kwargs))


def _wants(task: Any, trigger: dict[str, Any] | None) -> dict[str, Any] | None:
    if task is None:
        return None
    if not getattr(task, "is_mapped", False):
        wants = getattr(task, "event_wait", None)
        return None if wants is None else dict(json.loads(wants))
    if task.task_type != tables.OPERATOR:
        return None
    partial = task.partial_kwargs
    replay = partial.get("replay", True)
    if trigger is not None:  # the arguments that its map index has, and its listener by its name
        kwargs = trigger["listener_kwargs"]
        return {"listener": trigger["listener"], "replay": replay, "schema": kwargs.get("schema")}
    if not str(partial.get("listener", "")).startswith(_MAPPED_LISTENER):
        return None
    wants = {"listener": _LISTENER, "replay": replay}
    if isinstance(kwargs := partial.get("listener_kwargs"), dict):
        wants["schema"] = kwargs.get("schema")
    elif "listener_kwargs" not in task.expand_input.value:
        wants["schema"] = None
    return wants
