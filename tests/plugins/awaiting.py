"""Waiting in an event loop for what a test has set going."""

from __future__ import annotations

import asyncio


async def until(condition):
    """Wait until ``condition`` holds: for 500 looks, however long the loop takes for them."""
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not in time")
