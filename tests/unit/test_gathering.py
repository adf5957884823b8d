"""
A task that waits for many events: what becomes of each event, and of the task.

The transactions are the real ones, and so is the triggerer's client of them, but that there is no HTTP between.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import greenback
import pytest
import uuid6
from airflow import settings
from airflow.models.base import Base
from airflow.models.dagrun import DagRun
from airflow.models.renderedtifields import RenderedTaskInstanceFields
from airflow.models.taskinstance import TaskInstance
from airflow.models.taskmap import TaskMap
from airflow.models.xcom import XComModel
from airflow.sdk.execution_time import task_runner
from airflow.sdk.serde import deserialize
from airflow_events import EventListener, Wait, current_wait
from airflow_events.errors import ArgumentsChanged, AtRedelivery, EventLost, EventUndecodable, InboxRefused
from airflow_events.inbox import models as inbox
from airflow_events.inbox import transactions
from airflow_events.inbox.entries import (
    Answer,
    Begin,
    Finish,
    Look,
    Lose,
    Places,
    Record,
    Status,
    answer_of,
    as_json,
    entry_of,
)
from airflow_events.listeners.support.clock import Clock
from airflow_events.listeners.timer import TimerListener
from airflow_events.triggers import gathering as gathering_
from airflow_events.triggers import outcome, polling, reference
from airflow_events.triggers.calls import Calls
from airflow_events.triggers.events import EventsTrigger
from airflow_events.triggers.gathering import Gathering, Held
from airflow_events.triggers.inbox import Inbox
from sqlalchemy import insert, select, update
from sqlalchemy.orm import scoped_session, sessionmaker

pytestmark = pytest.mark.parametrize("engine", ["sqlite"], indirect=True, scope="session")

NOW = datetime.now(timezone.utc)
WAIT = Wait("shop", "run_1", "wait")


@pytest.fixture
def airflow(engine, monkeypatch):
    """A database for `airflow_events.inbox.transactions.carry_out`, and task instances in it that wait."""
    sessions = sessionmaker(engine, expire_on_commit=False)
    monkeypatch.setattr(settings, "NonScopedSession", sessions)
    monkeypatch.setattr(settings, "Session", scoped_session(sessions))
    monkeypatch.setattr("airflow_events.triggers.inbox.Post", Directly)
    yield Airflow(engine)
    with engine.begin() as connection:
        for metadata in (inbox.Base.metadata, Base.metadata):
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())


class Directly:
    """What the client of the inbox sends, and gets, without HTTP."""

    url = "nowhere"

    def __init__(self, at_once):
        self._thread = ThreadPoolExecutor(1)  # SQLite has one writer at a time

    async def __call__(self, bodies):
        entries = [entry_of(json.loads(body)) for body in bodies]
        answers = await asyncio.get_running_loop().run_in_executor(self._thread, transactions.carry_out, entries)
        return [answer_of(json.loads(json.dumps(as_json(answer)))) for answer in answers]


class Airflow:
    def __init__(self, engine):
        self.engine = engine
        self.runs = 0

    def deferred(self):
        """A task instance that waits; return the UUID of its try."""
        self.runs += 1
        run = {"dag_id": "shop", "run_id": f"run_{self.runs}"}
        ti = uuid6.uuid7()
        with self.engine.begin() as connection:
            more = {"id": self.runs, "run_type": "manual", "run_after": NOW, "state": "running", "start_date": NOW}
            connection.execute(insert(DagRun.__table__).values(**run, **more))
            of_task = {"task_id": "wait", "map_index": -1, "operator": "WaitForEventsOperator"}
            more = {"pool": "default_pool", "pool_slots": 1, "span_status": "not_started", "start_date": NOW}
            state = {"id": ti, "state": "deferred", "try_number": 1, "max_tries": 3}
            connection.execute(insert(TaskInstance.__table__).values(**run, **of_task, **more, **state))
        return str(ti)

    def again(self, ti, *, cleared=False):
        """Another try, as a retry or a clear makes it: under another UUID."""
        before, after = self.state(ti), uuid6.uuid7()
        max_tries = before.max_tries + 1 if cleared else before.max_tries
        self._set(ti, id=after, state="deferred", try_number=before.try_number + 1, max_tries=max_tries)
        return str(after)

    def mark(self, ti, state):
        self._set(ti, state=state)

    def _set(self, ti, **columns):
        table = TaskInstance.__table__
        with self.engine.begin() as connection:
            connection.execute(update(table).where(table.c.id == uuid.UUID(ti)).values(**columns))

    def state(self, ti):
        table = TaskInstance.__table__
        with self.engine.connect() as connection:
            return connection.execute(select(table).where(table.c.id == uuid.UUID(ti))).one()

    def rows(self, ti):
        """The rows of the wait, by place."""
        table, of = inbox.EventWait.__table__, self.state(ti)
        with self.engine.connect() as connection:
            rows = connection.execute(select(table).where(table.c.run_id == of.run_id)).all()
        return {row.place: row for row in rows}

    def phases(self, ti):
        return Counter(row.phase for place, row in self.rows(ti).items() if place >= 0)

    def value(self, ti):
        """What the task has returned."""
        of = self.state(ti)
        with self.engine.connect() as connection:
            key = (XComModel.run_id == of.run_id, XComModel.key == "return_value")
            return deserialize(connection.execute(select(XComModel.value).where(*key)).scalar_one())

    def told(self, ti):
        """What the worker is told that the task was handed to."""
        kwargs = self.state(ti).next_kwargs
        return outcome.decode(kwargs["event"] if "event" in kwargs else deserialize(kwargs)["event"])

    def trigger(self, ti, listener, arguments, common=None, **more):
        of = self.state(ti)
        wait = {name: getattr(of, name) for name in ("dag_id", "run_id", "task_id", "map_index")}
        trigger = EventsTrigger(
            listener=reference.name(listener),
            calls=Calls(arguments, common or {}).encode(),
            count=len(arguments),
            wait={**wait, "run_start": NOW},
            **more,
        )
        trigger.task_instance = SimpleNamespace(id=uuid.UUID(ti), task_id="wait", try_number=1)
        return trigger


@contextlib.asynccontextmanager
async def running(trigger):
    """Run a trigger in a triggerer, which dies at the end of this."""

    async def run():
        async for event in trigger.run():
            raise AssertionError(f"a trigger that ends its task by the inbox yields nothing: {event}")

    task = asyncio.create_task(run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def until(condition, what, seconds=20):
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, what
        await asyncio.sleep(0.02)


async def ended(airflow, ti, trigger, seconds=30):
    """Run a trigger until it has ended its task, and return the task's state."""
    async with running(trigger) as task:
        await until(task.done, "the trigger ends", seconds)
        if not task.cancelled():  # by itself: see `airflow_events.triggers.event.leave`
            task.result()
    return airflow.state(ti).state


class Source(EventListener):
    """Messages ``sent``, which waits claim in their names; who has which, and who has committed which."""

    async def poll_for_event(self, prefix=""):
        me = current_wait().id
        self.polls.append(me)
        while True:
            for message in self.sent:
                if message.startswith(prefix) and self.claims.setdefault(message, me) == me:
                    return message
            await asyncio.sleep(0.02)

    async def event_checkpointed(self, event):
        await self.gate.wait()
        if event in self.stolen:
            if event in self.sent:
                self.sent.remove(event)
            raise EventLost(event)
        if event in self.refused:
            raise ConnectionError("away")
        me = current_wait().id
        if self.claims.get(event) != me:
            raise EventLost(f"{event} is claimed by {self.claims.get(event)}, not by {me}")
        if self.committed.setdefault(event, me) != me:
            raise EventLost(f"{event} was committed by {self.committed[event]}, not by {me}")
        self.commits.append(event)

    async def event_released(self, event, *args, **kwargs):
        me = current_wait().id
        self.released.append(me)
        for message, owner in list(self.claims.items()):
            if owner == me and message not in self.committed:
                del self.claims[message]

    @classmethod
    def reset(cls):
        cls.sent, cls.polls, cls.stolen, cls.refused, cls.released, cls.commits = [], [], [], [], [], []
        cls.claims, cls.committed = {}, {}
        cls.gate = asyncio.Event()
        cls.gate.set()


@pytest.fixture
async def source():
    Source.reset()
    return Source


class Cancelled(EventListener):
    """What it awaits is cancelled by its client; or it would end the process."""

    async def poll_for_event(self, how):
        if how == "good":
            return how
        if how == "exit":
            raise SystemExit("bye")
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future


@pytest.mark.parametrize(("how", "said"), [("cancel", "cancelled itself"), ("exit", r"called sys.exit\('bye'\)")])
async def test_a_poll_that_would_end_others_fails_the_task(airflow, how, said):
    ti = airflow.deferred()
    with pytest.raises(RuntimeError, match=said):
        await ended(airflow, ti, airflow.trigger(ti, Cancelled, ["good", how]))


async def test_a_thousand_timers(airflow):
    ti = airflow.deferred()
    moments = [NOW - timedelta(seconds=n) if n % 2 else f"PT{(n % 7) / 10 + 1}S" for n in range(1000)]
    trigger = airflow.trigger(ti, TimerListener, moments, mapped_over=True)
    assert await ended(airflow, ti, trigger, 60) == "success"
    value = airflow.value(ti)
    assert len(value) == 1000
    assert [moment for n, moment in enumerate(value) if n % 2] == [m for n, m in enumerate(moments) if n % 2]
    rows = airflow.rows(ti)
    assert airflow.phases(ti) == {"committed": 1000}
    assert rows[-1].call.startswith("TimerListener, 1,000 times, the first of them TimerListener('PT1.0S'")
    assert (rows[-1].phase, rows[-1].wanted, rows[0].listener) == (None, 1000, "TimerListener")
    with airflow.engine.connect() as connection:
        assert connection.execute(select(TaskMap.length)).scalar_one() == 1000


async def test_a_thousand_events_are_committed_each_at_its_place(airflow, source):
    ti = airflow.deferred()
    source.sent += [f"{number}.csv" for number in reversed(range(1000))]
    trigger = airflow.trigger(ti, source, [f"{number}." for number in range(1000)])
    assert await ended(airflow, ti, trigger, 60) == "success"
    assert airflow.value(ti) == [f"{number}.csv" for number in range(1000)]
    assert source.committed == {f"{number}.csv": f"shop/run_1/wait/-1#{number}" for number in range(1000)}
    assert len(source.commits) == 1000
    assert airflow.phases(ti) == {"committed": 1000}
    # A retry and a clear deliver the same, and ask the source for nothing.
    polls = len(source.polls)
    for cleared in (False, True):
        ti = airflow.again(ti, cleared=cleared)
        trigger = airflow.trigger(ti, source, [f"{number}." for number in range(1000)])
        assert await ended(airflow, ti, trigger) == "success"
        assert airflow.value(ti) == [f"{number}.csv" for number in range(1000)]
    assert (len(source.polls), len(source.commits)) == (polls, 1000)


async def test_it_goes_on_with_what_is_missing(airflow, source):
    ti = airflow.deferred()
    source.sent += ["a1"]
    async with running(airflow.trigger(ti, source, ["a", "b"])):
        await until(lambda: airflow.phases(ti) == {"committed": 1}, "one has come")
    source.polls.clear()
    source.sent += ["b1"]
    assert await ended(airflow, ti, airflow.trigger(ti, source, ["a", "b"])) == "success"
    assert source.polls == ["shop/run_1/wait/-1#1"]
    assert airflow.value(ti) == ["a1", "b1"]


async def test_no_more_than_the_first_are_recorded_and_the_others_are_given_back(airflow, source):
    ti = airflow.deferred()
    source.sent += list("abcdef")
    assert await ended(airflow, ti, airflow.trigger(ti, source, [""] * 6, first=2)) == "success"
    value = airflow.value(ti)
    assert [tuple(pair) for pair in value] == sorted(
        (int(place.rpartition("#")[2]), event) for event, place in source.committed.items()
    )
    assert len(value) == len(source.committed) == airflow.phases(ti)["committed"] == 2
    assert source.claims == source.committed
    assert airflow.rows(ti)[-1].wanted == 2
    assert airflow.rows(ti)[-1].call.startswith("Source, 2 of 6 times,")


async def test_a_first_one_that_is_lost_makes_room_for_another(airflow, source):
    ti = airflow.deferred()
    source.sent += list("ab")
    source.stolen += ["a"]
    assert await ended(airflow, ti, airflow.trigger(ti, source, ["", ""], first=1)) == "success"
    assert list(source.committed) == ["b"]


async def test_the_place_of_an_event_that_went_to_another_wait_waits_on(airflow, source):
    ti = airflow.deferred()
    source.sent += ["a1", "a2", "b1"]
    source.stolen += ["a1"]
    assert await ended(airflow, ti, airflow.trigger(ti, source, ["a", "b"])) == "success"
    assert airflow.value(ti) == ["a2", "b1"]
    # It has another name since, by which its claim is told from that of the lost one.
    assert source.committed["a2"].startswith("shop/run_1/wait/-1#0~")
    assert airflow.rows(ti)[0].lost.startswith(source.committed["a2"].rpartition("~")[2])


async def test_a_triggerer_that_begins_reads_what_a_place_has_lost(airflow, source):
    ti = airflow.deferred()
    source.sent += ["a1"]
    source.stolen += ["a1"]
    async with running(airflow.trigger(ti, source, ["a"])):
        await until(lambda: (row := airflow.rows(ti).get(0)) and row.lost, "it is lost")
    source.polls.clear()
    source.sent += ["a2"]
    assert await ended(airflow, ti, airflow.trigger(ti, source, ["a"])) == "success"
    assert [name.startswith("shop/run_1/wait/-1#0~") for name in source.polls] == [True]


TIMEOUT = 1.5
LATE = {"timeout": TIMEOUT}


async def test_a_default_stands_for_what_has_not_come(airflow, source):
    ti = airflow.deferred()
    source.sent += ["a1", "c1"]
    trigger = airflow.trigger(ti, source, ["a", "b", "c"], default=["none"], **LATE)
    assert await ended(airflow, ti, trigger) == "success"
    assert airflow.value(ti) == ["a1", "none", "c1"]
    assert source.released == ["shop/run_1/wait/-1#1"]
    # A clear waits for the rest.
    ti = airflow.again(ti, cleared=True)
    source.sent += ["b1"]
    assert (
        await ended(airflow, ti, airflow.trigger(ti, source, ["a", "b", "c"], default=["none"], **LATE))
        == "success"
    )
    assert airflow.value(ti) == ["a1", "b1", "c1"]


async def test_what_is_recorded_when_the_time_is_up_is_committed_first(airflow, source):
    ti = airflow.deferred()
    source.sent += ["a1"]
    source.gate.clear()
    trigger = airflow.trigger(ti, source, ["a", "b"], default=["none"], **LATE)
    async with running(trigger):
        await until(lambda: airflow.phases(ti) == {"recorded": 1}, "it is recorded")
        await asyncio.sleep(TIMEOUT)
        assert airflow.state(ti).state == "deferred"
        source.gate.set()
        await until(lambda: airflow.state(ti).state == "success", "the task ends")
    assert airflow.value(ti) == ["a1", "none"]
    assert airflow.phases(ti) == {"committed": 1}


async def test_a_triggerer_that_comes_after_the_deadline_commits_what_is_recorded_and_polls_for_nothing(
    airflow, source
):
    ti = airflow.deferred()
    source.sent += ["a1"]
    source.gate.clear()
    async with running(airflow.trigger(ti, source, ["a", "b"], default=["none"], **LATE)):
        await until(lambda: airflow.phases(ti) == {"recorded": 1}, "it is recorded")
    await asyncio.sleep(TIMEOUT)
    source.gate.set()
    source.polls.clear()
    assert await ended(airflow, ti, airflow.trigger(ti, source, ["a", "b"], default=["none"], **LATE)) == "success"
    assert airflow.value(ti) == ["a1", "none"]
    assert source.polls == []


@pytest.mark.parametrize("soft_fail", [False, True])
async def test_without_a_default_the_time_fails_or_skips_the_task(airflow, source, soft_fail):
    ti = airflow.deferred()
    source.sent += ["a1"]
    state = await ended(airflow, ti, airflow.trigger(ti, source, ["a", "b"], soft_fail=soft_fail, **LATE))
    assert state == ("skipped" if soft_fail else "scheduled")  # a worker fails it
    if not soft_fail:
        assert airflow.told(ti).arrived == 1
    assert airflow.phases(ti) == {"committed": 1}


async def test_of_two_triggerers_the_one_that_began_last_counts(airflow, source):
    ti = airflow.deferred()
    arguments = [f"{number}." for number in range(40)]
    source.sent += [f"{number}.x" for number in range(20)]
    async with running(airflow.trigger(ti, source, arguments)) as first:
        await until(lambda: airflow.phases(ti) == {"committed": 20}, "half of them have come")
        async with running(airflow.trigger(ti, source, arguments)):
            await until(lambda: airflow.rows(ti)[-1].generation == 2, "the second begins")
            source.sent += [f"{number}.x" for number in range(20, 40)]
            await until(lambda: airflow.state(ti).state == "success", "the task ends")
            assert not first.done() or first.cancelled()  # it has left
    assert airflow.value(ti) == [f"{number}.x" for number in range(40)]
    assert sorted(source.commits) == sorted(airflow.value(ti))  # each once


async def test_what_was_recorded_and_not_committed_when_a_triggerer_died_is_committed_by_the_next(airflow, source):
    ti = airflow.deferred()
    source.sent += ["a1", "b1"]
    source.gate.clear()
    async with running(airflow.trigger(ti, source, ["a", "b", "c"])):
        await until(lambda: airflow.phases(ti) == {"recorded": 2}, "two are recorded")
    assert source.commits == []
    source.gate.set()
    source.polls.clear()
    source.sent += ["c1"]
    assert await ended(airflow, ti, airflow.trigger(ti, source, ["a", "b", "c"])) == "success"
    assert airflow.value(ti) == ["a1", "b1", "c1"]
    assert sorted(source.commits) == ["a1", "b1", "c1"]
    assert source.polls == ["shop/run_1/wait/-1#2"]


KINDS = (Begin, Places, Record, Finish, Lose)


@pytest.mark.parametrize("answered", [False, True], ids=["not carried out", "answer lost"])
@pytest.mark.parametrize("first", [None, 2])
async def test_whatever_request_a_triggerer_dies_at_each_event_is_delivered_once(
    airflow, source, monkeypatch, answered, first
):
    """It dies at its first request, then at its second one, and so on, until it comes to its end."""
    ask = Inbox.ask
    for number in range(1, 40):
        source.reset()
        ti = airflow.deferred()
        source.sent += ["a1", "a2", "b1", "c1"]
        source.stolen += ["a1"]
        asked, dies = [], asyncio.Event()

        async def dying(self, entry, asked=asked, number=number, dies=dies):
            asked.append(entry)
            if len(asked) != number:
                return await ask(self, entry)
            if answered:
                await ask(self, entry)
            dies.set()
            await asyncio.Event().wait()

        arguments = ["a", "b", "c"]
        monkeypatch.setattr(Inbox, "ask", dying)
        async with running(airflow.trigger(ti, source, arguments, first=first)):
            await until(lambda ti=ti, dies=dies: dies.is_set() or airflow.state(ti).state == "success", "it dies")
        monkeypatch.setattr(Inbox, "ask", ask)
        if airflow.state(ti).state != "success":
            assert await ended(airflow, ti, airflow.trigger(ti, source, arguments, first=first)) == "success"
        value = airflow.value(ti)
        events = dict(value) if first else dict(enumerate(value))
        assert len(events) == (first or 3)
        assert events.items() <= {0: "a2", 1: "b1", 2: "c1"}.items()
        places = {event: place.partition("~")[0] for event, place in source.committed.items()}
        assert places == {event: f"shop/{airflow.state(ti).run_id}/wait/-1#{n}" for n, event in events.items()}
        if len(asked) < number:
            assert {type(entry) for entry in asked} == set(KINDS)
            return
    raise AssertionError("it never came to its end")


async def test_a_commit_that_fails_fails_the_try_and_the_next_one_begins_with_it(airflow, source, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__COMMIT_TIMEOUT", "0.1")
    ti = airflow.deferred()
    source.sent += ["a1", "b1"]
    source.refused += ["b1"]
    with pytest.raises(Exception, match="the next try of the task commits it"):
        await ended(airflow, ti, airflow.trigger(ti, source, ["a", "b", "c"]))
    assert airflow.phases(ti) == {"committed": 1, "recorded": 1}
    source.refused.clear()
    source.polls.clear()
    source.sent += ["c1"]
    ti = airflow.again(ti)
    assert await ended(airflow, ti, airflow.trigger(ti, source, ["a", "b", "c"])) == "success"
    assert source.polls == ["shop/run_1/wait/-1#2"]


class Failing(Source):
    async def poll_for_event(self, prefix):
        if prefix == "x":
            await asyncio.sleep(0.5)
            raise KeyError("no such topic")
        return await super().poll_for_event(prefix)


async def test_a_poll_that_fails_fails_the_try_and_what_came_stays(airflow):
    Failing.reset()
    Failing.sent += ["a1"]
    ti = airflow.deferred()
    with pytest.raises(KeyError, match="no such topic"):
        await ended(airflow, ti, airflow.trigger(ti, Failing, ["a", "x"]))
    assert airflow.phases(ti) == {"committed": 1}


async def test_a_list_that_changed_is_refused_where_events_were_taken(airflow, source):
    ti = airflow.deferred()
    source.sent += ["a1", "b1"]
    assert await ended(airflow, ti, airflow.trigger(ti, source, ["a", "b"])) == "success"
    for changed, index in ((["b", "a"], 0), (["a"], 1)):
        ti = airflow.again(ti, cleared=True)
        with pytest.raises(ArgumentsChanged, match=f"event {index} was recorded for other arguments") as error:
            await ended(airflow, ti, airflow.trigger(ti, source, changed))
        assert error.value.index == index
    source.sent += ["c1"]
    ti = airflow.again(ti, cleared=True)
    assert await ended(airflow, ti, airflow.trigger(ti, source, ["a", "b", "c"])) == "success"
    assert airflow.value(ti) == ["a1", "b1", "c1"]


async def test_a_list_of_timers_may_change(airflow):
    ti = airflow.deferred()
    assert await ended(airflow, ti, airflow.trigger(ti, TimerListener, [1, 2, 3])) == "success"
    ti = airflow.again(ti, cleared=True)
    assert await ended(airflow, ti, airflow.trigger(ti, TimerListener, [4, 2])) == "success"
    assert [moment.timestamp() for moment in airflow.value(ti)] == [4, 2]
    assert airflow.phases(ti) == {"committed": 2, None: 1}


async def test_without_replay_a_clear_waits_for_all_of_them_again(airflow, source):
    ti = airflow.deferred()
    source.sent += ["a1", "b1"]
    assert await ended(airflow, ti, airflow.trigger(ti, source, ["a", "b"], replay=False)) == "success"
    ti = airflow.again(ti)
    assert await ended(airflow, ti, airflow.trigger(ti, source, ["a", "b"], replay=False)) == "success"
    assert airflow.value(ti) == ["a1", "b1"]
    ti = airflow.again(ti, cleared=True)
    source.sent[:] = ["a2", "b2"]
    assert await ended(airflow, ti, airflow.trigger(ti, source, ["a", "b"], replay=False)) == "success"
    assert airflow.value(ti) == ["a2", "b2"]


class Queue(Source):
    """It delivers one message to two, as at least once does, and says how it is known."""

    async def poll_for_event(self, *_):
        while not self.sent or current_wait().index in self.served.get(self.sent[0], ()):
            await asyncio.sleep(0.02)
        self.served.setdefault(self.sent[0], set()).add(current_wait().index)
        return self.sent[0]

    def event_id(self, event):
        return event

    async def event_checkpointed(self, event):
        self.commits.append((current_wait().index, event))
        if len([one for one in self.commits if one[1] == event]) == 2:
            self.sent.remove(event)


async def test_an_event_that_two_places_are_delivered_is_one_places(airflow):
    Queue.reset()
    Queue.served = {}
    Queue.sent += ["m", "n", "o"]
    ti = airflow.deferred()
    assert await ended(airflow, ti, airflow.trigger(ti, Queue, [[], []], first=2)) == "success"
    value = [tuple(pair) for pair in airflow.value(ti)]
    assert len({event for _, event in value}) == 2
    assert {event for _, event in value} <= {"m", "n", "o"}
    assert {row.wait for row in _taken(airflow)} == {"shop/run_1/wait/-1#0", "shop/run_1/wait/-1#1"}


class Stale(Queue):
    """Each event came over a connection that is gone."""

    async def event_checkpointed(self, event):
        raise AtRedelivery(f"{event} was delivered to another process")


async def test_an_event_that_is_acknowledged_at_its_redelivery_is_delivered_and_stays_known(airflow):
    Stale.reset()
    Stale.served = {}
    Stale.sent += ["m"]
    ti = airflow.deferred()
    assert await ended(airflow, ti, airflow.trigger(ti, Stale, [[]])) == "success"
    assert airflow.value(ti) == ["m"]
    assert [row.acknowledged_at for row in _taken(airflow)] == [None]


class Poisoned(Queue):
    async def poll_for_event(self, *_):
        event = await super().poll_for_event()
        if event.startswith("bad"):
            type(self).sent.remove(event)
            error = EventUndecodable(event, "json", "no JSON", b"")
            error.event_id = event
            raise error
        return event


async def test_for_what_cannot_be_read_one_try_fails_and_the_next_passes_over_it(airflow):
    Poisoned.reset()
    Poisoned.served = {}
    Poisoned.sent += ["bad", "good"]
    ti = airflow.deferred()
    with pytest.raises(EventUndecodable):
        await ended(airflow, ti, airflow.trigger(ti, Poisoned, [[]]))
    Poisoned.sent.insert(0, "bad")  # which stays at its source
    Poisoned.served = {}
    ti = airflow.again(ti)
    assert await ended(airflow, ti, airflow.trigger(ti, Poisoned, [[]])) == "success"
    assert airflow.value(ti) == ["good"]
    assert [row.set_aside is not None for row in _taken(airflow)].count(True) == 1


class InHand(Queue):
    """What it has delivered, it delivers again only when it is given back."""

    async def poll_for_event(self, *_):
        event = await super().poll_for_event()
        type(self).sent.remove(event)
        return event

    async def event_checkpointed(self, event):
        self.commits.append(event)


async def test_for_what_cannot_be_recorded_one_try_fails_and_the_next_passes_over_it(airflow, monkeypatch):
    async def ask(inbox, entry):
        if isinstance(entry, Record) and "bad" in entry.event:
            return Answer(Status.INVALID, "it is longer than max_allowed_packet")
        return await known(inbox, entry)

    known = Inbox.ask
    monkeypatch.setattr(Inbox, "ask", ask)
    InHand.reset()
    InHand.served = {}
    InHand.sent += ["bad", "good"]
    ti = airflow.deferred()
    with pytest.raises(EventUndecodable, match="bad is not storable: it is longer"):
        await ended(airflow, ti, airflow.trigger(ti, InHand, [[]]))
    InHand.sent.insert(0, "bad")  # as of another triggerer
    InHand.served = {}
    ti = airflow.again(ti)
    assert await ended(airflow, ti, airflow.trigger(ti, InHand, [[]])) == "success"
    assert airflow.value(ti) == ["good"]


class Unfinished(Queue):
    async def event_checkpointed(self, event):
        await asyncio.Event().wait()

    async def event_released(self, event, *_):
        self.released.append(event)


async def test_what_is_polled_and_not_recorded_is_given_back_whoever_ends_the_trigger(airflow, monkeypatch):
    class Supervisor:
        async def asend(self, message):
            return SimpleNamespace(task_states={"run_1": {"wait": "deferred"}})

    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", Supervisor(), raising=False)
    Unfinished.reset()
    Unfinished.served = {}
    Unfinished.sent += ["m"]
    ti = airflow.deferred()
    trigger = airflow.trigger(ti, Unfinished, [[], []], first=1)
    async with running(trigger):
        await until(lambda: airflow.phases(ti) == {"recorded": 1}, "the first is recorded")
        # It is so in the database before the trigger has the answer.
        await until(lambda: trigger._gathering._uncommitted, "the trigger knows it")
        await until(lambda: trigger._gathering._polled, "a redelivery is polled, and has to wait")
    await trigger.on_kill()  # it was moved to another triggerer, say
    # The redelivery, and what is recorded and not acknowledged: delivered once more, it is known.
    assert Unfinished.released == ["m", "m"]


def _taken(airflow):
    with airflow.engine.connect() as connection:
        return connection.execute(select(inbox.EventTaken.__table__)).all()


async def test_a_task_that_a_user_has_ended_keeps_what_is_recorded_and_gives_back_the_rest(
    airflow, source, monkeypatch
):
    ti = airflow.deferred()
    source.sent += ["a1"]
    trigger = airflow.trigger(ti, source, ["a", "b"])

    class Supervisor:
        async def asend(self, message):
            states = {"run_1": {"wait": airflow.state(ti).state}}
            return SimpleNamespace(task_states=states)

    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", Supervisor(), raising=False)
    async with running(trigger):
        await until(lambda: airflow.phases(ti) == {"committed": 1}, "one has come")
    await trigger.on_kill()
    assert source.released == []  # it was moved to another triggerer, say
    airflow.mark(ti, "failed")
    await trigger.on_kill()
    assert source.released == ["shop/run_1/wait/-1#1"]


async def test_what_was_on_its_way_to_the_inbox_is_not_given_back(airflow, source, monkeypatch):
    ti = airflow.deferred()
    source.sent += ["a1"]
    trigger = airflow.trigger(ti, source, ["a"])
    ask, recording, go_on = Inbox.ask, asyncio.Event(), asyncio.Event()

    async def slow(self, entry):
        answer = await ask(self, entry)
        if isinstance(entry, Record):
            recording.set()
            await go_on.wait()
        return answer

    monkeypatch.setattr(Inbox, "ask", slow)
    async with running(trigger):
        await recording.wait()
    go_on.set()
    await trigger._gathering.release()
    assert source.released == []
    assert airflow.phases(ti) == {"recorded": 1}


class Asked(Source):
    """Gives its messages to whom the test says, of those who poll."""

    asked: list[asyncio.Future[str]] = []  # noqa: RUF012

    async def poll_for_event(self, prefix=""):
        self.asked.append(asyncio.get_running_loop().create_future())
        return await self.asked[-1]


@pytest.fixture
def looks(monkeypatch):
    """Triggers that look in tenths of a second whether a wait is still theirs."""
    monkeypatch.setattr(polling, "_LOOK_EVERY", 0.1)
    monkeypatch.setattr(polling, "_LOOKS_APART", 0.1)


async def test_who_waits_finds_what_another_has_recorded_that_began_late_and_died(airflow, source, looks):
    ti = airflow.deferred()
    source.claims["a1"] = "shop/run_1/wait/-1#0"
    source.gate.clear()
    Asked.asked = []
    async with running(airflow.trigger(ti, Asked, ["a"])) as first:
        await until(lambda: len(Asked.asked) == 1, "it polls")
        async with running(airflow.trigger(ti, Asked, ["a"])):
            await until(lambda: len(Asked.asked) == 2, "the other polls")
            Asked.asked[-1].set_result("a1")
            await until(lambda: airflow.phases(ti) == {"recorded": 1}, "the other records")
        source.gate.set()
        await until(first.cancelled, "it leaves")
    async with running(airflow.trigger(ti, Asked, ["a"])) as again:  # as Airflow does, whose trigger it still is
        await until(again.cancelled, "the task ends, and it leaves")
    assert airflow.state(ti).state == "success"
    assert source.commits == ["a1"]


async def test_a_look_that_an_api_server_does_not_know_ends_nothing(airflow, source, looks, monkeypatch):
    async def ask(inbox, entry):
        if isinstance(entry, Look):
            looked.append(entry)
            raise InboxRefused("look", "of an earlier version")
        return await known(inbox, entry)

    looked, known = [], Inbox.ask
    monkeypatch.setattr(Inbox, "ask", ask)
    ti = airflow.deferred()
    async with running(airflow.trigger(ti, source, ["a"])) as task:
        await until(lambda: len(looked) > 1, "it looks")
        assert not task.done()
        source.sent += ["a1"]
        await until(lambda: airflow.state(ti).state == "success", "the task ends")


async def test_it_begins_again_after_the_process_stood_still(airflow, source):
    ti = airflow.deferred()
    source.sent += ["a1"]
    trigger = airflow.trigger(ti, source, ["a", "b"])
    async with running(trigger):
        await until(lambda: airflow.phases(ti) == {"committed": 1}, "one has come")
        trigger._begin_again()
        await until(lambda: airflow.rows(ti)[-1].generation == 2, "it begins again")
        source.sent += ["b1"]
        await until(lambda: airflow.state(ti).state == "success", "the task ends")
    assert airflow.value(ti) == ["a1", "b1"]


async def test_it_asks_again_if_the_process_stood_still_while_it_began(airflow, source, monkeypatch):
    """What the inbox said before, another triggerer may have changed meanwhile."""
    ti = airflow.deferred()
    source.sent += ["a1"]
    trigger = airflow.trigger(ti, source, ["a"])
    ask = Inbox.ask

    async def slow(self, entry):
        answer = await ask(self, entry)
        if isinstance(entry, Begin) and answer.generation == 1:
            trigger._begin_again()
        return answer

    monkeypatch.setattr(Inbox, "ask", slow)
    assert await ended(airflow, ti, trigger) == "success"
    assert airflow.rows(ti)[-1].generation == 2


async def test_a_worker_ends_the_task_where_only_that_runs_what_is_to_run(airflow, source):
    ti = airflow.deferred()
    source.sent += ["a1"]
    assert await ended(airflow, ti, airflow.trigger(ti, source, ["a"], finish_on_worker=True)) == "scheduled"
    assert airflow.told(ti) == outcome.Arrived(["a1"])


async def test_an_outlet_that_airflow_refuses_fails_the_try(airflow):
    ti = airflow.deferred()
    with pytest.raises(RuntimeError, match="could not carry out 'finish'"):
        await ended(airflow, ti, airflow.trigger(ti, TimerListener, [1], outlets=[{"name": "a"}]))
    assert airflow.phases(ti) == {"committed": 1}


async def test_in_a_dag_test_nothing_is_recorded_and_all_is_committed(airflow, source):
    def trigger(*arguments, **more):
        made = airflow.trigger(airflow.deferred(), source, arguments, **more)
        made.task_instance = None
        return made

    source.sent += ["a1", "b1"]
    [event] = [event async for event in trigger("a", "b").run()]
    assert outcome.decode(event.payload) == outcome.Arrived(["a1", "b1"])
    assert sorted(source.commits) == ["a1", "b1"]
    source.reset()
    source.sent += ["a1"]
    [event] = [event async for event in trigger("a", "b", default=[None], **LATE).run()]
    assert outcome.decode(event.payload) == outcome.Arrived(["a1", None])
    source.reset()
    [event] = [event async for event in trigger("a", "b", **LATE).run()]
    assert outcome.decode(event.payload).arrived == 0


async def test_an_empty_list_is_delivered_at_once(airflow, source):
    ti = airflow.deferred()
    assert await ended(airflow, ti, airflow.trigger(ti, source, [])) == "success"
    assert airflow.value(ti) == []


def test_a_trigger_row_of_the_first_edition_is_read(airflow):
    told = {"hand_over": True, "have": [0], "timeout": 5.0}
    trigger = airflow.trigger(airflow.deferred(), TimerListener, [1, 2], **told)
    name, arguments = trigger.serialize()
    assert name == "airflow_events.triggers.events.EventsTrigger"
    assert sorted(arguments) == [
        "calls", "count", "default", "finish_on_worker", "first", "listener", "mapped_over", "multiple_outputs",
        "outlets", "push", "replay", "shown", "soft_fail", "timeout", "wait",
    ]  # fmt: skip
    assert EventsTrigger(**json.loads(json.dumps(arguments, default=str))).serialize()[1]["count"] == 2


def test_secrets_are_masked_in_what_the_page_shows(airflow):
    trigger = airflow.trigger(airflow.deferred(), TimerListener, [{"password": "hunter2"}], {"api_key": "x12345"})
    trigger._calls = Calls.decode(trigger.calls)
    assert trigger._call() == (
        "TimerListener, 1 times, the first of them TimerListener(api_key='***', password='***')"
    )


async def test_what_started_in_the_triggerer_shows_its_arguments_and_of_many_the_first(airflow):
    ti = airflow.deferred()
    trigger = airflow.trigger(ti, TimerListener, list(range(150)))
    trigger._started_here = True
    assert await ended(airflow, ti, trigger) == "success"
    with airflow.engine.connect() as connection:
        shown = connection.execute(select(RenderedTaskInstanceFields.rendered_fields)).scalar_one()
    assert shown == {"arguments": [*range(100), "... and 50 more"], "listener_kwargs": {}}


async def nowhere(entry):
    return Answer("done")


def gathering(listener, arguments, wanted=None):
    calls = Calls(arguments, {})
    return Gathering(listener, WAIT, calls, Held(nowhere, "", 1, "scope"), wanted=wanted or len(calls))


async def test_timers_to_come_have_no_task_until_their_moment(airflow):
    soon = datetime.now(timezone.utc) + timedelta(seconds=0.4)
    later = soon + timedelta(hours=1)
    before = len(asyncio.all_tasks())
    # The run has no start: of "PT5M" the poll tells.
    of_timers = gathering(TimerListener, [later] * 500 + [soon, 1, "PT5M", soon], wanted=3)
    await of_timers.begin()
    assert len(asyncio.all_tasks()) - before <= 1 + 2  # the clock of them, the one that is past, and "PT5M"
    await of_timers.changed(5)
    assert "counts from the start of the run" in str(of_timers.error)
    while not of_timers.complete:
        await of_timers.changed(5)
    assert datetime.now(timezone.utc) >= soon
    assert of_timers.events.keys() == {500, 501, 503}
    await of_timers.end()
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == before
    assert len(Clock.of_loop()) == 0


class Synchronous(EventListener):
    async def poll_for_event(self, value):
        return greenback.await_(asyncio.sleep(0, value))


async def test_a_listener_that_needs_the_portal_gets_one(airflow):
    await greenback.ensure_portal()
    of_synchronous = gathering(Synchronous, [1, 2])
    await of_synchronous.begin()
    while not of_synchronous.complete:
        await of_synchronous.changed(5)
    assert of_synchronous.events == {0: 1, 1: 2}


async def test_what_comes_at_once_is_checked_over_several_turns(airflow, source, turn, monkeypatch):
    checked = []
    monkeypatch.setattr(gathering_.serde, "check", lambda event: checked.append(turn()) or event)
    source.sent += [f"{number}.csv" for number in range(200)]
    of_many = gathering(source, [f"{number}." for number in range(200)])
    await of_many.begin()
    while not of_many.complete:
        await of_many.changed(5)
    assert len(checked) == 200
    assert max(Counter(checked).values()) == 20
    await of_many.end()
