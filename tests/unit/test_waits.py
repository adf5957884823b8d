"""What is asked of Airflow's database, against its real tables in SQLite and PostgreSQL."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import pytest
import uuid6
from airflow.jobs.job import Job
from airflow.models.dag import DagModel
from airflow.models.dagbundle import DagBundleModel
from airflow.models.dagrun import DagRun
from airflow.models.task_state_store import TaskStateStoreModel
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from airflow.models.xcom import XComModel
from airflow.sdk.serde import serialize
from airflow.triggers.base import TaskSuccessEvent
from airflow_events import waits
from airflow_events.listeners.commit import Phase, Record
from airflow_events.triggers.calls import Calls
from airflow_events.triggers.journal import Entry
from airflow_events.waits import Order, Stage
from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

NOW = datetime(2026, 11, 23, 12, tzinfo=timezone.utc)
EVENT = {"order": 42, "at": NOW}


@pytest.fixture
def airflow(session):
    """An Airflow with nothing in it."""
    return Airflow(session)


@dataclass
class Airflow:
    session: Session
    runs: int = 0

    def task(self, state, *, task_id="wait", dag_id="shop", operator="WaitForEventOperator", **columns):
        """A run with one task instance; return the wait's key."""
        self.runs += 1
        run_id = f"run_{self.runs}"
        self.insert(
            DagRun, id=self.runs, dag_id=dag_id, run_id=run_id, run_type="manual", run_after=NOW, state="running"
        )
        self.insert(
            TaskInstance,
            id=uuid6.uuid7(),
            dag_id=dag_id,
            run_id=run_id,
            task_id=task_id,
            map_index=columns.pop("map_index", -1),
            state=state,
            operator=operator,
            pool="default_pool",
            pool_slots=1,
            span_status="not_started",
            **{"start_date": NOW, "try_number": 1, **columns},
        )
        return dag_id, run_id, task_id, -1

    def insert(self, table, **columns):
        self.session.execute(insert(table.__table__).values(**columns))

    def deferred(self, listener="x:DirectoryListener", *, triggerer=None, **columns):
        trigger = Trigger(
            "airflow_events.triggers.event.EventTrigger",
            {"listener": listener, "listener_args": ["drops"], "listener_kwargs": {"password": "hunter2", "n": 1}},
            created_date=NOW,
        )
        trigger.triggerer_id = triggerer
        self.session.add(trigger)
        self.session.flush()
        return self.task("deferred", trigger_id=trigger.id, **columns)

    def triggerer(self, heartbeat):
        job = Job.__table__
        values = {"state": "running", "job_type": "TriggererJob", "hostname": "box", "latest_heartbeat": heartbeat}
        return self.session.execute(insert(job).values(**values)).inserted_primary_key[0]

    def record(self, key, phase=Phase.RECORDED, *, id="1", event=EVENT):
        record = Record(event, phase, id, recorded_at=NOW.isoformat())
        self.xcom(key, "event_record", serialize(record.as_dict()))

    def xcom(self, key, name, value):
        dag_id, run_id, task_id, map_index = key
        run = self.session.scalars(select(DagRun.id).where(DagRun.dag_id == dag_id, DagRun.run_id == run_id)).one()
        self.insert(
            XComModel,
            dag_run_id=run,
            dag_id=dag_id,
            run_id=run_id,
            task_id=task_id,
            map_index=map_index,
            key=name,
            value=value,
            timestamp=NOW + timedelta(seconds=3),
        )

    def stored(self, key, phase, *, name="event_record"):
        """As a worker does through the API server."""
        dag_id, run_id, task_id, map_index = key
        record = {**Record(EVENT, phase, "1", recorded_at=NOW.isoformat()).as_dict(), "generation": 3}
        run = self.session.scalars(select(DagRun.id).where(DagRun.dag_id == dag_id, DagRun.run_id == run_id)).one()
        self.insert(
            TaskStateStoreModel,
            dag_run_id=run,
            dag_id=dag_id,
            run_id=run_id,
            task_id=task_id,
            map_index=map_index,
            key=name,
            value=json.dumps(serialize(record)),
            updated_at=NOW,
        )

    def found(self, stage, **kwargs):
        return [wait.key for wait in waits.find(self.session, stage, **kwargs).waits]

    def names(self, key):
        dag_id, run_id, task_id, _ = key
        where = (XComModel.dag_id == dag_id, XComModel.run_id == run_id, XComModel.task_id == task_id)
        return set(self.session.scalars(select(XComModel.key).where(*where)))


def test_each_wait_is_in_one_stage_and_other_tasks_are_in_none(airflow):
    waiting, ended = airflow.deferred(), airflow.task("success", end_date=NOW)
    airflow.task("running", operator="BashOperator")
    airflow.task(None)  # what is before it has not ended
    stuck_open, stuck_failed, stuck_worker = airflow.deferred(), airflow.task("failed"), airflow.task("failed")
    airflow.record(stuck_open)
    airflow.record(stuck_failed)
    airflow.stored(stuck_worker, Phase.RECORDED)
    airflow.record(ended, Phase.COMMITTED)
    assert set(airflow.found(Stage.OPEN)) == {waiting}
    assert set(airflow.found(Stage.ENDED)) == {ended}
    assert set(airflow.found(Stage.RECORDED)) == {stuck_open, stuck_failed, stuck_worker}
    assert waits.find(airflow.session, Stage.RECORDED, limit=1).total == 3


def test_a_record_that_is_noted_as_lost_is_none_and_the_wait_is_open(airflow):
    lost, later = airflow.deferred(), airflow.deferred()
    for key in (lost, later):
        airflow.record(key, id="2")
    airflow.xcom(lost, "event_lost", "2")
    airflow.xcom(later, "event_lost", "1")
    assert airflow.found(Stage.OPEN) == [lost]
    assert airflow.found(Stage.RECORDED) == [later]
    assert waits.show(airflow.session, lost).record is None


def test_what_a_worker_stored_counts_before_the_xcom(airflow):
    key = airflow.deferred()
    airflow.record(key, Phase.RECORDED)
    airflow.stored(key, Phase.COMMITTED)
    assert airflow.found(Stage.RECORDED) == []
    assert waits.show(airflow.session, key).record.phase == "committed"


def test_an_event_that_speaks_of_phases_is_not_taken_for_a_record(airflow):
    key = airflow.deferred()
    airflow.record(key, Phase.COMMITTED, event={"phase": "recorded"})
    assert airflow.found(Stage.RECORDED) == []


def test_it_is_paged_sorted_and_filtered_and_null_is_last(airflow):
    soon, late, never = (
        airflow.deferred(trigger_timeout=deadline, custom_operator_name=name, task_id=name)
        for deadline, name in ((NOW, "A_1"), (NOW + timedelta(hours=1), "AB1"), (None, "c"))
    )
    assert airflow.found(Stage.OPEN, order=Order.DEADLINE) == [soon, late, never]
    assert airflow.found(Stage.OPEN, order=Order.DEADLINE, descending=True) == [late, soon, never]
    page = waits.find(airflow.session, Stage.OPEN, order=Order.DEADLINE, limit=2, offset=0)
    assert ([wait.key for wait in page.waits], page.total, page.more) == ([soon, late], 3, True)
    page = waits.find(airflow.session, Stage.OPEN, order=Order.DEADLINE, limit=2, offset=2)
    assert ([wait.key for wait in page.waits], page.total, page.more) == ([never], 3, False)
    assert airflow.found(Stage.OPEN, text="a_1") == [soon]  # not the wildcard that it is in SQL
    assert airflow.found(Stage.OPEN, listener="AB1") == [late]


def test_open_waits_are_counted_by_listener_and_those_that_are_not_committed(airflow):
    for name in ("Queue", "Queue", "Timer", "WaitForEventOperator", None):
        airflow.deferred(custom_operator_name=name)
    airflow.task("success", custom_operator_name="Queue", end_date=NOW)
    airflow.task("running", operator="BashOperator", custom_operator_name="BashOperator")
    airflow.record(airflow.deferred(custom_operator_name="Queue"))
    counted = waits.count(airflow.session)
    assert counted == waits.Counted({"Queue": 2, "Timer": 1, "WaitForEventOperator": 2}, uncommitted=1)


def test_only_waits_of_the_dags_that_one_may_see(airflow):
    mine, theirs = airflow.deferred(dag_id="mine"), airflow.deferred(dag_id="theirs")
    airflow.record(theirs)
    assert airflow.found(Stage.OPEN, dag_ids={"mine"}) == [mine]
    assert airflow.found(Stage.RECORDED, dag_ids={"mine"}) == []
    assert airflow.found(Stage.OPEN, dag_ids=set()) == []
    assert waits.find(airflow.session, Stage.RECORDED, dag_ids={"mine"}).total == 0


def test_a_summary_says_what_it_waits_for_and_where_and_masks_secrets(airflow):
    fresh = airflow.triggerer(datetime.now(timezone.utc))
    stale = airflow.triggerer(NOW - timedelta(days=1))
    airflow.deferred(triggerer=fresh, task_id="a")
    airflow.deferred(triggerer=stale, task_id="b")
    key = airflow.deferred(task_id="c")
    airflow.xcom(key, "event_deadline", serialize({"at": NOW, "try_number": 1, "last_try": 4}))
    a, b, c = waits.find(airflow.session, Stage.OPEN, order=Order.TASK).waits
    assert a.call == "DirectoryListener('drops', password='***', n=1)"
    assert a.triggerer.alive and not b.triggerer.alive and c.triggerer is None
    assert (a.deadline, c.deadline) == (None, NOW)


def test_a_trigger_of_another_fernet_key_hides_nothing_else(airflow):
    key = airflow.deferred()
    airflow.session.scalars(select(Trigger)).one().encrypted_kwargs = "not of this key"
    airflow.session.flush()
    [wait] = waits.find(airflow.session, Stage.OPEN).waits
    assert (wait.key, wait.call) == (key, None)


def test_one_wait_is_shown_with_its_steps_and_its_event(airflow):
    key = airflow.task("success", end_date=NOW + timedelta(seconds=5))
    airflow.record(key, Phase.COMMITTED)
    detail = waits.show(airflow.session, key)
    assert [(step.name, step.done, step.at) for step in detail.steps] == [
        ("Begun", True, NOW),
        ("Recorded", True, NOW),
        ("Committed", True, NOW + timedelta(seconds=3)),
        ("Delivered", True, NOW + timedelta(seconds=5)),
    ]
    assert detail.record.event == {"order": 42, "at": NOW.isoformat()}
    assert detail.summary.seconds_to_delivery == 5
    assert waits.show(airflow.session, ("shop", "no such run", "wait", -1)) is None
    other = airflow.task("success", operator="BashOperator")
    assert waits.show(airflow.session, other) is None
    airflow.record(other, Phase.COMMITTED)  # the operator is a subclass
    assert waits.show(airflow.session, other).record.phase == "committed"


def test_an_event_that_came_by_http_was_recorded_by_the_api_server(airflow):
    key = airflow.task("success", end_date=NOW, custom_operator_name="HttpListener")
    record = Record(EVENT, Phase.COMMITTED, "1", recorded_at=NOW.isoformat(), receipt={"status": "delivered"})
    airflow.xcom(key, "event_record", serialize(record.as_dict()))
    assert waits.show(airflow.session, key).steps[1].note == "by the API server"


def test_a_rejected_wait_says_by_whom_and_why(airflow):
    key = airflow.task("failed", end_date=NOW, custom_operator_name="HttpListener")
    airflow.record(key, Phase.REJECTED, event={"reason": "not ours", "by": "ada", "generation": 3})
    detail = waits.show(airflow.session, key)
    assert (detail.steps[1].name, detail.steps[1].note) == ("Rejected", "by ada: not ours")
    assert not detail.takes_http_events  # any more
    assert airflow.found(Stage.RECORDED) == []


def test_what_is_written_ahead_of_an_event_is_no_record_until_it_comes(airflow, session):
    key, now = airflow.deferred("x:TimerListener"), datetime.now(timezone.utc)

    def ahead(at):
        record = Record(at, Phase.COMMITTED, "1", recorded_at=at.isoformat(), foreseen=True)
        session.execute(delete(XComModel))
        airflow.xcom(key, "event_record", serialize(record.as_dict()))
        [row] = waits.find(session, Stage.OPEN).waits
        return row, waits.show(session, key)

    row, shown = ahead(now + timedelta(minutes=5))
    assert (row.phase, row.recorded, shown.record) == (None, None, None)
    assert "Nothing is recorded" in waits.forget(session, key).refused
    row, shown = ahead(now - timedelta(minutes=5))
    assert row.phase == "committed"
    assert row.recorded == shown.record.recorded == shown.record.committed == now - timedelta(minutes=5)


def test_a_long_event_is_cut(airflow):
    key = airflow.task("success", end_date=NOW)
    airflow.record(key, Phase.COMMITTED, event="x" * 60_000)
    record = waits.show(airflow.session, key).record
    assert record.event is None
    assert (len(record.preview), record.length) == (50_000, 60_002)
    airflow.record(airflow.task("success", task_id="other"), Phase.COMMITTED, event="é" * 40_000)
    [other] = waits.find(airflow.session, Stage.ENDED, task_id="other").waits
    assert waits.show(airflow.session, other.key).record.event == "é" * 40_000


def test_it_says_whether_a_living_triggerer_has_the_wait(airflow):
    fresh = airflow.triggerer(datetime.now(timezone.utc))
    stale = airflow.triggerer(NOW - timedelta(days=1))
    keys = [airflow.deferred(triggerer=triggerer) for triggerer in (fresh, stale, None)]
    keys.append(airflow.task("up_for_retry"))
    notes = [[s.note for s in waits.show(airflow.session, key).steps if s.name == "Waiting"] for key in keys]
    on_box = "in the triggerer on box"
    assert notes == [
        [on_box],
        [f"{on_box}, which gives no sign of life"],
        ["no triggerer has taken it on"],
        [""],
    ]


def test_it_says_why_nothing_goes_on_after_a_wait(airflow):
    airflow.session.add(DagBundleModel(name="dags"))
    airflow.session.flush()
    states = {"fine": (False, False), "paused": (True, False), "stale": (True, True), "deleted": None}
    for dag_id, state in states.items():
        airflow.deferred(dag_id=dag_id)
        if state is not None:
            is_paused, is_stale = state
            dag = DagModel(dag_id=dag_id, bundle_name="dags", is_paused=is_paused, is_stale=is_stale)
            airflow.session.add(dag)
    airflow.session.flush()
    found = {wait.dag_id: wait.dag_state for wait in waits.find(airflow.session, Stage.OPEN).waits}
    assert found == {"fine": None, "paused": "paused", "stale": "gone", "deleted": "gone"}


def test_the_error_of_a_failed_trigger_is_shown(airflow):
    kwargs = {"error": "Trigger failure", "traceback": ["Traceback\n", "ValueError: no\n"]}
    key = airflow.task("scheduled", next_method="__fail__", next_kwargs=kwargs)
    assert waits.show(airflow.session, key).error == "Traceback\nValueError: no\n"


@pytest.mark.parametrize("state", ["success", "failed", "up_for_retry", None])
def test_forgetting_drops_all_of_the_record_and_the_value_that_came_of_it(airflow, state):
    key, other = airflow.task(state), airflow.task("success")
    for one in (key, other):
        airflow.record(one, id="7")
        airflow.xcom(one, "return_value", 1)
    airflow.stored(key, Phase.RECORDED)
    airflow.stored(key, Phase.RECORDED, name="event_lost")
    forgotten = waits.forget(airflow.session, key)
    assert forgotten.record.phase == "recorded"
    assert airflow.names(key) == {"event_lost"}
    assert airflow.session.scalars(select(TaskStateStoreModel)).all() == []
    assert airflow.names(other) == {"event_record", "return_value"}
    airflow.record(key, id="7")  # by a process that the task has outlived
    assert waits.show(airflow.session, key).record is None


def brought_along(session, key, record):
    """As Airflow does with what a `TaskSuccessEvent` has among its XComs."""
    ti = session.scalars(select(TaskInstance).where(TaskInstance.dag_id == key[0])).one()
    ti.xcom_push(
        "event_record",
        TaskSuccessEvent(xcoms={"event_record": record.as_xcom()}).xcoms["event_record"],
        session=session,
    )


def test_a_record_that_came_with_the_success_is_shown_and_forgotten(airflow):
    key = airflow.task("success", end_date=NOW + timedelta(seconds=2))
    sent = Record(NOW, Phase.COMMITTED, "7", recorded_at=NOW.isoformat())
    brought_along(airflow.session, key, sent)
    stored = airflow.session.scalars(select(XComModel.value).where(XComModel.key == "event_record")).one()
    assert isinstance(stored, str)
    assert Record.from_dict(stored) == sent
    [summary] = waits.find(airflow.session, Stage.ENDED).waits
    assert (summary.phase, summary.recorded, summary.seconds_to_delivery) == ("committed", NOW, 2)
    assert waits.find(airflow.session, Stage.RECORDED).waits == []
    record = waits.show(airflow.session, key).record
    assert (record.phase, record.event, record.id) == ("committed", NOW.isoformat(), "7")
    assert waits.forget(airflow.session, key).record.id == "7"
    assert airflow.names(key) == {"event_lost"}


@pytest.mark.parametrize("state", ["queued", "running", "deferred"])
def test_nothing_is_forgotten_while_the_task_is_at_work(airflow, state):
    key = airflow.task(state)
    airflow.record(key)
    assert state in waits.forget(airflow.session, key).refused
    assert airflow.names(key) == {"event_record"}


def test_forgetting_nothing_says_so(airflow):
    assert "Nothing is recorded" in waits.forget(airflow.session, airflow.task("failed")).refused
    assert waits.forget(airflow.session, ("no", "such", "wait", -1)) is None


def many(airflow, entries, **progress):
    """A task that waits for three events, and its journal."""
    calls = {"calls": Calls([{"n": n} for n in range(3)], {"password": "hunter2"}).encode(), "count": 3}
    trigger = Trigger(
        "airflow_events.triggers.events.EventsTrigger",
        {"listener": "x:DirectoryListener", **calls},
        created_date=NOW,
    )
    airflow.session.add(trigger)
    airflow.session.flush()
    key = airflow.task("deferred", trigger_id=trigger.id, operator="WaitForEventsOperator")
    if entries:
        page = {"full": False, "entries": [entry.as_dict() for entry in entries]}
        airflow.xcom(key, "event_log:0.0:0", serialize(page))
        airflow.xcom(key, "event_log:0.0:closed", True)
        airflow.xcom(key, "event_progress", progress)
    return key


def recorded(index):
    return Entry(index, "c", Record(EVENT, Phase.RECORDED, f"id{index}", recorded_at=NOW.isoformat()))


def test_a_task_that_waits_for_many_shows_how_many_have_arrived(airflow):
    begun = many(airflow, [])
    entries = [recorded(2), Entry(2, "c", committed="id2")]
    some = many(airflow, entries, phase="committed", arrived=1, of=3, uncommitted=0)
    page = waits.find(airflow.session, Stage.OPEN)
    assert {wait.key: (wait.arrived, wait.wanted) for wait in page.waits} == {begun: (0, 3), some: (1, 3)}
    assert {wait.call for wait in page.waits} == {"DirectoryListener, 3 times"}
    detail = waits.show(airflow.session, some)
    [note] = [step.note for step in detail.steps if step.name == "Waiting"]
    assert note == "1 of 3 arrived; no triggerer has taken it on"
    assert not any(step.done for step in detail.steps if step.name in ("Recorded", "Committed", "Delivered"))
    assert list(detail.record.event) == ["2"]
    assert detail.record.event["2"]["order"] == 42
    assert "hunter2" not in detail.summary.call + str(detail.arguments)


def test_one_event_of_many_that_is_not_committed_is_found_and_all_can_be_forgotten(airflow):
    key = many(airflow, [recorded(0)], phase="recorded", arrived=1, of=3, uncommitted=1)
    assert [wait.key for wait in waits.find(airflow.session, Stage.RECORDED).waits] == [key]
    assert waits.find(airflow.session, Stage.OPEN).waits == []
    assert "Mark it as failed first" in waits.forget(airflow.session, key).refused
    airflow.session.execute(update(TaskInstance).values(state="failed"))
    assert waits.forget(airflow.session, key).record.event.keys() == {"0"}
    assert waits.show(airflow.session, key).record is None
    assert airflow.session.scalars(select(XComModel.key).where(XComModel.key.contains("event_log"))).all() == []
