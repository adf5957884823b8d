"""The thread of an API server that ends parked waits when their moment comes."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from airflow_events.inbox.alarm import alarm
from airflow_events.inbox.transactions import LARGEST_BATCH
from airflow_events.inbox.waking import seconds_to_next, wake_due

log = logging.getLogger(__name__)

# Seconds. So long what another process has parked since the last look may be late, if it is due before that.
_PAUSE = 1.0
_PAUSE_IF_FAILING = 5.0


async def keep_waking() -> None:
    """End parked waits when they are due, until this is cancelled."""
    # A thread of its own: it is as punctual as it is free.
    with ThreadPoolExecutor(1, thread_name_prefix="airflow-events-parked") as thread:
        try:
            await asyncio.get_running_loop().run_in_executor(thread, _run)
        finally:
            alarm.end()


def _run() -> None:
    pause, failing = 0.0, False
    while alarm.wait(pause):
        try:
            while wake_due() == LARGEST_BATCH:
                pass
            pause, failing = seconds_to_next(_PAUSE), False
        except Exception:
            # Once for each time that the database is unreachable; the waits stay where they are.
            level = logging.DEBUG if failing else logging.ERROR
            log.log(level, "Parked waits that are due could not be ended; this is tried again", exc_info=True)
            pause, failing = _PAUSE_IF_FAILING, True
