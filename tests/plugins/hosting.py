"""A host of waits beside the inbox's transactions, in one database."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import greenback
from airflow.models.trigger import Trigger
from airflow_events.inbox.models import EventHost
from airflow_events.triggers import event as event_trigger
from airflow_events.triggers import host as host_trigger
from airflow_events.triggers.host import HostTrigger
from sqlalchemy import select


class Hosting:
    """The waits of a listener that share a host, which looks more often than in a deployment."""

    def __init__(self, waits, monkeypatch, listener):
        self.waits = waits
        for module in event_trigger, host_trigger:
            monkeypatch.setattr(module, "Inbox", SimpleNamespace(of_loop=lambda: waits))
        monkeypatch.setattr(event_trigger.reference, "load", lambda _: listener)
        monkeypatch.setattr(event_trigger.settings, "hosts", lambda: 1)
        for name, seconds in (("_LOOK_EVERY", 0.02), ("_LOOK_FOR_ALL_EVERY", 0.1), ("_PATIENCE", 0.2)):
            monkeypatch.setattr(host_trigger, name, seconds)

    def trigger(self):
        """The columns of a task instance that has a trigger of its own."""
        row = Trigger(classpath="airflow_events.triggers.event.EventTrigger", kwargs={})
        self.waits.session.add(row)
        self.waits.session.flush()
        return {"next_method": "execute_complete", "trigger_id": row.id}

    @contextlib.asynccontextmanager
    async def running(self, *, portal=False, anchor=None):
        """Run the host; ``anchor`` is the task instance that Airflow has started it for, if it says."""
        row = self.waits.session.execute(select(EventHost.host, EventHost.trigger_id)).one()
        host = HostTrigger(host=row.host.hex())
        host.trigger_id = row.trigger_id
        host.task_instance = anchor and SimpleNamespace(
            id=anchor, dag_id="shop", run_id="r", task_id="wait", map_index=-1, try_number=1
        )

        async def run():
            if portal:  # as Airflow's runner
                await greenback.ensure_portal()
            async for _ in host.run():
                raise AssertionError("it does not yield")

        task = asyncio.create_task(run())
        try:
            yield host
        finally:
            task.cancel()
            await asyncio.wait({task})
