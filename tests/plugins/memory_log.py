"""A log in memory, which many watch by the hub that all sources use."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from datetime import datetime, timezone

from airflow_events.listeners.support.values import Match
from airflow_events.listeners.support.watching import LogHub, Reader, Watcher, message_of

NOW = datetime.now(timezone.utc)


class MemoryReader(Reader):
    def __init__(self, hub, position):
        self.hub = hub
        self.position = position
        hub.open += 1

    async def read(self, seconds):
        while self.hub.reads_left <= 0:
            await asyncio.sleep(0.001)
        self.hub.reads_left -= 1
        if (trouble := self.hub.trouble) is not None:
            self.hub.trouble = None
            raise trouble
        found = self.hub.messages[self.position : self.position + 10]
        self.hub.reads.append((self, self.position, len(found)))
        self.position += len(found)
        if not found:
            await asyncio.sleep(seconds / 50)
        return found

    async def close(self):
        self.hub.open -= 1


class MemoryHub(LogHub):
    """
    A log in memory, of which ten messages are read at once.

    :ivar reads_left: how many it may still make.
    :ivar reads: each read: by which reader, from where, how many.
    """

    def __init__(self):
        self.messages = []
        self.reads = []
        self.open = 0
        self.trouble = None
        self.made_anew = False
        self.reads_left = math.inf
        super().__init__("the log")

    def send(self, value, at=None, size=10):
        number = len(self.messages)
        event = value if callable(value) else lambda: {"number": number, "value": value}
        self.messages.append(message_of(at or datetime.now(timezone.utc), size, f"the message {number}", event))

    async def connect(self):
        self.open = 0
        if self.made_anew:
            self.start_over("was recreated")

    async def disconnect(self):
        pass

    async def reader(self, since, position):
        if position is None:
            young = (number for number, each in enumerate(self.messages) if each.timestamp >= since)
            position = next(young, len(self.messages))
        return MemoryReader(self, position)

    async def dropped_until(self):
        return None

    def watch(self, match=None, since=NOW, on_undecodable="skip"):
        return asyncio.create_task(self.take(Watcher(Match(match), since, on_undecodable)))

    def read_by(self):
        """Return how many messages each reader has read."""
        found = Counter()
        for reader, _, count in self.reads:
            found[reader] += count
        return sorted(found.values())
