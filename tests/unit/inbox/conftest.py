"""Task instances that wait, in Airflow's real tables, and what a triggerer and a user do to them."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from types import SimpleNamespace

import pytest
import uuid6
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XComModel
from airflow_events.inbox import transactions
from airflow_events.inbox.entries import Begin, End, Finish, Look, Lose, Places, Record
from airflow_events.inbox.models import EventWait
from airflow_events.triggers.event import EventTrigger
from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

NOW = datetime(2026, 11, 23, 12, tzinfo=timezone.utc)


@pytest.fixture
def waits(session):
    return Waits(session)


@pytest.fixture(scope="session")
def waits_of():
    """Make waits in a session of one's own."""
    return Waits


@dataclass
class Waits:
    """Waits of one database, without HTTP between."""

    session: Session
    runs: int = 0
    _keys: dict[str, tuple[str, str, str, int]] = field(default_factory=dict)

    def deferred(self, *, map_index=-1, run_start=NOW, dag_id="shop", **columns):
        """A task instance that is deferred; return the UUID of its try."""
        self.runs += 1
        run_id, ti = f"run_{self.runs}", uuid6.uuid7()
        run = {"dag_id": dag_id, "run_id": run_id, "run_type": "manual", "run_after": NOW, "state": "running"}
        self.session.execute(
            insert(DagRun.__table__).values(id=self.runs, start_date=run_start, created_at=run_start, **run)
        )
        self.session.execute(
            insert(TaskInstance.__table__).values(
                id=ti,
                dag_id=dag_id,
                run_id=run_id,
                task_id="wait",
                map_index=map_index,
                operator="WaitForEventOperator",
                pool="default_pool",
                pool_slots=1,
                span_status="not_started",
                **{"state": "deferred", "start_date": NOW, "try_number": 1, "max_tries": 3, **columns},
            )
        )
        self._keys[str(ti)] = (dag_id, "wait", run_id, map_index)
        return str(ti)

    def again(self, ti, *, cleared=False, **columns):
        """Another try of the task instance, by a retry or a clear, as Airflow makes it: under another UUID."""
        after = str(uuid6.uuid7())
        state = self.state(ti)
        values = {"try_number": state.try_number + 1, "state": "deferred", "next_method": "execute_complete"}
        if cleared:
            values["max_tries"] = state.max_tries + 1
        self.set(ti, id=uuid.UUID(after), **{**values, **columns})
        self._keys[after] = self._keys[ti]
        return after

    def set(self, ti, **columns):
        table = TaskInstance.__table__
        self.session.execute(update(table).where(table.c.id == uuid.UUID(ti)).values(**columns))

    def state(self, ti):
        table = TaskInstance.__table__
        return self.session.execute(select(table).where(table.c.id == uuid.UUID(ti))).one()

    def row(self, ti, place=-1):
        dag_id, task_id, run_id, map_index = self._keys[ti]
        table = EventWait.__table__
        where = (table.c.dag_id == dag_id, table.c.run_id == run_id, table.c.task_id == task_id)
        return self.session.execute(
            select(table).where(*where, table.c.map_index == map_index, table.c.place == place)
        ).one_or_none()

    def xcoms(self, ti):
        dag_id, _, run_id, _ = self._keys[ti]
        rows = self.session.execute(
            select(XComModel.key, XComModel.value).where(XComModel.dag_id == dag_id, XComModel.run_id == run_id)
        )
        return {row.key: row.value for row in rows}

    async def ask(self, entry):
        """Answer a trigger, in the place of what asks an API server."""
        await asyncio.sleep(0)
        work = dict(transactions._WORK)
        with self.session.begin_nested():
            return work[type(entry)](self.session, [entry])[0]

    def trigger(self, ti, **arguments):
        """The trigger of a wait that a worker has deferred."""
        names = dict(zip(("dag_id", "task_id", "run_id", "map_index"), self._keys[ti], strict=True))
        trigger = EventTrigger(wait={**names, "run_start": None}, **arguments)
        trigger.task_instance = SimpleNamespace(id=uuid.UUID(ti), task_id="wait", try_number=1)
        return trigger

    def begin(self, ti, **more):
        return transactions.begin(self.session, [Begin(ti, listener="L", call="L()", holder="box:1", **more)])[0]

    def record(self, ti, generation, event='"e"', *, record_id=None, **more):
        entry = Record(ti, generation=generation, record_id=record_id or uuid.uuid4().hex, event=event, **more)
        return transactions.record(self.session, [entry])[0]

    def finish(self, ti, generation, record_id=None, end=End(), **more):  # noqa: B008 (it is frozen)
        entry = Finish(ti, generation=generation, record_id=record_id, end=end, **more)
        return transactions.finish(self.session, [entry])[0]

    def lose(self, ti, generation, record_id, **more):
        entry = Lose(ti, generation=generation, record_id=record_id, **more)
        return transactions.lose(self.session, [entry])[0]

    def look(self, ti, generation):
        return transactions.look(self.session, [Look(ti, generation=generation)])[0].status

    def places(self, ti, generation, **more):
        return transactions.places(self.session, [Places(ti, generation=generation, **more)])[0]
