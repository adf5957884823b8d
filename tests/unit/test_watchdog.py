from __future__ import annotations

import asyncio
import time

import pytest
from airflow_events.triggers.watchdog import timed


async def test_results_and_errors_pass_through():
    async def work(fail):
        await asyncio.sleep(0)
        if fail:
            raise KeyError("x")
        return "done"

    assert await timed(work(False), 1, pytest.fail) == "done"
    with pytest.raises(KeyError):
        await timed(work(True), 1, pytest.fail)


async def test_a_step_that_blocks_is_told_and_waiting_is_not():
    seen = []

    async def work():
        await asyncio.sleep(0.3)
        time.sleep(0.2)
        await asyncio.sleep(0.3)

    await timed(work(), 0.15, seen.append)
    assert len(seen) == 1


async def test_cancellation_reaches_the_work_and_may_be_swallowed():
    async def work():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            return "cleaned up"

    async def outer():
        return await timed(work(), 1, pytest.fail)

    task = asyncio.create_task(outer())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "cleaned up"
