"""
A process that waits on Kafka, driven over its standard input: a line of JSON asks, a line of JSON answers.

``{"do": "poll", "wait": 1, "kwargs": {...}}``, ``{"do": "commit", "wait": 1, "event": {...}}``; ``"idle"`` starts
a wait that keeps the process's clients open. ``{"do": "stop", "at": "flushed"}`` makes it stand still, for good,
as soon as one of its transactions has come that far (`STEPS`); it says so instead of an answer.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from typing import Any

import wrapt
from airflow_events.errors import EventsError
from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.kafka import KafkaListener
from airflow_events.listeners.kafka.client import Clients

_ANSWER = "answer: "

STEPS = {
    "flushed": ("flush", "the ledger's records are on the broker, in an open transaction"),
    "offsets sent": ("send_offsets_to_transaction", "so are the group's offsets"),
    "committed": ("commit_transaction", "the transaction is committed, and nobody was told"),
}
"""For each step of the ledger's transaction the producer's call after which it is reached, and what is so then."""


class Process:
    """Such a process, seen from a test."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, do: str, **more: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **more}, default=str) + "\n")
        self.process.stdin.flush()

    async def answer(self) -> Any:
        assert self.process.stdout is not None
        while True:  # there are lines of the log, too
            line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), 300)
            if line.startswith(_ANSWER) or not line:
                return json.loads(line.removeprefix(_ANSWER))

    async def ask(self, do: str, **more: Any) -> Any:
        self.tell(do, **more)
        return await self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


async def main() -> None:
    idle = []
    taken: list[Any] = []
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        answer: Any = None
        with working_for(Wait("dag", f"run{asked.get('wait', 0)}", "task")):
            listener = KafkaListener()
            try:
                if asked["do"] == "idle":
                    idle.append(asyncio.create_task(listener.poll_for_event(**asked["kwargs"])))
                elif asked["do"] == "poll":
                    answer = await listener.poll_for_event(**asked["kwargs"])
                elif asked["do"] == "commit":
                    await listener.event_checkpointed(asked["event"])
                elif asked["do"] == "take":
                    idle += [
                        asyncio.create_task(take(asked["wait"] + number, asked["kwargs"], taken))
                        for number in range(asked["waits"])
                    ]
                elif asked["do"] == "taken":
                    answer = taken
                elif asked["do"] == "stop":
                    stop_at(asked["at"])
            except EventsError as error:
                answer = {"error": type(error).__name__, "message": str(error)}
        print(_ANSWER + json.dumps(answer, default=str), flush=True)


def stop_at(step: str) -> None:
    """Make producers whose call does not return."""
    call, _ = STEPS[step]
    producer = Clients.producer

    class Stopping(wrapt.ObjectProxy):  # type: ignore[misc,name-defined]
        pass

    def stands(proxy: Any, *args: Any) -> None:
        getattr(proxy.__wrapped__, call)(*args)
        print(_ANSWER + json.dumps({"stands at": step}), flush=True)
        threading.Event().wait()

    setattr(Stopping, call, stands)
    Clients.producer = lambda self, name: Stopping(producer(self, name))  # type: ignore[method-assign]


async def take(number: int, kwargs: Any, taken: list[Any]) -> None:
    """Take and commit event after event, each for another wait, and note its value and the wait."""
    while True:
        number += 1000
        wait = Wait("dag", f"run{number}", "task")
        with working_for(wait):
            event = await KafkaListener().poll_for_event(**kwargs)
            while True:
                try:
                    await KafkaListener().event_checkpointed(event)
                    break
                except ConnectionError:  # tried again, as a commit is
                    await asyncio.sleep(0.2)
        taken.append([event["value"], wait.id])


if __name__ == "__main__":
    asyncio.run(main())
