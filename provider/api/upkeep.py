"""What an API server sees to for the inbox: tables that are there and forget, and records that win."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timedelta, timezone

from airflow_events import settings
from airflow_events.errors import InboxNotMigrated
from airflow_events.inbox.database import in_transaction
from airflow_events.inbox.purge import purge
from airflow_events.inbox.startup import check_or_migrate
from airflow_events.inbox.timeouts import clear_timeouts

log = logging.getLogger(__name__)

_PAUSE = 120.0  # seconds; so that it comes twice in the 300 s that Airflow leaves to a wait after its deadline
_PAUSE_IF_FAILING = 60.0
_PIECE = 500  # rows in a transaction


async def keep_up() -> None:
    """
    See to the tables, and migrate them where that is allowed; then take timeouts away, and forget.

    It does so now and every few minutes. Whatever fails is only logged, once, and tried again: Airflow's API
    server goes on without the inbox.
    """
    told: str | None = None
    while True:
        try:
            await asyncio.to_thread(check_or_migrate)
            await asyncio.to_thread(clear_timeouts)
            while await asyncio.to_thread(forget) == _PIECE:  # noqa: ASYNC110 (there is nothing else to wait for)
                await asyncio.sleep(0.1)  # others need the database too
        except Exception as error:
            if str(error) != told:
                told = str(error)
                if isinstance(error, InboxNotMigrated):
                    log.error("Waits for events cannot run: %s", error)
                else:
                    log.exception("Maintenance of the inbox's tables failed; this is tried again")
            await asyncio.sleep(_PAUSE_IF_FAILING)
        else:
            told = None
            await asyncio.sleep(_PAUSE)


def forget() -> int:
    """Forget some of what is old, in one transaction; return how many rows were deleted."""
    memory = timedelta(seconds=settings.memory())
    return in_transaction(lambda session: purge(session, datetime.now(timezone.utc), memory, _PIECE))
