"""Waits that share a trigger: who has it, and who has it next."""

from __future__ import annotations

import hashlib
import uuid
from datetime import timedelta

import pytest
from airflow.models.trigger import Trigger
from airflow_events.inbox import hosts, transactions
from airflow_events.inbox.entries import Begin, End, Finish, Hosted, Join, Record, Status
from airflow_events.inbox.models import EventHost
from airflow_events.listeners.support import serde
from sqlalchemy import delete, func, select, update

DONE, OUTLIVED = Status.DONE, Status.OUTLIVED
HOST, OTHER = (hashlib.sha256(name).hexdigest() for name in (b"watches", b"others"))
KWARGS = {"listener": "a:B", "listener_args": ["x"]}
END = End(xcoms={"return_value": 1})


@pytest.fixture(autouse=True)
def in_the_session_of_the_test(waits, monkeypatch):
    def in_transaction(work):
        with waits.session.begin_nested():
            return work(waits.session)

    monkeypatch.setattr(hosts, "in_transaction", in_transaction)


def trigger(waits):
    row = Trigger(classpath="airflow_events.triggers.event.EventTrigger", kwargs={})
    waits.session.add(row)
    waits.session.flush()
    return row.id


def begun(waits):
    """A wait that has begun, by a trigger of its own."""
    ti = waits.deferred(trigger_id=trigger(waits), next_method="execute_complete")
    waits.begin(ti)
    return ti


def join(waits, *tis, host=HOST, generation=1):
    entries = [Join(ti, generation=generation, kwargs=serde.encode(KWARGS), host=host) for ti in tis]
    return [answer.status for answer in transactions.join(waits.session, entries)]


def hosted(waits, count=3):
    """Waits that share a trigger, and the one that it is anchored to first."""
    tis = [begun(waits) for _ in range(count)]
    assert join(waits, *tis) == [DONE] * count
    first = anchor(waits)
    return sorted(tis, key=lambda ti: ti != first)


def anchor(waits, host=HOST):
    """The task instance that has the trigger of a host, or None."""
    row = waits.session.scalar(
        select(EventHost.trigger_id).where(EventHost.host == bytes.fromhex(host)).execution_options()
    )
    having = [ti for ti in waits._keys if (state := waits.session.execute(_state(ti)).first()) and state[0] == row]
    assert len(having) <= 1
    return having[0] if having else None


def _state(ti):
    from airflow.models.taskinstance import TaskInstance

    table = TaskInstance.__table__
    return select(table.c.trigger_id).where(table.c.id == uuid.UUID(ti), table.c.trigger_id.is_not(None))


def begin(waits, ti):
    """As its host does."""
    return transactions.begin(waits.session, [Begin(ti, listener="L", call="L()", holder="box:2", hosted=True)])[0]


def of(waits, host=HOST):
    """The id of a host's trigger."""
    return waits.session.scalar(select(EventHost.trigger_id).where(EventHost.host == bytes.fromhex(host)))


def shown(waits, host=HOST, **more):
    asked = {"host": host, "trigger": of(waits, host) or 0, **more}
    return transactions.hosted(waits.session, [Hosted(**asked)])[0]


def clean_unused(waits):
    """What each triggerer does in each of its loops."""
    Trigger.clean_unused(session=waits.session)


def test_those_that_join_share_one_trigger(waits):
    tis = hosted(waits)
    assert anchor(waits) == tis[0]
    [row] = waits.session.scalars(select(Trigger).where(Trigger.classpath == hosts.TRIGGER))
    assert row.kwargs == {"host": HOST}
    assert [waits.state(ti).trigger_id for ti in tis] == [row.id, None, None]
    later = begun(waits)
    assert join(waits, later) == [DONE]
    assert waits.state(later).trigger_id is None
    apart = begun(waits)
    join(waits, apart, host=OTHER)
    assert anchor(waits, OTHER) == apart
    clean_unused(waits)
    assert waits.session.scalar(select(func.count()).select_from(Trigger)) == 2
    assert waits.session.scalar(select(func.count()).select_from(EventHost)) == 2


def test_the_host_is_told_who_they_are(waits, monkeypatch):
    monkeypatch.setattr(transactions, "_OVERLAP", timedelta(0))
    tis = hosted(waits, 4)
    page = shown(waits)
    assert [ti for ti, *_ in page.hosted] == [*tis[:0], *sorted(tis)]
    assert {serde.decode(kwargs)["listener"] for _, kwargs, *_ in page.hosted} == {"a:B"}
    assert page.next is None
    assert shown(waits, after=page.after).hosted == ()
    late = begun(waits)
    join(waits, late)
    assert [ti for ti, *_ in shown(waits, after=page.after).hosted] == [late]
    assert {kwargs for _, kwargs, *_ in shown(waits, brief=True).hosted} == {""}
    assert shown(waits, OTHER).hosted == ()


def test_a_long_list_comes_in_pages(waits, monkeypatch):
    monkeypatch.setattr(transactions, "_MOST_HOSTED", 2)
    tis = hosted(waits, 5)
    found, after = [], ""
    for _ in range(3):
        page = shown(waits, after=after)
        found += [ti for ti, *_ in page.hosted]
        after = page.after
    assert (page.next, sorted(found)) == (None, sorted(tis))


def test_whoever_asks_twice_changes_nothing(waits):
    """Also if the one that asks has become the anchor."""
    tis = hosted(waits)
    before = [waits.state(ti).trigger_id for ti in tis]
    assert join(waits, *tis) == [DONE] * 3
    assert [waits.state(ti).trigger_id for ti in tis] == before


def test_the_trigger_of_one_that_ends_is_anothers_at_once(waits):
    tis = hosted(waits)
    shared = waits.state(tis[0]).trigger_id
    for number in range(2):
        [one] = [ti for ti in tis if waits.state(ti).trigger_id == shared]
        assert begin(waits, one).generation == 2
        assert waits.record(one, 2, record_id=f"r{number}", committed=True, end=END).status == DONE
        assert (waits.state(one).state, waits.state(one).trigger_id) == ("success", None)
        clean_unused(waits)
        tis.remove(one)
        assert anchor(waits) in tis
    [last] = tis
    begin(waits, last)
    waits.finish(last, 2, end=End("skipped"))
    clean_unused(waits)
    assert waits.session.scalar(select(func.count()).select_from(Trigger)) == 0
    assert hosts.repair() == 0


def test_one_that_ends_and_is_no_anchor_leaves_the_trigger_where_it_is(waits):
    tis = hosted(waits)
    begin(waits, tis[1])
    waits.record(tis[1], 2, record_id="r", committed=True, end=END)
    assert anchor(waits) == tis[0]


def test_all_that_end_in_one_transaction_leave_it_to_none_of_them(waits):
    tis = hosted(waits, 4)
    for ti in tis:
        begin(waits, ti)
    entries = [
        Record(ti, generation=2, record_id=f"r{ti}"[:30], event="1", committed=True, end=END) for ti in tis[:3]
    ]
    transactions.record(waits.session, entries)
    assert anchor(waits) == tis[3]


@pytest.mark.parametrize("next_one", ["a wait's", "its former anchor's", "another host's"])
def test_the_number_of_a_deleted_trigger_is_no_hosts(waits, next_one):
    """SQLite gives it to the next trigger, which another wait may have."""
    first, *others = hosted(waits)
    number = of(waits)
    waits.set(first, state="failed")
    clean_unused(waits)
    classpath = hosts.TRIGGER if next_one == "another host's" else "airflow_events.triggers.event.EventTrigger"
    waits.session.add(Trigger(classpath=classpath, kwargs={}))
    waits.session.flush()
    waits.session.execute(update(Trigger).where(Trigger.classpath == classpath).values(id=number))
    if next_one == "its former anchor's":
        waits.set(first, state="deferred", trigger_id=number)
    elif next_one == "another host's":
        join(waits, begun(waits), host=OTHER)
        waits.session.execute(
            update(EventHost).where(EventHost.host == bytes.fromhex(OTHER)).values(trigger_id=number)
        )
        waits.deferred(trigger_id=number)
    else:
        waits.deferred(trigger_id=number)
    assert shown(waits, trigger=number).status == OUTLIVED
    assert hosts.repair() >= 1
    assert anchor(waits) in others


@pytest.mark.parametrize("end", ["is cleared", "is marked", "is deleted"])
def test_where_the_anchor_is_taken_away_another_trigger_is_made(waits, end):
    first, *others = hosted(waits)
    gone = waits.state(first).trigger_id
    match end:
        case "is cleared":
            waits.set(first, state=None)
        case "is marked":
            waits.set(first, state="failed")
        case "is deleted":
            from airflow.models.taskinstance import TaskInstance

            table = TaskInstance.__table__
            waits.session.execute(delete(table).where(table.c.id == uuid.UUID(first)))
            waits._keys.pop(first)
    assert hosts.repair() == 1
    clean_unused(waits)
    assert waits.session.get(Trigger, gone, populate_existing=True) is None
    assert anchor(waits) in others
    assert hosts.repair() == 0


def test_a_trigger_that_was_nobodys_is_not_used_again(waits):
    """Airflow may be about to delete it, and the task instance that has it by then with it."""
    first, *_ = hosted(waits)
    before = waits.state(first).trigger_id
    waits.set(first, state="failed")
    late = begun(waits)
    join(waits, late)  # and no triggerer has cleaned up yet
    assert anchor(waits) == late
    assert waits.state(late).trigger_id != before
    clean_unused(waits)
    assert waits.state(late).state == "deferred"


def test_only_its_host_begins_a_hosted_wait(waits):
    ti, *_ = hosted(waits)
    assert waits.begin(ti).status == OUTLIVED  # its own trigger, in a process that Airflow is about to cancel
    assert begin(waits, ti).generation == 2
    assert waits.row(ti).host is not None
    again = waits.again(ti, cleared=True, trigger_id=trigger(waits))
    assert begin(waits, again).status == OUTLIVED
    assert waits.begin(again).generation == 3
    assert (waits.row(again).host, waits.row(again).parked) == (None, None)


def test_one_that_has_an_event_does_not_join(waits):
    ti = begun(waits)
    waits.record(ti, 1)
    assert join(waits, ti) == [Status.HAS]
    assert join(waits, begun(waits), generation=7) == [OUTLIVED]
    assert waits.session.scalar(select(func.count()).select_from(EventHost)) == 0


def test_a_try_fails_as_if_its_trigger_had_raised(waits):
    first, second = hosted(waits, 2)
    begin(waits, first)
    assert waits.finish(first, 2, end=End("failed", payload={"traceback": ["Boom"]})).status == DONE
    state = waits.state(first)
    assert (state.state, state.next_method, state.trigger_id) == ("scheduled", "__fail__", None)
    assert state.next_kwargs["traceback"] == ["Boom"]
    assert anchor(waits) == second


def test_triggers_are_renewed_before_airflow_would_clean_them_away(waits):
    ti, *_ = hosted(waits)
    id = waits.state(ti).trigger_id
    made = waits.session.scalar(select(Trigger.created_date).where(Trigger.id == id))
    waits.session.execute(update(Trigger).values(created_date=made - timedelta(days=1)))
    hosts.repair()
    waits.session.expire_all()
    renewed = waits.session.scalar(select(Trigger.created_date).where(Trigger.id == id))
    # Not as if it were new: triggerers take on the oldest first.
    assert made - timedelta(hours=7) < renewed < made - timedelta(hours=5)


def test_a_wait_whose_finish_is_asked_again(waits):
    ti, *_ = hosted(waits, 1)
    begin(waits, ti)
    entry = Finish(ti, generation=2, end=End("skipped"))
    assert [transactions.finish(waits.session, [entry])[0].status for _ in range(2)] == [DONE, DONE]


def test_a_try_fails_though_its_event_is_recorded(waits):
    """It could not be committed; the next try goes on with it."""
    ti, *_ = hosted(waits, 1)
    generation = begin(waits, ti).generation
    waits.record(ti, generation)
    assert waits.finish(ti, generation, end=End("skipped")).status == Status.HAS
    assert waits.finish(ti, generation, end=End("failed", payload={"traceback": ["Boom"]})).status == DONE
    assert waits.state(ti).next_method == "__fail__"
    assert waits.row(ti).phase == "recorded"


def test_a_wait_with_its_event_keeps_its_host_until_it_is_committed(waits):
    ti, *_ = hosted(waits, 1)
    waits.record(ti, begin(waits, ti).generation)
    assert [one for one, *_ in shown(waits).hosted] == [ti]


def test_what_a_host_tells_is_there_for_whoever_looks(waits):
    hosted(waits)

    def told():
        waits.session.expire_all()
        row = waits.session.execute(select(EventHost)).scalar_one()
        return row.log_of, row.trouble

    shown(waits, log_of="dag/run/task/-1, try 1", trouble="Kafka a:9092 cannot be reached")
    assert told() == ("dag/run/task/-1, try 1", "Kafka a:9092 cannot be reached")
    shown(waits, log_of="dag/run/task/-1, try 1", trouble="x" * 100_000)
    assert len(told()[1]) == 2000
    shown(waits, log_of="dag/run/task/-1, try 1")
    assert told() == ("dag/run/task/-1, try 1", None)
    # What another trigger says, which is outlived, does not count.
    shown(waits, trigger=12345, trouble="outlived")
    assert told() == ("dag/run/task/-1, try 1", None)
