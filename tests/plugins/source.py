"""What the matrix asks of a source: to send it events, and to say, by a client of its own, what became of them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from airflow_events import EventListener

EVENTS = ("a", "b")


def queue_of(base: Path) -> str:
    """Name the queue of a run; every source takes such a name."""
    return f"q{hashlib.sha256(str(base).encode()).hexdigest()[:16]}"


def conf(base: Path) -> dict[str, str]:
    """Return what a run is started with."""
    return {"base": str(base), "queue": queue_of(base)}


class Books(NamedTuple):
    """
    What a source has written down of a queue, besides what is acknowledged.

    :param found: by what it is called.
    :param problems: in which of it, in words, it is not as what was delivered says.
    """

    found: dict[str, Any]
    problems: list[str]


class Source:
    """A source of a wait's events. Two are sent to each wait, which is to take one of them."""

    name: ClassVar[str]
    listener: type[EventListener]
    commits: ClassVar[bool] = True
    # Whether only the process that received an event can acknowledge it, and else whoever waits next.
    acknowledges_later: ClassVar[bool] = False
    # Of `paths.PATHS`, those that differ for it.
    paths: ClassVar[tuple[str, ...]]
    keywords: ClassVar[dict[str, Any]] = {}
    # Whether its queues give up what was delivered more than twice, where the server can.
    few_deliveries: bool = False
    # Whether it is in the matrix for the gaps that no other source has, and only for them.
    has_gaps_of_its_own: ClassVar[bool] = False

    def argument(self, base: str, queue: str) -> str:
        """Return the first argument of ``poll_for_event``, from what a run is started with."""
        return base

    @property
    def is_there(self) -> bool:
        """Whether the server that it needs is running, once it is served."""
        return True

    @property
    def missing(self) -> str:
        """Say how to get the server."""
        return ""

    def scale(self, servers: int | None, partitions: int | None) -> None:
        """
        Be served by so many servers, and have queues of so many partitions; None is as it comes.

        :raises ValueError: it cannot.
        """
        if servers is not None or partitions is not None:
            raise ValueError(f"{self.name} is not a source of several servers and partitions")

    def dead_letters(self, base: Path) -> int:
        """Say how many messages the server has given up, of a queue with `few_deliveries`."""
        return 0

    @property
    def servers(self) -> Sequence[Any]:
        """The processes that serve it, which can be killed, and begun again on what they left."""
        return ()

    def prepare(self, base: Path) -> None: ...

    def send(self, base: Path, *events: str) -> None: ...

    @contextlib.contextmanager
    def serve(self) -> Iterator[dict[str, str]]:
        """Start the server that it needs, and yield the environment variables by which Airflow finds it."""
        yield {}

    def identity(self, event: Any) -> str:
        """Name an event as the source does."""
        return str(event)

    def committed(self, base: Path) -> set[str]:
        """Say which events are acknowledged."""
        return set()

    def free(self, base: Path) -> set[str]:
        """Say which events another wait could take."""
        return set(EVENTS) - set(self.committed(base))

    def books(self, base: Path, delivered: dict[str, Any]) -> Books:
        """
        Read what else it has written down, and compare it with what was delivered, when that is all.

        :param delivered: each event as it was delivered, by its identity.
        """
        return Books({}, [])
