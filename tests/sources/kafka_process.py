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
    taken: list[Any] = []
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
                elif asked["do"] == "take":
                    idle += [
                        asyncio.create_task(take(asked["wait"] + number, asked["kwargs"], taken))
                        for number in range(asked["waits"])
                    ]
                elif asked["do"] == "taken":
                    answer = taken
            except EventsError as error:
                answer = {"error": type(error).__name__, "message": str(error)}
        print(_ANSWER + json.dumps(answer, default=str), flush=True)


async def take(number: int, kwargs: Any, taken: list[Any]) -> None:
    """Take and commit event after event, each for another wait, and note its value and the wait."""
    while True:
        number += 1000
        wait = Wait("dag", f"run{number}", "task")
        with working_for(wait):
            event = await KafkaListener().poll_for_event(**kwargs)
            await KafkaListener().event_checkpointed(event)
        taken.append([event["value"], wait.id])


if __name__ == "__main__":
    asyncio.run(main())
