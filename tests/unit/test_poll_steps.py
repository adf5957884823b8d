from __future__ import annotations

import asyncio
import time

import greenback
import pytest
from airflow_events.triggers.poll_steps import Steps


async def test_results_and_errors_pass_through():
    async def work(fail):
        await asyncio.sleep(0)
        if fail:
            raise KeyError("x")
        return "done"

    for portal in (False, True):
        assert await Steps(work(False), 1, pytest.fail, portal=portal) == "done"
        assert await asyncio.create_task(Steps(work(False), 1, pytest.fail, portal=portal)) == "done"
        with pytest.raises(KeyError):
            await Steps(work(True), 1, pytest.fail, portal=portal)


async def test_a_step_that_blocks_is_told_and_waiting_is_not():
    seen = []

    async def work():
        await asyncio.sleep(0.3)
        time.sleep(0.2)
        await asyncio.sleep(0.3)

    await Steps(work(), 0.15, seen.append)
    assert len(seen) == 1


@pytest.mark.parametrize("portal", [False, True])
async def test_cancellation_reaches_the_work_and_may_be_swallowed(portal):
    async def work():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            return "cleaned up"

    task = asyncio.create_task(Steps(work(), 1, pytest.fail, portal=portal))
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "cleaned up"


async def test_each_step_can_make_synchronous_calls_and_nothing_of_that_is_kept_between():
    async def work():
        found = [greenback.await_(asyncio.sleep(0.01, "first"))]
        await asyncio.sleep(0.05)
        return [*found, greenback.await_(asyncio.sleep(0.01, "second"))]

    task = asyncio.create_task(Steps(work(), 1, pytest.fail, portal=True))
    await asyncio.sleep(0.03)
    assert not greenback.has_portal(task)
    assert await task == ["first", "second"]
    with pytest.raises(RuntimeError):
        await Steps(work(), 1, pytest.fail)


async def test_a_synchronous_call_is_cancelled_and_fails_like_any_other():
    async def fail():
        await asyncio.sleep(0)
        raise KeyError("x")

    async def work():
        with pytest.raises(KeyError):
            greenback.await_(fail())
        try:
            greenback.await_(asyncio.sleep(60))
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            return greenback.await_(asyncio.sleep(0, "cleaned up"))

    task = asyncio.create_task(Steps(work(), 1, pytest.fail, portal=True))
    await asyncio.sleep(0.05)
    task.cancel()
    assert await task == "cleaned up"
