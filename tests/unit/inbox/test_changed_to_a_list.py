"""A task that waited for one event and waits for many now, as its DAG was edited before a clear."""

from __future__ import annotations

import asyncio
import uuid
from types import SimpleNamespace

import pytest
from airflow_events.errors import ArgumentsChanged
from airflow_events.inbox.entries import End
from airflow_events.listeners.base import EventListener
from airflow_events.triggers import event as event_trigger
from airflow_events.triggers import events as events_trigger
from airflow_events.triggers.calls import Calls
from airflow_events.triggers.events import EventsTrigger


class Watch(EventListener):
    async def poll_for_event(self, name):
        return {"id": name}


class Queue(Watch):
    async def event_checkpointed(self, event):
        pass


@pytest.mark.parametrize("map_index", [-1, 0])
@pytest.mark.parametrize("listener", [Watch, Queue])
async def test_a_list_in_the_place_of_a_single_wait_does_not_go_round_for_ever(
    waits, monkeypatch, listener, map_index
):
    asked = []

    async def ask(entry):
        asked.append(entry.operation)
        assert len(asked) < 40, f"it goes round: {asked}"
        return await waits.ask(entry)

    inbox = SimpleNamespace(of_loop=lambda: SimpleNamespace(ask=ask))
    for module in event_trigger, events_trigger:
        monkeypatch.setattr(module, "Inbox", inbox)
    monkeypatch.setattr(event_trigger.reference, "load", lambda _: listener)
    ti = waits.deferred(next_method="execute_complete", map_index=map_index)
    generation = waits.begin(ti, arguments="ab" * 32).generation
    waits.record(ti, generation, '{"id":"a"}', record_id="r", committed=True, end=End())
    ti = waits.again(ti, cleared=True)
    names = dict(zip(("dag_id", "task_id", "run_id", "map_index"), waits._keys[ti], strict=True))
    calls = Calls(["a", "b"], {}).encode()
    trigger = EventsTrigger(wait={**names, "run_start": None}, listener="m:Watch", calls=calls, count=2)
    trigger.task_instance = SimpleNamespace(id=uuid.UUID(ti), task_id="wait", try_number=1)
    trigger._calls = Calls.prepared(calls)
    if listener is Watch and map_index < 0:
        await asyncio.wait_for(trigger.until_ended(), 20)
        assert waits.state(ti).state == "success"
        assert waits.xcoms(ti)["return_value"] == [{"id": "a"}, {"id": "b"}]
    else:
        with pytest.raises(ArgumentsChanged):
            await asyncio.wait_for(trigger.until_ended(), 20)
