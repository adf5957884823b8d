"""What the inbox forgets, and what it never does."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta, timezone

import pytest
from airflow_events.inbox.models import EventKept, EventSent, EventStart, EventTaken
from airflow_events.inbox.purge import purge
from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

NOW = datetime(2026, 11, 28, 12, tzinfo=timezone.utc)
DAY = timedelta(days=1)
WEEK = 7 * DAY


def digest(text):
    return hashlib.sha256(text.encode()).digest()


def taken(name, taken_at, acknowledged_at):
    return insert(EventTaken).values(
        identity=digest(name),
        content=digest("content"),
        record_id=name,
        wait="shop / run / wait / -1",
        taken_at=taken_at,
        acknowledged_at=acknowledged_at,
    )


def kept(name, expires):
    return insert(EventKept).values(
        address=digest("key"),
        key="key",
        event="{}",
        event_id=name,
        to="one",
        sent_by="ada",
        reached="[]",
        kept_at=NOW - WEEK,
        expires=expires,
    )


def sent(name, expires):
    return insert(EventSent).values(
        identity=digest(name), content=digest("content"), receipt=name, expires=expires
    )


def names(session):
    """Return what is there."""
    found = session.scalars(select(EventTaken.record_id)).all()
    found += session.scalars(select(EventKept.event_id)).all()
    found += session.scalars(select(EventStart.trouble)).all()
    return {*found, *session.scalars(select(EventSent.receipt))}


@pytest.fixture
def rows(session):
    for statement in (
        taken("taken old", NOW - 9 * DAY, NOW - 8 * DAY),
        taken("taken and acknowledged late", NOW - 400 * DAY, NOW - 6 * DAY),
        taken("taken and never acknowledged", NOW - 400 * DAY, None),
        kept("kept old", NOW - timedelta(seconds=1)),
        kept("kept", NOW + timedelta(seconds=1)),
        sent("sent old", NOW - timedelta(seconds=1)),
        sent("sent", NOW + timedelta(seconds=1)),
        insert(EventStart).values(trigger_id=1, trouble="told old", told_at=NOW - DAY - timedelta(seconds=1)),
        insert(EventStart).values(trigger_id=2, trouble="told", told_at=NOW - DAY + timedelta(seconds=1)),
    ):
        session.execute(statement)
    return session


def test_what_is_old_is_forgotten_and_nothing_else(rows):
    assert purge(rows, NOW, WEEK, 100) == 4
    assert names(rows) == {"taken and acknowledged late", "taken and never acknowledged", "kept", "sent", "told"}
    assert purge(rows, NOW, WEEK, 100) == 0


def test_what_no_source_has_confirmed_is_never_forgotten(rows):
    assert purge(rows, NOW + 10_000 * DAY, timedelta(0), 100) == 8
    assert names(rows) == {"taken and never acknowledged"}


def test_it_goes_in_pieces(rows):
    for n in range(5):
        rows.execute(taken(f"more {n}", NOW - 30 * DAY, NOW - (20 + n) * DAY))
    before = names(rows)
    assert purge(rows, NOW, WEEK, 2) == 2
    assert before - names(rows) == {"more 3", "more 4"}  # the oldest come first
    assert [purge(rows, NOW, WEEK, 2) for _ in range(4)] == [2, 2, 2, 1]
    assert names(rows) == {"taken and acknowledged late", "taken and never acknowledged", "kept", "sent", "told"}


def test_what_somebody_else_has_locked_is_passed_over(engine):
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite locks no rows")
    with Session(engine) as session:
        session.execute(taken("locked", NOW - 30 * DAY, NOW - 20 * DAY))
        session.execute(taken("free", NOW - 30 * DAY, NOW - 19 * DAY))
        session.commit()
    try:
        with Session(engine) as other, Session(engine) as session:
            other.scalars(select(EventTaken).where(EventTaken.record_id == "locked").with_for_update()).one()
            assert purge(session, NOW, WEEK, 100) == 1
            session.commit()
            assert names(session) == {"locked"}
    finally:
        with Session(engine) as session:
            session.execute(delete(EventTaken))
            session.commit()
