"""What one, two and four triggerers ask of a source for the same messages."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from parts import Part, Rows, Stage
from parts.messages import BROKERS
from parts.messages import NAMES as ALL
from parts.processes import deferred, end, open_waits, settle
from parts.queues import fresh_queue, order_of, send_at_once
from parts.timers import successes

NAMES = {name: ALL[name] for name in ALL if name.endswith("_ours")}
TRIGGERERS = (1, 2, 4)
WAITS = 50
# Seconds between two messages.
APART = 0.2
# Seconds that the last of anything may take.
LONGEST = 300


def triggerers(stage: Stage) -> Rows:
    found: Rows = [{"name": name, "requests": [], "idle": [], "last": []} for name in NAMES]
    for count in TRIGGERERS:
        with _triggerers(stage.airflow, count):
            for row in found:
                for key, value in _asked(stage, row["name"]).items():
                    row[key].append(value)
                print(count, row, flush=True)
    return found


@contextlib.contextmanager
def _triggerers(airflow: Any, count: int) -> Iterator[None]:
    others = [f"triggerer@{number}" for number in range(1, count)]
    airflow.components["triggerer"].stop()
    airflow.restart("triggerer")
    for name in others:
        airflow.start_one("triggerer", as_name=name)
    settle()
    yield
    for name in others:
        airflow.components.pop(name).stop()


def _asked(stage: Stage, name: str) -> dict[str, float]:
    """Have a message for each of many waits, and return what was sent to the source meanwhile."""
    from deployment import until

    airflow = stage.airflow
    broker, where = fresh_queue(stage, name)
    runs = open_waits(airflow, f"{name}_10", 10, WAITS, queue=where)
    until(lambda: sum(deferred(airflow)) == WAITS, f"{WAITS} wait", timeout=LONGEST)
    settle()
    counter = _Segments(broker)
    began = time.monotonic()
    while time.monotonic() - began < WAITS * APART:
        counter.look()
        time.sleep(1)
    idle = counter.sent
    orders = [{"order": order_of(run, f"wait{number}")} for run in runs for number in range(10)]
    begin = datetime.now(timezone.utc)
    for order in orders:
        send_at_once(broker, [order])
        time.sleep(APART)
        counter.look()
    last = successes(runs, begin, LONGEST)[-1]
    counter.look()
    end(airflow, runs)
    return {"requests": counter.sent - idle, "idle": idle, "last": last}


class _Segments:
    """
    Counts the segments with data that other processes have sent to a broker, from when this is made.

    A request is one at least, and those of one moment may share it: so it does not depend on what a protocol calls
    a request.
    """

    def __init__(self, broker: Any) -> None:
        self._port = broker.server.port
        self._most: dict[str, int] = {}
        self._at_first = self._read()

    @property
    def sent(self) -> int:
        return sum(self._most.values()) - self._at_first

    def look(self) -> None:
        """Note what connections have sent, some of which may be gone at the next look."""
        self._read()

    def _read(self) -> int:
        import psutil

        own = {str(each.laddr.port) for each in psutil.Process().net_connections("tcp")}
        told = subprocess.run(
            ["ss", "--tcp", "--info", "--numeric", "--no-header", "--oneline", f"dport = :{self._port}"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for line in told.splitlines():
            [port] = re.findall(rf":(\d+)\s+\S+:{self._port}\s", line)
            [sent] = re.findall(r"data_segs_out:(\d+)", line) or ["0"]
            if port not in own:
                self._most[port] = max(self._most.get(port, 0), int(sent))
        return sum(self._most.values())


def table(rows: Rows) -> str:
    lines = [
        f"| {WAITS} open waits, a message each {APART:g} s | requests: one triggerer | two, times that | four "
        "| at rest: one triggerer | two, times that | four |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        lines.append(f"| {NAMES[row['name']]} | {_times(row['requests'])} | {_times(row['idle'])} |")
    return "\n".join(
        [
            *lines,
            "",
            "What the triggerers send to the broker while the messages come, and in as many seconds without one: "
            "TCP segments with data, as the operating system counts them.",
        ]
    )


def _times(counts: list[int]) -> str:
    first, *others = counts
    return " | ".join([f"{first:,}", *(f"{each / max(first, 1):.2f}" for each in others)])


PARTS = {"triggerers": Part(triggerers, table, tuple(f"{name}_10" for name in NAMES), BROKERS)}
