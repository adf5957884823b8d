"""The trigger of a wait beside the inbox's transactions: what its source has confirmed, and what it has not."""

from __future__ import annotations

import asyncio
import traceback
from datetime import timedelta
from types import SimpleNamespace

import pytest
from airflow.models.trigger import Trigger
from airflow.models.xcom import XComModel
from airflow_events.errors import AtRedelivery, CommitFailed
from airflow_events.inbox.models import EventTaken
from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.support import serde
from airflow_events.listeners.support.queue import InHand, QueueListener, receive
from airflow_events.triggers import event as event_trigger
from airflow_events.triggers import polling
from awaiting import until
from boxes import Box, BoxHub
from sqlalchemy import select


class Queue(EventListener):
    """As RabbitMQ: what is not acknowledged over the connection that it came by, is at its redelivery."""

    messages: list[str] = []  # noqa: RUF012
    is_gone = False
    ids: list[str] = []  # noqa: RUF012

    async def poll_for_event(self):
        while not self.messages:
            await asyncio.sleep(0.01)
        return {"id": self.messages[0]}

    def event_id(self, event):
        self.ids.append(current_wait().run_id)
        return event["id"]

    async def event_checkpointed(self, event):
        if type(self).is_gone:
            type(self).is_gone = False
            raise AtRedelivery("the connection over which it came is gone")
        self.messages.remove(event["id"])


@pytest.fixture
def run(waits, monkeypatch):
    """Run the trigger of a task instance until its wait has ended."""
    monkeypatch.setattr(event_trigger, "Inbox", SimpleNamespace(of_loop=lambda: waits))
    monkeypatch.setattr(event_trigger.reference, "load", lambda _: Queue)
    Queue.messages, Queue.is_gone, Queue.ids = [], False, []

    async def until_ended(ti):
        await asyncio.wait_for(waits.trigger(ti, listener="m:Queue").until_ended(), 20)

    return until_ended


def acknowledged(waits):
    return waits.session.execute(select(EventTaken.__table__.c.acknowledged_at)).scalar_one()


async def test_what_the_source_has_not_confirmed_no_clear_confirms(waits, run):
    """Or the inbox would forget whose it is, while the source has it."""
    Queue.messages, Queue.is_gone = ["m"], True
    ti = waits.deferred(next_method="execute_complete")
    await run(ti)
    assert (waits.state(ti).state, acknowledged(waits), Queue.messages) == ("success", None, ["m"])
    ti = waits.again(ti, cleared=True)
    await run(ti)
    assert (waits.state(ti).state, acknowledged(waits), Queue.messages) == ("success", None, ["m"])
    other = waits.deferred(next_method="execute_complete")
    Queue.messages.append("n")
    await run(other)
    assert waits.row(other).event == waits.row(ti).event.replace("m", "n")
    assert Queue.messages == [] and acknowledged_of_both(waits)


def acknowledged_of_both(waits):
    moments = waits.session.execute(select(EventTaken.__table__.c.acknowledged_at)).scalars().all()
    return len(moments) == 2 and all(moments)


async def test_the_dags_result_is_marked(waits, run):
    Queue.messages = ["m"]
    ti = waits.deferred(next_method="execute_complete")
    first = waits.trigger(ti, listener="m:Queue", dag_result=True)
    path, told = first.serialize()  # as a host keeps them
    assert path == "airflow_events.triggers.event.EventTrigger"
    again = event_trigger.EventTrigger(**serde.decode(serde.encode(told)))
    again.task_instance = first.task_instance
    await asyncio.wait_for(again.until_ended(), 20)
    assert waits.session.scalars(select(XComModel.dag_result)).all() == [True]


async def test_an_events_id_may_ask_for_which_wait_it_is(waits, run):
    Queue.messages = ["m"]
    ti = waits.deferred(next_method="execute_complete")
    await run(ti)
    assert set(Queue.ids) == {waits._keys[ti][2]}


async def test_what_a_listener_raises_is_told_as_a_text_that_can_be_stored(waits, run, monkeypatch):
    """A triggerer that told its supervisor the other would end, and so would the next one that had the trigger."""

    async def poll(self):
        raise ValueError("unknown record: \0 \ud83d")

    monkeypatch.setattr(Queue, "poll_for_event", poll)
    trigger = waits.trigger(waits.deferred(next_method="execute_complete"), listener="m:Queue")
    with pytest.raises(RuntimeError) as raised:
        await anext(trigger.run())
    said = "".join(traceback.format_exception(raised.value))
    assert "ValueError: unknown record: \\x00 \\ud83d" in said
    assert "\0" not in said and said.encode()


async def test_a_parked_wait_ends_by_the_clock_of_who_ends_it(waits, run, monkeypatch):
    monkeypatch.setattr(Queue, "recorded_from_outside", True)
    monkeypatch.setattr(event_trigger, "commits", lambda _: False)
    now = event_trigger._now
    monkeypatch.setattr(event_trigger, "_now", lambda: now() + timedelta(minutes=-10))
    row = Trigger(classpath="airflow_events.triggers.event.EventTrigger", kwargs={})
    waits.session.add(row)
    waits.session.flush()
    ti = waits.deferred(next_method="execute_complete", trigger_id=row.id)
    trigger = waits.trigger(ti, listener="m:Queue")
    trigger.timeout, trigger.default = 3600.0, ["late"]
    await asyncio.wait_for(trigger.until_ended(), 20)
    assert waits.row(ti).wake_at == waits.row(ti).deadline


@pytest.mark.parametrize("ahead", [timedelta(minutes=-5), timedelta(0), timedelta(minutes=5)])
async def test_a_deadline_holds_where_the_clock_is_wrong(waits, run, monkeypatch, ahead):
    now = event_trigger._now
    monkeypatch.setattr(event_trigger, "_now", lambda: now() + ahead)
    monkeypatch.setattr(polling, "_now", lambda: now() + ahead)
    ti = waits.deferred(next_method="execute_complete")
    trigger = waits.trigger(ti, listener="m:Queue")
    trigger.timeout, trigger.default = 1.0, ["late"]
    began = asyncio.get_running_loop().time()
    await asyncio.wait_for(trigger.until_ended(), 20)
    assert asyncio.get_running_loop().time() - began > 0.9
    assert waits.state(ti).state == "success"


@pytest.mark.parametrize("push", [True, False])
async def test_nothing_is_mapped_over_what_is_not_pushed(waits, run, monkeypatch, push):
    """A worker says so, as Airflow has it."""

    async def poll(self):
        return ["a", "b"]

    monkeypatch.setattr(Queue, "poll_for_event", poll)
    monkeypatch.setattr(Queue, "event_id", EventListener.event_id)
    monkeypatch.setattr(Queue, "event_checkpointed", EventListener.event_checkpointed)
    ti = waits.deferred(next_method="execute_complete")
    trigger = waits.trigger(ti, listener="m:Queue", push=push, mapped_over=True)
    await asyncio.wait_for(trigger.until_ended(), 20)
    assert waits.state(ti).state == ("success" if push else "scheduled")


class Stuck(BoxHub):
    """Of which one message cannot be acknowledged: a row that a constraint holds, a file in use."""

    async def acknowledge(self, deliveries):
        if "bad" in deliveries:
            raise OSError("refused")

    async def give_back(self, deliveries):
        self.box.waiting[:0] = deliveries  # which is the next again


class OfBox(QueueListener):
    box = None

    async def poll_for_event(self):
        return await receive("box", lambda: Stuck(OfBox.box), lambda message: {"id": message})

    def event_id(self, event):
        return event["id"]


async def test_what_is_recorded_and_cannot_be_acknowledged_stops_no_queue(waits, monkeypatch):
    monkeypatch.setattr(event_trigger, "Inbox", SimpleNamespace(of_loop=lambda: waits))
    monkeypatch.setattr(event_trigger.reference, "load", lambda _: OfBox)
    monkeypatch.setattr(OfBox, "hosted", False)
    monkeypatch.setenv("AIRFLOW__EVENTS__COMMIT_TIMEOUT", "0.1")
    box = OfBox.box = Box()
    box.put("bad", "good")

    def trigger(ti):
        return waits.trigger(ti, listener="m:OfBox")

    first, second = (waits.deferred(next_method="execute_complete") for _ in range(2))
    with pytest.raises(CommitFailed):
        await asyncio.wait_for(anext(trigger(first).run()), 20)
    await until(lambda: "bad" in box.waiting)
    await asyncio.wait_for(trigger(second).until_ended(), 20)
    assert (waits.state(second).state, waits.row(second).event) == ("success", '{"id": "good"}')
    assert box.waiting == [] and "bad" in InHand.of_loop().hubs
