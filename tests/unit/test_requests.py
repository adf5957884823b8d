"""Waits ask their supervisor one at a time, in the order in which their events came."""

from __future__ import annotations

import asyncio

import pytest
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
