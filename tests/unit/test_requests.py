"""Waits ask their supervisor one at a time, in the order in which their events came."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import pytest
from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.comms import GetTaskStates, GetXCom, XComResult
from airflow_events.listeners.base import EventListener
from airflow_events.triggers.event import EventTrigger
from airflow_events.triggers.requests import Requests


class Asking:
    """Waits that ask; what they ask is answered when the test says so."""

    def __init__(self):
        self.requests = Requests()
        self.asked = []
        self.answers = {}

    def ask(self, name, arrived):
        self.answers[name] = asyncio.Event()
        return asyncio.create_task(self._ask(name, arrived))

    async def _ask(self, name, arrived):
        async with self.requests.turn(arrived):
            self.asked.append(name)
            await self.answers[name].wait()

    async def rest(self):
        for _ in range(10):
            await asyncio.sleep(0)
        return self.asked


async def test_the_wait_whose_event_came_first_asks_first():
    waits = Asking()
    for name, arrived in (("begins", None), ("begins too", None), ("third", 3.0), ("first", 1.0), ("second", 2.0)):
        waits.ask(name, arrived)
    assert await waits.rest() == ["begins"], "one at a time"
    waits.answers["begins"].set()
    assert await waits.rest() == ["begins", "first"]
    for answer in waits.answers.values():
        answer.set()
    assert await waits.rest() == ["begins", "first", "second", "third", "begins too"]


@pytest.mark.parametrize("moment", ["waiting", "its turn", "asking"])
async def test_a_cancelled_wait_holds_up_nobody(moment):
    waits = Asking()
    first, second, _ = [waits.ask(name, at) for at, name in enumerate(("first", "second", "third"))]
    await waits.rest()
    if moment == "waiting":
        second.cancel()
        waits.answers["first"].set()
    elif moment == "its turn":
        waits.answers["first"].set()
        while not first.done():
            await asyncio.sleep(0)
        assert waits.asked == ["first"]
        second.cancel()
    else:
        first.cancel()
        second.cancel()
    assert await waits.rest() == ["first", "third"]
    waits.answers["third"].set()
    await waits.rest()
    waits.ask("last", None)
    assert await waits.rest() == ["first", "third", "last"]
    waits.answers["last"].set()
    await waits.rest()


async def test_a_request_that_fails_holds_up_nobody():
    waits = Asking()
    with pytest.raises(RuntimeError, match="refused"):
        async with waits.requests.turn(None):
            raise RuntimeError("refused")
    waits.ask("next", None).cancel()
    waits.ask("the one after", None)
    assert await waits.rest() == ["the one after"]
    waits.answers["the one after"].set()
    await waits.rest()


class Bell(EventListener):
    """All waits hear it at once; each claims what it hears, and commits."""

    repeatable_poll = True
    rings = asyncio.Event()
    heard_by = 0

    async def poll_for_event(self):
        type(self).heard_by += 1
        await self.rings.wait()
        return "heard"

    async def event_checkpointed(self, event): ...


class Supervisor:
    """Answers one request after another, and counts them."""

    def __init__(self):
        self.asked = 0
        self._lock = asyncio.Lock()

    async def asend(self, message):
        async with self._lock:
            self.asked += 1
            await asyncio.sleep(0)
        if isinstance(message, GetTaskStates):
            return SimpleNamespace(task_states={run: {"task": "deferred"} for run in message.run_ids})
        return XComResult(key=message.key, value=None) if isinstance(message, GetXCom) else None


async def asked_until_the_first_ended(monkeypatch, waits):
    supervisor = Supervisor()
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", supervisor, raising=False)
    monkeypatch.setattr(Bell, "rings", asyncio.Event())
    monkeypatch.setattr(Bell, "heard_by", 0)
    ended = []

    async def wait(run):
        trigger = EventTrigger(
            listener=f"{__name__}:Bell", wait={"dag_id": "dag", "run_id": run, "task_id": "task"}
        )
        trigger.task_instance = SimpleNamespace(task_id="task", try_number=1)
        async for _ in trigger.run():
            ended.append(supervisor.asked)

    tasks = [asyncio.create_task(wait(f"run{number}")) for number in range(waits)]
    while Bell.heard_by < waits:
        await asyncio.sleep(0)
    before = supervisor.asked
    Bell.rings.set()
    await asyncio.gather(*tasks)
    return ended[0] - before, ended[-1] - before


async def test_of_many_events_at_once_the_first_does_not_wait_for_the_last(monkeypatch):
    alone, _ = await asked_until_the_first_ended(monkeypatch, 1)
    first, last = await asked_until_the_first_ended(monkeypatch, 20)
    assert last == 20 * alone
    assert first <= 2 * alone, "another may ask while the first commits"

    monkeypatch.setattr(Requests, "turn", lambda *_: contextlib.nullcontext())
    first, last = await asked_until_the_first_ended(monkeypatch, 20)
    assert first > last / 2, "in the order of asking, as it would be without turns"
