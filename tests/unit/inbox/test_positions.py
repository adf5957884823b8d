"""How far the logs of sources are settled, as the inbox knows it, in each database."""

from __future__ import annotations

import threading

import pytest
from airflow_events.inbox import transactions
from airflow_events.inbox.entries import Positions, Status, answer_of, as_json, entry_of
from airflow_events.inbox.models import EventPosition
from airflow_events.listeners.support import positions
from sqlalchemy import delete, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

SOURCE = '["cluster", "größe 🎉", "group"]'


def exchange(session, settled=None, begins=None, source=SOURCE):
    entry = Positions(source=source, settled=settled or {}, begins=begins or {})
    [answer] = transactions.positions(session, [entry_of(as_json(entry))])
    assert answer.status == Status.DONE
    return answer_of(as_json(answer))


@pytest.mark.parametrize(
    ("ranges", "found"),
    [
        ([], []),
        ([[0, 0]], []),
        ([[5, 6], [0, 3]], [(0, 3), (5, 6)]),
        ([[0, 3], [3, 5]], [(0, 5)]),
        ([[0, 9], [2, 3], [8, 12]], [(0, 12)]),
    ],
)
def test_ranges(ranges, found):
    assert positions.union(ranges) == found


def test_what_comes_after_what_is_settled():
    ranges = [(0, 3), (5, 7)]
    assert [positions.after(ranges, offset) for offset in range(8)] == [3, 3, 3, 3, 4, 7, 7, 7]
    assert positions.after([], 4) == 4


def test_what_is_settled_only_grows(session):
    assert exchange(session).settled == {}
    assert exchange(session, {"t/0": [[0, 4]]}).settled == {"t/0": [(0, 4)]}
    assert exchange(session, {"t/0": [[0, 2], [6, 7]]}).settled == {"t/0": [(0, 4), (6, 7)]}
    last = exchange(session, {"t/1": [[0, 1]], "t/0": [[4, 6]]})
    assert last.settled == {"t/0": [(0, 7)], "t/1": [(0, 1)]}
    assert exchange(session, {"t/0": [[4, 6]]}) == last
    assert exchange(session, source="another").settled == {}


def test_a_place_begins_once(session):
    assert exchange(session, begins={"t/0": 10, "t/1": 0}).settled == {"t/0": [(0, 10)], "t/1": []}
    assert exchange(session, begins={"t/0": 12, "t/1": 5}).settled == {"t/0": [(0, 10)], "t/1": []}


def test_each_source_has_an_owner_that_stays(session):
    owner = exchange(session).owner
    assert len(owner) == 32
    assert exchange(session, {"t/0": [[0, 4]]}).owner == owner
    assert exchange(session, source="another").owner != owner


def test_many_at_once(session):
    entries = [Positions(source=SOURCE, settled={"t/0": [[number, number + 1]]}) for number in range(4)]
    answers = transactions.positions(session, [*entries, Positions(source="another")])
    assert answers[3].settled == {"t/0": [(0, 4)]}
    assert answers[4].settled == {}
    assert {row.name for row in session.scalars(select(EventPosition))} == {SOURCE, "another"}


def test_two_servers_lose_nothing_of_what_they_are_told_at_once(engine):
    start = threading.Barrier(2)

    def serve(first):
        start.wait(30)
        for number in range(first, 40, 2):
            _until_done(engine, {"t/0": [[number, number + 1]]})

    threads = [threading.Thread(target=serve, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    try:
        with Session(engine) as session:
            assert exchange(session).settled == {"t/0": [(0, 40)]}
            session.rollback()
    finally:
        with Session(engine) as session:
            session.execute(delete(EventPosition))
            session.commit()


def _until_done(engine, settled):
    """Do as `database.in_transaction` does, on this engine."""
    for _ in range(20):
        try:
            with Session(engine) as session, session.begin():
                exchange(session, settled)
                return
        except DBAPIError:
            continue
    raise AssertionError("the database gave up the transaction twenty times")
