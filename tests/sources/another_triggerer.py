"""
A triggerer of its own, to be killed: polls for one wait, says the event in a line, and holds it.

Takes from standard input, as JSON: the listener's class, and what it polls with.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import sys

from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.support import serde


async def main(told):
    module, name = told["listener"]
    listener = getattr(importlib.import_module(module), name)
    with working_for(Wait("dag", "another", "task")):
        event = await listener().poll_for_event(*told["args"], **told["kwargs"])
    print(serde.encode(event), file=sys.__stdout__, flush=True)
    await asyncio.Event().wait()


with contextlib.redirect_stdout(sys.stderr):  # which Airflow logs to
    asyncio.run(main(json.load(sys.stdin)))
