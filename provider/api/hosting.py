"""An API server sees to it that the waits which share a trigger have one."""

from __future__ import annotations

import asyncio
import logging

from airflow_events.inbox import hosts

log = logging.getLogger(__name__)

# Seconds. So long, and a little longer, nobody polls for waits whose host lost its trigger with its anchor.
_PAUSE = 5.0


async def keep_hosts() -> None:
    """Give new triggers to hosts that have none, until this is cancelled."""
    failing = False
    while True:
        try:
            made = await asyncio.to_thread(hosts.repair)
            failing = False
            if made:
                log.info("%s hosts of waits were given a new trigger", made)
        except Exception:
            # Once for each time that the database is unreachable.
            level = logging.DEBUG if failing else logging.ERROR
            log.log(level, "Hosts could not be looked at; this is tried again", exc_info=True)
            failing = True
        await asyncio.sleep(_PAUSE)
