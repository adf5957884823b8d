"""The floor of all triggers: one that awaits forever, and the operator that starts it in the triggerer."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from airflow.plugins_manager import AirflowPlugin
from airflow.sdk import BaseOperator
from airflow.triggers.base import BaseTrigger, StartTriggerArgs, TriggerEvent


class EmptyTrigger(BaseTrigger):
    """Awaits forever."""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "floor.EmptyTrigger", {}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        await asyncio.Event().wait()
        yield TriggerEvent(None)


class Floor(BaseOperator):
    """Waits in the triggerer for nothing."""

    start_from_trigger = True
    start_trigger_args = StartTriggerArgs(
        trigger_cls="floor.EmptyTrigger",
        trigger_kwargs={},
        next_method="execute_complete",
        next_kwargs=None,
        timeout=None,
    )


class FloorPlugin(AirflowPlugin):
    """Makes Airflow import this module in each of its processes."""

    name = "floor"


def _collect_when_told() -> None:
    """Collect Python's garbage each time that the file is touched, which no contender does by itself just then."""
    told = Path(os.environ["AIRFLOW_HOME"]) / "collect"
    seen = 0.0
    while True:
        time.sleep(0.5)
        touched = told.stat().st_mtime if told.exists() else 0.0
        if touched > seen:
            seen = touched
            gc.collect()


# So that memory is measured after a collection, for all contenders alike.
if "triggerer" in sys.argv:
    threading.Thread(target=_collect_when_told, daemon=True).start()
