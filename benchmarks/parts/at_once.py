"""A thousand events at once: what the inbox takes beside as many of Airflow's own triggers, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from parts import Part, Rows, Stage
from parts.processes import connect, fresh_triggerer, open_waits, until_open
from parts.queues import REDIS, fresh_queue, order_of, send_at_once

NAMES = {
    "appears": "Airflow's own: a trigger that ends its task when a file is there",
    "ours": "ours: `TimerListener`",
    "redis_ours": "ours: `RedisListener`, Valkey",
}
# Seconds between two looks at how many have succeeded, and that the last may take.
_EVERY = 0.02
_LONGEST = 600


def at_once(stage: Stage) -> Rows:
    """From the moment at which the events are there until the database says that each task has succeeded."""
    count = max(stage.options.waits)
    found = []
    for name in NAMES:
        ends = _ends(stage, name, count)
        found.append({"name": name, "waits": count, **ends})
        print(name, ends["seen"][0], statistics.median(ends["seen"]), ends["seen"][-1], flush=True)
    return found


def _ends(stage: Stage, name: str, count: int) -> dict[str, Any]:
    triggerer = fresh_triggerer(stage.airflow)
    label = f"{name}-{time.time():.0f}"
    due = datetime.now(timezone.utc) + timedelta(seconds=45 + count // 10)
    file = Path(stage.airflow.home, label)
    broker, queue = fresh_queue(stage, "redis_ours")
    runs = open_waits(stage.airflow, f"{name}_10", 10, count, due, path=str(file), queue=queue)
    until_open(stage.airflow, triggerer, count)
    if name == "ours":
        assert datetime.now(timezone.utc) < due, "they are due before all wait"
        time.sleep(max((due - datetime.now(timezone.utc)).total_seconds(), 0))
        return _watch(stage, runs, due.timestamp(), lambda: None)
    time.sleep(5)  # until each has begun
    if name == "appears":
        return _watch(stage, runs, time.time(), file.touch)
    orders = [{"order": order_of(run, f"wait{number}")} for run in runs for number in range(10)]
    return _watch(stage, runs, time.time(), lambda: send_at_once(broker, orders))


def _watch(stage: Stage, runs: list[Any], begin: float, fire: Callable[[], Any]) -> dict[str, Any]:
    """Return after how many seconds each wait was seen to have succeeded, as another connection sees it."""
    at = time.time()
    ids = [run.run_id for run in runs]
    query = "SELECT count(*) FROM task_instance WHERE state = 'success' AND run_id = ANY(%s)"
    seen: list[float] = []
    with connect(stage.postgres.url) as connection:
        fire()
        fired = time.time() - at
        while len(seen) < 10 * len(runs):
            [(done,)] = connection.execute(query, (ids,))
            seen += [round(time.time() - begin, 3)] * (done - len(seen))
            assert time.time() - begin < _LONGEST, f"{len(seen)} after {_LONGEST} s"
            time.sleep(_EVERY)
    workers = sum(run.worker_starts(f"wait{number}") for run in runs for number in range(10))
    return {"seen": seen, "firing": round(fired, 2), "workers": workers}


def table(rows: Rows) -> str:
    peer = next(row for row in rows if row["name"] == "appears")["seen"][-1]
    lines = [
        "| open waits, and an event for each at once | worker processes | first success | median | last "
        "| the last, of Airflow's own |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        seen = row["seen"]
        lines.append(
            f"| {NAMES[row['name']]}; {row['waits']:,} | {row['workers']} | {seen[0]:.2f} s "
            f"| {statistics.median(seen):.2f} s | {seen[-1]:.2f} s | {seen[-1] / peer:.2f} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "Runs of a DAG with 10 waits. A success is when another connection to the database sees it, which "
            "looks fifty times in a second. From the moment at which the timers are due, the file is made, or the "
            "first "
            f"message is sent; sending all took {max(row['firing'] for row in rows):.1f} s.",
        ]
    )


PARTS = {"at_once": Part(at_once, table, tuple(f"{name}_10" for name in NAMES), (REDIS,))}
