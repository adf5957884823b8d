"""The triggerer's processes, and what they take."""

from __future__ import annotations

import contextlib
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

# Seconds in which what has begun or ended comes to rest; `--settle`.
settled = 10.0
# Seconds in which the triggerer's processes have collected their garbage, once told.
COLLECTING = 5.0


def settle() -> None:
    time.sleep(settled)


def fresh_triggerer(airflow: Any) -> tuple[Any, Any]:
    """Start the triggerer anew, and return its supervisor and its runner."""
    from deployment import until

    airflow.components["triggerer"].stop()
    triggerer = airflow.restart("triggerer")
    until(lambda: len(triggerer.family()) > 1, "the triggerer runs")
    settle()
    supervisor, *others = triggerer.family()
    # What it starts besides, to see what is installed, is small and soon gone.
    return supervisor, max(others, key=lambda process: process.memory_info().rss)


def open_waits(
    airflow: Any, dag_id: str, waits: int, count: int, due: datetime | None = None, **conf: str
) -> list:
    """Start as many runs of a DAG with so many waits as make ``count``."""
    if due:
        conf["due"] = due.isoformat()
    label = f"{time.time():.0f}"
    return [airflow.run(dag_id, conf, run_id=f"{label}-{number}") for number in range(count // waits)]


def tenth(waits: int) -> int:
    """Return how many waits are enough where each has a worker, of which one or two start in a second."""
    return max(waits // 100, 1) * 10


def until_open(triggerer: tuple[Any, Any], count: int) -> None:
    """Wait until so many triggers run: the supervisor has one open log for each."""
    from deployment import until

    until(lambda: _logs(triggerer[0]) >= count, f"{count} triggers run", timeout=60 + count, pause=0.2)


def _logs(process: Any) -> int:
    found = 0
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found += ".trigger." in os.readlink(entry)
    return found


def open_files(process: Any) -> int:
    return sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir())


def end(airflow: Any, runs: list) -> None:
    for run in runs:
        airflow.api("PATCH", run.path, {"state": "failed"})
    settle()


def collected(airflow: Any, processes: tuple[Any, Any]) -> list[int]:
    """Let the triggerer's processes collect their garbage, and return what memory each has then, in KB."""
    (airflow.home / "collect").touch()
    time.sleep(COLLECTING)
    return [pss(process.pid) for process in processes]


def pss(pid: int) -> int:
    """Return a process's share of memory, in KB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def busy(process: Any) -> float:
    """Return the processor time that a process has had, in seconds."""
    times = process.cpu_times()
    return float(times.user + times.system)
