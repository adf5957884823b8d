"""
Listeners written in the DAG file: one that only watches, one that commits.

Their source is a text file, so that the example runs as it stands; the arguments of the waits are a template,
the output of another task, and a mapped list.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from airflow.sdk import dag, task
from airflow_events import EventListener, wait_for_event
from airflow_events.operators.wait_for_event import WaitForEventOperator


class LineListener(EventListener):
    """The first line of a file, once there is one. Nothing is taken, so there is nothing to commit."""

    async def poll_for_event(self, path):
        while not (lines := _lines(path)):
            await asyncio.sleep(0.5)
        return {"path": path, "line": lines[0]}


class TicketListener(EventListener):
    """
    The tickets of a folder, which are files without a suffix; each goes to one wait.

    All waits may poll the same ticket at once: by its id Airflow knows that it is the same, and one wait gets it.
    It is gone once it is committed, which may happen again, and by whoever comes to know that it is another's.
    """

    async def poll_for_event(self, folder):
        while not (tickets := sorted(file for file in Path(folder).glob("*") if file.suffix == "")):
            await asyncio.sleep(0.5)
        return {"ticket": str(tickets[0]), "changed": tickets[0].stat().st_mtime_ns}

    def event_id(self, event):
        return f"{event['ticket']} {event['changed']}"  # the next ticket of that name is another one

    async def event_checkpointed(self, event):
        with contextlib.suppress(FileNotFoundError):
            Path(event["ticket"]).rename(f"{event['ticket']}.done")


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
