"""
A process that waits on Kafka, driven over its standard input: a line of JSON asks, a line of JSON answers.

``{"do": "poll", "wait": 1, "kwargs": {...}}``, ``{"do": "commit", "wait": 1, "event": {...}}``; ``"idle"`` starts
a wait that keeps the process's clients open.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

from airflow_events.errors import EventsError
from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.kafka import KafkaListener

_ANSWER = "answer: "


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
            line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), 90)
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
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        answer: Any = None
        with working_for(Wait("dag", f"run{asked['wait']}", "task")):
            listener = KafkaListener()
            try:
                if asked["do"] == "idle":
                    idle.append(asyncio.create_task(listener.poll_for_event(**asked["kwargs"])))
                elif asked["do"] == "poll":
                    answer = await listener.poll_for_event(**asked["kwargs"])
                elif asked["do"] == "commit":
                    await listener.event_checkpointed(asked["event"])
                elif asked["do"] == "take all":  # until nothing has come for a while
                    answer = await take_all(asked["wait"], asked["waits"], asked["kwargs"], asked["seconds"])
            except EventsError as error:
                answer = {"error": type(error).__name__, "message": str(error)}
        print(_ANSWER + json.dumps(answer, default=str), flush=True)


async def take_all(first: int, waits: int, kwargs: Any, seconds: float) -> list[Any]:
    """Let waits take and commit event after event, each under a name of its own."""
    taken = []

    async def work(start: int) -> None:
        number = start
        while True:
            number += 1000
            with working_for(Wait("dag", f"run{number}", "task")):
                try:
                    event = await asyncio.wait_for(KafkaListener().poll_for_event(**kwargs), seconds)
                except asyncio.TimeoutError:
                    return
                await KafkaListener().event_checkpointed(event)
            taken.append([event["value"], f"dag/run{number}/task/-1"])

    await asyncio.gather(*(work(first + number) for number in range(waits)))
    return taken


if __name__ == "__main__":
    asyncio.run(main())
