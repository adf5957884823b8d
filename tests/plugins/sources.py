"""The sources of the matrix. A source takes part in it by standing in `SOURCES`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from airflow_events import Wait
from airflow_events.listeners.directory import DirectoryListener, DirectoryWatchListener
from airflow_events.listeners.directory.claims import key_of
from airflow_events.listeners.timer import TimerListener
from brokers import BROKERS
from probes import Contested, LeasedQueue
from source import Source


class Directory(Source):
    name = "directory"
    listener = DirectoryListener
    paths = ("no worker", "ends on a worker", "starts and ends on workers")
    keywords: ClassVar[dict[str, Any]] = {"settle": 0}

    def argument(self, base: str, queue: str) -> str:
        return f"{base}/drops"

    def holder(self, wait: Wait) -> str:
        return key_of(wait)

    def prepare(self, base: Path) -> None:
        (base / "drops").mkdir()

    def send(self, base: Path, *events: str) -> None:
        for event in events:
            (base / "drops" / event).write_text(event)

    def identity(self, event: Any) -> str:
        return str(event["name"])

    def committed(self, base: Path) -> dict[str, str]:
        return self._held(base, "archive")

    def claimed(self, base: Path) -> dict[str, str]:
        return self._held(base, "claims")

    def _held(self, base: Path, where: str) -> dict[str, str]:
        files = (base / "drops" / ".airflow-events" / where).glob("*/*/*")
        return {file.name: file.parents[1].name for file in files}

    def free(self, base: Path) -> set[str]:
        return {file.name for file in (base / "drops").iterdir() if file.is_file()}


class ContestedDirectory(Directory):
    """The claim is taken away just before the first commit, which is refused."""

    name = "contested directory"
    listener = Contested
    has_gaps_of_its_own = True


class DirectoryWatch(Directory):
    name = "directory (watch)"
    listener = DirectoryWatchListener
    paths = ("no worker", "starts and ends on workers")
    commits = False

    def committed(self, base: Path) -> dict[str, str]:
        return {}


class Queue(Source):
    """Claims are leases in nobody's name, so the poll is not repeatable."""

    name = "queue with leases"
    listener = LeasedQueue
    paths = ("ends on a worker", "starts and ends on workers")

    def prepare(self, base: Path) -> None:
        for folder in ("queue", "leases", "owners"):
            (base / folder).mkdir()

    def send(self, base: Path, *events: str) -> None:
        for event in events:
            (base / "queue" / event).touch()

    def identity(self, event: Any) -> str:
        return str(event["message"])

    def committed(self, base: Path) -> dict[str, str]:
        return {file.name: file.read_text() for file in (base / "owners").iterdir() if not file.suffix}


class Timer(Source):
    name = "timer"
    listener = TimerListener
    paths = ("no worker", "starts on a worker")
    commits = False
    is_foreseen = True

    def argument(self, base: str, queue: str) -> str:
        return "2020-01-01T00:00:00Z"


class TimerToCome(Timer):
    """Its return value is written before its moment."""

    name = "timer to come"
    paths = ("no worker",)
    has_gaps_of_its_own = True

    def argument(self, base: str, queue: str) -> str:
        return "{{ (dag_run.run_after + macros.timedelta(seconds=45)).isoformat() }}"


SOURCES: tuple[Source, ...] = (
    Directory(),
    ContestedDirectory(),
    DirectoryWatch(),
    Queue(),
    Timer(),
    TimerToCome(),
    *BROKERS,
)
