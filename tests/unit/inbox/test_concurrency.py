"""Two API servers at once, on rows that are committed: who waits for whom, and who gets an event."""

from __future__ import annotations

import hashlib
import threading
import uuid

import pytest
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow_events.inbox import database, transactions
from airflow_events.inbox.entries import Begin, Record, SetAside, Status
from airflow_events.inbox.models import EventTaken, EventWait
from sqlalchemy import delete, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

COUNT = 40


@pytest.fixture
def waiting(engine, waits_of):
    """Two groups of waits, committed; the first of each could have the same event."""
    with Session(engine) as session:
        waits = waits_of(session, runs=100_000)
        groups = [[waits.deferred(dag_id="both") for _ in range(COUNT)] for _ in range(2)]
        for group in groups:
            transactions.begin(session, [Begin(ti) for ti in group])
        session.commit()
    yield groups
    with Session(engine) as session:
        session.execute(delete(EventTaken))
        for table in (EventWait, TaskInstance, DagRun):  # here SQLite does not do as the foreign keys say
            session.execute(delete(table).where(table.dag_id == "both"))
        session.commit()


def carry_out(engine, work):
    """Do as `database.in_transaction` does, on this engine."""
    for _ in range(5):
        try:
            with Session(engine) as session, session.begin():
                return work(session)
        except DBAPIError:
            continue
    raise AssertionError("the database gave up the transaction five times")


ID, ONE, OTHER = (hashlib.sha256(text).hexdigest() for text in (b"id", b"one", b"other"))


def told(ti, content):
    return Record(ti, generation=1, record_id=uuid.uuid4().hex, event="1", identity=ID, content=content)


def set_aside(session, ti):
    transactions.set_aside(session, [SetAside(ti, generation=1, identity=ID, reason="no JSON")])


def recorded(session, ti):
    transactions.record(session, [told(ti, ONE)])


@pytest.mark.parametrize("before", [set_aside, recorded])
def test_of_two_servers_one_takes_what_is_known_already(engine, waiting, before):
    """What was set aside, or an id with another content: its row is there, and the unique key says nothing."""
    first, *others = waiting[0]
    carry_out(engine, lambda session: before(session, first))
    answers = {}

    def serve(ti):
        answers[ti] = carry_out(engine, lambda session: transactions.record(session, [told(ti, OTHER)]))[0]

    with Session(engine) as session, session.begin():
        answers[others[0]] = transactions.record(session, [told(others[0], OTHER)])[0]
        late = threading.Thread(target=serve, args=(others[1],))
        late.start()
        late.join(0.5)
    late.join(60)
    assert [answers[ti].status for ti in others[:2]] == [Status.DONE, Status.TAKEN]


def test_of_two_servers_each_event_is_recorded_by_one(engine, waiting):
    """They insert the same keys at the same time, in batches, in opposite orders."""
    answers, start = {}, threading.Barrier(2)

    def serve(number):
        entries = [
            Record(
                ti,
                generation=1,
                record_id=uuid.uuid4().hex,
                event="1",
                identity=hashlib.sha256(f"event {index}".encode()).hexdigest(),
                content=hashlib.sha256(b"1").hexdigest(),
            )
            for index, ti in enumerate(waiting[number])
        ]
        if number:
            entries.reverse()
        start.wait()
        for begin in range(0, COUNT, 10):
            some = entries[begin : begin + 10]
            for entry, answer in zip(
                some, carry_out(engine, lambda s, some=some: transactions.record(s, some)), strict=True
            ):
                answers[entry.ti] = (entry.identity, answer.status)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 2 * COUNT
    recorded = [identity for identity, status in answers.values() if status == Status.DONE]
    assert len(recorded) == len(set(recorded)) == COUNT
    assert {status for _, status in answers.values()} == {Status.DONE, Status.TAKEN}
    with Session(engine) as session:
        assert session.scalar(select(func.count()).select_from(EventTaken)) == COUNT


def test_a_transaction_that_reads_first_keeps_others_from_writing(engine, waiting):
    """Also on SQLite, where a SELECT locks nothing and FOR UPDATE is not there."""
    [ti, *_], _ = waiting
    first, second = threading.Event(), threading.Event()
    answers = []

    def record(session, name):
        entry = Record(ti, generation=1, record_id=name, event=f'"{name}"')
        return transactions.record(session, [entry])[0]

    def other():
        first.wait(10)
        answers.append(carry_out(engine, lambda session: record(session, "second")))
        second.set()

    thread = threading.Thread(target=other)
    thread.start()
    with Session(engine) as session, session.begin():
        database.begin_writing(session)
        assert record(session, "first").status == Status.DONE
        first.set()
        assert not second.wait(1)  # it stands before the lock
    thread.join(30)
    assert answers[0].status == Status.HAS
    assert answers[0].stored.record_id == "first"
