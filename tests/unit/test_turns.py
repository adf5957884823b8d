"""What wakes many waits at once holds up nobody else: only so many go on in one turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import Counter

from airflow_events.listeners.support.turns import Turns


def start(turns, count, turn, done):
    async def one(number):
        await turns.take()
        done.append((number, turn()))

    return [asyncio.create_task(one(number)) for number in range(count)]


async def test_so_many_go_on_in_one_turn_and_the_others_follow_in_their_order(turn):
    done = []
    await asyncio.gather(*start(Turns(3), 10, turn, done))
    assert [number for number, _ in done] == list(range(10))
    assert sorted(Counter(when for _, when in done).values()) == [1, 3, 3, 3]


async def test_who_is_cancelled_is_in_nobodys_way(turn):
    done = []
    tasks = start(Turns(2), 7, turn, done)
    await asyncio.sleep(0)
    for task in tasks[2:6]:
        task.cancel()
    await asyncio.wait(tasks, timeout=5)
    assert [number for number, _ in done] == [0, 1, 6]


async def test_there_is_room_again_in_a_later_turn(turn):
    turns, done = Turns(2), []
    for _ in range(3):
        await asyncio.gather(*start(turns, 2, turn, done))
        await asyncio.sleep(0)
    assert max(Counter(when for _, when in done).values()) == 2
