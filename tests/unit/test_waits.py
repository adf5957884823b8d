"""What is asked of Airflow's database, against its real tables in SQLite and PostgreSQL."""

from __future__ import annotations

import hashlib
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
from airflow_events import waits
from airflow_events.inbox import transactions
from airflow_events.inbox.entries import Begin, End, Finish, Phase, Status
from airflow_events.inbox.entries import Record as RecordEntry
from airflow_events.inbox.models import EventTaken, EventWait
from airflow_events.listeners.support import serde
from airflow_events.triggers.calls import Calls
from airflow_events.waits import Order, Stage
from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

NOW = datetime(2026, 11, 23, 12, tzinfo=timezone.utc)
EVENT = {"order": 42, "at": NOW}
SECOND = timedelta(seconds=1)


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
        run_id, map_index = f"run_{self.runs}", columns.pop("map_index", -1)
        self.insert(
            DagRun, id=self.runs, dag_id=dag_id, run_id=run_id, run_type="manual", run_after=NOW, state="running"
        )
        self.insert(
            TaskInstance,
            id=uuid6.uuid7(),
            dag_id=dag_id,
            run_id=run_id,
            task_id=task_id,
            map_index=map_index,
            state=state,
            operator=operator,
            pool="default_pool",
            pool_slots=1,
            span_status="not_started",
            **{"start_date": NOW, "try_number": 1, "max_tries": 3, **columns},
        )
        return dag_id, run_id, task_id, map_index

    def insert(self, table, **columns):
        self.session.execute(insert(table.__table__).values(**columns))

    def deferred(self, listener="x:DirectoryListener", *, triggerer=None, **columns):
        """A wait that no triggerer has begun."""
        return self.task("deferred", trigger_id=self.trigger(listener, triggerer), **columns)

    def trigger(self, listener="x:DirectoryListener", triggerer=None):
        trigger = Trigger(
            "airflow_events.triggers.event.EventTrigger",
            {"listener": listener, "listener_args": ["drops"], "listener_kwargs": {"password": "hunter2", "n": 1}},
            created_date=NOW,
        )
        trigger.triggerer_id = triggerer
        self.session.add(trigger)
        self.session.flush()
        return trigger.id

    def triggerer(self, heartbeat):
        job = Job.__table__
        values = {"state": "running", "job_type": "TriggererJob", "hostname": "box", "latest_heartbeat": heartbeat}
        return self.session.execute(insert(job).values(**values)).inserted_primary_key[0]

    def row(self, key, *, place=-1, **columns):
        """What the inbox has of a wait that has begun."""
        values = {
            "listener": "DirectoryListener",
            "call": "DirectoryListener('drops/7')",
            "generation": 1,
            "clears": 3,
            "holder": "box:17",
            "since": NOW,
        }
        self.insert(EventWait, **named(key), place=place, **{**values, **columns})

    def record(self, key, phase=Phase.RECORDED, *, place=-1, event=EVENT, record_id="r", **columns):
        """A wait with an event."""
        moments = {"recorded_at": NOW}
        if phase == Phase.COMMITTED:
            moments |= {"committed_at": NOW + 3 * SECOND}
        values = {"phase": phase.value, "event": serde.encode(event), "record_id": record_id, "record_clears": 3}
        self.row(key, place=place, **{**values, **moments, **columns})

    def xcom(self, key, name, value):
        run = self._run(key)
        stamp = NOW + 3 * SECOND
        self.insert(XComModel, dag_run_id=run, **named(key), key=name, value=value, timestamp=stamp)

    def stored(self, key, name, value):
        """As a worker does through the API server."""
        run, text = self._run(key), json.dumps(serialize(value))
        self.insert(TaskStateStoreModel, dag_run_id=run, **named(key), key=name, value=text, updated_at=NOW)

    def _run(self, key):
        where = (DagRun.dag_id == key[0], DagRun.run_id == key[1])
        return self.session.scalars(select(DagRun.id).where(*where)).one()

    def found(self, stage, **kwargs):
        return [wait.key for wait in waits.find(self.session, stage, **kwargs).waits]

    def names(self, key):
        """Of the XComs of a wait."""
        where = [getattr(XComModel, name) == value for name, value in named(key).items()]
        return set(self.session.scalars(select(XComModel.key).where(*where)))

    def column(self, key, name, place=-1):
        table = EventWait.__table__
        where = [table.c[column] == value for column, value in {**named(key), "place": place}.items()]
        return self.session.execute(select(table.c[name]).where(*where)).scalar_one()

    def id(self, key):
        where = [getattr(TaskInstance, name) == value for name, value in named(key).items()]
        return str(self.session.scalars(select(TaskInstance.id).where(*where)).one())

    def set(self, key, **columns):
        table = TaskInstance.__table__
        where = [table.c[name] == value for name, value in named(key).items()]
        self.session.execute(update(table).where(*where).values(**columns))


def named(key):
    return dict(zip(("dag_id", "run_id", "task_id", "map_index"), key, strict=True))


def first_edition(phase="recorded", id="7"):
    return serialize({"phase": phase, "event": EVENT, "id": id, "recorded_at": NOW.isoformat()})


def test_each_wait_is_in_one_stage_and_other_tasks_are_in_none(airflow):
    waiting, begun = airflow.deferred(), airflow.deferred()
    airflow.row(begun)
    airflow.task("running", operator="BashOperator")
    airflow.task(None)  # what is before it has not ended
    stuck_open, stuck_failed, stuck_place = airflow.deferred(), airflow.task("failed"), airflow.deferred()
    airflow.record(stuck_open)
    airflow.record(stuck_failed)
    airflow.row(stuck_place)
    airflow.record(stuck_place, Phase.COMMITTED, place=0, record_id="a")
    airflow.record(stuck_place, Phase.RECORDED, place=1, record_id="b")
    ended = airflow.task("success", end_date=NOW)
    airflow.record(ended, Phase.COMMITTED)
    assert set(airflow.found(Stage.OPEN)) == {waiting, begun}
    assert set(airflow.found(Stage.ENDED)) == {ended}
    assert set(airflow.found(Stage.RECORDED)) == {stuck_open, stuck_failed, stuck_place}
    assert waits.find(airflow.session, Stage.RECORDED, limit=1).total == 3


def test_a_wait_of_a_subclass_is_listed_while_it_waits_and_shown_once_it_has_begun(airflow):
    key = airflow.deferred(operator="OurWait")
    assert airflow.found(Stage.OPEN) == [key]
    airflow.set(key, state="failed", trigger_id=None, end_date=NOW)
    assert waits.show(airflow.session, key) is None  # it might be any task
    airflow.record(key)
    assert airflow.found(Stage.RECORDED) == [key]
    airflow.session.execute(update(EventWait).values(phase="committed"))
    assert waits.show(airflow.session, key).record.phase == "committed"
    assert airflow.found(Stage.ENDED) == []


def test_it_is_paged_sorted_and_filtered_and_null_is_last(airflow):
    soon, late, never = (airflow.deferred(task_id=name) for name in ("A_1", "AB1", "c"))
    for key, name, deadline in ((soon, "A_1", NOW), (late, "AB1", NOW + timedelta(hours=1)), (never, "c", None)):
        airflow.row(key, listener=name, deadline=deadline)
    assert airflow.found(Stage.OPEN, order=Order.DEADLINE) == [soon, late, never]
    assert airflow.found(Stage.OPEN, order=Order.DEADLINE, descending=True) == [late, soon, never]
    page = waits.find(airflow.session, Stage.OPEN, order=Order.DEADLINE, limit=2, offset=0)
    assert ([wait.key for wait in page.waits], page.total, page.more) == ([soon, late], 3, True)
    page = waits.find(airflow.session, Stage.OPEN, order=Order.DEADLINE, limit=2, offset=2)
    assert ([wait.key for wait in page.waits], page.total, page.more) == ([never], 3, False)
    assert airflow.found(Stage.OPEN, text="a_1") == [soon]  # not the wildcard that it is in SQL
    assert airflow.found(Stage.OPEN, listener="AB1") == [late]


@pytest.mark.parametrize("order", Order)
def test_it_is_sorted_by_anything(airflow, order):
    keys = {airflow.deferred(), airflow.deferred(triggerer=airflow.triggerer(NOW))}
    for stage in Stage:
        assert set(airflow.found(stage, order=order)) == (keys if stage is Stage.OPEN else set())


def test_open_waits_are_counted_by_listener_and_those_that_are_not_committed(airflow):
    for name in ("Queue", "Queue", "Timer", "WaitForEventOperator", None):
        airflow.deferred(custom_operator_name=name)
    mapped = airflow.deferred(custom_operator_name="WaitForEventOperator", map_index=0)
    airflow.row(mapped, listener="Queue")  # which only says it once it has begun
    airflow.task("success", custom_operator_name="Queue", end_date=NOW)
    airflow.task("running", operator="BashOperator", custom_operator_name="BashOperator")
    stuck = airflow.deferred(custom_operator_name="Queue")
    airflow.row(stuck)
    for place in range(2):  # one wait, whatever places it has
        airflow.record(stuck, place=place)
    counted = waits.count(airflow.session)
    assert counted == waits.Counted({"Queue": 3, "Timer": 1, "WaitForEventOperator": 2}, uncommitted=1)


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
    airflow.row(airflow.deferred(task_id="c"), deadline=NOW)
    a, b, c = waits.find(airflow.session, Stage.OPEN, order=Order.TASK).waits
    assert a.call == "DirectoryListener('drops', password='***', n=1)"  # as its trigger has it, until it begins
    assert c.call == "DirectoryListener('drops/7')"
    assert (a.holder, c.holder) == (None, "box:17")
    assert a.triggerer.alive and not b.triggerer.alive and c.triggerer is None
    assert (a.deadline, c.deadline) == (None, NOW)


def test_what_it_waits_for_is_known_between_tries_and_after_the_end(airflow):
    again, ended = airflow.task("up_for_retry"), airflow.task("failed", end_date=NOW)
    airflow.row(again)
    airflow.row(ended)
    for key in (again, ended):
        summary = waits.show(airflow.session, key).summary
        assert (summary.listener, summary.call) == ("DirectoryListener", "DirectoryListener('drops/7')")


def test_a_trigger_of_another_fernet_key_hides_nothing_else(airflow):
    key = airflow.deferred()
    airflow.session.scalars(select(Trigger)).one().encrypted_kwargs = "not of this key"
    airflow.session.flush()
    [wait] = waits.find(airflow.session, Stage.OPEN).waits
    assert (wait.key, wait.call) == (key, None)


def test_one_wait_is_shown_with_its_steps_and_its_event(airflow):
    key = airflow.task("success", end_date=NOW + 9 * SECOND)
    airflow.record(key, Phase.COMMITTED, since=NOW - SECOND, delivered_at=NOW + 5 * SECOND)
    detail = waits.show(airflow.session, key)
    assert [(step.name, step.done, step.at) for step in detail.steps] == [
        ("Begun", True, NOW - SECOND),
        ("Recorded", True, NOW),
        ("Committed", True, NOW + 3 * SECOND),
        ("Delivered", True, NOW + 5 * SECOND),
    ]
    assert detail.record.event == {"order": 42, "at": NOW.isoformat()}
    assert (detail.summary.recorded, detail.summary.seconds_to_delivery) == (NOW, 5)
    [summary] = waits.find(airflow.session, Stage.ENDED).waits
    assert summary == detail.summary
    assert waits.show(airflow.session, ("shop", "no such run", "wait", -1)) is None
    assert waits.show(airflow.session, airflow.task("success", operator="BashOperator")) is None


def test_one_that_a_worker_ended_was_delivered_when_its_task_ended(airflow):
    key = airflow.task("success", end_date=NOW + 9 * SECOND)
    airflow.record(key, Phase.COMMITTED)
    detail = waits.show(airflow.session, key)
    assert (detail.steps[-1].name, detail.steps[-1].at) == ("Delivered", NOW + 9 * SECOND)
    assert detail.summary.seconds_to_delivery == 9


@pytest.mark.parametrize("state", ["deferred", "failed", "up_for_retry"])
def test_one_that_is_not_committed_shows_so(airflow, state):
    key = airflow.task(state, end_date=NOW if state == "failed" else None)
    airflow.record(key)
    detail = waits.show(airflow.session, key)
    assert detail.summary.stage is Stage.RECORDED
    assert [(step.name, step.done) for step in detail.steps] == [
        ("Begun", True),
        ("Recorded", True),
        ("Committed", False),
        ("Ended: failed", True) if state == "failed" else ("Delivered", False),
    ]


def test_a_task_that_was_marked_as_a_success_without_an_event_delivered_none(airflow):
    key = airflow.task("success", end_date=NOW)
    airflow.row(key)
    assert [step.name for step in waits.show(airflow.session, key).steps] == ["Begun", "Ended: success"]


def test_an_event_that_was_sent_says_by_whom(airflow):
    key = airflow.task("success", end_date=NOW)
    airflow.record(key, Phase.COMMITTED, listener="HttpListener", sent_by="ada")
    detail = waits.show(airflow.session, key)
    assert detail.steps[1].note == "sent by ada"
    assert detail.record.sent_by == "ada"
    assert not detail.takes_http_events  # any more


def test_an_event_that_was_sent_before_the_wait_began_expires(airflow):
    now = datetime.now(timezone.utc)

    def early(expires):
        key = airflow.task("scheduled", custom_operator_name="HttpListener", start_date=None)
        kept = {"since": None, "listener": None, "call": None, "generation": 0, "expires": expires}
        airflow.record(key, Phase.COMMITTED, **kept)
        return waits.show(airflow.session, key)

    for detail in (early(None), early(now + timedelta(minutes=5))):
        assert detail.record.phase == detail.summary.phase == "committed"
        assert not detail.steps[0].done
        assert not detail.takes_http_events
    expired = early(now - timedelta(minutes=5))
    assert (expired.record, expired.summary.phase, expired.summary.recorded) == (None, None, None)
    assert expired.takes_http_events


def test_a_rejected_wait_says_by_whom_and_why_until_a_clear(airflow):
    key = airflow.task("failed", end_date=NOW)
    rejected = {"event": None, "listener": "HttpListener", "sent_by": "ada", "reason": "not ours"}
    airflow.record(key, Phase.REJECTED, **rejected)
    detail = waits.show(airflow.session, key)
    assert (detail.steps[1].name, detail.steps[1].note) == ("Rejected", "by ada: not ours")
    assert (detail.record.event, detail.record.sent_by, detail.record.reason) == (None, "ada", "not ours")
    assert not detail.takes_http_events  # any more
    assert airflow.found(Stage.RECORDED) == []
    airflow.set(key, state="scheduled", max_tries=4)
    detail = waits.show(airflow.session, key)
    assert (detail.record, detail.summary.phase) == (None, None)
    assert detail.takes_http_events


def test_a_long_event_is_cut_and_what_is_secret_in_one_is_masked(airflow):
    key = airflow.task("success", end_date=NOW)
    airflow.record(key, Phase.COMMITTED, event="x" * 60_000)
    record = waits.show(airflow.session, key).record
    assert record.event is None
    assert (len(record.preview), record.length) == (50_000, 60_002)
    airflow.record(airflow.task("success", task_id="other"), Phase.COMMITTED, event="é" * 40_000)
    [other] = waits.find(airflow.session, Stage.ENDED, task_id="other").waits
    assert waits.show(airflow.session, other.key).record.event == "é" * 40_000
    secret = airflow.task("success", end_date=NOW)
    airflow.record(secret, Phase.COMMITTED, event={"password": "hunter2"})
    assert waits.show(airflow.session, secret).record.event == {"password": "***"}


def test_an_event_of_a_class_that_this_process_cannot_make_is_shown_as_it_is_stored(airflow):
    key = airflow.task("success", end_date=NOW)
    stored = {"__classname__": "shop.Order", "__version__": 1, "__data__": {"n": 1}}
    airflow.record(key, Phase.COMMITTED, event=None)
    airflow.session.execute(update(EventWait).values(event=json.dumps(stored)))
    assert waits.show(airflow.session, key).record.event["__data__"] == {"n": 1}


def test_it_says_whether_a_living_triggerer_has_the_wait(airflow):
    fresh = airflow.triggerer(datetime.now(timezone.utc))
    stale = airflow.triggerer(NOW - timedelta(days=1))
    keys = [airflow.deferred(triggerer=triggerer) for triggerer in (fresh, stale, None)]
    keys.append(airflow.task("up_for_retry"))
    notes = [[s.note for s in waits.show(airflow.session, key).steps if s.name == "Waiting"] for key in keys]
    on_box = "in the triggerer on box"
    assert notes == [
        [on_box],
        [f"{on_box}, which has no heartbeat"],
        ["no triggerer has picked it up"],
        [""],
    ]


def test_a_parked_wait_has_no_triggerer_and_needs_none(airflow):
    key = airflow.task("deferred")
    # Rendered, with a secret that Airflow's masker knew where that was done, and does not know here.
    kwargs = {
        "listener": "airflow_events.listeners.http:HttpListener",
        "listener_kwargs": {"key": "of-a-connection"},
    }
    airflow.row(key, call="HttpListener(key='***')", parked=Trigger.encrypt_kwargs(kwargs))
    detail = waits.show(airflow.session, key)
    assert (detail.summary.parked, detail.summary.triggerer) == (True, None)
    assert detail.summary.call == detail.arguments.call == "HttpListener(key='***')"
    assert "secret" not in str(detail)
    [waiting] = [step for step in detail.steps if step.name == "Waiting"]
    assert waiting.note == "parked: it needs no triggerer, and the API server ends it"
    [listed] = waits.find(airflow.session, Stage.OPEN).waits
    assert listed == detail.summary


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


def taken(airflow, record_id, digest=b"a"):
    """That a source's event is of the wait with this record."""
    identity = hashlib.sha256(digest).digest()
    airflow.insert(EventTaken, identity=identity, content=identity, record_id=record_id, wait="shop", taken_at=NOW)


@pytest.mark.parametrize("phase", [Phase.RECORDED, Phase.COMMITTED, Phase.REJECTED])
@pytest.mark.parametrize("state", ["success", "failed", "up_for_retry", None])
def test_forgetting_drops_all_of_the_event_and_the_value_that_came_of_it(airflow, state, phase):
    key, other = airflow.task(state), airflow.task("success")
    for one, id in ((key, "7"), (other, "8")):
        airflow.record(one, phase, record_id=id, sent_by="ada", reason="so", receipt="{}", delivered_at=NOW)
        airflow.xcom(one, "return_value", 1)
        airflow.xcom(one, "event_record", first_edition())
        taken(airflow, id, id.encode())
    airflow.stored(key, "event_record", {"phase": "recorded"})
    airflow.stored(key, "event_lost", "6")
    assert waits.forget(airflow.session, key, by="ada") == waits.Forgotten(None)

    columns = ("phase", "event", "record_id", "recorded_at", "committed_at", "delivered_at", "sent_by", "reason")
    assert {airflow.column(key, name) for name in (*columns, "receipt", "record_clears")} == {None}
    assert airflow.column(key, "lost") == ("7" if phase == Phase.RECORDED else None)
    assert airflow.column(key, "generation") == 1  # the row stays
    assert waits.show(airflow.session, key).record is None
    assert airflow.names(key) == set()
    assert airflow.session.scalars(select(TaskStateStoreModel)).all() == []
    assert airflow.column(other, "phase") == phase
    assert airflow.names(other) == {"return_value", "event_record"}
    kept = ["8"] if phase == Phase.RECORDED else ["7", "8"]  # what is committed nobody else may deliver
    assert sorted(airflow.session.scalars(select(EventTaken.record_id))) == kept
    assert "Nothing is recorded" in waits.forget(airflow.session, key, by="ada").refused


def test_a_wait_whose_event_was_forgotten_waits_again_and_may_take_the_same(airflow):
    """With the inbox's own transactions on both sides of it."""
    key, digest = airflow.deferred(), hashlib.sha256(b"a").hexdigest()
    ti = airflow.id(key)
    arrived = {"event": "1", "identity": digest, "content": digest}

    def record(ti, id, generation):
        return transactions.record(
            airflow.session, [RecordEntry(ti, generation=generation, record_id=id, **arrived)]
        )[0].status

    def begin(ti):
        return transactions.begin(airflow.session, [Begin(ti, listener="L", call="L()", holder="box:1")])[0]

    assert begin(ti).generation == 1
    assert record(ti, "r", 1) == Status.DONE
    airflow.set(key, state="failed")
    assert waits.forget(airflow.session, key, by="ada").refused is None
    airflow.set(key, state="deferred", max_tries=4, try_number=2)
    again = begin(ti)
    assert (again.stored, again.superseded, again.lost, again.generation) == (None, None, "r", 2)
    end = [Finish(ti, generation=1, record_id="r", end=End())]
    assert transactions.finish(airflow.session, end)[0].status == Status.OUTLIVED
    assert record(ti, "s", 2) == Status.DONE
    assert airflow.column(key, "record_id") == "s"


@pytest.mark.parametrize("state", ["scheduled", "queued", "running", "deferred"])
def test_nothing_is_forgotten_while_the_task_is_at_work(airflow, state):
    key = airflow.task(state)
    airflow.record(key)
    taken(airflow, "r")
    assert state in waits.forget(airflow.session, key, by="ada").refused
    assert state in waits.show(airflow.session, key).cannot_forget
    assert airflow.column(key, "phase") == "recorded"
    assert airflow.session.scalars(select(EventTaken.record_id)).all() == ["r"]


def test_forgetting_nothing_says_so(airflow):
    assert "Nothing is recorded" in waits.forget(airflow.session, airflow.task("failed"), by="ada").refused
    assert waits.forget(airflow.session, ("no", "such", "wait", -1), by="ada") is None


def test_what_the_first_edition_recorded_is_not_shown_and_can_be_forgotten(airflow):
    in_xcom, by_worker, at_work = airflow.task("failed"), airflow.task("success"), airflow.task("deferred")
    airflow.xcom(in_xcom, "event_record", first_edition())
    airflow.stored(
        by_worker,
        "event_record",
        {"phase": "committed", "event": EVENT, "id": "8", "recorded_at": NOW.isoformat()},
    )
    airflow.xcom(at_work, "event_record", first_edition())
    for key in (in_xcom, by_worker):
        assert waits.show(airflow.session, key).record is None
        assert waits.forget(airflow.session, key, by="ada").refused is None
        assert airflow.names(key) == set()
        assert "Nothing is recorded" in waits.forget(airflow.session, key, by="ada").refused
    assert airflow.found(Stage.RECORDED) == []
    assert (airflow.column(in_xcom, "lost"), airflow.column(by_worker, "lost")) == ("7", None)
    # What is at work takes it over itself, with whatever else is recorded until then.
    assert "deferred" in waits.forget(airflow.session, at_work, by="ada").refused
    rows = airflow.session.scalars(select(EventWait.run_id).where(EventWait.run_id == at_work[1])).all()
    assert rows == []


def test_a_task_that_waits_for_many_has_a_place_for_each_event(airflow):
    calls = {"calls": Calls([{"n": n} for n in range(3)], {}).encode(), "count": 3}
    trigger = Trigger("airflow_events.triggers.events.EventsTrigger", {"listener": "x:D", **calls})
    airflow.session.add(trigger)
    airflow.session.flush()
    key = airflow.task("deferred", trigger_id=trigger.id, operator="WaitForEventsOperator")
    airflow.row(key, call="D, 3 times")

    def shown():
        detail = waits.show(airflow.session, key)
        assert [wait for stage in Stage for wait in waits.find(airflow.session, stage).waits] == [detail.summary]
        return detail, detail.summary, {step.name: step.done for step in detail.steps}

    detail, summary, steps = shown()
    assert (summary.arrived, summary.wanted, summary.phase, detail.record) == (0, 3, None, None)
    airflow.record(key, Phase.COMMITTED, place=2, record_id="a")
    detail, summary, steps = shown()
    assert (summary.arrived, summary.phase, summary.call) == (1, "committed", "D, 3 times")
    assert detail.record.event == {"2": {"order": 42, "at": NOW.isoformat()}}
    [note] = [step.note for step in detail.steps if step.name == "Waiting"]
    assert note == "1 of 3 arrived; no triggerer has picked it up"
    assert not steps["Recorded"]

    airflow.record(key, place=0, record_id="b", recorded_at=NOW + SECOND)
    airflow.row(key, place=1, phase=None)  # lost, and waited for again
    detail, summary, _ = shown()
    assert (summary.arrived, summary.phase, summary.stage) == (2, "recorded", Stage.RECORDED)
    assert (detail.record.phase, detail.record.recorded, detail.record.committed) == (
        "recorded",
        NOW + SECOND,
        None,
    )

    airflow.session.execute(update(EventWait).where(EventWait.place == 0).values(phase="committed"))
    airflow.session.execute(update(EventWait).where(EventWait.place == 1).values(phase="committed"))
    airflow.set(key, state="success", trigger_id=None, end_date=NOW + 4 * SECOND)
    summary = waits.show(airflow.session, key).summary
    assert (summary.arrived, summary.wanted, summary.seconds_to_delivery) == (3, None, 3)
    steps = waits.show(airflow.session, key).steps
    assert [(step.name, step.done) for step in steps] == [
        (name, True) for name in ("Begun", "Recorded", "Committed", "Delivered")
    ]


def test_all_events_of_a_task_that_waits_for_many_are_forgotten(airflow):
    key = airflow.task("failed", operator="WaitForEventsOperator")
    airflow.row(key)
    airflow.record(key, Phase.COMMITTED, place=0, record_id="a")
    airflow.record(key, Phase.RECORDED, place=1, record_id="b")
    taken(airflow, "a", b"a"), taken(airflow, "b", b"b")
    assert waits.forget(airflow.session, key, by="ada").refused is None
    assert [airflow.column(key, "phase", place) for place in (-1, 0, 1)] == [None] * 3
    assert [airflow.column(key, "lost", place) for place in (-1, 0, 1)] == [None, None, "b"]
    assert airflow.session.scalars(select(EventTaken.record_id)).all() == ["a"]  # which is committed
    assert waits.show(airflow.session, key).record is None
