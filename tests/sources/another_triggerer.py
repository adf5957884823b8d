"""
A triggerer of its own, to be killed: polls for one wait, says the event in a line, and holds it.

Before that it says in a line that it is connected.

Takes from standard input, as JSON: the listener's class, and what it polls with.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import sys

from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.support import serde, shared
from airflow_events.listeners.support.hub import Hub


def is_connected(resource):
    return isinstance(resource, Hub) and resource._up.is_set()


async def main(told):
    module, name = told["listener"]
    listener = getattr(importlib.import_module(module), name)
    with working_for(Wait("dag", "another", "task")):
        polling = asyncio.ensure_future(listener().poll_for_event(*told["args"], **told["kwargs"]))
    resources = shared._open.setdefault(asyncio.get_running_loop(), {})
    while not polling.done() and not any(is_connected(one.resource) for one in resources.values()):
        await asyncio.sleep(0.05)
    print("connected", file=sys.__stdout__, flush=True)
    print(serde.encode(await polling), file=sys.__stdout__, flush=True)
    await asyncio.Event().wait()


with contextlib.redirect_stdout(sys.stderr):  # which Airflow logs to
    asyncio.run(main(json.load(sys.stdin)))
