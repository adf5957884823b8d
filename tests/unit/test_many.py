"""A task that waits for many events: what a DAG author meets, and how the events are gathered."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import datetime, timedelta, timezone
from typing import ClassVar

import greenback
import pytest
from airflow.sdk import DAG, task
from airflow.sdk.execution_time import task_runner
from airflow_events import EventListener, Wait, current_wait, wait_for_events
from airflow_events.errors import ArgumentsChanged, EventLost
from airflow_events.listeners import serde
from airflow_events.listeners.clock import Clock
from airflow_events.listeners.commit import Phase
from airflow_events.listeners.directory import DirectoryListener, DirectoryWatchListener
from airflow_events.listeners.http import HttpListener
from airflow_events.listeners.timer import TimerListener
from airflow_events.operators.wait_for_events import WaitForEventsOperator
from airflow_events.triggers import events as events_
from airflow_events.triggers import gathering as gathering_
from airflow_events.triggers import outcome
from airflow_events.triggers.calls import Calls, result
from airflow_events.triggers.events import XComRecordOfMany, recorded, recorded_in_turns
from airflow_events.triggers.gathering import Gathering
from airflow_events.triggers.journal import Journal
from airflow_events.triggers.record import XComRecord

WAIT = Wait("dag", "run", "task")


@pytest.fixture
def dag():
    with DAG("d", schedule=None) as dag:
        yield dag


class Leased(EventListener):
    async def poll_for_event(self): ...

    async def event_checkpointed(self, event): ...


@pytest.mark.parametrize(
    ("listener", "arguments", "of_task", "error", "message"),
    [
        (Leased, [[]], {}, TypeError, "its poll is not repeatable.*Use WaitForEventOperator"),
        (HttpListener, [[]], {}, TypeError, "is sent to a task and ends it"),
        (TimerListener, "2030-01-01", {}, TypeError, "arguments is a list .* not '2030-01-01'"),
        (TimerListener, [1, [2, 3]], {}, TypeError, r"arguments\[1\]: TimerListener.poll_for_event.*too many"),
        (TimerListener, [{"when": 1}], {}, TypeError, r"arguments\[0\].*'moment'|unexpected keyword"),
        (TimerListener, [object()], {}, TypeError, r"arguments\[0\] cannot be delivered"),
        (TimerListener, [1], {"first": 2}, ValueError, "first=2, and the list has 1 items"),
        (TimerListener, [1], {"first": 0}, ValueError, "at least 1, or None for all, not 0"),
        (TimerListener, [1], {"first": 1, "default": 1, "timeout": 1}, ValueError, "nothing is missing"),
        (TimerListener, [1], {"soft_fail": True}, ValueError, "there is no timeout"),
    ],
)
def test_what_cannot_be_is_refused_when_the_dag_is_parsed(dag, listener, arguments, of_task, error, message):
    with pytest.raises(error, match=message):
        wait_for_events.override(**of_task)(listener, arguments)


@task
def upstream(): ...


ROUTES = {
    # starts in the triggerer, ends there, records there
    "timers": (lambda: wait_for_events(TimerListener, [1, "{{ ts }}", timedelta(1)]), True, True, True),
    "directory": (lambda: wait_for_events(DirectoryListener, [{}], directory="d"), True, True, True),
    "upstream, timers": (lambda: wait_for_events(TimerListener, upstream()), False, True, True),
    "upstream in the list": (lambda: wait_for_events(TimerListener, [1, upstream()]), False, True, True),
    "upstream, watch": (lambda: wait_for_events(DirectoryWatchListener, upstream()), False, False, False),
    "upstream, directory": (lambda: wait_for_events(DirectoryListener, upstream()), False, False, False),
    "multiple outputs": (
        lambda: wait_for_events.override(multiple_outputs=True)(TimerListener, [1]), True, False, True,
    ),
    "replay=False": (
        lambda: wait_for_events.override(replay=False)(DirectoryListener, ["d"]), False, False, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", ROUTES)
def test_where_it_starts_records_and_ends(dag, way):
    make, starts, ends, records = ROUTES[way]
    operator = make().operator
    assert operator.start_from_trigger is starts
    if starts:
        told = operator.start_trigger_args.trigger_kwargs
        assert (not told["finish_on_worker"], not told["hand_over"]) == (ends, records)
        assert len(Calls.decode(told["calls"])) == told["count"] == len(operator.arguments)
    else:
        operator.arguments = [["d"]]  # as a worker has rendered them
        told = operator._trigger_arguments(started_on_worker=True)
        assert (not told["finish_on_worker"], not told["hand_over"]) == (ends, records)


def test_it_is_a_task_with_upstream_and_can_be_mapped(dag):
    assert wait_for_events(TimerListener, upstream()).operator.upstream_task_ids == {"upstream"}
    mapped = WaitForEventsOperator.partial(task_id="m", listener=TimerListener).expand(arguments=[[1], [2]])
    assert mapped.retries == 3
    with pytest.raises(TypeError, match="not repeatable"):
        WaitForEventsOperator.partial(task_id="n", listener=Leased)


def test_how_an_item_is_called():
    calls = Calls([5, [1, 2], (3,), {"a": 1, "topic": "u"}, None], {"topic": "t"})
    assert [calls.of(index) for index in range(5)] == [
        ((5,), {"topic": "t"}),
        ([1, 2], {"topic": "t"}),
        ((3,), {"topic": "t"}),
        ((), {"topic": "u", "a": 1}),
        ((None,), {"topic": "t"}),
    ]
    again = Calls.decode(calls.encode())
    assert [again.digest(index) for index in range(5)] == [calls.digest(index) for index in range(5)]
    assert len({calls.digest(index) for index in range(5)}) == 5
    assert Calls([5], {}).digest(0) != calls.digest(0)
    assert calls.describe("L") == "L(5, topic='t') and 4 more"


def test_what_is_delivered():
    assert result({1: "b", 0: "a"}, 2, None) == ["a", "b"]
    assert result({1: "b"}, 3, None, [None]) == [None, "b", None]
    assert result({2: "c", 0: "a"}, 3, 2) == [(0, "a"), (2, "c")]


def test_a_batch_goes_to_the_worker_and_back():
    batch = outcome.Batch({3: ("a", 1), 0: None})
    assert outcome.decode(outcome.encode(batch)) == batch
    assert outcome.decode(outcome.encode(outcome.Gathered())) == outcome.Gathered()


def test_each_place_has_a_name_of_its_own():
    assert WAIT.id == "dag/run/task/-1"
    assert Wait("dag", "run", "task", index=5).id == "dag/run/task/-1#5"


class Memory:
    def __init__(self):
        self.values = {}

    async def get(self, name):
        return serde.decode(self.values.get(name, "null"))

    async def set(self, name, value):
        self.values[name] = serde.encode(value)


class Source(EventListener):
    """Messages ``sent``; who has which, and who has committed which."""

    repeatable_poll = True

    async def poll_for_event(self, prefix=""):
        me = current_wait().id
        self.polls.append(me)
        while True:
            for message in self.sent:
                if message.startswith(prefix) and self.claims.setdefault(message, me) == me:
                    return message
            await asyncio.sleep(0.01)

    async def event_checkpointed(self, event):
        if event in self.stolen:
            self.stolen.remove(event)
            self.sent.remove(event)
            raise EventLost(event)
        if event in self.refused:
            raise ConnectionError("away")
        assert self.claims[event] == current_wait().id
        self.committed[event] = current_wait().id

    async def event_released(self, event, *args, **kwargs):
        for message, owner in list(self.claims.items()):
            if owner == current_wait().id and message not in self.committed:
                del self.claims[message]


@pytest.fixture
def source():
    names = ("sent", "polls", "stolen", "refused")
    return type("Source", (Source,), {"claims": {}, "committed": {}, **{name: [] for name in names}})


async def gather(source, memory, calls, wanted=None, seconds=5):
    """Wait until it is complete or has failed, as the trigger does, and return the gathering."""
    journal = Journal(memory)
    await journal.read()
    have = recorded(journal, calls, source)
    gathering = Gathering(source, WAIT, calls, wanted=wanted or len(calls), journal=journal, have=have)
    await gathering.begin()
    end = asyncio.get_running_loop().time() + seconds
    while not gathering.complete and gathering.error is None and asyncio.get_running_loop().time() < end:
        await gathering.changed(0.05)
    await gathering.end()
    return gathering


async def test_each_event_is_recorded_and_committed_at_its_place(source):
    source.sent += ["b1", "a1", "c1"]
    memory, calls = Memory(), Calls(["a", "b", "c"], {})
    gathering = await gather(source, memory, calls)
    assert recorded(gathering.journal, calls, source) == {0: "a1", 1: "b1", 2: "c1"}
    assert source.committed == {"a1": "dag/run/task/-1#0", "b1": "dag/run/task/-1#1", "c1": "dag/run/task/-1#2"}
    polls = len(source.polls)
    assert (await gather(source, memory, calls)).complete
    assert len(source.polls) == polls


async def test_it_goes_on_with_what_is_missing_and_with_what_was_not_committed(source, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__COMMIT_TIMEOUT", "0.1")
    source.sent += ["a1", "b1"]
    source.refused += ["b1"]
    memory, calls = Memory(), Calls(["a", "b", "c"], {})
    first = await gather(source, memory, calls)
    assert "the next try of the task commits it" in str(first.error)
    assert first.journal.records.of(1).phase is Phase.RECORDED
    assert source.committed == {"a1": "dag/run/task/-1#0"}
    source.refused.clear()
    source.polls.clear()
    source.sent += ["c1"]
    assert (await gather(source, memory, calls)).complete
    assert source.polls == ["dag/run/task/-1#2"]
    assert len(source.committed) == 3


async def test_an_event_that_went_to_another_wait_is_waited_for_anew(source):
    source.sent += ["a1", "a2", "b1"]
    source.stolen += ["a1"]
    memory, calls = Memory(), Calls(["a", "b"], {})
    gathering = await gather(source, memory, calls)
    assert recorded(gathering.journal, calls, source) == {0: "a2", 1: "b1"}


async def test_no_more_than_the_first_are_recorded_and_the_others_are_given_back(source):
    source.sent += list("abcdef")
    memory, calls = Memory(), Calls([""] * 6, {})
    gathering = await gather(source, memory, calls, wanted=2)
    assert len(gathering.have) == len(source.committed) == 2
    await gathering.release()
    assert source.claims == source.committed


async def test_a_first_one_that_is_lost_makes_room_for_another(source):
    source.sent += list("ab")
    source.stolen += ["a"]
    gathering = await gather(source, Memory(), Calls(["", ""], {}), wanted=1)
    assert gathering.complete
    assert list(source.committed) == ["b"]


async def test_a_list_that_changed_is_refused_where_events_were_taken(source):
    source.sent += ["a1", "b1"]
    memory = Memory()
    await gather(source, memory, Calls(["a", "b"], {}))
    for changed in (["b", "a"], ["a"]):
        with pytest.raises(ArgumentsChanged, match=r"event [01] was recorded for other arguments"):
            await gather(source, memory, Calls(changed, {}))
    grown = await gather(source, memory, Calls(["a", "b", "c"], {}), seconds=0.1)
    assert grown.missing == [2]


async def test_a_list_of_timers_may_change():
    memory = Memory()
    assert (await gather(TimerListener, memory, Calls([1, 2, 3], {}))).complete
    changed = Calls([4, 2], {})
    gathering = await gather(TimerListener, memory, changed)
    assert gathering.complete
    assert [
        event.timestamp() for _, event in sorted(recorded(gathering.journal, changed, TimerListener).items())
    ] == [
        4,
        2,
    ]


async def test_timers_to_come_have_no_task_until_their_moment():
    soon = datetime.now(timezone.utc) + timedelta(seconds=0.4)
    later = soon + timedelta(hours=1)
    calls = Calls([later] * 500 + [soon, 1, "PT5M", soon], {})  # the run has no start: of "PT5M" the poll tells
    before = len(asyncio.all_tasks())
    gathering = Gathering(TimerListener, WAIT, calls, wanted=3, journal=Journal(Memory()))
    await gathering.begin()
    assert len(asyncio.all_tasks()) - before <= 1 + 2  # the clock of them, the one that is past, and "PT5M"
    await gathering.changed(5)
    assert "counts from the start of the run" in str(gathering.error)
    while not gathering.complete:
        await gathering.changed(5)
    assert datetime.now(timezone.utc) >= soon
    assert gathering.have == {500, 501, 503}
    await gathering.end()
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == before
    assert len(Clock.of_loop()) == 0


async def test_a_listener_that_needs_the_portal_gets_one():
    class Synchronous(EventListener):
        repeatable_poll = True

        async def poll_for_event(self, value):
            return greenback.await_(asyncio.sleep(0, value))

    await greenback.ensure_portal()
    calls = Calls([1, 2], {})
    gathering = await gather(Synchronous, Memory(), calls)
    assert recorded(gathering.journal, calls, Synchronous) == {0: 1, 1: 2}


async def test_a_poll_that_fails_fails_the_try_and_what_came_stays(source):
    class Failing(Source):
        sent, polls, stolen, refused, claims, committed = ["a1"], [], [], [], {}, {}

        async def poll_for_event(self, prefix):
            if prefix == "x":
                await asyncio.sleep(0.2)
                raise KeyError("no such topic")
            return await super().poll_for_event(prefix)

    memory, calls = Memory(), Calls(["a", "x"], {})
    gathering = await gather(Failing, memory, calls)
    assert isinstance(gathering.error, KeyError)
    assert recorded(gathering.journal, calls, Failing) == {0: "a1"}


async def test_what_comes_at_once_is_checked_over_several_turns(source, turn, monkeypatch):
    checked = []
    monkeypatch.setattr(gathering_, "as_recorded", lambda event: checked.append(turn()) or event)
    calls = Calls([f"{number}." for number in range(200)], {})
    source.sent += [f"{number}.csv" for number in range(200)]
    assert (await gather(source, Memory(), calls)).complete
    assert len(checked) == 200
    assert max(Counter(checked).values()) == 20


async def test_records_are_looked_at_over_several_turns_and_say_the_same(source, turn, monkeypatch):
    monkeypatch.setattr(events_, "_AT_ONCE", 5)
    source.sent += [f"{number}.csv" for number in range(50)]
    calls = Calls([f"{number}." for number in range(50)], {})
    journal = (await gather(source, Memory(), calls)).journal
    before = turn()
    assert await recorded_in_turns(journal, calls, source) == recorded(journal, calls, source)
    assert turn() - before >= 10
    with pytest.raises(ArgumentsChanged):
        await recorded_in_turns(journal, Calls(["0."], {}), source)


async def test_a_long_result_is_written_as_airflow_would_write_it(monkeypatch):
    class Supervisor:
        async def asend(self, message):
            self.messages.append(message)

        messages: ClassVar = []

    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", Supervisor(), raising=False)
    value = [{"a": 1}, datetime(2030, 1, 1, tzinfo=timezone.utc)]
    for record in (XComRecord(WAIT), XComRecordOfMany(WAIT)):
        await record.deliver(value, mapped_length=2, dag_result=True)
    one, other = Supervisor.messages
    assert one == other
    assert (one.key, one.mapped_length, one.dag_result) == ("return_value", 2, True)
