"""The floor of all triggers: one that awaits forever, and the operator that starts it in the triggerer."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections.abc import AsyncIterator
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


def _collect() -> None:
    while True:
        time.sleep(5)
        gc.collect()


# So that memory is measured after a collection, for all contenders alike.
if "triggerer" in sys.argv:
    threading.Thread(target=_collect, daemon=True).start()
