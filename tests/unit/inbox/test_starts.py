"""Runs that events start, in each database, of DAGs that Airflow's own DAG processor has read."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import types
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

import airflow_events.waits as waits_of_airflow
import pytest
from airflow.dag_processing.collection import update_dag_parsing_results_in_db
from airflow.jobs.job import Job
from airflow.models.asset import (
    AssetActive,
    AssetDagRunQueue,
    AssetEvent,
    AssetModel,
    AssetWatcherModel,
    DagScheduleAssetReference,
)
from airflow.models.dag import DagModel
from airflow.models.dag_version import DagVersion
from airflow.models.dagbundle import DagBundleModel
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow.models.tasklog import LogTemplate
from airflow.models.trigger import Trigger
from airflow.sdk import DAG, Asset, AssetWatcher, Param
from airflow.sdk.bases.operator import BaseOperator
from airflow.serialization.serialized_objects import DagSerialization, LazyDeserializedDAG
from airflow_events import event_trigger, start_on
from airflow_events.inbox import starts, transactions
from airflow_events.inbox.entries import (
    Record,
    Settle,
    StartRoom,
    StartRun,
    Status,
    Told,
    answer_of,
    as_json,
    entry_of,
)
from airflow_events.inbox.models import EventStart, EventTaken
from airflow_events.listeners.directory import DirectoryListener
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

CONTENT, OTHER = (hashlib.sha256(text).hexdigest() for text in (b"a", b"b"))


def hexed(number):
    return hashlib.sha256(f"event {number}".encode()).hexdigest()


@dataclass
class Airflow:
    """What the DAG processor makes of DAGs, the inbox above it."""

    session: Session
    schedules: dict = field(default_factory=dict)

    def parse(self, *dag_ids, schedule=None, paused=False, **of_dag):
        """Read DAGs as the DAG processor does, all in one file; twice, since it makes no trigger of a new DAG."""
        if self.session.get(DagBundleModel, "b") is None:
            self.session.add(DagBundleModel(name="b"))
            if self.session.scalar(select(func.count()).select_from(LogTemplate)) == 0:
                self.session.add(LogTemplate(filename="", elasticsearch_id=""))
            self.session.flush()
        schedule = schedule or start_on(DirectoryListener, "drops")
        for _ in range(2):
            lazy = []
            for dag_id in dag_ids:
                with DAG(dag_id, schedule=schedule, **of_dag) as dag:
                    BaseOperator(task_id="one")
                    BaseOperator(task_id="two")
                dag.fileloc, dag.relative_fileloc = __file__, "f.py"
                lazy.append(LazyDeserializedDAG.from_dag(dag))
            errors = {}
            update_dag_parsing_results_in_db("b", None, lazy, errors, None, set(), self.session)
            assert not errors
            self.set_paused(*dag_ids, paused=paused)
            self.session.expire_all()

    def set_paused(self, *dag_ids, paused):
        self.set(*dag_ids, is_paused=paused)

    def set(self, *dag_ids, **values):
        table = DagModel.__table__
        self.session.execute(update(table).where(table.c.dag_id.in_(dag_ids)).values(**values))
        self.session.expire_all()

    @property
    def triggers(self):
        return list(self.session.scalars(select(Trigger.id).order_by(Trigger.id)))

    @property
    def trigger(self):
        [id] = self.triggers
        return id

    def room(self, up_to=None, trigger=None, **more):
        entry = StartRoom(trigger=trigger or self.trigger, up_to=up_to, **more)
        return self.carried(starts.room, entry)

    def start(self, *numbers, **more):
        return self.carried(starts.start, self.entry(*numbers, **more))

    def entry(self, *numbers, trigger=None, record_id=None, content=CONTENT, has_id=True, **more):
        told = [
            Told(json.dumps({"n": number}), *((hexed(number), content) if has_id else (None, None)))
            for number in numbers
        ]
        return StartRun(
            trigger=trigger or self.trigger,
            record_id=record_id or f"record {numbers[0]}",
            events=tuple(told),
            **more,
        )

    def carried(self, work, entry):
        [answer] = work(self.session, [entry_of(json.loads(json.dumps(as_json(entry))))])
        self.session.flush()
        return answer_of(json.loads(json.dumps(as_json(answer))))

    def runs(self, dag_id="order"):
        query = select(DagRun).where(DagRun.dag_id == dag_id).order_by(DagRun.id)
        return list(self.session.scalars(query.execution_options(populate_existing=True)))

    def end(self, run, state="success"):
        table = DagRun.__table__
        self.session.execute(update(table).where(table.c.id == run.id).values(state=state))

    def taken(self):
        query = select(EventTaken.identity, EventTaken.wait, EventTaken.acknowledged_at)
        return {row.identity.hex(): (row.wait, row.acknowledged_at) for row in self.session.execute(query)}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """A DAG that has changed is read and written at once."""
    monkeypatch.setenv("AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL", "0")
    starts._dag_bag.cache_clear()


@pytest.fixture
def airflow(session):
    return Airflow(session)


def test_an_event_starts_a_run(airflow):
    airflow.parse("order", max_active_runs=3)
    assert (airflow.room().status, airflow.room().room, airflow.room().dags) == (Status.DONE, 3, ("order",))
    answer = airflow.start(1)
    assert (answer.status, answer.room, answer.dags) == (Status.DONE, 2, ("order",))
    [run] = airflow.runs()
    assert (run.state, run.run_type, run.conf) == ("queued", "asset_triggered", {"event": {"n": 1}})
    assert run.run_id == f"event__{run.run_id[7:]}" and len(run.run_id) == 39
    assert run.created_dag_version.dag_id == "order" and run.logical_date is None
    assert sorted(ti.task_id for ti in run.task_instances) == ["one", "two"]
    assert airflow.taken() == {hexed(1): (f"order/{run.run_id}", None)}
    transactions.settle(airflow.session, [Settle("", identity=hexed(1))])
    assert airflow.taken()[hexed(1)][1] is not None


def test_the_same_event_starts_no_other_run(airflow):
    airflow.parse("order", max_active_runs=3)
    assert airflow.start(1).status == Status.DONE
    assert airflow.start(1).status == Status.DONE  # the same request, whose answer was lost
    again = airflow.start(1, record_id="another")
    assert (again.status, again.message, again.room) == (Status.TAKEN, f"order/{airflow.runs()[0].run_id}", 2)
    assert len(airflow.runs()) == 1


def test_within_a_batch_too(airflow):
    airflow.parse("order", max_active_runs=3)
    entries = [airflow.entry(1), airflow.entry(1, record_id="another"), airflow.entry(2)]
    answers = starts.start(airflow.session, entries)
    assert [answer.status for answer in answers] == [Status.DONE, Status.TAKEN, Status.DONE]
    assert {answer.room for answer in answers} == {1}
    assert [run.conf["event"]["n"] for run in airflow.runs()] == [1, 2]


def test_airflows_own_key_keeps_what_the_inbox_has_forgotten(airflow):
    airflow.parse("order", max_active_runs=3)
    airflow.start(1)
    airflow.session.execute(delete(EventTaken))
    again = airflow.start(1, record_id="another")
    assert (again.status, again.message) == (Status.TAKEN, f"order/{airflow.runs()[0].run_id}")
    assert len(airflow.runs()) == 1


def test_an_event_without_an_id_starts_a_run_for_each_delivery(airflow):
    airflow.parse("order", max_active_runs=3)
    assert airflow.start(1, has_id=False).status == Status.DONE
    assert airflow.start(1, has_id=False).status == Status.DONE  # its answer was lost
    assert len(airflow.runs()) == 1
    assert airflow.start(1, has_id=False, record_id="another").status == Status.DONE
    assert len(airflow.runs()) == 2
    assert airflow.taken() == {}


def test_an_id_with_another_content_is_another_event(airflow, caplog):
    airflow.parse("order", max_active_runs=3)
    airflow.start(1)
    assert airflow.start(1, record_id="another", content=OTHER).status == Status.DONE
    assert len(airflow.runs()) == 2
    assert "with another content" in caplog.text
    for content in (CONTENT, OTHER):  # both are known
        assert airflow.start(1, record_id="third", content=content).status == Status.TAKEN
    assert len(airflow.runs()) == 2


def test_what_a_wait_has_starts_no_run_and_the_other_way_round(airflow, waits):
    airflow.parse("order", max_active_runs=3)
    waits.runs = 100
    ti = waits.deferred()
    waits.begin(ti)
    assert waits.record(ti, 1, identity=hexed(1), content=CONTENT).status == Status.DONE
    answer = airflow.start(1)
    assert (answer.status, answer.message) == (Status.TAKEN, "shop/run_101/wait/-1")
    airflow.start(2)
    waits.runs = 200
    other = waits.deferred()
    waits.begin(other)
    [answer] = transactions.record(
        airflow.session,
        [Record(other, generation=1, record_id="r", event="1", identity=hexed(2), content=CONTENT)],
    )
    assert answer.status == Status.TAKEN


def test_no_more_is_taken_than_there_is_room_for(airflow):
    airflow.parse("order", max_active_runs=2)
    assert [airflow.start(number).status for number in (1, 2, 3)] == [Status.DONE, Status.DONE, Status.FULL]
    assert (airflow.room().room, airflow.room().message) == (0, "order has 2 active runs")
    assert airflow.room(up_to=5).room == 3
    assert airflow.start(3, up_to=3).status == Status.DONE
    assert airflow.start(4, up_to=3).status == Status.FULL
    for run in airflow.runs():
        airflow.end(run)
    assert (airflow.room().room, airflow.room().message) == (2, "")
    assert airflow.start(4).status == Status.DONE
    assert hexed(4) in airflow.taken()


def test_a_batch_takes_what_there_is_room_for(airflow):
    airflow.parse("order", max_active_runs=2)
    answers = starts.start(airflow.session, [airflow.entry(number) for number in range(4)])
    assert [answer.status for answer in answers] == [Status.DONE, Status.DONE, Status.FULL, Status.FULL]
    assert len(airflow.runs()) == len(airflow.taken()) == 2


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"is_paused": True}, "order is paused"),
        ({"has_import_errors": True}, "the file of order has import errors"),
    ],
)
def test_a_dag_that_is_paused_or_broken_takes_nothing_and_goes_on(airflow, values, why):
    airflow.parse("order", max_active_runs=2)
    airflow.set("order", **values)
    assert (airflow.room().room, airflow.room().message) == (0, why)
    assert airflow.start(1).status == Status.FULL
    assert airflow.runs() == [] and airflow.taken() == {}
    airflow.set("order", **dict.fromkeys(values, False))
    assert airflow.start(1).status == Status.DONE


def test_a_dag_that_is_gone_takes_nothing(airflow):
    airflow.parse("order")
    airflow.set("order", is_stale=True)
    assert airflow.room().status == airflow.start(1).status == Status.OUTLIVED
    assert airflow.room(trigger=12345).status == Status.OUTLIVED
    assert airflow.runs() == []


def test_two_dags_of_one_schedule_have_a_run_each_or_none(airflow):
    airflow.parse("order", "audit", max_active_runs=2)
    assert airflow.start(1).dags == ("audit", "order")
    [order], [audit] = airflow.runs(), airflow.runs("audit")
    assert order.run_id == audit.run_id
    assert airflow.taken()[hexed(1)][0] == f"audit/{order.run_id}, order/{order.run_id}"
    airflow.set_paused("audit", paused=True)
    assert (airflow.start(2).status, airflow.room().message) == (Status.FULL, "audit is paused")
    airflow.set("audit", is_stale=True)  # which is then no reason to wait
    assert airflow.start(2).status == Status.DONE
    assert (len(airflow.runs()), len(airflow.runs("audit"))) == (2, 1)


def test_an_event_that_the_params_refuse_is_not_taken_and_harms_no_other(airflow):
    """A param whose name is event gives events a schema."""
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 2}}}
    airflow.parse("order", params={"event": Param({"n": 2}, **schema)}, max_active_runs=3)
    answers = starts.start(airflow.session, [airflow.entry(1), airflow.entry(2)])
    assert [answer.status for answer in answers] == [Status.REJECTED, Status.DONE]
    assert "less than the minimum" in answers[0].message
    assert [run.conf["event"]["n"] for run in airflow.runs()] == [2]
    assert airflow.taken().keys() == {hexed(2)}


def test_of_a_key_one_run_is_active_at_a_time(airflow):
    airflow.parse("order", max_active_runs=9)
    assert airflow.start(1, key="x").status == Status.DONE
    [first] = airflow.runs()
    assert first.conf == {"event": {"n": 1}, "key": "x"}
    waits = airflow.start(2, key="x")
    assert (waits.status, waits.message, waits.room) == (Status.BUSY, f"order/{first.run_id} is active", 8)
    assert airflow.start(1, record_id="again", key="x").status == Status.TAKEN
    others = [airflow.start(3, key="y"), airflow.start(4, key="7"), airflow.start(5)]
    assert {answer.status for answer in others} == {Status.DONE}
    airflow.end(first, "running")
    assert airflow.start(2, key="x").status == Status.BUSY
    airflow.end(first, "failed")
    assert airflow.start(2, key="x").status == Status.DONE
    airflow.end(first, "queued")  # it is cleared; both are there by then
    assert airflow.start(6, key="x").status == Status.BUSY
    assert [run.conf["event"]["n"] for run in airflow.runs()] == [1, 3, 4, 5, 2]


def test_of_a_key_one_run_is_made_in_one_transaction_too(airflow):
    airflow.parse("order", max_active_runs=9)
    entries = [airflow.entry(number, key="x") for number in range(3)]
    assert [answer.status for answer in starts.start(airflow.session, entries)] == [
        Status.DONE, Status.BUSY, Status.BUSY,
    ]  # fmt: skip
    assert airflow.taken().keys() == {hexed(0)}


def test_a_run_has_the_logical_date_that_its_event_says(airflow):
    airflow.parse("order", "other", max_active_runs=9)
    moment = datetime(2026, 11, 28, 12, 0, 0, 999_999, tzinfo=timezone.utc)
    for number in range(3):
        assert airflow.start(number, logical_date=moment.isoformat()).status == Status.DONE
    for dag_id in ("order", "other"):
        runs = airflow.runs(dag_id)
        dates = [moment + timedelta(microseconds=number) for number in range(3)]
        assert [run.logical_date for run in runs] == dates
        assert [(run.data_interval_start, run.data_interval_end) for run in runs] == [(d, d) for d in dates]


def test_what_airflow_refuses_leaves_nothing(airflow, monkeypatch):
    airflow.parse("order", max_active_runs=3)
    monkeypatch.setenv("AIRFLOW__SCHEDULER__ALLOWED_RUN_ID_PATTERN", "^never$")
    answer = airflow.start(1)
    assert answer.status == Status.INVALID and "does not match" in answer.message
    assert airflow.runs() == [] and airflow.taken() == {}
    assert airflow.session.scalar(select(func.count()).select_from(TaskInstance)) == 0


def test_a_transaction_that_airflow_gives_up_takes_no_event(airflow, monkeypatch):
    """Where it cannot make task instances it rolls back, and goes on as if nothing were."""
    airflow.parse("order", max_active_runs=3)
    made = starts._create_run

    def give_up(batch, *arguments):
        made(batch, *arguments)
        batch.session.rollback()

    monkeypatch.setattr(starts, "_create_run", give_up)
    with pytest.raises(RuntimeError, match="given up the transaction"):
        airflow.start(1)


def test_a_run_is_made_of_the_latest_version_of_the_dag(airflow):
    airflow.parse("order", max_active_runs=5)
    airflow.start(1)
    airflow.parse("order", max_active_runs=5, tags=["another"])
    airflow.start(2)
    first, second = airflow.runs()
    assert (first.created_dag_version.version_number, second.created_dag_version.version_number) == (1, 2)


@pytest.mark.parametrize("rules", [{}, {"match": {"name": "a"}, "key": "name", "logical_date": "modified"}])
def test_parsing_again_leaves_the_trigger_as_it_is(airflow, rules):
    """Airflow compares triggers by a hash of what they were serialized to, and by what it reads from its row."""
    airflow.parse("order", schedule=start_on.override(up_to=4, **rules)(DirectoryListener, "drops", settle=0.5))
    before = airflow.trigger
    airflow.parse("order", schedule=start_on.override(up_to=4, **rules)(DirectoryListener, "drops", settle=0.5))
    assert airflow.trigger == before
    [name] = airflow.session.scalars(select(AssetModel.name))
    assert name.startswith("DirectoryListener('drops', settle=0.5) up_to=4")


def test_another_schedule_is_another_trigger(airflow):
    airflow.parse("order")
    before = airflow.trigger
    airflow.parse("order", schedule=start_on(DirectoryListener, "others"))
    watched = airflow.session.scalars(select(AssetWatcherModel.trigger_id)).all()
    assert len(watched) >= 1 and airflow.room(trigger=watched[-1]).room
    assert airflow.start(1, trigger=before).status == Status.OUTLIVED


def test_a_batch_starts_one_run(airflow):
    airflow.parse("order", max_active_runs=3)
    assert airflow.start(1, 2, 3, makes="batch").room == 2
    [run] = airflow.runs()
    assert run.conf == {"events": [{"n": 1}, {"n": 2}, {"n": 3}]}
    assert {wait for wait, _ in airflow.taken().values()} == {f"order/{run.run_id}"} and len(airflow.taken()) == 3
    assert airflow.start(1, 2, 3, makes="batch").status == Status.DONE  # its answer was lost
    assert airflow.start(3, 2, 1, makes="batch", record_id="another").status == Status.TAKEN
    assert len(airflow.runs()) == 1


def test_a_batch_has_both_of_two_events_with_one_id(airflow):
    airflow.parse("order", max_active_runs=3)
    told = [Told(json.dumps(word), hexed(1), content) for word, content in (("a", CONTENT), ("b", OTHER))]
    for record_id, status in (("r", Status.DONE), ("r", Status.DONE), ("another", Status.TAKEN)):
        entry = StartRun(trigger=airflow.trigger, record_id=record_id, makes="batch", events=tuple(told))
        assert airflow.carried(starts.start, entry).status == status
    [run] = airflow.runs()
    assert run.conf["events"] == ["a", "b"]
    assert len(airflow.taken()) == 2


def test_a_batch_is_without_what_has_started_a_run_and_what_comes_twice(airflow):
    airflow.parse("order", max_active_runs=3)
    airflow.start(2, makes="batch")
    assert airflow.start(1, 2, 3, 3, makes="batch", record_id="another").status == Status.DONE
    assert [run.conf["events"] for run in airflow.runs()] == [[{"n": 2}], [{"n": 1}, {"n": 3}]]


def watched(name="orders"):
    return Asset(name, watchers=[AssetWatcher("files", event_trigger(DirectoryListener, "drops"))])


def asset_events(airflow):
    query = select(AssetModel.name, AssetEvent.extra).join(AssetModel, AssetModel.id == AssetEvent.asset_id)
    return [tuple(row) for row in airflow.session.execute(query.order_by(AssetEvent.id))]


def queued(airflow):
    return airflow.session.scalars(select(AssetDagRunQueue.target_dag_id)).all()


def test_an_event_becomes_one_asset_event(airflow):
    airflow.parse("order", schedule=watched(), max_active_runs=1)
    assert airflow.room(makes="asset_event").room == 64
    answer = airflow.start(1, makes="asset_event")
    assert (answer.status, answer.room, answer.dags) == (Status.DONE, 64, ("order",))
    assert asset_events(airflow) == [("orders", {"from_trigger": True, "payload": {"n": 1}})]
    assert queued(airflow) == ["order"] and airflow.runs() == []
    assert airflow.taken() == {hexed(1): ("asset orders", None)}
    assert airflow.start(1, makes="asset_event").status == Status.DONE  # its answer was lost
    assert airflow.start(1, makes="asset_event", record_id="another").status == Status.TAKEN
    airflow.start(2, makes="asset_event")
    assert len(asset_events(airflow)) == 2


def test_an_event_without_an_id_becomes_one_asset_event_though_its_answer_is_lost(airflow):
    airflow.parse("order", schedule=watched())
    for _ in range(2):
        assert airflow.start(1, makes="asset_event", has_id=False).status == Status.DONE
    assert len(asset_events(airflow)) == 1
    airflow.start(1, makes="asset_event", has_id=False, record_id="another")
    assert len(asset_events(airflow)) == 2


def test_no_asset_event_is_made_for_a_paused_dag(airflow):
    airflow.parse("order", schedule=watched())
    airflow.set_paused("order", paused=True)
    answer = airflow.start(1, makes="asset_event")
    assert (answer.status, answer.message) == (Status.FULL, "order is paused")
    assert asset_events(airflow) == [] and airflow.taken() == {}


def test_what_a_later_version_makes_of_events_is_refused(airflow):
    airflow.parse("order")
    assert airflow.start(1, makes="coffee").status == Status.INVALID
    assert airflow.taken() == {}


def test_what_starts_runs_is_listed(airflow):
    def listed():
        [start] = waits_of_airflow.starts(airflow.session)
        return start

    airflow.parse("order", schedule=start_on.override(up_to=2)(DirectoryListener, "drops"))
    assert listed().asset == "DirectoryListener('drops') up_to=2"
    assert (listed().state, listed().up_to) == ("no triggerer", 2)
    now = datetime.now(timezone.utc)
    job = Job(job_type="TriggererJob", state="running", hostname="box", latest_heartbeat=now)
    airflow.session.add(job)
    airflow.session.flush()
    airflow.session.execute(update(Trigger).values(triggerer_id=job.id))
    assert (listed().state, listed().active, listed().last_run, listed().last_event) == ("open", 0, None, None)
    assert listed().triggerer.hostname == "box"
    airflow.room(up_to=2)
    assert airflow.session.scalars(select(EventStart)).all() == []  # it has told nothing
    airflow.room(up_to=2, lag=12)
    assert (listed().state, listed().lag, listed().trouble) == ("open", 12, None)
    airflow.room(up_to=2, trouble="its broker is unreachable")
    assert (listed().state, listed().lag, listed().trouble) == ("failing", None, "its broker is unreachable")
    airflow.room(up_to=2, lag=3)
    assert (listed().state, listed().lag, listed().trouble) == ("open", 3, None)
    assert waits_of_airflow.lags(airflow.session) == {"order": 3}
    airflow.session.execute(update(EventStart).values(told_at=now - timedelta(minutes=3)))
    airflow.session.expire_all()
    assert (listed().state, listed().lag) == ("open", None)  # its triggerer has not said so lately
    airflow.room(up_to=2, lag=3)
    assert listed().lag == 3
    for number in (1, 2):
        airflow.start(number)
    assert (listed().state, listed().active, listed().last_run) == ("full", 2, airflow.runs()[1].run_id)
    assert listed().last_event >= now
    airflow.set("order", has_import_errors=True)
    assert listed().state == "broken"
    airflow.parse("order", schedule=start_on.override(up_to=2)(DirectoryListener, "drops"), paused=True)
    assert listed().state == "paused"
    airflow.session.execute(delete(AssetWatcherModel))
    airflow.set_paused("order", paused=False)
    assert (listed().state, listed().up_to) == ("no trigger", 16)
    assert waits_of_airflow.starts(airflow.session, dag_ids=["another"]) == []
    airflow.set("order", is_stale=True)
    assert waits_of_airflow.starts(airflow.session) == []


@pytest.fixture
def committed_dag(engine):
    """A DAG that other transactions see; nothing is left of it."""
    with Session(engine) as session:
        airflow = Airflow(session)
        airflow.parse("order", max_active_runs=30)
        session.commit()
        yield airflow.trigger
        session.rollback()
        for table in (
            EventTaken, TaskInstance, DagRun, AssetWatcherModel, Trigger, DagScheduleAssetReference, AssetActive,
            AssetModel, DagVersion, DagModel, DagBundleModel,
        ):  # fmt: skip
            session.execute(delete(table).execution_options(synchronize_session=False))
        session.commit()


def test_of_two_servers_each_event_starts_one_run_and_no_more_than_there_is_room(engine, committed_dag):
    """They are told of the same 40 events at once, in opposite orders; there is room for 30."""
    found, start = [], threading.Barrier(2)

    def serve(number):
        entries = [
            StartRun(
                trigger=committed_dag,
                record_id=f"{number} {index}",
                events=(Told("1", hexed(index), CONTENT),),
            )
            for index in range(40)
        ]
        entries = entries[::-1] if number else entries
        start.wait()
        for first in range(0, 40, 10):
            found.extend(answer.status for answer in carry_out(engine, entries[first : first + 10]))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found.count(Status.DONE) == 30 and len(found) == 80
    with Session(engine) as session:
        assert session.scalar(select(func.count()).select_from(DagRun)) == 30
        assert session.scalar(select(func.count()).select_from(EventTaken)) == 30
        assert session.scalar(select(func.count()).select_from(TaskInstance)) == 60


def test_of_two_servers_one_starts_a_run_of_a_key(engine, committed_dag):
    found, start = [], threading.Barrier(2)

    def serve(number):
        start.wait()
        for index in range(number, 20, 2):
            told = Told("1", hexed(index), CONTENT)
            entry = StartRun(trigger=committed_dag, record_id=f"{index}", events=(told,), key="x")
            found.extend(answer.status for answer in carry_out(engine, [entry]))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (found.count(Status.DONE), found.count(Status.BUSY)) == (1, 19)
    with Session(engine) as session:
        assert session.scalar(select(func.count()).select_from(DagRun)) == 1


def carry_out(engine, entries):
    """Do as `database.in_transaction` does, on this engine."""
    for _ in range(8):
        try:
            with Session(engine) as session, session.begin():
                return starts.start(session, entries)
        except DBAPIError:
            continue
    raise AssertionError("the database gave up the transaction eight times")


def test_a_serialized_dag_says_what_starts_its_runs():
    with DAG("order", schedule=start_on(DirectoryListener, "drops")) as dag:
        pass
    watcher = DagSerialization.to_dict(dag)["dag"]["timetable"]["__var"]["asset_condition"]["watchers"][0]
    assert watcher["trigger"] == {
        "classpath": "airflow_events.triggers.starts.StartTrigger",
        "kwargs": {
            "listener": "airflow_events.listeners.directory:DirectoryListener",
            "arguments": '[["drops"], {}]',
            "up_to": None,
            "makes": "run",
            "batch": 1,
            "within": 0.0,
        },
    }


@pytest.mark.parametrize("at", ["2026-10-31T00:00:00+00:00", "2026-12-02T00:00:00+00:00"])
def test_no_run_is_made_of_which_airflow_makes_no_task(airflow, at):
    schedule = start_on.override(logical_date="at")(DirectoryListener, "drops")
    span = {
        "start_date": datetime(2026, 11, 1, tzinfo=timezone.utc),
        "end_date": datetime(2026, 12, 1, tzinfo=timezone.utc),
    }
    airflow.parse("order", schedule=schedule, **span)
    answer = airflow.start(1, logical_date=at)
    assert (answer.status, airflow.runs(), airflow.taken()) == (Status.REJECTED, [], {})
    assert airflow.start(2, logical_date="2026-11-01T00:00:00+00:00").status == Status.DONE
    assert airflow.start(3).status == Status.DONE
    assert [len(run.task_instances) for run in airflow.runs()] == [2, 2]


def triggers_of(airflow, files):
    """Parse files, twice each, and return the triggers of the assets by their names."""
    s = airflow.session
    s.add(DagBundleModel(name="b"))
    if s.scalar(select(func.count()).select_from(LogTemplate)) == 0:
        s.add(LogTemplate(filename="", elasticsearch_id=""))
    s.flush()
    for _ in range(2):
        for file, dags in files.items():
            lazy = []
            for dag_id, schedule in dags.items():
                with DAG(dag_id, schedule=schedule) as dag:
                    BaseOperator(task_id="t")
                dag.fileloc, dag.relative_fileloc = __file__, file
                lazy.append(LazyDeserializedDAG.from_dag(dag))
            errors = {}
            update_dag_parsing_results_in_db("b", None, lazy, errors, None, set(), s)
            assert not errors
            airflow.set_paused(*dags, paused=False)
            s.expire_all()
    query = select(AssetModel.name, AssetWatcherModel.trigger_id).join(AssetWatcherModel)
    return dict(s.execute(query).all())


@pytest.mark.parametrize("in_one_file", [True, False])
def test_two_names_share_the_events_out(airflow, in_one_file):
    one, two = (start_on.override(name=name)(DirectoryListener, "drops") for name in ("one", "two"))
    triggers = triggers_of(
        airflow,
        {"a.py": {"one": one, "two": two}} if in_one_file else {"a.py": {"one": one}, "b.py": {"two": two}},
    )
    assert triggers["one"] != triggers["two"]
    assert airflow.start(1, trigger=triggers["one"]).dags == ("one",)
    assert (len(airflow.runs("one")), len(airflow.runs("two"))) == (1, 0)


def test_what_is_held_up_by_another_dag_is_not_open(airflow):
    airflow.parse("order", "audit", max_active_runs=2)
    s = airflow.session
    job = Job(
        job_type="TriggererJob", state="running", hostname="box", latest_heartbeat=datetime.now(timezone.utc)
    )
    s.add(job)
    s.flush()
    s.execute(update(Trigger).values(triggerer_id=job.id))
    assert [one.state for one in waits_of_airflow.starts(s)] == ["open", "open"]
    airflow.set_paused("audit", paused=True)
    assert airflow.room().room == 0
    assert {one.dag_id: one.state for one in waits_of_airflow.starts(s)} == {"audit": "paused", "order": "full"}
    [order] = waits_of_airflow.starts(s, dag_ids=["order"])
    assert order.state == "full"


def test_listeners_of_one_name_are_two_sources(airflow, monkeypatch):
    made = []
    for module in ("drops_of_a", "drops_of_b"):
        monkeypatch.setitem(sys.modules, module, here := types.ModuleType(module))
        here.Drops = type("Drops", (DirectoryListener,), {"__module__": module, "__qualname__": "Drops"})
        made.append(here.Drops)
    one, two = (start_on(listener, "drops") for listener in made)
    triggers = triggers_of(airflow, {"a.py": {"one": one}, "b.py": {"two": two}})
    assert len(triggers) == 2, triggers
    for name, trigger in triggers.items():
        assert len(airflow.room(trigger=trigger).dags) == 1, name
