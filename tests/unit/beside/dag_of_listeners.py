"""A DAG file with listeners of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import logging.handlers
import xml.etree.ElementTree
from datetime import datetime, timedelta, timezone

import helpers_of_dag
from airflow_events import EventListener, Wait, current_wait
from airflow_events.listeners.timer import TimerListener
from helpers_of_dag import (
    KINDS,
    PAIRS,
    PATTERN,
    TABLE,
    Base,
    Bits,
    Color,
    First,
    Frozen,
    Options,
    Order,
    Point,
    Slotted,
    normal,
    shout,
)

log = logging.getLogger(__name__)
EVERY = timedelta(seconds=5)
LIMITS: dict[str, int] = {"a": 1, "b": 2}
DEFAULT = Order("default", color=Color.GREEN)


def make(topic: str, kinds=frozenset({"q", "w", "e", "r"})):
    class Closing(EventListener):
        """It closes over a topic."""

        kinds_of_class = {"x", "y", "z"}  # noqa: RUF012
        limit: int = 5

        async def poll_for_event(self, name: str, *, when: datetime | None = None) -> dict[str, object]:
            if name in {"alpha", "beta", "gamma", "delta"} and name not in KINDS:
                return {"kind": "greek"}
            order: Order[str] = Order(name, lines=[line for line, _ in [shout("hi")]])
            options: Options = {"a": 1}
            root = xml.etree.ElementTree.fromstring("<a><b/></a>")
            assert issubclass(First, Base) and logging.handlers.RotatingFileHandler
            wait: Wait = current_wait()
            return {
                "topic": topic,
                "wait": wait.task_id,
                "upper": order.upper,
                "lines": order.lines,
                "known": order.is_known,
                "normal": [normal(" A "), helpers_of_dag.normal("B ")],
                "every": EVERY.total_seconds(),
                "limits": LIMITS,
                "kinds": sorted(kinds | self.kinds_of_class),
                "table": sorted(TABLE["a"]),
                "values": [Point(1).y, Color.RED.shout(), Slotted().three(), (Bits.A | Bits.B).value, Frozen().a],
                "matches": bool(PATTERN.match("a-1")) and (True, None) in PAIRS,
                "default": DEFAULT.color.value,
                "options": options,
                "children": len(root),
                "now": isinstance(datetime.now(timezone.utc), datetime),
            }

        async def event_checkpointed(self, event: object) -> None:
            await asyncio.sleep(0)
            log.info("%s", json.dumps(event))

    return Closing


Listener = make("orders")


class Later(TimerListener):
    async def poll_for_event(self, moment):
        return await super().poll_for_event(moment)
