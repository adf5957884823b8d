"""Waits that go on without a trigger, and end when their moment comes."""

from __future__ import annotations

import json
import threading
from datetime import datetime, timedelta, timezone

import pytest
from airflow.models import crypto
from airflow.models.trigger import Trigger
from airflow.models.xcom import XComModel
from airflow_events.api import senders
from airflow_events.api.keys import send
from airflow_events.inbox import rotation, transactions, waking
from airflow_events.inbox.alarm import Alarm
from airflow_events.inbox.entries import End, Finish, Hosted, Join, Park, Record, Status, as_json
from airflow_events.inbox.models import EventHost, EventKept, EventWait
from airflow_events.listeners.support import serde
from cryptography.fernet import Fernet
from sqlalchemy import select, update

DONE = Status.DONE
KWARGS = {"listener": "a:B", "listener_args": [datetime(2026, 1, 1, tzinfo=timezone.utc)], "timeout": 3.0}


@pytest.fixture(autouse=True)
def in_the_session_of_the_test(waits, monkeypatch):
    def in_transaction(work):
        with waits.session.begin_nested():
            return work(waits.session)

    for module in (transactions, waking, rotation):
        monkeypatch.setattr(module, "in_transaction", in_transaction)


def deferred(waits, **columns):
    """A task instance that is deferred to a trigger."""
    trigger = Trigger(classpath="airflow_events.triggers.event.EventTrigger", kwargs={})
    waits.session.add(trigger)
    waits.session.flush()
    return waits.deferred(trigger_id=trigger.id, next_method="execute_complete", **columns)


def park(waits, ti, generation=1, at=None, then=None):
    moment = None if at is None else at.isoformat()
    entry = Park(
        ti,
        generation=generation,
        kwargs=serde.encode(KWARGS),
        at=moment,
        then=None if then is None else as_json(then),
    )
    return transactions.park(waits.session, [entry])[0].status


def now():
    return datetime.now(timezone.utc)


def a_success(ti, generation=1):
    end = End(xcoms={"return_value": "e"})
    return Record(ti, generation=generation, record_id="r", event='"e"', committed=True, end=end)


def test_a_parked_wait_has_no_trigger_and_its_row_has_what_that_had(waits):
    ti = deferred(waits)
    waits.begin(ti)
    assert park(waits, ti) == DONE
    state, row = waits.state(ti), waits.row(ti)
    assert (state.state, state.trigger_id, state.next_method) == ("deferred", None, "execute_complete")
    assert Trigger._decrypt_kwargs(row.parked) == KWARGS
    assert (row.wake_at, row.wake) == (None, None)
    assert park(waits, ti) == DONE  # its answer was lost


def test_one_that_this_version_cannot_read_keeps_no_other_from_its_moment(waits, caplog):
    later, other = deferred(waits), deferred(waits)
    for ti in (later, other):
        waits.begin(ti)
        park(waits, ti, at=now(), then=a_success(ti))
    changed = update(EventWait).where(EventWait.run_id == waits._keys[later][2])
    waits.session.execute(changed.values(wake=json.dumps({"operation": "of_later"})))
    assert waking.wake_due() == 2
    assert (waits.state(later).state, waits.state(other).state) == ("deferred", "success")
    assert "What is to happen to the parked wait" in caplog.text


def test_an_event_ends_a_parked_wait(waits):
    ti = deferred(waits)
    waits.begin(ti)
    park(waits, ti, at=now() + timedelta(hours=1), then=Finish(ti, generation=1, end=End("skipped")))
    assert waits.record(ti, 1, record_id="r", committed=True, end=End(xcoms={"return_value": 1})).status == DONE
    row = waits.row(ti)
    assert (waits.state(ti).state, row.parked, row.wake_at, row.wake) == ("success", None, None, None)


@pytest.mark.parametrize("became", ["has its event", "was begun by another", "is another try", "is not deferred"])
def test_what_is_not_to_be_parked_is_not(waits, became):
    ti = deferred(waits)
    waits.begin(ti)
    asked, trigger = ti, waits.state(ti).trigger_id
    match became:
        case "has its event":
            waits.record(ti, 1)
        case "was begun by another":
            waits.begin(ti)
        case "is another try":
            ti = waits.again(ti)
        case "is not deferred":
            waits.set(ti, state="scheduled")
    assert park(waits, asked) == (Status.HAS if became == "has its event" else Status.OUTLIVED)
    assert (waits.state(ti).trigger_id, waits.row(ti).parked) == (trigger, None)


def test_what_begins_again_is_not_parked_any_more(waits):
    ti = deferred(waits)
    waits.begin(ti)
    park(waits, ti, at=now(), then=a_success(ti))
    trigger = Trigger(classpath="airflow_events.triggers.event.EventTrigger", kwargs={})
    waits.session.add(trigger)
    waits.session.flush()
    again = waits.again(ti, cleared=True, trigger_id=trigger.id)
    assert waits.begin(again).generation == 2
    row = waits.row(again)
    assert (row.parked, row.wake_at, row.wake) == (None, None, None)


def test_another_process_with_the_trigger_that_was_parked_does_not_begin_it_again(waits):
    """It is about to be cancelled, and nobody would work for the wait."""
    ti = deferred(waits)
    waits.begin(ti)
    park(waits, ti, at=now(), then=a_success(ti))
    assert waits.begin(ti).status == Status.OUTLIVED
    waking.wake_due()
    assert waits.state(ti).state == "success"


def test_the_moment_of_an_event_ends_the_wait_and_not_before(waits):
    due, later = deferred(waits), deferred(waits)
    for ti, at in ((due, now()), (later, now() + timedelta(hours=1))):
        waits.begin(ti)
        park(waits, ti, at=at, then=a_success(ti))
    assert waking.wake_due() == 1
    assert (waits.state(due).state, waits.state(later).state) == ("success", "deferred")
    assert waits.xcoms(due) == {"return_value": "e"}
    row = waits.row(due)
    assert (row.phase, row.event, row.wake_at) == ("committed", '"e"', None)
    assert waking.wake_due() == 0
    assert 3500 < waking.seconds_to_next(4000) <= 3600
    assert waking.seconds_to_next(1.0) == 1.0


@pytest.mark.parametrize("end", ["success", "skipped", "worker"])
def test_the_deadline_ends_the_wait(waits, end):
    ti = deferred(waits)
    waits.begin(ti, timeout=10.0)
    how = End(end, payload={"outcome": "TimedOut"}) if end == "worker" else End(end)
    park(waits, ti, at=now(), then=Finish(ti, generation=1, end=how))
    waking.wake_due()
    state = waits.state(ti)
    assert state.state == ("scheduled" if end == "worker" else end)
    if end == "worker":
        assert state.next_kwargs["event"]["outcome"] == "TimedOut"
    assert waits.row(ti).wake_at is None


def test_an_event_that_is_there_wins_over_the_deadline(waits):
    ti = deferred(waits)
    waits.begin(ti)
    park(waits, ti, at=now(), then=Finish(ti, generation=1, end=End("skipped")))
    waits.record(ti, 1, record_id="r", committed=True)  # and nobody has ended the task yet
    waking.wake_due()
    assert waits.state(ti).state == "deferred"


@pytest.mark.parametrize("who", ["a user", "another"])
def test_of_a_wait_that_is_over_nothing_is_left_to_do(waits, who):
    ti = deferred(waits)
    waits.begin(ti)
    park(waits, ti, at=now(), then=a_success(ti))
    if who == "a user":
        waits.set(ti, state="failed")
    else:
        waits.set(ti, state="running")
    assert waking.wake_due() == 1
    assert waits.row(ti).wake_at is None
    assert (waits.xcoms(ti), waking.wake_due()) == ({}, 0)


def test_who_dies_with_waits_in_hand_leaves_them_to_others(waits):
    ti = deferred(waits)
    waits.begin(ti)
    park(waits, ti, at=now(), then=a_success(ti))
    assert len(waking._take(waits.session)) == 1  # and it goes no further
    assert waking.wake_due() == 0  # for a while
    row = waits.session.execute(select(EventWait.wake_at)).scalar_one()
    assert row > now()
    waits.session.execute(update(EventWait).values(wake_at=row - waking._LEASE))
    assert waking.wake_due() == 1
    assert waits.state(ti).state == "success"
    assert len(waits.session.scalars(select(XComModel.value)).all()) == 1


def test_many_are_ended_in_pieces(waits, monkeypatch):
    monkeypatch.setattr(waking, "LARGEST_BATCH", 2)
    tis = [deferred(waits) for _ in range(5)]
    for number, ti in enumerate(tis):
        waits.begin(ti)
        park(waits, ti, at=now(), then=Record(**{**vars(a_success(ti)), "record_id": f"r{number}"}))
    assert [waking.wake_due() for _ in range(4)] == [2, 2, 1, 0]
    assert {waits.state(ti).state for ti in tis} == {"success"}


def test_an_alarm_rings_at_the_earliest_moment_that_it_was_told():
    alarm = Alarm()
    rang = threading.Event()

    def sleep():
        alarm.wait(3600)
        rang.set()

    sleeper = threading.Thread(target=sleep, daemon=True)
    sleeper.start()
    alarm.ring_at(now() + timedelta(hours=1))
    assert not rang.wait(0.05)
    alarm.ring_at(now())
    assert rang.wait(30)
    sleeper.join()
    assert alarm.wait(0.0)  # nothing more has come
    alarm.end()
    assert not alarm.wait(3600)


def test_an_entry_that_waits_survives_json(waits):
    ti = deferred(waits)
    waits.begin(ti)
    park(waits, ti, at=now(), then=a_success(ti))
    assert json.loads(waits.row(ti).wake)["operation"] == "record"


@pytest.fixture
def keys(monkeypatch):
    """Set the deployment's Fernet keys."""

    def use(*keys):
        monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", ",".join(key.decode() for key in keys))
        crypto.get_fernet.cache_clear()

    yield use
    monkeypatch.undo()
    crypto.get_fernet.cache_clear()


def keep(session, sender):
    """Keep an event of somebody for a key."""
    send(session, "key", 1, by="ada", dags=None, sender=sender)


def kept_senders(session):
    session.expire_all()
    return session.scalars(select(EventKept.sender).order_by(EventKept.id)).all()


def test_the_fernet_key_is_rotated(waits, keys, monkeypatch):
    monkeypatch.setattr(rotation, "_PIECE", 2)
    old, new, lost = (Fernet.generate_key() for _ in range(3))
    tis = [deferred(waits) for _ in range(4)]
    for number, ti in enumerate(tis):
        keys(lost if number == 3 else old)
        waits.begin(ti)
        park(waits, ti)
        keep(waits.session, senders.Task(f"dag {number}"))
    keys(new, old)
    done = rotation.rotate()
    assert (done.rotated, done.unreadable) == (6, 2)
    keys(new)
    found = [crypto.get_fernet().decrypt(one.encode()) for one in kept_senders(waits.session)[:3]]
    assert found == [f'["task", {{"dag_id": "dag {number}"}}]'.encode() for number in range(3)]
    assert [Trigger._decrypt_kwargs(waits.row(ti).parked) for ti in tis[:3]] == [KWARGS] * 3
    assert "a:B" not in waits.row(tis[0]).parked


def test_arguments_of_a_class_that_the_api_server_lacks_are_kept_as_they_are(waits):
    config = {"__classname__": "only_on_triggerers.Config", "__version__": 0, "__data__": {"x": 1}}
    kwargs, host = json.dumps({"listener": "a:B", "listener_args": [config]}), "ab" * 32
    hosted, parked = (waits.deferred(next_method="execute_complete") for _ in range(2))
    for ti in hosted, parked:
        waits.begin(ti)
    transactions.join(waits.session, [Join(hosted, generation=1, kwargs=kwargs, host=host)])
    transactions.park(waits.session, [Park(parked, generation=1, kwargs=kwargs)])
    trigger = waits.session.scalar(select(EventHost.trigger_id))
    [answer] = transactions.hosted(waits.session, [Hosted(host=host, trigger=trigger)])
    assert answer.hosted == ((hosted, kwargs, 1, None),)
