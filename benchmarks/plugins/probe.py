"""A trigger that looks at how long its triggerer's loop stands still, and the operator that starts it there."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent
from floor import Floor

# Seconds between two looks, and between two lines of what was seen.
TICK = 0.01
LINE = 0.5


class ProbeTrigger(BaseTrigger):
    """Writes, line by line, when and for how long the loop stood still at most."""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "probe.ProbeTrigger", {}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        with (Path(os.environ["AIRFLOW_HOME"]) / "probe.jsonl").open("a", buffering=1) as seen:
            longest, since = 0.0, time.monotonic()
            while True:
                began = time.monotonic()
                await asyncio.sleep(TICK)
                longest = max(longest, time.monotonic() - began - TICK)
                if began - since > LINE:
                    seen.write(json.dumps([time.time(), longest]) + "\n")
                    longest, since = 0.0, began
        yield TriggerEvent(None)


class Probe(Floor):
    """Waits in the triggerer for nothing, and looks."""

    start_trigger_args = dataclasses.replace(Floor.start_trigger_args, trigger_cls="probe.ProbeTrigger")
