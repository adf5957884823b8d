"""Events that are sent to a key, in each database: which waits get them, now or later, and who is told what."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from datetime import datetime, timedelta, timezone

import pytest
import time_machine
from airflow.models.variable import Variable
from airflow_events import waits
from airflow_events.api import keys, matcher, sending, variables
from airflow_events.api.refusals import NoSuchWait, TooMany, Unfit
from airflow_events.api.wait_rows import WaitRow
from airflow_events.inbox.database import in_transaction
from airflow_events.inbox.models import LATEST, EventKept, EventSent
from sqlalchemy import event, func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

HOUR = timedelta(hours=1)
ORDER = {"type": "object", "required": ["order"]}


def send(session, key, payload, *, by="ada", dags=None, **kwargs):
    return keys.send(session, key, payload, by=by, dags=dags, **kwargs)


def kept(session, table=EventKept):
    return session.scalar(select(func.count()).select_from(table))


def later(**delta):
    return time_machine.travel(datetime.now(timezone.utc) + timedelta(**delta))


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    """Of another database, whose events have been kept there."""
    monkeypatch.setattr(keys, "_refused", keys._Refused())
    monkeypatch.setattr(keys, "_total", keys._Total())


@contextlib.contextmanager
def statements(session):
    """What the database is asked meanwhile."""
    said, connection = [], session.connection()

    def note(conn, cursor, statement, parameters, context, many):
        said.append(statement)

    event.listen(connection, "before_cursor_execute", note)
    try:
        yield said
    finally:
        event.remove(connection, "before_cursor_execute", note)


@pytest.mark.parametrize("key", ["order-1", "a%b_c/d", "größe", "注文", "🎉", "x" * 256])
def test_it_is_kept_and_the_same_again_is_the_same(session, key):
    receipt = send(session, key, {"n": 1}, idempotency_key="k")
    assert (receipt.status, receipt.waits) == ("kept", [])
    assert send(session, key, {"n": 1}, idempotency_key="k") == receipt
    with pytest.raises(Unfit, match="another payload"):
        send(session, key, {"n": 2}, idempotency_key="k")
    assert kept(session) == 1
    assert send(session, key, {"n": 1}).event_id != receipt.event_id
    assert kept(session) == 2
    assert keys.match(session, key) == {}
    assert keys.wanted(session) == []
    assert kept(session) == 2


@pytest.mark.parametrize("others", [{"by": "bob"}, {"dags": ["shop"]}, {"key": "other"}], ids=repr)
def test_an_idempotency_key_is_of_the_sender_what_it_may_reach_and_the_key(session, others):
    sent = {"key": "key", "payload": 1, "idempotency_key": "k"}
    first = send(session, **sent)
    second = send(session, **{**sent, **others})
    assert second.event_id != first.event_id
    assert send(session, **sent) == first
    assert send(session, **{**sent, **others}) == second
    assert kept(session) == 2


def test_what_has_expired_is_never_delivered_though_its_row_is_there(http):
    session = http.session
    first = send(session, "key", "brief", ttl=HOUR, idempotency_key="k")
    with later(hours=2):
        wait = http.add("key")
        assert keys.wanted(session) == []
        assert keys.match(session, "key") == {}
        assert http.state(wait).state == "deferred"
        again = send(session, "key", "anew", idempotency_key="k")
        assert again.event_id != first.event_id
        assert again.waits == [wait.id]
    assert kept(session) == kept(session, EventSent) == 1


def test_what_is_kept_can_be_looked_at_and_dropped(session):
    for number in range(3):
        send(
            session,
            "orders",
            {"order": number, "password": "s3cret-word"},
            dags=["shop"],
            idempotency_key=f"{number}",
        )
    send(session, "others", 1, to="all", ttl=HOUR)
    found, total = waits.kept(session, key="orders", limit=2)
    assert total == 3 and [one.event["order"] for one in found] == [0, 1]
    first = found[0]
    assert (first.key, first.to, first.sent_by, first.dags, first.reached) == (
        "orders",
        "one",
        "ada",
        ["shop"],
        [],
    )
    assert first.kept_at < first.expires and "s3cret-word" not in str(first.event)
    assert waits.drop(session, first.event_id) and not waits.drop(session, first.event_id)
    assert [one.event["order"] for one in waits.kept(session, key="orders")[0]] == [1, 2]
    again = send(session, "orders", {"order": 0, "password": "s3cret-word"}, dags=["shop"], idempotency_key="0")
    assert again.event_id == first.event_id and waits.kept(session)[1] == 3
    with later(days=400):
        assert waits.kept(session) == ([], 0)


def test_for_all_without_a_time_to_live_nothing_is_kept(session):
    with pytest.raises(NoSuchWait), session.begin_nested():
        send(session, "nobody", 1, to="all")
    assert kept(session) == 0
    assert send(session, "nobody", 1, to="all", ttl=HOUR).status == "kept"
    assert keys.match(session, "nobody") == {}


def test_it_goes_to_the_wait_that_has_waited_longest(http):
    first, second, other = http.add("key"), http.add("key"), http.add("other")
    receipt = send(http.session, "key", 1, idempotency_key="k")
    assert (receipt.status, receipt.waits) == ("delivered", [first.id])
    assert send(http.session, "key", 1, idempotency_key="k") == receipt
    assert send(http.session, "key", 2).waits == [second.id]
    assert send(http.session, "key", 3).waits == []
    assert [http.xcoms(wait) for wait in (first, second, other)] == [{"return_value": 1}, {"return_value": 2}, {}]
    assert http.audit(first) == [("event sent", "ada")]
    assert kept(http.session) == 1


def test_a_kept_event_goes_to_one_wait_that_begins_and_the_oldest_goes_first(http):
    sent = [send(http.session, "key", number) for number in (1, 2)]
    assert keys.wanted(http.session) == []
    first = http.add("key")
    assert keys.wanted(http.session) == ["key"]
    assert keys.match(http.session, "key") == {sent[0].event_id: [first.id]}
    assert keys.wanted(http.session) == []
    second, third = http.add("key"), http.add("key")
    assert send(http.session, "key", 3).waits == [third.id]  # after what came before it
    assert [http.xcoms(wait)["return_value"] for wait in (first, second, third)] == [1, 2, 3]
    assert kept(http.session) == 0


def test_where_nothing_is_kept_an_event_that_nobody_waits_for_is_refused(http, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__HTTP_KEEP", "0")
    with pytest.raises(NoSuchWait, match="http_keep = 0"):
        send(http.session, "key", 1)
    wait = http.add("key")
    assert send(http.session, "key", 2).waits == [wait.id]
    assert send(http.session, "key", 3, ttl=HOUR).status == "kept"


def test_for_all_it_goes_to_those_that_wait_and_to_each_that_begins(http):
    now = [http.add("key"), http.add("key")]
    receipt = send(http.session, "key", "news", to="all", ttl=HOUR)
    assert sorted(receipt.waits) == sorted(wait.id for wait in now)
    late = http.add("key", replay=False)
    assert keys.match(http.session, "key") == {receipt.event_id: [late.id]}
    # Once for each wait, also for one that waits again after a clear.
    http.again(late, cleared=True)
    assert keys.match(http.session, "key") == {}
    assert send(http.session, "key", "its own").waits == [late.id]
    assert kept(http.session) == 1


def test_it_goes_to_dags_that_its_sender_may_reach(http):
    theirs, mine = http.add("key", dag_id="theirs"), http.add("key", dag_id="mine")
    assert send(http.session, "key", 1, dags={"mine"}).waits == [mine.id]
    assert send(http.session, "key", 2, dags={"mine"}).waits == []
    assert keys.match(http.session, "key") == {}
    late = http.add("key", dag_id="mine")
    assert list(keys.match(http.session, "key").values()) == [[late.id]]
    assert http.state(theirs).state == "deferred"


def test_what_does_not_fit_a_wait_stays_for_others_and_is_not_tried_again_and_again(http, monkeypatch):
    tried = []
    fits = sending.fits
    monkeypatch.setattr(sending, "fits", lambda row, payload: tried.append(payload) or fits(row, payload))
    unfit = [send(http.session, "key", number) for number in range(3)]
    good = send(http.session, "key", {"order": 1})
    strict = http.add("key", schema=ORDER)
    assert keys.match(http.session, "key") == {good.event_id: [strict.id]}
    assert tried == [0, 1, 2, {"order": 1}]
    strict = http.add("key", schema=ORDER)
    assert keys.match(http.session, "key") == {}
    tried.clear()
    with statements(http.session) as said:
        for _ in range(2):
            assert keys.wanted(http.session) == ["key"]
            assert keys.match(http.session, "key") == {}
    assert tried == []
    assert not any("event_kept.event," in statement for statement in said)  # nor read
    with pytest.raises(Unfit), http.session.begin_nested():
        send(http.session, "key", "nor does this")
    # Of another beginning nothing is known, nor of another wait.
    http.again(strict, cleared=False)
    loose = http.add("key")
    assert keys.match(http.session, "key") == {unfit[0].event_id: [loose.id]}
    assert send(http.session, "key", {"order": 2}).waits == [strict.id]
    assert kept(http.session) == 2


@pytest.mark.parametrize("is_waited_for", [False, True])
def test_what_an_event_costs_does_not_hang_on_how_many_are_kept(http, is_waited_for):
    """Neither in statements, nor in what is read."""

    def cost():
        if is_waited_for:
            http.add("key", schema=ORDER)
            http.session.flush()
        with statements(http.session) as said:
            receipt = send(http.session, "key", {"order": 1}, dags=["shop"])
        assert receipt.waits if is_waited_for else not receipt.waits
        return len(said)

    send(http.session, "key", 0, dags=["elsewhere"])
    cost()
    few = cost()
    for number in range(120):
        send(http.session, "key", number, dags=["elsewhere"])
    assert cost() == few


def test_a_wait_is_found_by_the_key_that_it_has_in_this_try(http):
    wait = http.add("before")
    http.again(wait, cleared=True, begun=False)
    assert send(http.session, "before", 1).waits == []  # what key it has now is not known yet
    assert keys.wanted(http.session) == []
    http.begin(wait, key="after")
    assert keys.match(http.session, "before") == {}
    assert send(http.session, "after", 2).waits == [wait.id]


@pytest.mark.parametrize("state", ["success", "failed", "scheduled", "running", None])
def test_a_wait_that_is_not_deferred_any_more_gets_nothing(http, state):
    wait = http.add("key")
    http.set(wait, state=state)
    assert send(http.session, "key", 1).waits == []
    assert keys.wanted(http.session) == []
    assert http.row(wait).phase is None


def test_a_wait_that_has_an_event_gets_no_other(http):
    wait = http.add("key", finish_on_worker=True)
    sending.send(http.session, wait, "by its address", by="ada")
    http.again(wait, cleared=False, begun=False)
    assert send(http.session, "key", 1).waits == []
    http.begin(wait)
    assert keys.match(http.session, "key") == {}
    assert json.loads(http.row(wait).event) == "by its address"


@pytest.mark.parametrize("key", ["", "x" * 257])
def test_what_is_no_key_is_refused(session, key):
    with pytest.raises(Unfit, match="a key is a text of 1 to 256 characters"):
        send(session, key, 1)


def test_no_more_are_kept_for_a_key_than_allowed(http, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__HTTP_MOST_KEPT_FOR_KEY", "2")
    session = http.session
    send(session, "key", 1), send(session, "key", 2, ttl=HOUR)
    for more in ({}, {"to": "all", "ttl": HOUR}):
        with pytest.raises(TooMany, match="2 events are kept for this key") as refused, session.begin_nested():
            send(session, "key", 3, idempotency_key="k", **more)
        assert (refused.value.status, refused.value.retry_after) == (429, 60)
    assert kept(session, EventSent) == 0
    send(session, "other", 1)
    # What need not be kept is taken, and what has expired does not count.
    waits = [http.add("key"), http.add("key"), http.add("key")]
    assert send(session, "key", "now", to="all").waits == [wait.id for wait in waits]
    with later(hours=2):
        assert send(session, "key", 3).status == "kept"
        assert kept(session) == 3


def test_no_more_of_a_sender_are_kept_than_allowed(session, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__HTTP_MOST_KEPT_FOR_SENDER", "2")
    for number in range(2):
        send(session, f"key{number}", 1, ttl=HOUR)
    with pytest.raises(TooMany, match="2 events are kept for this sender"), session.begin_nested():
        send(session, "key", 1)
    assert send(session, "key", 1, by="another").status == "kept"
    with later(hours=2):
        assert send(session, "key", 1).status == "kept"


def test_no_more_are_kept_in_all_than_allowed(session, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__HTTP_MOST_KEPT", "3")
    for number in range(3):
        send(session, f"key{number}", 1, ttl=HOUR)
    with pytest.raises(TooMany, match="3 events are kept for all keys"), session.begin_nested():
        send(session, "key", 1)
    with later(hours=2):
        monkeypatch.setattr(keys._total, "_counted", float("-inf"))
        assert send(session, "key", 1).status == "kept"


def test_one_that_cannot_be_matched_holds_up_no_other(monkeypatch):
    """A match that fails is made to, since none is known that does."""
    asked = []

    def match(session, key):
        asked.append(key)
        if key == "broken":
            raise ValueError("no")
        return {f"event for {key}": [key]}

    monkeypatch.setattr(keys, "wanted", lambda session: ["first", "broken", "last"])
    monkeypatch.setattr(keys, "match", match)
    monkeypatch.setattr(matcher, "in_transaction", lambda work: work(contextlib.nullcontext()))
    with pytest.raises(RuntimeError, match="'broken'"):
        matcher.match_once()
    assert asked == ["first", "broken", "last"]


async def test_an_api_server_takes_over_once_what_the_first_edition_kept(monkeypatch):
    """As it starts, or as soon as its database is there; and then it matches."""
    done = []

    def take_over():
        done.append("take over")
        if len(done) == 1:
            raise OperationalError("", {}, Exception("away"))

    monkeypatch.setattr(variables, "take_over", take_over)
    monkeypatch.setattr(matcher, "match_once", lambda: done.append("match"))
    monkeypatch.setenv("AIRFLOW__EVENTS__HTTP_MATCH_INTERVAL", "0.01")
    running = asyncio.create_task(matcher.Matcher(None)._run())
    while len(done) < 4:
        await asyncio.sleep(0.01)
    running.cancel()
    assert done[:4] == ["take over", "take over", "match", "match"]


def at_once(*works):
    """Do all of it in threads of their own, each in a transaction, and return what came of each."""
    came = [None] * len(works)

    def one(number):
        try:
            came[number] = in_transaction(works[number])
        except Exception as error:
            came[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return came


def test_of_the_same_request_many_times_at_once_one_counts(committed):
    work = [lambda session: send(session, "key", 1, idempotency_key="k")] * 3
    receipts = at_once(*work)
    assert len({receipt.event_id for receipt in receipts}) == 1
    assert kept(committed) == 1


def test_many_senders_and_matchers_at_once_give_each_wait_one_event(committed, http_committed):
    waits = [http_committed.add("key") for _ in range(4)]
    committed.commit()
    early = in_transaction(lambda session: send(session, "key", "early", to="all", ttl=HOUR, dags=["none"]))
    assert early.status == "kept"
    sends = [lambda session, n=n: send(session, "key", n) for n in range(6)]
    came = at_once(*sends, *[lambda session: keys.match(session, "key")] * 2)
    assert [error for error in came if isinstance(error, Exception)] == []
    matcher.match_once()
    got = [http_committed.xcoms(wait)["return_value"] for wait in waits]
    assert len(set(got)) == 4
    assert set(got) <= set(range(6))
    assert kept(committed) == 1 + 2
    assert [len(http_committed.audit(wait)) for wait in waits] == [1] * 4


def test_two_events_for_all_at_once_go_each_to_none_or_all_of_the_waits(committed, http_committed):
    waits = [http_committed.add("key") for _ in range(4)]
    committed.commit()
    came = at_once(*[lambda session, n=n: send(session, "key", n, to="all") for n in range(2)])
    assert sorted(type(one).__name__ for one in came) == ["KeyReceipt", "NoSuchWait"]
    assert len({http_committed.xcoms(wait)["return_value"] for wait in waits}) == 1


def variable(session, name, told, until="2999-01-01T00:00:00.000000+00:00"):
    text = told if isinstance(told, str) else json.dumps(told)
    session.add(Variable(key=f"airflow_events.{name}", val=text, description=f"until {until}"))


def of_first_edition(number, **more):
    return {
        "key": "key", "event": str(number), "event_id": f"event{number}", "to": "one", "by": "ada", "dags": None,
        "got": [], "until": "until 2999-01-01T00:00:00.000000+00:00", **more,
    }  # fmt: skip


def test_what_the_first_edition_kept_is_taken_over_once(committed, http_committed, caplog):

    def keep(number, told=None, **more):
        told = of_first_edition(number) if told is None else told
        variable(committed, f"kept.digest.{number * 10**17:020d}.event{number}", told, **more)

    keep(2), keep(1)
    keep(3, of_first_edition(3, to="all", dags=["shop"], got=["shop/run/wait/-1"]))
    keep(4, "{}", until="2020-01-01T00:00:00.000000+00:00")
    keep(5, "no JSON")
    keep(6, {"from": "another version"})
    committed.add(Variable(key="mine", val="1"))
    committed.commit()
    with caplog.at_level(logging.ERROR):
        assert variables.take_over() == 3
    assert variables.take_over() == 0
    assert [f"event{number}" in caplog.text for number in (4, 5, 6)] == [False, True, True]
    left = committed.scalars(select(Variable.key).order_by(Variable.key)).all()
    assert [name.rpartition(".")[2] for name in left] == ["event5", "event6", "mine"]
    rows = committed.scalars(select(EventKept).order_by(EventKept.id)).all()
    assert [(row.event_id, row.event, row.to, row.sent_by) for row in rows] == [
        ("event1", "1", "one", "ada"), ("event2", "2", "one", "ada"), ("event3", "3", "all", "ada"),
    ]  # fmt: skip
    assert (rows[2].dags, json.loads(rows[2].reached)) == ('["shop"]', ["shop/run/wait/-1"])
    assert rows[0].expires == LATEST
    wait = http_committed.add("key")
    committed.commit()
    assert matcher.match_once() == {"event1": [wait.id]}


def test_a_variable_that_somebody_adds_later_is_no_event(committed):
    """Who may edit Variables would else speak in any sender's name, once an API server starts."""
    assert variables.take_over() == 0
    told = {"key": "key", "event": "1", "event_id": "forged", "to": "one", "by": "ada", "dags": None, "got": []}
    variable(committed, "kept.forged.1.forged", told)
    committed.commit()
    assert variables.take_over() == 0
    assert kept(committed) == 0 and kept(committed, Variable) == 1


def test_what_the_first_edition_told_a_sender_it_is_told_again(committed):
    receipt = {"status": "kept", "event_id": "old", "key": "key", "waits": []}
    # As the first edition named it: by the first 40 digits of the SHA-256 of key, line break and idempotency key.
    name = "sent.7717e69578cd00cb1597b1b1f2ce27d21bb2ff8b"
    variable(committed, name, {"digest": sending.digest_of(1), "receipt": receipt})
    committed.commit()
    assert variables.take_over() == 1
    assert kept(committed, Variable) == 0
    assert send(committed, "key", 1, idempotency_key="k") == keys.KeyReceipt(**receipt)
    with pytest.raises(Unfit, match="another payload"):
        send(committed, "key", 2, idempotency_key="k")


def test_an_event_for_all_is_kept_though_it_does_not_fit_one_that_waits_now(http):
    http.add("news", schema=ORDER)
    assert send(http.session, "news", "text", to="all", ttl=HOUR).status == "kept"
    http.session.commit()
    later_one = http.add("news")
    assert keys.match(http.session, "news") == {http.session.scalar(select(EventKept.event_id)): [later_one.id]}


def test_an_event_is_kept_that_a_wait_which_is_locked_now_might_take(http, monkeypatch):
    http.add("orders", schema=ORDER)
    busy = http.add("orders")
    lock = WaitRow.lock_if_free.__func__
    monkeypatch.setattr(
        WaitRow,
        "lock_if_free",
        classmethod(lambda cls, session, wait: None if wait == busy else lock(cls, session, wait)),
    )
    assert send(http.session, "orders", "text").status == "kept"


def test_a_key_has_no_nul(http):
    with pytest.raises(Unfit, match="a key is a text"):
        send(http.session, "a\0b", 1)


def test_of_kept_events_the_oldest_goes_first_to_a_wait_that_was_locked_meanwhile(http, monkeypatch):
    """It was locked as the oldest was offered to it, and free again as the next was."""
    for number in range(3):
        assert send(http.session, "orders", number).status == "kept"
    http.session.commit()
    waits = [http.add("orders"), http.add("orders")]
    lock, locked = WaitRow.lock_if_free.__func__, [waits[0]]

    def is_locked_once(cls, session, wait):
        if wait in locked:
            locked.remove(wait)
            return None
        return lock(cls, session, wait)

    monkeypatch.setattr(WaitRow, "lock_if_free", classmethod(is_locked_once))
    oldest, second, third = http.session.scalars(select(EventKept.event_id).order_by(EventKept.id))
    assert keys.match(http.session, "orders") == {oldest: [waits[1].id]}
    assert not locked
    assert keys.match(http.session, "orders") == {second: [waits[0].id]}
    assert http.session.scalars(select(EventKept.event_id)).all() == [third]


def test_what_is_sent_does_not_go_before_what_is_kept(http, monkeypatch):
    """The wait was locked as the kept event was offered to it, and free again as the new one was."""
    kept_before = send(http.session, "orders", 1).event_id
    http.session.commit()
    wait = http.add("orders")
    lock, locked = WaitRow.lock_if_free.__func__, [wait]
    monkeypatch.setattr(
        WaitRow,
        "lock_if_free",
        classmethod(lambda cls, session, which: locked.pop() and None if locked else lock(cls, session, which)),
    )
    assert send(http.session, "orders", 2).status == "kept"
    assert not locked
    assert keys.match(http.session, "orders") == {kept_before: [wait.id]}


def test_a_later_event_does_not_go_before_one_that_another_transaction_has_locked(
    engine, committed, http_committed
):
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time, and no locks of rows")
    oldest, _ = (send(committed, "key", number).event_id for number in range(2))
    wait = http_committed.add("key")
    committed.commit()
    reached = []
    with Session(engine) as other:
        other.scalars(select(EventKept).where(EventKept.event_id == oldest).with_for_update()).one()
        matching = threading.Thread(target=lambda: reached.append(matcher.match_once()))
        matching.start()
        matching.join(2)  # time enough to give the second, were it not to wait for the first
    matching.join()
    assert reached == [{oldest: [wait.id]}]
