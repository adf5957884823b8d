"""A queue in this process."""

from __future__ import annotations

import asyncio

from airflow_events.listeners.support.queue import QueueHub


class Box:
    """A source in this process: what is to be delivered, and what it was told."""

    def __init__(self):
        self.waiting = []
        self.changed = asyncio.Event()
        self.told = []
        self.fails = None
        self.breaks = None

    def put(self, *messages):
        self.waiting += messages
        self.changed.set()


class BoxHub(QueueHub):
    def __init__(self, box):
        self.box = box
        super().__init__("the box")

    async def connect(self): ...

    async def disconnect(self): ...

    async def serve(self):
        if self.box.breaks is not None:
            raise self.box.breaks
        self.box.changed.clear()
        while self.wanted and self.box.waiting:
            message = self.box.waiting.pop(0)
            self.offer(message, message)
            await asyncio.sleep(0)
        await asyncio.wait({asyncio.ensure_future(self.box.changed.wait())}, timeout=0.05)

    async def acknowledge(self, deliveries):
        if self.box.fails:
            raise self.box.fails
        self.box.told.append(("acknowledge", *deliveries))

    async def give_back(self, deliveries):
        self.box.told.append(("give back", *deliveries))
        self.box.waiting += [delivery.message for delivery in deliveries.values()]
