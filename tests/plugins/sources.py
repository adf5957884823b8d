"""The sources of the matrix. A source takes part in it by standing in `SOURCES`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from airflow_events.listeners.directory import DirectoryListener, DirectoryWatchListener
from airflow_events.listeners.timer import TimerListener
from brokers import BROKERS
from probes import Contested, LeasedQueue
from source import Source


class Directory(Source):
    name = "directory"
    listener = DirectoryListener
    paths = ("no worker", "starts on a worker", "ends on a worker")
    keywords: ClassVar[dict[str, Any]] = {"settle": 0}

    def argument(self, base: str, queue: str) -> str:
        return f"{base}/drops"

    def prepare(self, base: Path) -> None:
        (base / "drops").mkdir()

    def send(self, base: Path, *events: str) -> None:
        for event in events:
            unfinished = base / f"{event}.unfinished"  # half of a file would be another event
            unfinished.write_text(event)
            unfinished.rename(base / "drops" / event)

    def identity(self, event: Any) -> str:
        return str(event["name"])

    def committed(self, base: Path) -> set[str]:
        return {file.name for file in (base / "drops/.airflow-events/archive").glob("*/*")}

    def free(self, base: Path) -> set[str]:
        return {file.name for file in (base / "drops").iterdir() if file.is_file()}


class ContestedDirectory(Directory):
    """The first file is written to again just before its commit, which is refused."""

    name = "contested directory"
    listener = Contested
    paths = ("no worker",)
    has_gaps_of_its_own = True


class DirectoryWatch(Directory):
    name = "directory (watch)"
    listener = DirectoryWatchListener
    paths = ("no worker", "ends on a worker")
    commits = False

    def committed(self, base: Path) -> set[str]:
        return set()


class Queue(Source):
    """Claims are leases in nobody's name: polling again may give another message."""

    name = "queue with leases"
    listener = LeasedQueue
    paths = ("no worker",)

    def prepare(self, base: Path) -> None:
        for folder in ("queue", "leases", "owners"):
            (base / folder).mkdir()

    def send(self, base: Path, *events: str) -> None:
        for event in events:
            (base / "queue" / event).touch()

    def identity(self, event: Any) -> str:
        return str(event["message"])

    def committed(self, base: Path) -> set[str]:
        return {file.name for file in (base / "owners").iterdir() if not file.suffix}


class Timer(Source):
    name = "timer"
    listener = TimerListener
    paths = ("no worker", "starts on a worker")
    commits = False

    def argument(self, base: str, queue: str) -> str:
        return "2020-01-01T00:00:00Z"


SOURCES: tuple[Source, ...] = (
    Directory(),
    ContestedDirectory(),
    DirectoryWatch(),
    Queue(),
    Timer(),
    *BROKERS,
)
