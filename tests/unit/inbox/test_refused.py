"""What a database refuses to write, or takes for something else, is one entry's, and harms no other."""

from __future__ import annotations

import uuid
from datetime import datetime, timezone

import pytest
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow_events.inbox import carrying_out, tasks, transactions
from airflow_events.inbox.entries import End, Record, SetAside, Status
from airflow_events.inbox.models import EventTaken, EventWait
from sqlalchemy import delete, insert, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session


@pytest.fixture
def each(waits, monkeypatch):
    """Carry out entries in the test's transaction."""

    def in_transaction(work, **_):
        with waits.session.begin_nested():
            return work(waits.session)

    monkeypatch.setattr(transactions, "in_transaction", in_transaction)
    monkeypatch.setattr(carrying_out, "in_transaction", in_transaction)
    return carrying_out.carry_out_each


def record(ti, **xcoms):
    return Record(
        ti, generation=1, record_id=uuid.uuid4().hex, event="1", committed=True, end=End(xcoms={**xcoms})
    )  # fmt: skip


ODD = {"long": {"k" * 600: 1}, "spaces": {"a": 1, "a ": 2}, "emoji": {"\U0001f600": 1}}


@pytest.mark.parametrize("bad", ODD.values(), ids=ODD)
def test_an_xcom_that_one_database_refuses_leaves_the_others_alone(waits, each, bad):
    good, other = waits.deferred(), waits.deferred()
    for ti in (good, other):
        waits.begin(ti)
    answers = each([record(good, return_value=1), record(other, **bad)])
    assert answers[0].status == Status.DONE
    assert waits.state(good).state == "success"
    assert answers[1].status in (Status.DONE, Status.INVALID)
    assert waits.state(other).state == ("success" if answers[1].status == Status.DONE else "deferred")


def test_a_reason_may_be_of_any_length(waits, each):
    ti = waits.deferred()
    waits.begin(ti)
    [answer] = each([SetAside(ti, generation=1, identity="ab" * 32, reason="x" * 200_000)])
    assert answer.status == Status.DONE
    assert len(waits.session.scalar(select(EventTaken.set_aside))) == 2000


def test_what_is_longer_than_a_packet_of_mysql_is_named(monkeypatch):
    """It hangs up, as if the connection were lost, and would again."""
    calls = []

    def carry_out(entries):
        calls.append(len(entries))
        if any(len(entry.record_id) > 100 for entry in entries):
            raise OperationalError("INSERT", {}, Exception(2013, "Lost connection"))
        return ["done" for _ in entries]

    monkeypatch.setattr(transactions, "carry_out", carry_out)
    monkeypatch.setattr(carrying_out, "in_transaction", lambda work: 1000)
    short, long = Record("a", record_id="r"), Record("b", record_id='"' * 400)
    first, second = carrying_out.carry_out_each([short, long])
    assert first == "done"
    assert second.status == Status.INVALID and "max_allowed_packet is 1,000" in second.message
    # With what would fit, it was the connection.
    monkeypatch.setattr(carrying_out, "in_transaction", lambda work: 1_000_000)
    with pytest.raises(OperationalError):
        carrying_out.carry_out_each([short, long])


@pytest.fixture
def mapped(engine):
    """The ids of the task instances of a task that is mapped over a thousand, committed."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite locks the whole database")
    ids = [uuid.uuid4() for _ in range(1000)]
    rest = {"try_number": 1, "max_tries": 0, "pool": "p", "pool_slots": 1, "span_status": "not_started"}
    names = {"dag_id": "mapped", "run_id": "r"}
    with engine.begin() as connection:
        state = {"run_type": "manual", "state": "running", "run_after": datetime.now(timezone.utc)}
        connection.execute(insert(DagRun.__table__), {"id": 2_000_000, **names, **state})
        rows = [{"id": id, "task_id": "t", "map_index": at, **names, **rest} for at, id in enumerate(ids)]
        connection.execute(insert(TaskInstance.__table__), rows)
        if engine.dialect.name == "mysql":  # its plans depend on what it knows
            connection.execute(text("ANALYZE TABLE task_instance, dag_run"))
    yield ids
    with engine.begin() as connection:
        for table in (TaskInstance.__table__, DagRun.__table__):
            connection.execute(delete(table).where(table.c.dag_id == "mapped"))


NO_PATIENCE = {"mysql": "SET innodb_lock_wait_timeout = 1", "postgresql": "SET lock_timeout = '1s'"}


def test_whoever_locks_some_waits_for_no_other(engine, mapped):
    """MySQL, left alone, would read and lock all of the run."""
    with Session(engine) as one, Session(engine) as other:
        other.execute(text(NO_PATIENCE[engine.dialect.name]))
        tasks.lock(one, [mapped[650]])
        assert len(tasks.lock(other, mapped[:300])) == 300


def test_whoever_locks_by_names_holds_nothing_that_another_transaction_needs(engine, mapped):
    """MySQL would lock the record of the names first, which a row that refers to them needs, too."""
    with Session(engine) as one, Session(engine) as other:
        one.execute(text(NO_PATIENCE[engine.dialect.name]))
        tasks.lock(one, [mapped[7]])
        assert tasks.lock_one(other, "mapped", "t", "r", 7, skip_locked=True) is None
        named = {"dag_id": "mapped", "task_id": "t", "run_id": "r", "map_index": 7, "place": -1}
        one.execute(insert(EventWait), {**named, "generation": 1, "clears": -1})


def test_a_task_is_found_by_its_very_names(waits):
    """MySQL takes names for equal that end in other spaces; who asks has rights on those that were asked for."""
    ti = waits.deferred()
    key = waits._keys[ti]
    found = tasks.lock_one(waits.session, key[0], key[1], key[2], -1)
    assert str(found.id) == ti
    for at in range(3):
        other = [f"{name} " if number == at else name for number, name in enumerate(key[:3])]
        assert tasks.lock_one(waits.session, *other, -1) is None
