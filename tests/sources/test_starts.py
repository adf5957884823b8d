"""What starts runs, on every source against its real server: each message makes one run, and is acknowledged."""

from __future__ import annotations

import asyncio
import json

import pytest
from airflow_events.inbox.entries import Answer, Settle, StartRoom, StartRun, Status
from airflow_events.triggers import source_state, starting
from airflow_events.triggers.inbox import Inbox
from airflow_events.triggers.starts import StartTrigger


class Ledger:
    """The inbox's part in it, in memory: an event, by its identity, makes one run, as far as there is room."""

    def __init__(self):
        self.room, self.runs, self.has, self.settled, self.dies = 1000, [], set(), set(), False
        self.lag = None

    async def ask(self, entry):
        if isinstance(entry, StartRoom):
            self.lag = entry.lag
            return Answer(Status.DONE, room=self.room, dags=("order",))
        if isinstance(entry, Settle):
            self.settled.add(entry.identity)
            return Answer(Status.DONE)
        assert isinstance(entry, StartRun)
        new = [told for told in entry.events if told.identity not in self.has]
        if not new:
            return Answer(Status.TAKEN, "another", room=self.room)
        if not self.room:
            return Answer(Status.FULL, room=0)
        self.room -= 1
        self.has.update(told.identity for told in new)
        self.runs.append([json.loads(told.event)["value"] for told in new])
        if self.dies:
            await asyncio.Event().wait()  # and who asks is never answered
        return Answer(Status.DONE, room=self.room)

    @property
    def values(self):
        return sorted(value for run in self.runs for value in run)


@pytest.fixture
def ledger(monkeypatch):
    ledger = Ledger()
    monkeypatch.setattr(Inbox, "of_loop", lambda: ledger)
    monkeypatch.setattr(starting, "_LOOK_WHEN_FULL", 0.1)
    monkeypatch.setattr(starting, "_LOOK_WHILE_OPEN", 0.2)
    monkeypatch.setattr(source_state, "_EVERY", 0.5)
    monkeypatch.setattr(source_state, "_UNTIL_POLLED", 0.2)
    return ledger


@pytest.fixture
async def started(broker):
    """Let triggers run on the source."""
    tasks = []

    def start(**what):
        args, kwargs = broker.arguments()
        trigger = StartTrigger.of(broker.listener, args, kwargs, **what)
        trigger.trigger_id = 7

        async def run():
            async for _ in trigger.run():
                raise AssertionError("it does not yield")

        tasks.append(asyncio.create_task(run()))
        return tasks[-1]

    yield start
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


async def until(condition, seconds=60):
    async def look():
        while not condition():
            await asyncio.sleep(0.05)

    await asyncio.wait_for(look(), seconds)


async def until_acknowledged(broker):
    for _ in range(200):
        if broker.unacknowledged() == 0:
            return
        await asyncio.sleep(0.2)
    raise AssertionError("it is not acknowledged")


async def test_each_message_makes_one_run(broker, ledger, started):
    started()
    await asyncio.sleep(0.5)
    broker.send(*range(100))
    await until(lambda: len(ledger.runs) == 100)
    assert ledger.values == list(range(100))
    await until_acknowledged(broker)
    assert ledger.settled <= ledger.has


async def test_without_room_messages_stay(broker, ledger, started):
    ledger.room = 3
    started()
    await asyncio.sleep(0.5)
    broker.send(*range(10))
    await until(lambda: len(ledger.runs) == 3)
    await asyncio.sleep(2)
    assert len(ledger.runs) == 3
    ledger.room = 100
    await until(lambda: len(ledger.runs) == 10)
    assert ledger.values == list(range(10))
    await until_acknowledged(broker)


async def test_what_is_left_is_told_also_while_nothing_is_taken(broker, ledger, started):
    if not broker.tells_lag:
        pytest.skip("it does not tell")
    ledger.room = 3
    started()
    await asyncio.sleep(0.5)
    broker.send(*range(10))
    await until(lambda: len(ledger.runs) == 3)
    await until(lambda: ledger.lag == 7)
    await asyncio.sleep(3)  # its hub has closed
    broker.send(10, 11)
    await until(lambda: ledger.lag == 9)
    ledger.room = 100
    await until(lambda: len(ledger.runs) == 12)
    await until(lambda: ledger.lag == 0)


async def test_a_trigger_that_dies_leaves_all_to_the_next(broker, ledger, started):
    """It never learns that its events have runs; the source delivers them again, and they are acknowledged."""
    ledger.room, ledger.dies = 5, True
    first = started()
    await asyncio.sleep(0.5)
    broker.send(*range(10))
    await until(lambda: ledger.runs)
    first.cancel()
    await asyncio.wait({first})
    ledger.room, ledger.dies = 100, False
    started()
    await until(lambda: len(ledger.runs) == 10)
    assert ledger.values == list(range(10))


async def test_batches(broker, ledger, started):
    started(makes="batch", batch=4, within=2.0)
    await asyncio.sleep(0.5)
    broker.send(*range(10))
    await until(lambda: len(ledger.values) == 10)
    assert ledger.values == list(range(10)) and max(len(run) for run in ledger.runs) <= 4
    await until_acknowledged(broker)
