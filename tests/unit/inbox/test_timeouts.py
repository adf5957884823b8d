"""Airflow's timeouts of deferrals, which go where a wait has what it waits for."""

from __future__ import annotations

import json
import threading
from datetime import datetime, timedelta, timezone

import pytest
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from airflow_events.inbox import timeouts
from airflow_events.inbox.entries import Phase
from airflow_events.inbox.models import EventWait
from sqlalchemy import delete, insert, update
from sqlalchemy.orm import Session

SOON = datetime.now(timezone.utc) + timedelta(minutes=5)


@pytest.fixture
def clear(session, monkeypatch):
    """Clear timeouts; return of how many."""
    monkeypatch.setattr(timeouts, "in_transaction", lambda work: work(session))
    return timeouts.clear_timeouts


def deferred_again(waits, ti, kwargs='{"replay": true}', **how):
    """Another try, of which no triggerer has told the inbox; ``kwargs`` are its trigger's."""
    trigger = {"id": waits.runs, "classpath": "T", "kwargs": kwargs, "created_date": SOON}
    waits.session.execute(insert(Trigger.__table__).values(trigger))
    return waits.again(ti, trigger_timeout=SOON, trigger_id=waits.runs, **how)


def recorded(waits, **columns):
    ti = waits.deferred(**columns)
    waits.record(ti, waits.begin(ti, timeout=60.0).generation, record_id="r")
    return ti


@pytest.mark.parametrize("cleared", [False, True])
def test_a_wait_that_has_its_event_is_not_ended(waits, clear, cleared):
    ti = deferred_again(waits, recorded(waits), cleared=cleared)
    assert clear() == 1
    assert waits.state(ti).trigger_timeout is None
    assert clear() == 0
    assert waits.begin(ti, timeout=60.0).stored.record_id == "r"


def test_a_wait_that_has_none_is_ended(waits, clear):
    other = recorded(waits)
    waits.set(other, state="failed", trigger_timeout=SOON)
    ti = waits.deferred()
    waits.begin(ti, timeout=60.0)
    assert clear() == 0
    assert waits.state(ti).trigger_timeout is not None


def test_of_what_was_recorded_before_a_clear_the_trigger_says_whether_it_counts(waits, clear):
    without = '{"replay": false}'
    cleared = deferred_again(waits, recorded(waits), without, cleared=True)
    retried = deferred_again(waits, recorded(waits), without)
    unreadable = deferred_again(waits, recorded(waits), "of another key", cleared=True)
    unreadable_retried = deferred_again(waits, recorded(waits), "of another key")
    assert clear() == 2
    ended = {ti for ti in (cleared, retried, unreadable, unreadable_retried) if waits.state(ti).trigger_timeout}
    assert ended == {cleared, unreadable}


def test_the_arguments_of_a_trigger_are_read_as_airflow_writes_them(waits, clear):
    of_trigger = Trigger.encrypt_kwargs({"listener": "L", "timeout": timedelta(hours=1), "replay": True})
    deferred_again(waits, recorded(waits), of_trigger, cleared=True)
    deferred_again(waits, recorded(waits), Trigger.encrypt_kwargs({"replay": False}), cleared=True)
    deferred_again(waits, recorded(waits), json.dumps({"listener": "L"}), cleared=True)  # replay is the default
    assert clear() == 2


def test_a_rejection_wins_until_a_clear(waits, session, clear):
    for cleared in (False, True):
        ti = recorded(waits)
        session.execute(update(EventWait).values(phase=Phase.REJECTED.value))
        deferred_again(waits, ti, cleared=cleared)
    assert clear() == 1


def test_what_will_have_expired_by_then_does_not_count(waits, session, clear):
    ti = deferred_again(waits, recorded(waits))
    session.execute(update(EventWait).values(expires=SOON - timedelta(seconds=1)))
    assert clear() == 0
    session.execute(update(EventWait).values(expires=SOON + timedelta(seconds=1)))
    assert clear() == 1
    assert waits.state(ti).trigger_timeout is None


@pytest.mark.parametrize(("there", "is_cleared"), [(2, True), (1, False)])
def test_a_list_is_not_ended_that_has_as_many_events_as_it_wants(waits, clear, there, is_cleared):
    ti = waits.deferred()
    generation = waits.begin(ti, timeout=60.0, wanted=2).generation
    for place in range(there):
        waits.record(ti, generation, place=place)
    kept = deferred_again(waits, ti, cleared=True)
    assert clear() == is_cleared
    assert (waits.state(kept).trigger_timeout is None) == is_cleared


def test_a_list_that_is_to_wait_for_others_is_ended(waits, clear):
    ti = waits.deferred()
    waits.record(ti, waits.begin(ti, timeout=60.0, wanted=1).generation, place=0)
    deferred_again(waits, ti, '{"replay": false}', cleared=True)
    assert clear() == 0


def test_what_is_not_to_be_ended_soon_is_left(waits, clear):
    ti = deferred_again(waits, recorded(waits))
    waits.set(ti, trigger_timeout=SOON + timedelta(days=1))
    assert clear() == 0


def test_the_event_may_be_lost_between_the_look_and_the_lock(engine, waits_of, monkeypatch):
    """Somebody holds the task instance meanwhile, and the wait has no event when it is let go."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite lets one transaction write at a time")

    def in_transaction(work):
        with Session(engine) as session, session.begin():
            return work(session)

    monkeypatch.setattr(timeouts, "in_transaction", in_transaction)
    with Session(engine) as session:
        waits = waits_of(session)
        ti = deferred_again(waits, recorded(waits))
        session.commit()
        try:
            waits.set(ti, try_number=9)  # which locks it
            waits.session.execute(update(EventWait).values(phase=None))
            cleared = []
            other = threading.Thread(target=lambda: cleared.append(timeouts.clear_timeouts()))
            other.start()
            other.join(1)
            assert not cleared
            session.commit()
            other.join(30)
            assert cleared == [0]
            assert waits.state(ti).trigger_timeout is not None
        finally:
            session.rollback()
            for table in TaskInstance, Trigger, DagRun:
                session.execute(delete(table))
            session.commit()
