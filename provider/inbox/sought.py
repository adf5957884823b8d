"""What waits look for in Airflow's own database, as their rows hold it: the API server finds it for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow_events.inbox.models import LATEST

_EARLIEST = datetime(1970, 1, 2, tzinfo=timezone.utc)  # that all of Airflow's databases can hold
_NOTHING: Mapping[str, Any] = {"sought": None, "sought_kind": None, "sought_since": None}


def columns_of(sought: Mapping[str, Any] | None, created: datetime) -> Mapping[str, Any]:
    """
    Return what the row of a wait says of it.

    :param sought: `airflow_events.listeners.base.EventListener.sought`.
    :param created: when the run was; or when the wait first began, where nobody knows.
    """
    if sought is None:
        return _NOTHING
    since = _EARLIEST
    if sought["since"] is not None:
        since = datetime.fromisoformat(sought["since"])
    elif sought["after"] is not None:
        since = created + timedelta(seconds=sought["after"])
    return {
        "sought": json.dumps(sought["of"], sort_keys=True),
        "sought_kind": str(sought["kind"])[:20],
        "sought_since": max(_EARLIEST, min(since, LATEST)),
    }
