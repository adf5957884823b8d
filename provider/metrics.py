"""
Metrics, through Airflow's own stats: wherever ``[metrics]`` sends Airflow's, these go too (``docs/metrics.md``).

Where ``[metrics]`` is off nothing here does anything. Where it is on, no metric is worth an event: what goes wrong
with one is logged, and the wait goes on.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

log = logging.getLogger(__name__)

RECORDED = "events.recorded"
COMMITTED = "events.committed"
COMMIT_FAILED = "events.commit_failed"
LOST = "events.lost"
KEPT = "events.kept"
TO_RECORD = "events.time_to_record"
TO_DELIVERY = "events.time_to_delivery"
TO_ADMISSION = "events.time_to_admission"
OPEN = "events.open_waits"
OPEN_BY_LISTENER = "events.open_waits_by_listener"
UNCOMMITTED = "events.uncommitted_waits"
LAG = "events.lag"


@functools.cache
def are_on() -> bool:
    """Whether Airflow sends metrics anywhere. Read once in each process, as Airflow does."""
    from airflow.sdk.configuration import conf

    switches = ("statsd_on", "statsd_datadog_enabled", "otel_on")
    return any(conf.getboolean("metrics", switch, fallback=False) for switch in switches)


def count(name: str, **tags: str) -> None:
    """Count one."""
    _send(lambda stats: stats.incr(name, tags=tags))


def since(name: str, begun: float | None, **tags: str) -> None:
    """Tell how long something took that began at ``begun``, in seconds since the epoch; None tells nothing."""
    if begun is not None:
        # Another machine's clock may have been ahead when it began.
        took = timedelta(seconds=max(time.time() - begun, 0.0))
        _send(lambda stats: stats.timing(name, took, tags=tags))


def level(name: str, value: int, **tags: str) -> None:
    """Tell how many there are."""
    _send(lambda stats: stats.gauge(name, value, tags=tags))


def _send(send: Callable[[Any], None]) -> None:
    if not are_on():
        return
    try:
        send(_stats())
    except Exception:
        log.warning("A metric could not be sent", exc_info=True)


@functools.cache
def _stats() -> Any:
    # Its import is what tells the stats of Airflow's SDK where to send to, in whatever process.
    from airflow.sdk.observability.stats import Stats

    return Stats
