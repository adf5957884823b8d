"""A message that no wait can read, of a listener of one's own that gives it again at each poll."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from airflow_events.errors import EventUndecodable
from airflow_events.listeners.base import EventListener
from airflow_events.triggers import event as event_trigger


class HeadOfATable(EventListener):
    polls = 0

    async def poll_for_event(self):
        type(self).polls += 1
        await asyncio.sleep(0)
        error = EventUndecodable("row 1", "JSON", "it is not", b"{")
        error.event_id = "1"
        raise error

    def event_id(self, event):
        return event["id"]

    async def event_checkpointed(self, event):
        pass


async def test_it_is_not_asked_for_again_at_once(waits, monkeypatch):
    inbox = SimpleNamespace(of_loop=lambda: SimpleNamespace(ask=waits.ask))
    monkeypatch.setattr(event_trigger, "Inbox", inbox)
    monkeypatch.setattr(event_trigger.reference, "load", lambda _: HeadOfATable)
    ti = waits.deferred(next_method="execute_complete")
    with pytest.raises(EventUndecodable):
        await waits.trigger(ti, listener="m:T").until_ended()
    ti = waits.again(ti)  # the retry
    HeadOfATable.polls = 0
    task = asyncio.ensure_future(waits.trigger(ti, listener="m:T").until_ended())
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait({task})
    assert HeadOfATable.polls <= 3
