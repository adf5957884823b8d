"""Waits for HTTP events in Airflow's real tables: as scheduler, triggers and users have them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from types import SimpleNamespace

import pytest
import uuid6
from airflow.models.dagrun import DagRun
from airflow.models.log import Log
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from airflow.models.xcom import XComModel
from airflow_events.inbox import models as inbox
from airflow_events.inbox import transactions
from airflow_events.inbox.entries import Begin
from airflow_events.listeners.base import Wait
from airflow_events.listeners.http import HttpListener
from sqlalchemy import func, insert, select, update
from sqlalchemy.orm import Session

HTTP_LISTENER = f"{HttpListener.__module__}:{HttpListener.__qualname__}"


@dataclass
class HttpWaits:
    """
    The waits of one database.

    What of a wait stands in its serialized DAG is told here by `get_task`.
    """

    session: Session
    monkeypatch: pytest.MonkeyPatch
    tasks: dict[tuple[str, str], SimpleNamespace] = field(default_factory=dict)
    keys: dict[Wait, tuple] = field(default_factory=dict)
    runs: int = 0

    def __post_init__(self):
        bag = SimpleNamespace(get_dag_for_run=lambda run, session: self)
        self.monkeypatch.setattr("airflow_events.api.wait_rows._dag_bag", lambda: bag)

    def has_task(self, task_id):
        return True

    def get_task(self, task_id):
        return self.tasks[task_id]

    def add(
        self, key=None, *, state="deferred", schema=None, replay=True, begun=True, dag_id="shop", map_index=-1,
        dependants=(), listener=HTTP_LISTENER, columns=None, **trigger,
    ):  # fmt: skip
        """Return a wait of a run of its own; one that is deferred has begun unless it is said not to have."""
        self.runs += 1
        number = (self.session.scalar(select(func.max(DagRun.id))) or 0) + 1
        wait = Wait(dag_id, f"run_{number}", f"wait_{number}", map_index)
        run = {"id": number, "dag_id": dag_id, "run_id": wait.run_id, "run_type": "manual", "state": "running"}
        now = datetime.now(timezone.utc)
        self.session.execute(insert(DagRun.__table__).values(**run, run_after=now, start_date=now))
        self.tasks[wait.task_id] = SimpleNamespace(
            event_wait=json.dumps({"listener": listener, "replay": replay, "schema": schema}),
            iter_mapped_dependants=lambda: iter(dependants),
            get_needs_expansion=lambda: False,
        )
        self.keys[wait] = key, replay, {"listener": listener, "listener_kwargs": {"schema": schema}, **trigger}
        names = {name: getattr(wait, name) for name in ("dag_id", "run_id", "task_id", "map_index")}
        values = {
            "id": uuid6.uuid7(), "state": state, "operator": "WaitForEventOperator", "start_date": now,
            "try_number": 1, "max_tries": 3, "pool": "default_pool", "pool_slots": 1, "span_status": "not_started",
        }  # fmt: skip
        if state == "deferred":
            values |= {"trigger_id": self._trigger(wait), "next_method": "execute_complete"}
        self.session.execute(insert(TaskInstance.__table__).values(**names, **values, **(columns or {})))
        if begun and state == "deferred":
            self.begin(wait)
        return wait

    def _trigger(self, wait):
        trigger = Trigger("airflow_events.triggers.event.EventTrigger", self.keys[wait][2])
        self.session.add(trigger)
        self.session.flush()
        return trigger.id

    def begin(self, wait, key=...):
        """Let its trigger begin, and return what that is answered."""
        told, replay, _ = self.keys[wait]
        address = HttpListener.address(told if key is ... else key)
        entry = Begin(str(self.state(wait).id), listener="HttpListener", address=address, replay=replay)
        answer = transactions.begin(self.session, [entry])[0]
        self.session.expire_all()
        return answer

    def again(self, wait, *, cleared, state="deferred", begun=True):
        """Another try, after a retry or a clear; return what its trigger is answered."""
        before, deferred = self.state(wait), state == "deferred"
        self.set(
            wait, id=uuid6.uuid7(), try_number=before.try_number + 1, max_tries=before.max_tries + cleared,
            state=state, trigger_id=self._trigger(wait) if deferred else None,
            next_method="execute_complete" if deferred else None,
        )  # fmt: skip
        return self.begin(wait) if begun and state == "deferred" else None

    def set(self, wait, **columns):
        self.session.execute(update(TaskInstance.__table__).where(*self._is(TaskInstance, wait)).values(**columns))
        self.session.expire_all()

    def state(self, wait):
        return self.session.execute(select(TaskInstance.__table__).where(*self._is(TaskInstance, wait))).one()

    def row(self, wait):
        table = inbox.EventWait
        return self.session.execute(select(table.__table__).where(*self._is(table, wait))).one_or_none()

    def xcoms(self, wait):
        found = self.session.execute(select(XComModel.key, XComModel.value).where(*self._is(XComModel, wait)))
        return {row.key: row.value for row in found}

    def audit(self, wait):
        """Who did what to it, by the audit log."""
        ours = select(Log.event, Log.owner).where(Log.run_id == wait.run_id, Log.event.startswith("event "))
        return [tuple(row) for row in self.session.execute(ours.order_by(Log.id))]

    @staticmethod
    def _is(table, wait):
        columns = table.__table__.c
        return [columns[name] == getattr(wait, name) for name in ("dag_id", "run_id", "task_id", "map_index")]
