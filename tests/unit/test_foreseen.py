"""What a wait does ahead of an event that its listener foresees."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import pytest
from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.comms import DeleteXCom, GetTaskStates, GetXCom, SetXCom, XComResult
from airflow.sdk.serde import deserialize
from airflow.triggers.base import TaskSkippedEvent, TaskSuccessEvent
from airflow_events.listeners.base import EventListener, Wait, foresees
from airflow_events.listeners.commit import Phase, Record, record_of
from airflow_events.listeners.timer import TimerListener
from airflow_events.triggers import foreseen, reference
from airflow_events.triggers.event import EventTrigger
from airflow_events.triggers.record import LOST_KEY, RECORD_KEY, XComRecord

WAIT = Wait("dag", "run", "task")


class Later(TimerListener):
    async def poll_for_event(self, moment):
        return await super().poll_for_event(moment + timedelta(hours=1))


class Foreseeing(Later):
    def foresee(self, moment):
        due = moment + timedelta(hours=1)
        return due, due


class Committing(TimerListener):
    async def event_checkpointed(self, event): ...


class Plain(EventListener):
    async def poll_for_event(self): ...


@pytest.mark.parametrize(
    ("listener", "does"),
    [(TimerListener, True), (Later, False), (Foreseeing, True), (Committing, False), (Plain, False)],
)
def test_whose_event_is_foreseen(listener, does):
    assert foresees(listener) is does


def test_of_an_xcom_backend_of_ones_own_nothing_is_foreseen(monkeypatch):
    assert foreseen.foresee(TimerListener, WAIT, ["PT15M"], {}) is None  # the run has no start
    assert foreseen.foresee(TimerListener, WAIT, [0], {}) is not None
    monkeypatch.setattr(foreseen, "XCom", object)
    assert foreseen.foresee(TimerListener, WAIT, [0], {}) is None


def test_when_a_return_value_is_written_ahead():
    now = datetime.now(timezone.utc)
    soon, past = foreseen.Foreseen(1, now + timedelta(hours=1)), foreseen.Foreseen(1, now)
    ahead = soon.at - soon.to_be_written_at(None)
    assert foreseen._UNTIL <= ahead <= foreseen._UNTIL + foreseen._FROM
    assert soon.to_be_written_at(now + timedelta(hours=2)) is not None
    assert soon.to_be_written_at(now + timedelta(minutes=59)) is None  # it will not come
    assert past.to_be_written_at(None) is None


class Supervisor:
    """Keeps XComs, and notes what it is asked."""

    def __init__(self):
        self.xcoms, self.asked, self.state, self.fails = {}, [], "deferred", False

    async def asend(self, message):
        self.asked.append(type(message).__name__)
        match message:
            case SetXCom():
                if self.fails:
                    raise ConnectionError
                self.xcoms[message.key] = message.value
            case DeleteXCom():
                del self.xcoms[message.key]
            case GetXCom():
                return XComResult(key=message.key, value=self.xcoms.get(message.key))
            case GetTaskStates():
                return SimpleNamespace(task_states={"run": {"task": self.state}})
        return None


@pytest.fixture
def supervisor(monkeypatch):
    supervisor = Supervisor()
    # What is written ahead is written at the first moment at which it may be.
    monkeypatch.setattr(foreseen.random, "random", lambda: 0.0)
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", supervisor, raising=False)
    return supervisor


def trigger(due, *, try_number=1, listener=TimerListener, **arguments):
    made = EventTrigger(
        listener=f"{listener.__module__}:{listener.__qualname__}",
        listener_args=[due],
        wait={"dag_id": "dag", "run_id": "run", "task_id": "task"},
        **arguments,
    )
    made.task_instance = SimpleNamespace(task_id="task", try_number=try_number)
    return made


async def written_ahead(supervisor, made):
    """Start a trigger, and return it as a task once it has written ahead of its event."""
    wait = asyncio.ensure_future(ended(made))
    while "return_value" not in supervisor.xcoms:
        await asyncio.sleep(0.01)
    return wait


async def ended(trigger):
    [event] = [event async for event in trigger.run()]
    assert isinstance(event, TaskSuccessEvent)
    return event


async def test_a_timer_asks_nothing_when_its_moment_comes(supervisor):
    due = datetime.now(timezone.utc) + foreseen._UNTIL + timedelta(seconds=0.5)
    wait = await written_ahead(supervisor, trigger(due))
    assert not wait.done()
    event = await wait
    assert supervisor.asked == ["SetXCom", "SetXCom"]
    assert not event.xcoms
    record = Record.from_dict(deserialize(supervisor.xcoms[RECORD_KEY]))
    assert (record.event, record.phase) == (due, Phase.COMMITTED)
    assert datetime.fromisoformat(record.recorded_at) == due
    assert not record.is_to_come


async def test_what_is_written_ahead_is_no_record_before_the_moment(supervisor):
    due = datetime.now(timezone.utc) + foreseen._UNTIL + timedelta(seconds=0.5)
    first = await written_ahead(supervisor, trigger(due))
    first.cancel()
    store = XComRecord(WAIT)
    assert await store.read() is None
    assert store.to_come.event == due
    await ended(trigger(due, try_number=2))
    assert datetime.now(timezone.utc) >= due
    assert (await store.read()).event == due
    supervisor.asked.clear()
    await ended(trigger(due, try_number=3))  # a clear: the record is there, and is delivered again
    assert "GetXCom" in supervisor.asked


@pytest.mark.parametrize("try_number", [2, 3])
async def test_another_event_than_was_foreseen_drops_what_was_written_ahead(supervisor, try_number):
    """The task is cleared, and its moment is another then: the earlier one must not come into force meanwhile."""
    soon = datetime.now(timezone.utc) + timedelta(seconds=0.3)
    ahead = record_of(TimerListener, WAIT, soon, soon)
    await XComRecord(WAIT).write(ahead)
    later = soon + timedelta(seconds=0.4)
    event = await ended(trigger(later, try_number=try_number))
    assert supervisor.xcoms[LOST_KEY] == ahead.id
    assert Record.from_dict(json.dumps(event.xcoms[RECORD_KEY])).event == later
    assert deserialize(supervisor.xcoms["return_value"]) == later


async def test_it_is_not_polled_before_its_moment(supervisor, monkeypatch):
    class Counting(TimerListener):
        async def poll_for_event(self, moment):
            polled.append(datetime.now(timezone.utc))
            return await super().poll_for_event(moment)

        def foresee(self, moment):
            return super().foresee(moment)

    polled: list[datetime] = []
    due = datetime.now(timezone.utc) + timedelta(seconds=0.3)
    monkeypatch.setattr(reference, "load", lambda _: Counting)
    await ended(trigger(due))
    assert [moment >= due for moment in polled] == [True]


async def test_a_deadline_before_the_moment_ends_the_wait(supervisor):
    made = trigger("2100-01-01T00:00Z", timeout=0.2, soft_fail=True)
    [event] = [event async for event in made.run()]
    assert isinstance(event, TaskSkippedEvent)
    assert "return_value" not in supervisor.xcoms


@pytest.mark.parametrize("fails", [False, True])
async def test_what_was_not_written_ahead_is_written_when_the_event_comes(supervisor, fails):
    ahead = foreseen._UNTIL + timedelta(seconds=0.5) if fails else timedelta(0)
    due = datetime.now(timezone.utc) + ahead
    supervisor.fails = fails
    wait = asyncio.ensure_future(ended(trigger(due)))
    while fails and not supervisor.asked:
        await asyncio.sleep(0.01)
    supervisor.fails = False
    await wait
    assert supervisor.asked == ["SetXCom"] * (2 if fails else 1)
    assert set(supervisor.xcoms) == {"return_value"}


async def test_a_later_try_delivers_what_the_success_recorded(supervisor):
    recorded = datetime(2026, 1, 1, tzinfo=timezone.utc)
    record = Record(recorded, Phase.COMMITTED, "1")
    supervisor.xcoms[RECORD_KEY] = json.dumps(record.as_xcom())
    await ended(trigger("2100-01-01T00:00Z", try_number=2))
    assert deserialize(supervisor.xcoms["return_value"]) == recorded


@pytest.mark.parametrize(("state", "stays"), [("failed", False), ("success", True), (None, True)])
async def test_a_user_who_ends_the_task_leaves_no_value_of_an_event_that_will_not_come(supervisor, state, stays):
    made = trigger(datetime.now(timezone.utc) + timedelta(minutes=5))
    wait = await written_ahead(supervisor, made)
    supervisor.state = state
    wait.cancel()
    await asyncio.gather(wait, return_exceptions=True)
    await made.on_kill()
    assert ("return_value" in supervisor.xcoms) is stays
    assert (LOST_KEY not in supervisor.xcoms) is stays
