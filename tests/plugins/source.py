"""What the matrix asks of a source: to send it events, and to say, by a client of its own, what became of them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from airflow_events import EventListener, Wait

EVENTS = ("a", "b")
# Who committed an event, where the source cannot say and it was not delivered.
UNKNOWN = "?"


def queue_of(base: Path) -> str:
    """Name the queue of a run; every source takes such a name."""
    return f"q{hashlib.sha256(str(base).encode()).hexdigest()[:16]}"


def conf(base: Path) -> dict[str, str]:
    """Return what a run is started with."""
    return {"base": str(base), "queue": queue_of(base)}


class Source:
    """A source of a wait's events. Two are sent to each wait, which is to take one of them."""

    name: ClassVar[str]
    listener: type[EventListener]
    commits: ClassVar[bool] = True
    # Of `paths.PATHS`, those that differ for it.
    paths: ClassVar[tuple[str, ...]]
    keywords: ClassVar[dict[str, Any]] = {}
    # Whether it is in the matrix for the gaps that no other source has, and only for them.
    has_gaps_of_its_own: ClassVar[bool] = False

    def argument(self, base: str, queue: str) -> str:
        """Return the first argument of ``poll_for_event``, from what a run is started with."""
        return base

    def holder(self, wait: Wait) -> str:
        """Name a wait as the source does."""
        return wait.id

    @property
    def is_there(self) -> bool:
        """Whether the server that it needs is running, once it is served."""
        return True

    @property
    def missing(self) -> str:
        """Say how to get the server."""
        return ""

    def prepare(self, base: Path) -> None: ...

    def send(self, base: Path, *events: str) -> None: ...

    @contextlib.contextmanager
    def serve(self) -> Iterator[dict[str, str]]:
        """Start the server that it needs, and yield the environment variables by which Airflow finds it."""
        yield {}

    def identity(self, event: Any) -> str:
        """Name an event as the source does."""
        return str(event)

    def committed(self, base: Path) -> dict[str, str]:
        """Say by whom each event was committed."""
        return {}

    def claimed(self, base: Path) -> dict[str, str]:
        """Say who has which event and has not committed it."""
        return {}

    def free(self, base: Path) -> set[str]:
        """Say which events another wait could take."""
        return set(EVENTS) - self.committed(base).keys()
