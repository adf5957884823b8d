"""Looks for what is recorded already: one at a time, in order, again after a failure, and none for who left."""

from __future__ import annotations

import asyncio

from airflow_events.triggers import lookups
from airflow_events.triggers.lookups import Lookups


async def until_done(queue):
    for _ in range(1000):
        if not len(queue):
            return
        await asyncio.sleep(0)
    raise AssertionError(f"{len(queue)} looks are left")


async def test_one_at_a_time_and_in_order():
    queue, taken, at_once = Lookups(), [], []

    def look(number):
        async def do():
            at_once.append(number)
            for _ in range(3):
                await asyncio.sleep(0)
            assert at_once == [number]
            at_once.remove(number)
            taken.append(number)

        return do

    for number in range(5):
        queue.add(look(number))
    assert len(queue) == 5
    await until_done(queue)
    queue.add(look(5))  # also after it had nothing to do
    await until_done(queue)
    assert taken == [0, 1, 2, 3, 4, 5]


async def test_who_has_gone_is_not_looked_for():
    queue, taken = Lookups(), []

    async def first():
        taken.append("first")

    async def second():
        taken.append("second")

    queue.add(first)
    queue.add(second)
    queue.discard(first)
    queue.discard(first)
    await until_done(queue)
    assert taken == ["second"]


async def test_a_look_that_fails_is_taken_again_after_the_others(monkeypatch, caplog):
    monkeypatch.setattr(lookups, "_PAUSE", 0)
    queue, taken = Lookups(), []

    async def failing():
        taken.append("failing")
        if taken.count("failing") == 1:
            raise RuntimeError("no database")

    async def other():
        taken.append("other")

    queue.add(failing)
    queue.add(other)
    await until_done(queue)
    assert taken == ["failing", "other", "failing"]
    assert "no database" in caplog.text


async def test_who_comes_again_during_its_look_is_looked_for_again():
    queue, taken = Lookups(), []

    async def look():
        taken.append("look")
        if len(taken) == 1:  # as after a stall, whose answer may be from before it
            queue.discard(look)
            queue.add(look)

    queue.add(look)
    await until_done(queue)
    assert taken == ["look", "look"]


async def test_each_event_loop_has_its_own():
    here = Lookups.of_loop()
    assert Lookups.of_loop() is here

    async def there():
        return Lookups.of_loop()

    assert await asyncio.to_thread(lambda: asyncio.run(there())) is not here
