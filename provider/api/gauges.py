"""Tells how many waits there are, and how much is left that starts runs; only where Airflow sends metrics."""

from __future__ import annotations

import asyncio
import logging

from airflow_events import metrics, waits
from airflow_events.inbox.database import in_transaction

log = logging.getLogger(__name__)

_PAUSE = 15.0  # seconds


async def keep_telling() -> None:
    """Count the waits in the database, again and again. Each API server does, and all of them come to the same."""
    failing = False
    told: set[str] = set()
    while metrics.are_on():
        try:
            told |= await asyncio.to_thread(_tell, told)
        except Exception:
            log.log(
                logging.DEBUG if failing else logging.ERROR,
                "The open waits could not be counted for Airflow's metrics; this is tried again",
                exc_info=True,
            )
            failing = True
        else:
            failing = False
        await asyncio.sleep(_PAUSE)


def _tell(told: set[str]) -> set[str]:
    """
    Tell the numbers, and return of which listeners.

    :param told: of which there was a number before: of those that have no wait now it is zero.
    """
    counted = in_transaction(waits.count)
    metrics.level(metrics.OPEN, sum(counted.open.values()))
    metrics.level(metrics.UNCOMMITTED, counted.uncommitted)
    for dag_id, lag in in_transaction(waits.lags).items():
        metrics.level(metrics.LAG, lag, dag_id=dag_id)
    for listener in told | counted.open.keys():
        metrics.level(metrics.OPEN_BY_LISTENER, counted.open.get(listener, 0), listener=listener)
    return set(counted.open)
