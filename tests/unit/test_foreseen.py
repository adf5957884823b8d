"""An event that its listener foresees: there is nothing to poll before its moment."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone

import pytest
from airflow_events.listeners.base import EventListener, Wait, foresees
from airflow_events.listeners.timer import TimerListener
from airflow_events.triggers.polling import BeginAgain, Poll, TimeIsUp, foreseen_by

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


def test_what_cannot_be_foreseen_the_poll_tells():
    assert foreseen_by(TimerListener, WAIT, ["PT15M"], {}) is None  # the run has no start
    moment = datetime.fromtimestamp(5, timezone.utc)
    assert foreseen_by(TimerListener, WAIT, [5], {}) == (moment, moment)


class Counting(TimerListener):
    polled: list[datetime] = []  # noqa: RUF012

    async def poll_for_event(self, moment):
        self.polled.append(datetime.now(timezone.utc))
        return await super().poll_for_event(moment)

    def foresee(self, moment):
        return super().foresee(moment)


async def test_it_is_not_polled_before_its_moment():
    Counting.polled.clear()
    due = datetime.now(timezone.utc) + timedelta(seconds=0.3)
    assert await Poll(Counting, WAIT, [due], {}, None).run() == due
    assert [moment >= due for moment in Counting.polled] == [True]


async def test_a_deadline_before_the_moment_ends_the_wait():
    deadline = datetime.now(timezone.utc) + timedelta(seconds=0.2)
    with pytest.raises(TimeIsUp):
        await Poll(TimerListener, WAIT, ["2100-01-01T00:00Z"], {}, deadline).run()
    assert datetime.now(timezone.utc) >= deadline


async def test_a_timer_that_begins_again_is_polled_anew():
    due = datetime.now(timezone.utc) + timedelta(seconds=0.3)
    poll = Poll(TimerListener, WAIT, [due], {}, None)
    run = asyncio.create_task(poll.run())
    await asyncio.sleep(0.05)
    poll.begin_again()
    with pytest.raises(BeginAgain):
        await run


async def test_a_poll_that_is_to_begin_again_does_not_begin():
    poll = Poll(Counting, WAIT, [datetime.now(timezone.utc)], {}, None)
    Counting.polled.clear()
    poll.begin_again()
    with pytest.raises(BeginAgain):
        await poll.run()
    assert Counting.polled == []
