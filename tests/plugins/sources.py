"""
The sources of the matrix: how to send them events, and to ask them, by a client of their own, what became of them.

A source takes part in the matrix by standing in `SOURCES`. Each run has a folder of its own, ``base``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from airflow_events import EventListener, Wait
from airflow_events.listeners.directory import DirectoryListener, DirectoryWatchListener
from airflow_events.listeners.directory.claims import key_of
from airflow_events.listeners.redis import RedisListener
from airflow_events.listeners.timer import TimerListener
from probes import Contested, LeasedQueue

EVENTS = ("a", "b")


class Source:
    """A source of a wait's events. Two are sent to each wait, which is to take one of them."""

    name: ClassVar[str]
    listener: ClassVar[type[EventListener]]
    commits: ClassVar[bool] = True
    # Of `paths.PATHS`, those that differ for it.
    paths: ClassVar[tuple[str, ...]]
    keywords: ClassVar[dict[str, Any]] = {}
    # Whether it is in the matrix for the gaps that no other source has, and only for them.
    has_gaps_of_its_own: ClassVar[bool] = False

    def argument(self, base: str) -> str:
        """Return the first argument of ``poll_for_event``."""
        return base

    def holder(self, wait: Wait) -> str:
        """Name a wait as the source does."""
        return wait.id

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


class Directory(Source):
    name = "directory"
    listener = DirectoryListener
    paths = ("no worker", "ends on a worker", "starts and ends on workers")
    keywords: ClassVar[dict[str, Any]] = {"settle": 0}

    def argument(self, base: str) -> str:
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


class RedisStream(Source):
    name = "redis"
    listener = RedisListener
    paths = ("no worker", "ends on a worker", "starts and ends on workers")
    keywords: ClassVar[dict[str, Any]] = {"field": "v"}

    @contextlib.contextmanager
    def serve(self) -> Iterator[dict[str, str]]:
        import servers

        server = servers.valkey()
        assert server is not None
        with server:
            about = {"conn_type": "redis", "host": "127.0.0.1", "port": server.port}
            os.environ["AIRFLOW_CONN_REDIS_DEFAULT"] = json.dumps(about)
            yield {"AIRFLOW_CONN_REDIS_DEFAULT": json.dumps(about)}

    @property
    def _client(self) -> Any:
        from redis import Redis

        port = json.loads(os.environ["AIRFLOW_CONN_REDIS_DEFAULT"])["port"]
        return Redis(port=port, decode_responses=True)

    def send(self, base: Path, *events: str) -> None:
        with self._client as client:
            for event in events:
                client.xadd(str(base), {"v": json.dumps(event)})

    def identity(self, event: Any) -> str:
        return str(event["value"])

    def committed(self, base: Path) -> dict[str, str]:
        with self._client as client:
            keys = list(client.scan_iter(f"airflow-events:{{{base}}}:airflow:*", count=10_000))
            names = {entry: json.loads(fields["v"]) for entry, fields in client.xrange(str(base))}
            return {names[key.rpartition(":")[2]]: client.get(key) for key in keys}

    def claimed(self, base: Path) -> dict[str, str]:
        with self._client as client:
            names = {entry: json.loads(fields["v"]) for entry, fields in client.xrange(str(base))}
            held = client.xpending_range(str(base), "airflow", "-", "+", 100)
            return {names[entry["message_id"]]: entry["consumer"] for entry in held}

    def free(self, base: Path) -> set[str]:
        with self._client as client:
            [group] = client.xinfo_groups(str(base))
            released = [held["message_id"] for held in client.xpending_range(str(base), "airflow", "-", "+", 100)
                        if held["consumer"] == "=released"]  # fmt: skip
            return {
                json.loads(fields["v"])
                for entry, fields in client.xrange(str(base))
                if entry in released or _place(entry) > _place(group["last-delivered-id"])
            }


def _place(entry: str) -> tuple[int, ...]:
    return tuple(int(part) for part in entry.split("-"))


class Timer(Source):
    name = "timer"
    listener = TimerListener
    paths = ("no worker", "starts on a worker")
    commits = False

    def argument(self, base: str) -> str:
        return "2020-01-01T00:00:00Z"


SOURCES: tuple[Source, ...] = (
    Directory(),
    ContestedDirectory(),
    DirectoryWatch(),
    Queue(),
    Timer(),
    RedisStream(),
)
