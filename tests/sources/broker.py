"""
A source of the suite: how to reach it, how to send, and how to ask, by a client of its own.

A source joins by a module ``of_<source>.py`` with a subclass of `Broker`, and a line in ``conftest.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import servers
from airflow_events import EventListener
from airflow_events.listeners.support import shared
from airflow_events.listeners.support.hub import Hub


class Broker(ABC):
    """A real server and one queue on it. `fresh` takes another queue, so that tests do not share one."""

    name: ClassVar[str]
    missing: ClassVar[str]
    """What to install if the server is not there."""
    listener: ClassVar[type[EventListener]]
    watcher: ClassVar[type[EventListener] | None] = None
    connection_type: ClassVar[str]
    has_order: ClassVar[bool] = True
    # Whether a message can be acknowledged by its coordinates alone, by a process that never received it.
    acknowledges_anywhere: ClassVar[bool] = True
    # Whether the connection's end alone gives back what came over it. If not, the source waits for the lease.
    gives_back_at_once: ClassVar[bool] = False
    # Whether each triggerer reads what another one has in hand, so that the inbox alone decides whose it is.
    everybody_reads: ClassVar[bool] = False
    # Whether it says how much is left.
    tells_lag: ClassVar[bool] = True
    # Where messages go that cannot be read, as the listener takes it; None if it takes none.
    dead_letter: Any = None
    # Whether the queue can hold bytes that are no JSON.
    has_bytes: ClassVar[bool] = True
    # Whether a message can hold bytes that are no text.
    has_binary: ClassVar[bool] = True
    # Whether messages and acknowledgements are there again after the server was killed.
    survives_kill: ClassVar[bool] = True

    # How many clients the waits of a triggerer share, and the watches.
    clients_of_waits: ClassVar[int] = 1
    clients_of_watches: ClassVar[int] = 1

    server: servers.Server

    def __init__(self) -> None:
        self.queue = ""
        self._count = 0

    @property
    def servers(self) -> list[servers.Server]:
        """Every process of it, for whoever kills them."""
        return [self.server]

    @classmethod
    @abstractmethod
    def make(cls) -> Broker | None:
        """Start the server; None if it is not there."""

    def stop(self) -> None:
        self.server.stop()

    def fresh(self) -> None:
        self._count += 1
        self.queue = f"queue{self._count}"

    @abstractmethod
    def connection(self, **changes: Any) -> dict[str, Any]:
        """Return the Airflow connection, as JSON has it."""

    @abstractmethod
    def arguments(self, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
        """Return what the consuming listener polls with."""

    def watch_arguments(self, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
        """Return what the watching listener polls with."""
        raise NotImplementedError

    def send(self, *values: Any) -> None:
        """Send values, as JSON."""
        for value in values:
            self.send_raw(json.dumps(value).encode())

    @abstractmethod
    def send_raw(self, raw: bytes) -> None:
        """Send one message, durably, by a client of its own."""

    @abstractmethod
    def unacknowledged(self) -> int:
        """Say how many messages the server has that are not acknowledged: free or claimed."""

    def dead_letters(self) -> list[bytes]:
        """Return the bodies of the messages that were put aside as dead letters."""
        raise NotImplementedError

    def clients(self) -> int:
        """Say how many connections of ours the server has (where it cannot tell: how many clients we have)."""
        raise NotImplementedError


def running(server: Any, missing: str) -> Iterator[Any]:
    """Yield a server of a module's own, for its fixture, from start to stop; skip its tests where it is None."""
    if server is None:
        pytest.skip(missing)
    with server:
        yield server


async def clients_at_rest(broker: Broker) -> int:
    """Say how many connections there are once those of earlier tests have ended, if they do."""
    for _ in range(20):
        if not broker.clients():
            break
        await asyncio.sleep(0.5)
    return broker.clients()


async def until_clients_are(broker: Broker, least: int, most: int) -> None:
    """
    Wait until there are so many connections.

    Those of waits that have ended end some while after, and those of an earlier test may end meanwhile.
    """
    for _ in range(60):
        if least <= broker.clients() <= most:
            return
        await asyncio.sleep(0.5)
    raise TimeoutError(f"there are {broker.clients()} connections, not {least} to {most}")


async def until_told(caplog: Any, text: str, seconds: float = 120) -> None:
    """Wait until the log says so."""
    for _ in range(round(seconds * 10)):
        if text in caplog.text:
            return
        await asyncio.sleep(0.1)
    raise TimeoutError(f"the log does not say {text!r} within {seconds} s: {caplog.text}")


async def soon(task: Any, seconds: float = 15) -> Any:
    """Return what the task returns, within ``seconds``."""
    return await asyncio.wait_for(asyncio.shield(task), seconds)


async def nothing(task: Any, seconds: float = 1.0) -> None:
    """See that the task is not done for ``seconds``, which count from when its hub is connected, or cannot be."""
    await _hub_is_at_work(task)
    with contextlib.suppress(asyncio.TimeoutError):
        raise AssertionError(f"it is done: {await soon(task, seconds)}")


def hubs() -> list[Any]:
    """Return those of this loop."""
    resources = [one.resource for one in shared._open.get(asyncio.get_running_loop(), {}).values()]
    return [resource for resource in resources if isinstance(resource, Hub)]


async def _hub_is_at_work(task: Any) -> None:
    """Wait, on a machine that is busy, until whoever is wanted has connected, or knows that it cannot for now."""
    for _ in range(200):
        wanted = [hub for hub in hubs() if hub._is_wanted]
        if task.done() or (wanted and all(hub._up.is_set() or hub._trouble is not None for hub in wanted)):
            return
        await asyncio.sleep(0.05)
