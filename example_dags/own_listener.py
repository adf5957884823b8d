"""
Listeners written in the DAG file: one that only watches, one that commits.

Their source is a text file, so that the example runs as it stands; the arguments of the waits are a template,
the output of another task, and a mapped list.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path

from airflow.sdk import dag, task
from airflow_events import EventListener, current_wait, wait_for_event
from airflow_events.errors import EventLost
from airflow_events.operators.wait_for_event import WaitForEventOperator


class LineListener(EventListener):
    """The first line of a file, once there is one. Nothing is taken, so there is nothing to commit."""

    async def poll_for_event(self, path):
        while not (lines := _lines(path)):
            await asyncio.sleep(0.5)
        return {"path": path, "line": lines[0]}


class TicketListener(EventListener):
    """
    The tickets ``a``, ``b``, ``c`` ... of a folder; each goes to one wait.

    A ticket is claimed by linking a file with the wait's name in it to ``a.claim``, which only one wait can, and
    it is committed by ``a.done``.
    """

    repeatable_poll = True

    async def poll_for_event(self, folder):
        me = current_wait().id
        while True:
            for ticket in sorted(p for p in Path(folder).glob("*") if p.suffix == ""):
                claim, done = ticket.with_suffix(".claim"), ticket.with_suffix(".done")
                if done.exists():
                    continue
                # In one step: a process that dies leaves the whole claim or none.
                with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".new") as mine:
                    mine.write(me)
                    mine.flush()
                    with contextlib.suppress(FileExistsError):
                        os.link(mine.name, claim)
                if claim.read_text() == me:
                    return str(ticket)
            await asyncio.sleep(0.5)

    async def event_checkpointed(self, event):
        ticket = Path(event)
        if ticket.with_suffix(".claim").read_text() != current_wait().id:
            raise EventLost(f"another wait has {ticket.name}")
        ticket.with_suffix(".done").touch()


def _lines(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []


@dag(schedule=None, catchup=False, tags=["events"], params={"folder": "/tmp"})
def events_own_listener():
    """Wait by listeners from this file; ``folder`` in the run's conf says where their files are."""
    by_template = wait_for_event.override(task_id="by_template")(LineListener, "{{ params.folder }}/line")

    @task
    def where(params=None):
        return f"{params['folder']}/line"

    by_output = wait_for_event.override(task_id="by_output")(LineListener, where())
    ticket = wait_for_event.override(task_id="ticket")(TicketListener, "{{ params.folder }}/tickets")
    mapped = WaitForEventOperator.partial(task_id="mapped", listener=LineListener).expand(
        listener_args=[["{{ params.folder }}/line"], ["{{ params.folder }}/other"]]
    )

    @task
    def gather(*events):
        return [list(e) if not isinstance(e, (dict, str)) else e for e in events]

    gather(by_template, by_output, ticket, mapped.output)


events_own_listener()
