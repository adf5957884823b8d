"""What the API server finds in Airflow's own database, in each database, and who gets it."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest
import uuid6
from airflow.models.asset import AssetEvent, AssetModel
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow_events.api import keys, seeking
from airflow_events.api.refusals import NoSuchWait
from airflow_events.inbox import transactions
from airflow_events.inbox.database import in_transaction
from airflow_events.inbox.entries import entry_of
from airflow_events.listeners.airflow import AssetListener, DagRunListener, TaskListener
from airflow_events.listeners.base import Wait, working_for
from airflow_events.operators.wait_for_event import WaitForEventOperator
from sqlalchemy import delete, event, func, insert, select, update

START = datetime(2026, 11, 29, 12, tzinfo=timezone.utc)
DAY = "2026-11-29T00:00:00+00:00"


def at(minutes):
    return START + timedelta(minutes=minutes)


class Deployment:
    """Waits for what happens in Airflow, and what happens there."""

    def __init__(self, http):
        self.http, self.session = http, http.session

    def wait(self, listener, *args, start=START, zone="UTC", trigger=None, **kwargs):
        """A wait that has begun, of a run that started then."""
        name = f"{listener.__module__}:{listener.__qualname__}"
        wait = self.http.add(begun=False, listener=name, dag_id="waits", **(trigger or {}))
        self.set_run(wait, start_date=start, created_at=start)
        self.begin(wait, listener, *args, zone=zone, **kwargs)
        return wait

    def begin(self, wait, listener, *args, zone="UTC", replay=True, **kwargs):
        with working_for(Wait("", "", "", timezone=zone)):
            address, sought = listener.address(*args, **kwargs), listener.sought(*args, **kwargs)
        told = {"operation": "begin", "ti": str(self.http.state(wait).id), "listener": listener.__name__}
        entry = entry_of(json.loads(json.dumps({**told, "address": address, "sought": sought, "replay": replay})))
        answer = transactions.begin(self.session, [entry])[0]
        self.session.commit()
        return answer

    def set_run(self, run, **columns):
        table = DagRun.__table__
        is_it = (table.c.dag_id == run.dag_id, table.c.run_id == run.run_id)
        self.session.execute(update(table).where(*is_it).values(**columns))
        self.session.commit()

    def run(self, dag_id, ended=None, state="success", **columns):
        number = (self.session.scalar(select(func.max(DagRun.id))) or 0) + 1
        values = {
            "id": number,
            "dag_id": dag_id,
            "run_id": f"run_{number}",
            "run_type": "scheduled",
            "state": state,
        }
        times = {"run_after": START, "start_date": START, "end_date": ended}
        self.session.execute(insert(DagRun.__table__).values(**{**values, **times, **columns}))
        self.session.commit()
        return values["run_id"]

    def task(self, dag_id, run_id, task_id, ended=None, state="success", map_index=-1):
        rest = {
            "try_number": 2,
            "max_tries": 3,
            "pool": "default_pool",
            "pool_slots": 1,
            "span_status": "not_started",
        }
        self.session.execute(
            insert(TaskInstance.__table__).values(
                id=uuid6.uuid7(), dag_id=dag_id, run_id=run_id, task_id=task_id, map_index=map_index, state=state,
                start_date=START, end_date=ended, **rest,
            )
        )  # fmt: skip
        self.session.commit()

    def update(self, name, when, *, extra=None, partition=None):
        asset = self.session.scalar(select(AssetModel).where(AssetModel.name == name))
        if asset is None:
            asset = AssetModel(name=name, uri=f"s3://bucket/{name}", group="asset", extra={})
            self.session.add(asset)
            self.session.flush()
        happened = AssetEvent(
            asset_id=asset.id, extra=extra or {}, timestamp=when, partition_key=partition, source_dag_id="loader",
            source_run_id="r", source_task_id="publish", source_map_index=-1,
        )  # fmt: skip
        self.session.add(happened)
        self.session.commit()

    def look(self):
        reached = seeking.look_once()
        self.session.rollback()
        return reached

    def got(self, wait):
        self.session.rollback()
        return self.http.xcoms(wait).get("return_value")


@pytest.fixture
def airflow(http_committed):
    yield Deployment(http_committed)
    http_committed.session.rollback()
    for table in (AssetEvent, AssetModel):
        http_committed.session.execute(delete(table))
    http_committed.session.commit()


def test_the_first_run_that_ends_well_since_the_run_has_started(airflow):
    airflow.run("loader", at(-1))
    airflow.run("other", at(1))
    airflow.run("loader", at(1), state="failed")
    airflow.run("loader", None, state="running")
    wait = airflow.wait(DagRunListener, "loader")
    assert airflow.look() == []
    airflow.run("loader", at(3))
    run_id = airflow.run("loader", at(2), logical_date=at(-9), partition_key="p")
    assert airflow.look() == [wait.id]
    assert airflow.got(wait) == {
        "dag_id": "loader",
        "run_id": run_id,
        "run_type": "scheduled",
        "state": "success",
        "logical_date": "2026-11-29T11:51:00+00:00",
        "data_interval_start": None,
        "data_interval_end": None,
        "run_after": "2026-11-29T12:00:00+00:00",
        "start_date": "2026-11-29T12:00:00+00:00",
        "end_date": "2026-11-29T12:02:00+00:00",
        "partition_key": "p",
    }
    assert airflow.http.state(wait).state == "success"
    assert airflow.http.audit(wait) == [("event sent", "airflow")]
    assert airflow.look() == []


@pytest.mark.parametrize(
    ("since", "zone", "found"),
    [
        (None, "UTC", 0),
        (timedelta(minutes=-20), "UTC", -20),
        ("PT1M", "UTC", 10),
        (timedelta(minutes=1), "UTC", 10),
        ("2026-11-29T11:30:00+00:00", "UTC", -20),
        ("2026-11-29T12:30:00", "Europe/Berlin", -20),  # which is 11:30 in UTC
        (START.timestamp() + 300, "UTC", 10),
        ("1890-01-01", "UTC", -40),
        ("2999-01-01", "UTC", None),
    ],
)
def test_since_is_a_moment_or_counts_from_the_start_of_the_run(airflow, since, zone, found):
    for minutes in (10, 0, -20, -40):
        airflow.run("loader", at(minutes))
    wait = airflow.wait(DagRunListener, "loader", since=since, zone=zone)
    assert airflow.look() == ([wait.id] if found is not None else [])
    assert (airflow.got(wait) or {}).get("end_date") == (None if found is None else at(found).isoformat())


def test_one_occurrence_is_for_all_and_each_gets_the_first_since_its_own_start(airflow):
    early, late, later = (airflow.wait(DagRunListener, "loader", start=at(minutes)) for minutes in (0, 5, 15))
    airflow.run("loader", at(3))
    airflow.run("loader", at(10))
    assert sorted(airflow.look()) == sorted([early.id, late.id])
    assert [airflow.got(wait)["end_date"] for wait in (early, late)] == [at(3).isoformat(), at(10).isoformat()]
    assert airflow.got(later) is None


def test_a_run_of_a_date_or_an_id_is_found_whenever_it_ended(airflow):
    run_id = airflow.run("loader", at(-500), logical_date=datetime.fromisoformat(DAY))
    airflow.run("loader", at(1))
    by_date = airflow.wait(DagRunListener, "loader", logical_date=DAY)
    by_id = airflow.wait(DagRunListener, "loader", run_id=run_id)
    in_berlin = airflow.wait(DagRunListener, "loader", logical_date="2026-11-29 01:00:00", zone="Europe/Berlin")
    not_yet = airflow.wait(DagRunListener, "loader", logical_date="2026-11-30")
    not_again = airflow.wait(DagRunListener, "loader", run_id=run_id, since=START)
    assert sorted(airflow.look()) == sorted(wait.id for wait in (by_date, by_id, in_berlin))
    assert {airflow.got(wait)["run_id"] for wait in (by_date, by_id, in_berlin)} == {run_id}
    assert airflow.got(not_yet) is airflow.got(not_again) is None


def test_a_run_that_fails_or_any_that_ends(airflow):
    failed = airflow.wait(DagRunListener, "loader", state="failed")
    any_end = airflow.wait(DagRunListener, "loader", state=["failed", "success"])
    airflow.run("loader", at(1))
    assert airflow.look() == [any_end.id]
    airflow.run("loader", at(2), state="failed")
    assert airflow.look() == [failed.id]
    assert [airflow.got(wait)["state"] for wait in (any_end, failed)] == ["success", "failed"]


def test_a_task_that_ends(airflow):
    run_id = airflow.run("loader", None, state="running", logical_date=datetime.fromisoformat(DAY))
    wait = airflow.wait(TaskListener, "loader", "publish")
    of_date = airflow.wait(TaskListener, "loader", "publish", logical_date=DAY, state=["success", "failed"])
    mapped = airflow.wait(TaskListener, "loader", "publish", map_index=1)
    skipped = airflow.wait(TaskListener, "loader", "other", state="skipped")
    airflow.task("loader", run_id, "other", at(1), "success")
    airflow.task("loader", run_id, "publish", at(1), "success", map_index=0)
    assert airflow.look() == []
    airflow.task("loader", run_id, "publish", at(2))
    airflow.task("loader", run_id, "publish", at(3), map_index=1)
    assert sorted(airflow.look()) == sorted([wait.id, of_date.id, mapped.id])
    got = airflow.got(wait)
    duration = got.pop("duration")
    assert duration is None
    assert got == {
        "dag_id": "loader",
        "run_id": run_id,
        "task_id": "publish",
        "map_index": -1,
        "state": "success",
        "try_number": 2,
        "logical_date": DAY,
        "start_date": START.isoformat(),
        "end_date": at(2).isoformat(),
    }
    assert airflow.got(mapped)["map_index"] == 1
    assert airflow.got(skipped) is None


def test_an_asset_that_is_updated(airflow):
    by_name = airflow.wait(AssetListener, "orders")
    by_uri = airflow.wait(AssetListener, uri="s3://bucket/orders/")  # as which Airflow does not store it
    partition = airflow.wait(AssetListener, "orders", partition="2026-11-29")
    airflow.update("orders", at(-1))
    airflow.update("others", at(1))
    assert airflow.look() == []
    airflow.update("orders", at(1), extra={"rows": 17})
    airflow.update("orders", at(2), partition="2026-11-29", extra={"a": "\0"})
    assert sorted(airflow.look()) == sorted([by_name.id, by_uri.id, partition.id])
    got = airflow.got(by_name)
    assert got.pop("id") > 0
    assert got == {
        "name": "orders",
        "uri": "s3://bucket/orders",
        "timestamp": at(1).isoformat(),
        "extra": {"rows": 17},
        "partition_key": None,
        "source_dag_id": "loader",
        "source_run_id": "r",
        "source_task_id": "publish",
        "source_map_index": -1,
    }
    # What Airflow could not give back is left out, and fails nobody.
    assert (airflow.got(partition)["partition_key"], airflow.got(partition)["extra"]) == ("2026-11-29", None)


def test_a_clear_delivers_the_same_and_a_retry_looks_since_the_same_moment(airflow):
    airflow.run("loader", at(1))
    wait = airflow.wait(DagRunListener, "loader")
    airflow.look()
    first = airflow.got(wait)
    # What a clear of the run does to its start.
    airflow.set_run(wait, start_date=at(60))
    airflow.run("loader", at(61))
    airflow.http.again(wait, cleared=True, begun=False)
    answer = airflow.begin(wait, DagRunListener, "loader")
    assert json.loads(answer.stored.event) == first
    other = airflow.wait(DagRunListener, "never")
    airflow.set_run(other, start_date=at(60))
    airflow.http.again(other, cleared=False, begun=False)
    airflow.begin(other, DagRunListener, "never")
    airflow.run("never", at(1))
    assert airflow.look() == [other.id]


def test_nothing_is_looked_for_without_a_wait_that_is_open(airflow):
    airflow.run("loader", at(1))
    ended = airflow.wait(DagRunListener, "loader")
    airflow.http.set(ended, state="failed")
    begins_again = airflow.wait(DagRunListener, "loader")
    airflow.http.again(begins_again, cleared=True, begun=False)
    other = airflow.http.add("key")
    airflow.session.commit()
    said, engine = [], airflow.session.get_bind()

    def note(conn, cursor, statement, parameters, context, many):
        said.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        assert airflow.look() == []
    finally:
        event.remove(engine, "before_cursor_execute", note)
    selects = [statement for statement in said if statement.lstrip().upper().startswith("SELECT")]
    assert len(selects) == 1
    assert airflow.http.state(other).state == "deferred"


def test_many_waits_are_few_queries(airflow, monkeypatch):
    monkeypatch.setattr(seeking, "_AT_ONCE", 4)
    monkeypatch.setattr(seeking, "_FIRST", 2)
    monkeypatch.setattr(seeking, "_GIVEN_AT_ONCE", 3)
    waits = [airflow.wait(DagRunListener, f"loader_{number % 6}", start=at(number)) for number in range(12)]
    for number in range(6):
        for minutes in (3, 8, 20):
            airflow.run(f"loader_{number}", at(minutes))
    reached = airflow.look()
    while more := airflow.look():
        reached += more
    assert sorted(reached) == sorted(wait.id for wait in waits)
    ends = [airflow.got(wait)["end_date"] for wait in waits]
    firsts = [next(minutes for minutes in (3, 8, 20) if minutes >= number) for number in range(12)]
    assert ends == [at(minutes).isoformat() for minutes in firsts]


def test_one_that_cannot_be_given_its_event_holds_up_no_other(airflow, monkeypatch):
    airflow.run("loader", at(1))
    broken, good = (airflow.wait(DagRunListener, "loader") for _ in range(2))
    deliver = seeking.sending.deliver

    def breaks(row, payload, **told):
        deliver(row, payload, **told)
        if row.wait == broken:
            raise RuntimeError("of this one")

    monkeypatch.setattr(seeking.sending, "deliver", breaks)
    assert airflow.look() == [good.id]
    assert (airflow.got(broken), airflow.http.state(broken).state) == (None, "deferred")
    monkeypatch.undo()


def test_one_that_gets_nothing_keeps_none_from_what_comes_much_later(airflow, monkeypatch):
    """Its task was renamed while it waited, say; there is more since then than one query finds."""
    monkeypatch.setattr(seeking, "_FIRST", 3)
    old = airflow.wait(AssetListener, "orders", start=at(0))
    has_task = type(airflow.http).has_task
    monkeypatch.setattr(
        type(airflow.http), "has_task", lambda self, task: task != old.task_id and has_task(self, task)
    )
    for minute in range(1, 12):
        airflow.update("orders", at(minute))
    new = airflow.wait(AssetListener, "orders", start=at(20))
    assert airflow.look() == []
    airflow.update("orders", at(21))
    assert airflow.look() == [new.id]
    assert airflow.got(new)["timestamp"] == at(21).isoformat()


def test_what_only_a_worker_ends_goes_to_one_beside_those_that_end_here(airflow):
    airflow.run("loader", at(1))
    asked = [{}, {"finish_on_worker": True}, {"push": False}]
    here, on_worker, silent = waits = [
        airflow.wait(DagRunListener, "loader", trigger=trigger) for trigger in asked
    ]
    assert sorted(airflow.look()) == sorted(wait.id for wait in waits)
    assert [airflow.http.state(wait).state for wait in waits] == ["success", "scheduled", "success"]
    assert [airflow.got(wait) is not None for wait in (here, on_worker, silent)] == [True, False, False]
    assert {airflow.http.row(wait).phase for wait in waits} == {"committed"}


def test_thousands_of_runs_are_one_condition(airflow):
    dates = [at(minutes) for minutes in range(20)]
    waits = [airflow.wait(DagRunListener, "loader", logical_date=date.isoformat()) for date in dates]
    ids = [airflow.run("loader", at(1), logical_date=date) for date in dates]
    waits += [airflow.wait(DagRunListener, "loader", run_id=run_id) for run_id in ids]
    both = airflow.wait(DagRunListener, "loader", run_id=ids[3], logical_date=dates[3])
    neither = airflow.wait(DagRunListener, "loader", run_id=ids[3], logical_date=dates[4])
    assert len(seeking._parts(in_transaction(seeking._wanted))) == 4
    assert sorted(airflow.look()) == sorted([*(wait.id for wait in waits), both.id])
    assert [airflow.got(wait)["run_id"] for wait in [*waits, both]] == [*ids, *ids, ids[3]]
    assert airflow.got(neither) is None


def test_nobody_sends_to_such_a_wait(airflow):
    wait = airflow.wait(DagRunListener, "loader")
    with pytest.raises(NoSuchWait):
        in_transaction(lambda session: keys.sending.send(session, wait, {}, by="ada"))


@pytest.mark.parametrize(
    ("listener", "args", "kwargs"),
    [
        (DagRunListener, [""], {}),
        (DagRunListener, [17], {}),
        (DagRunListener, ["d"], {"state": "running"}),
        (DagRunListener, ["d"], {"state": []}),
        (DagRunListener, ["d"], {"run_id": ""}),
        (DagRunListener, ["d"], {"logical_date": timedelta(1)}),
        (DagRunListener, ["d"], {"logical_date": "yesterday"}),
        (DagRunListener, ["d"], {"since": "yesterday"}),
        (DagRunListener, ["d"], {"since": timedelta(days=36500)}),
        (TaskListener, ["d", ""], {}),
        (TaskListener, ["d", "t"], {"state": "up_for_retry"}),
        (AssetListener, [], {}),
        (AssetListener, ["n"], {"uri": "u"}),
        (AssetListener, ["n"], {"partition": ""}),
    ],
)
def test_arguments_that_are_not_in_order_are_refused(listener, args, kwargs):
    with working_for(Wait("d", "r", "t")), pytest.raises(ValueError, match=r".+"):
        listener.sought(*args, **kwargs)
    with pytest.raises(ValueError, match=r"^wait: .+"):  # when the DAG is parsed
        WaitForEventOperator(task_id="wait", listener=listener, listener_args=args, listener_kwargs=kwargs)


def test_templates_are_no_matter_for_the_parser():
    for listener, args, kwargs in (
        (
            DagRunListener,
            ["{{ params.dag }}"],
            {"state": "{{ x }}", "logical_date": "{{ ts }}", "since": "{% x %}"},
        ),
        (
            TaskListener,
            ["d", "t"],
            {"state": ["failed", "{{ x }}"], "map_index": "{{ x }}", "run_id": "{{ run_id }}"},
        ),
        (AssetListener, [], {"uri": "s3://{{ ds }}", "partition": "{{ ds }}"}),
    ):
        WaitForEventOperator(task_id="wait", listener=listener, listener_args=args, listener_kwargs=kwargs)


def test_what_is_looked_for_is_frozen():
    with working_for(Wait("d", "r", "t")):
        assert DagRunListener.sought("d", since="2026-01-01") == {
            "kind": "dag_run",
            "of": {"dag_id": "d", "states": ["success"], "run_id": None, "logical_date": None},
            "since": "2026-01-01T00:00:00+00:00",
            "after": None,
        }
        assert TaskListener.sought("d", "t", state=("success", "failed"), logical_date=DAY) == {
            "kind": "task",
            "of": {
                "dag_id": "d", "task_id": "t", "map_index": -1, "states": ["failed", "success"], "run_id": None,
                "logical_date": DAY,
            },
            "since": None,
            "after": None,
        }  # fmt: skip
        assert AssetListener.sought("a", since=timedelta(hours=-1)) == {
            "kind": "asset",
            "of": {"name": "a", "partition": None},
            "since": None,
            "after": -3600.0,
        }
        assert DagRunListener.address("d") == DagRunListener.address("d", since="2026-01-01")
        digest = "43b99c3f1a8d1ae240b6081ed6c4c17a662fc996ec5cb5996ffa9bbaa763a6ef"
        assert DagRunListener.address("d") == digest
        assert DagRunListener.address("d") != DagRunListener.address("e")


@pytest.mark.parametrize(
    "odd",
    [
        (DagRunListener, "loader", {"run_id": "run_1 "}),
        (DagRunListener, "loader ", {}),
        (DagRunListener, "lader\U0001f600", {}),
        (TaskListener, "loader", "publish ", {}),
        (AssetListener, "日本", {}),
        (AssetListener, "orders ", {}),
    ],
    ids=repr,
)
def test_names_that_mysql_reads_otherwise_hold_up_no_other(airflow, odd):
    """It takes those for one that end in other spaces, and refuses what a column has no characters for."""
    *args, kwargs = odd[1:]
    stays = airflow.wait(odd[0], *args, **kwargs)
    runs, tasks = airflow.wait(DagRunListener, "loader"), airflow.wait(TaskListener, "loader", "publish")
    assets = airflow.wait(AssetListener, "orders")
    of = airflow.run("loader", at(1))
    airflow.task("loader", of, "publish", at(1))
    airflow.update("orders", at(1))
    assert set(airflow.look()) == {runs.id, tasks.id, assets.id}
    assert airflow.got(stays) is None
