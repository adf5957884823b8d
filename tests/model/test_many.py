"""
The promises of a task that waits for several events, over thousands of schedules: those of a single wait, for each
place in its list, with several triggerers on each trigger, crashes between any two requests, lapses and clears.
"""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
from airflow.triggers.base import TaskSuccessEvent
from airflow_events.listeners.commit import Phase, Record
from airflow_events.triggers import gathering, journal
from airflow_events.triggers.calls import Calls
from airflow_events.triggers.events import EventsTrigger
from airflow_events.triggers.journal import Entry, Records, is_page
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from protocol import Task, World, name_of, step
from test_protocol import MODEL, MUTANT, Protocol

PLACES = 2


def records_of(task: Task) -> Records:
    records = Records()
    for name, text in task.xcoms.items():
        if is_page(name):
            for stored in json.loads(text)["entries"]:
                records.add(Entry.from_dict(stored))
    return records


class ManyWorld(World):
    """Each task waits for two events."""

    async def _run_trigger(self, task, trigger_id):
        trigger = EventsTrigger(
            listener="model",
            calls=Calls([[]] * PLACES, {}).encode(),
            count=PLACES,
            wait=dataclasses.asdict(task.wait),
        )
        trigger.task_instance = SimpleNamespace(task_id="task", try_number=1)
        async for event in trigger.run():
            await step("submit")
            if task.state != "deferred" or task.trigger != trigger_id:
                return
            assert isinstance(event, TaskSuccessEvent)
            task.state = "success"
            task.delivered.append(tuple(event["name"] for event in json.loads(task.xcoms["return_value"])))

    def violation(self):
        for name, event in self.events.items():
            if event.committed_by:
                wait, _, index = name_of(event.committed_by).rpartition("#")
                [task] = [task for task in self.tasks if task.wait.id == wait]
                record = records_of(task).of(int(index))
                if record is None or record.event["name"] != name:
                    return f"{name} is committed by {event.committed_by}, which has {record}"
        delivered = {}
        for task in self.tasks:
            if len(set(task.delivered)) > 1:
                return f"{task.wait.id} delivered {task.delivered}"
            for names in set(task.delivered):
                for index, name in enumerate(names):
                    if name_of(self.events[name].committed_by or "") != f"{task.wait.id}#{index}":
                        return f"{task.wait.id} delivered {name}, which it has not committed"
                    if delivered.setdefault(name, (task.wait.id, index)) != (task.wait.id, index):
                        return f"{name} was delivered to two places"
        return None


class Many(Protocol):
    world_class = ManyWorld
    turns = 60
    rounds = 3000

    def about_to_write(self, process):
        return False  # nothing is overwritten, so a claim may lapse at any time


FEWER = settings(MODEL, max_examples=60, stateful_step_count=80)
FEWER_OF_MUTANT = settings(MUTANT, max_examples=600, stateful_step_count=80)


def test_the_promises_hold_for_each_event():
    run_state_machine_as_test(Many, settings=FEWER)


async def commit_before_record(listener, wait, store, event, **kwargs):
    record = await store.read()
    if record is None or record.phase is Phase.RECORDED:
        from airflow_events.listeners import commit

        await commit.commit(listener, wait, event)
        record = Record(event, Phase.COMMITTED, "id")
        await store.write(record)
    return record.event


def test_the_model_sees_an_event_that_is_committed_before_it_is_recorded(monkeypatch):
    monkeypatch.setattr(gathering, "settle", commit_before_record)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Many, settings=FEWER_OF_MUTANT)


def test_the_model_sees_pages_that_two_triggerers_share(monkeypatch):
    """The mutant that would be simpler: one log for all, in which a triggerer overwrites another's entries."""

    async def shared(self):
        await self._pages.set(journal._name((0, 0), "closed"), True)
        return (0, 0)

    monkeypatch.setattr(journal._Slots, "take", shared)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Many, settings=FEWER_OF_MUTANT)
