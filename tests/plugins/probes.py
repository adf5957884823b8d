"""
Listeners for the tests, in the plugins folder, where the triggerer can import them.

A gate is a file that a test lays down: whoever passes it first renames it, with its process id, and stays
there until the test opens it, or kills the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from pathlib import Path

from airflow.sdk import Variable
from airflow_events import EventListener, current_wait
from airflow_events.errors import EventLost
from airflow_events.listeners.directory import DirectoryListener


async def gate(base, name):
    """Stop here if the test wants it."""
    armed = Path(base, "gates", name)
    reached = armed.with_name(f"{name}.reached.{os.getpid()}")
    try:
        os.rename(armed, reached)
    except FileNotFoundError:
        return
    while not armed.with_name(f"{name}.open").exists():
        await asyncio.sleep(0.05)


def note(base, what):
    """Count what was called, for the test."""
    with Path(base, "calls").open("a") as calls:
        calls.write(f"{what}\n")


def lay_down(file, value):
    """Write what was delivered such that whoever sees the file sees all of it."""
    unfinished = file.parent.parent / f"{uuid.uuid4().hex}.unfinished"
    unfinished.write_text(json.dumps(value, default=str))
    unfinished.replace(file)


class GatedDirectory(DirectoryListener):
    """DirectoryListener, with a gate in each gap that a listener can see."""

    async def poll_for_event(self, base, pattern="*"):
        note(base, f"poll {current_wait().run_id}")
        event = await super().poll_for_event(f"{base}/drops", pattern, settle=0)
        await gate(base, "polled")
        return event

    async def event_checkpointed(self, event):
        base = Path(event["directory"]).parent
        note(base, f"commit {event['name']} {current_wait().run_id}")
        await gate(base, "recorded")
        await super().event_checkpointed(event)
        await gate(base, "committed")

    async def event_released(self, event, base, *args):
        note(base, f"release {current_wait().run_id}")
        await super().event_released(event, f"{base}/drops")


class Contested(DirectoryListener):
    """Loses the first event of its directory: the file is written to again before the commit."""

    async def event_checkpointed(self, event):
        lost = Path(event["directory"]).with_name("lost")
        if not lost.exists():
            lost.touch()
            with Path(event["directory"], event["name"]).open("a") as file:
                file.write("more")
        await super().event_checkpointed(event)


class LeasedQueue(EventListener):
    """
    A queue whose claims are leases, held in nobody's name: polling again may give another message.

    ``queue/m`` is a message, ``leases/m`` tells until when it is leased, ``owners/m`` who has committed it.
    """

    LEASE = 8.0

    async def poll_for_event(self, base):
        note(base, f"poll {current_wait().run_id}")
        event = await self._lease(Path(base))
        await gate(base, "polled")
        return event

    async def _lease(self, base):
        while True:
            for message in sorted(p.name for p in (base / "queue").glob("*")):
                lease = base / "leases" / message
                if (base / "owners" / message).exists():
                    continue
                if lease.exists() and float(lease.read_text() or "inf") > time.time():
                    continue
                mine = lease.with_suffix(f".{uuid.uuid4().hex}")
                mine.write_text(str(time.time() + self.LEASE))
                if not lease.exists():
                    try:
                        os.link(mine, lease)  # the first one wins
                    except FileExistsError:
                        continue
                    finally:
                        mine.unlink()
                else:
                    os.replace(mine, lease)
                return {"message": message, "base": str(base), "receipt": uuid.uuid4().hex}
            await asyncio.sleep(0.2)

    async def event_checkpointed(self, event):
        base = Path(event["base"])
        note(base, f"commit {event['message']} {current_wait().run_id}")
        await gate(base, "recorded")
        owner = base / "owners" / event["message"]
        mine = owner.with_suffix(f".{uuid.uuid4().hex}.new")
        mine.write_text(current_wait().id)
        try:
            os.link(mine, owner)
        except FileExistsError:
            if owner.read_text() != current_wait().id:
                raise EventLost(f"{owner.read_text()} has {event['message']}") from None
        finally:
            mine.unlink()
        await gate(base, "committed")


class Scripted(EventListener):
    """Does what the test says: ``script`` is a list of what successive polls do."""

    async def poll_for_event(self, base, *script):
        calls = Path(base, "polls")
        count = len(calls.read_text().split()) if calls.exists() else 0
        with calls.open("a") as file:
            file.write(f"{os.getpid()}\n")
        match script[min(count, len(script) - 1)]:
            case {"raise": message}:
                raise RuntimeError(message)
            case {"block": seconds}:
                time.sleep(seconds)
                return "blocked"
            case "file":
                while not Path(base, "event").exists():
                    await asyncio.sleep(0.1)
                return Path(base, "event").read_text()
            case {"raise_after": seconds}:
                await asyncio.sleep(seconds)
                raise RuntimeError("the connection broke")
            case "variable":  # Airflow's synchronous calls, as a listener may well make them
                return Variable.get("events_test", default="from the default")
            case "unserializable":
                return {"order": {"lines": [1, object()]}}
            case "stubborn":  # swallows its cancellation and returns an event
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    return "too late"
            case event:
                return event

    async def event_released(self, event, base, *script):
        note(base, f"release {event!r}")


class FailingCommit(LeasedQueue):
    """Fails to commit as often as the test says."""

    async def event_checkpointed(self, event):
        failures = Path(event["base"], "failures")
        left = int(failures.read_text())
        note(event["base"], f"attempt {Variable.get('events_test', default='')}".strip())
        if left:
            failures.write_text(str(left - 1))
            raise ConnectionError("the source is unreachable")
        await super().event_checkpointed(event)
