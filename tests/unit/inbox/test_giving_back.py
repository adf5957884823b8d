"""What a wait gives back, where the source, or Airflow, does not make it easy."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from airflow_events.inbox.entries import Record
from airflow_events.listeners.base import EventListener
from airflow_events.listeners.support import commit
from airflow_events.listeners.support.queue import InHand, QueueListener, receive
from airflow_events.triggers import event as event_trigger
from awaiting import until
from boxes import Box, BoxHub


class Claims(EventListener):
    async def poll_for_event(self):
        return {"id": "mine"}

    async def event_checkpointed(self, event):
        pass

    async def event_released(self, event, *args, **kwargs):
        await asyncio.Event().wait()  # a server that does not answer


async def test_a_wait_ends_though_its_source_does_not_take_back_what_it_does_not_need(waits, monkeypatch):
    """Another triggerer has recorded another event meanwhile."""
    monkeypatch.setattr(commit, "_LONGEST_RELEASE", 0.1, raising=False)

    async def ask(entry):
        if isinstance(entry, Record):
            waits.record(ti, entry.generation, '{"id":"others"}', record_id="r")
        return await waits.ask(entry)

    monkeypatch.setattr(event_trigger, "Inbox", SimpleNamespace(of_loop=lambda: SimpleNamespace(ask=ask)))
    monkeypatch.setattr(event_trigger.reference, "load", lambda _: Claims)
    ti = waits.deferred(next_method="execute_complete")
    await asyncio.wait_for(waits.trigger(ti, listener="m:Claims").until_ended(), 5)
    assert waits.state(ti).state == "success"


async def test_what_a_poll_was_given_is_given_back_though_airflow_cancels_it_again_and_again(waits, monkeypatch):
    """As it does each second while a trigger is not gone."""
    box = Box()

    class Slow(QueueListener):
        hosted = False

        async def poll_for_event(self):
            event = await receive("box", lambda: BoxHub(box), lambda message: {"id": message})
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.3)
            return event

        def event_id(self, event):
            return event["id"]

    monkeypatch.setattr(event_trigger, "Inbox", SimpleNamespace(of_loop=lambda: waits))
    monkeypatch.setattr(event_trigger.reference, "load", lambda _: Slow)
    ti = waits.deferred(next_method="execute_complete")
    trigger = waits.trigger(ti, listener="m:Slow")
    box.put("m")
    running = asyncio.create_task(trigger.until_ended())
    await until(lambda: InHand.of_loop().of_waits)
    running.cancel()
    await asyncio.sleep(0.1)
    running.cancel()
    await asyncio.wait({running})
    await trigger.on_kill()
    await asyncio.sleep(0.5)
    assert not InHand.of_loop().of_waits
