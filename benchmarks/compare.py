#!/usr/bin/env python3
"""
What a wait costs, ours and others': python3 benchmarks/compare.py [--only latency memory start burst] [--waits N].

Starts a real Airflow on PostgreSQL and runs in it, by turns, a timer of ours, Airflow's own
``DateTimeSensorAsync`` as it comes and as it starts and ends in the triggerer, and the floor: a trigger that
awaits forever. Writes its tables, and the machine they are from, to docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bootstrap  # noqa: E402

BENCHMARKS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
NAMES = {
    "ours": "ours: `TimerListener`",
    "peer": "`DateTimeSensorAsync`",
    "peer_in_triggerer": "`DateTimeSensorAsync`, `start_from_trigger`, `end_from_trigger`",
    "floor": "the floor: a trigger that awaits forever",
}
SETTINGS = {
    "triggerer.capacity": "100000",
    "core.parallelism": "16",
    # As it comes, so that latencies are what a user sees.
    "scheduler.scheduler_heartbeat_sec": "5",
}
# Seconds.
AHEAD = 15
SETTLED = 10
IDLE = 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a wait costs, ours and others'.")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="only these tables")
    parser.add_argument("--repeat", type=int, default=5, help="rounds of the latencies (default: 5)")
    parser.add_argument("--at-once", type=int, default=8, help="runs in a round of the latencies (default: 8)")
    parser.add_argument("--waits", type=int, default=1000, help="open waits, where many are (default: 1000)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    bootstrap.run_inside("[test]")
    from deployment import Deployment
    from postgres import Postgres

    home = Path(tempfile.mkdtemp(prefix="airflow-events-compare-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        postgres = stack.enter_context(Postgres())
        airflow = stack.enter_context(Deployment(home, database=postgres.url, settings=SETTINGS))
        airflow.prepare()
        shutil.copy(BENCHMARKS / "plugins" / "floor.py", airflow.plugins)
        airflow.add_dags(BENCHMARKS / "dags" / "compare.py")
        airflow.start()
        airflow.wait_for_dags(*(f"{name}_{waits}" for name in NAMES for waits in (1, 10, 300)))
        tables = {}
        for part in options.only:
            tables[part] = PARTS[part](airflow, options)
            print(f"\n{tables[part]}\n", flush=True)
    write(tables)


def latency(airflow: Any, options: argparse.Namespace) -> str:
    """From the moment that a timer is for to the wait's success, and to the next task's start."""
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in NAMES if name != "floor"}
    _due_at_once(airflow, "ours", 1, "warm-up")
    for turn in range(options.repeat):
        for name, rows in found.items():
            rows += _due_at_once(airflow, name, options.at_once, f"latency{turn}")
    ours = statistics.median(row[1] for row in found["ours"])
    lines = [
        "| timer | due to success | due to downstream running | in ours | worker processes per wait |",
        "|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        success, running, workers = zip(*rows, strict=True)
        ratio = statistics.median(running) / ours
        lines.append(
            f"| {NAMES[name]} | {spread(success)} | {spread(running)} | {ratio:.2f} "
            f"| {statistics.mean(workers):.2f} |"
        )
    lines += ["", f"{options.repeat} rounds by turns, {options.at_once} waits due at once in each."]
    return "\n".join(lines)


def _due_at_once(airflow: Any, name: str, count: int, label: str) -> list[tuple[float, float, int]]:
    """Start runs that are due in a moment, and return when each wait succeeded and what followed it ran."""
    due = datetime.now(timezone.utc) + timedelta(seconds=AHEAD)
    conf = {"due": due.isoformat()}
    runs = [airflow.run(f"{name}_1", conf, run_id=f"{label}-{number}") for number in range(count)]
    rows = []
    for run in runs:
        assert run.finished() == "success", run
        tasks = run.tasks()
        began = datetime.fromisoformat(tasks["wait"]["start_date"])
        assert began < due, f"{run} began to wait {began - due} after it was due"
        ended, running = (
            (datetime.fromisoformat(moment) - due).total_seconds()
            for moment in (tasks["wait"]["end_date"], tasks["downstream"]["start_date"])
        )
        rows.append((ended, running, run.worker_starts("wait")))
    return rows


def memory(airflow: Any, options: argparse.Namespace) -> str:
    """What an open wait costs the triggerer, above one that has none."""
    lines = [
        "| open waits, each started in the triggerer | memory of the runner per wait | above the floor "
        "| memory of its supervisor per wait | processor time while nothing happens | of the floor's |",
        "|---|---|---|---|---|---|",
    ]
    for waits in (10, 300):
        bare = None
        for name in ("floor", "ours", "peer_in_triggerer"):
            count = options.waits if waits == 10 else 300
            cost = _cost(airflow, f"{name}_{waits}", waits, count)
            bare = bare or cost
            lines.append(
                f"| {NAMES[name]}; {count}, in DAGs of {waits} tasks | {cost[0] / count:.1f} KB "
                f"| {(cost[0] - bare[0]) / count:+.1f} KB | {cost[1] / count:.1f} KB "
                f"| {cost[2]:.3f} cores | {cost[2] / bare[2]:.2f} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(
        [*lines, "", f"PSS after a collection; processor time of runner and supervisor over {IDLE} s."]
    )


def _cost(airflow: Any, dag_id: str, waits: int, count: int) -> tuple[float, float, float]:
    """Return the KB that the waits add to the runner and to its supervisor, and the cores that they idle with."""
    triggerer = _fresh_triggerer(airflow)
    before = [_pss(process) for process in triggerer]
    runs = _open(airflow, dag_id, waits, count)
    _until_open(triggerer, count)
    time.sleep(SETTLED)
    after = [_pss(process) for process in triggerer]
    busy = [_busy(process) for process in triggerer]
    time.sleep(IDLE)
    cores = sum(_busy(process) - was for process, was in zip(triggerer, busy, strict=True)) / IDLE
    _end(airflow, runs)
    supervisor, runner = (now - was for now, was in zip(after, before, strict=True))
    return runner, supervisor, cores


def start(airflow: Any, options: argparse.Namespace) -> str:
    """How long it takes until many waits wait."""
    lines = ["| waits | until all wait | per second |", "|---|---|---|"]
    for name, count in (
        ("floor", options.waits),
        ("ours", options.waits),
        ("peer_in_triggerer", options.waits),
        ("peer", options.waits // 10),
    ):
        triggerer = _fresh_triggerer(airflow)
        began = time.monotonic()
        runs = _open(airflow, f"{name}_10", 10, count)
        _until_open(triggerer, count)
        seconds = time.monotonic() - began
        _end(airflow, runs)
        lines.append(f"| {NAMES[name]}; {count} | {seconds:.1f} s | {count / seconds:.1f} |")
        print(lines[-1], flush=True)
    return "\n".join([*lines, "", "From the first request that makes a run; runs of a DAG with 10 waits."])


def burst(airflow: Any, options: argparse.Namespace) -> str:
    """How fast many waits end that are due at once."""
    lines = ["| waits due at once | due to the last success | per second |", "|---|---|---|"]
    for name in ("ours", "peer_in_triggerer"):
        triggerer = _fresh_triggerer(airflow)
        due = datetime.now(timezone.utc) + timedelta(seconds=90 + options.waits // 20)
        runs = _open(airflow, f"{name}_10", 10, options.waits, due)
        _until_open(triggerer, options.waits)
        assert datetime.now(timezone.utc) < due, "they are due before all wait"
        ends = []
        for run in runs:
            assert run.finished(timeout=600) == "success", run
            ends += [datetime.fromisoformat(task["end_date"]) for task in run.tasks().values()]
        seconds = (max(ends) - due).total_seconds()
        lines.append(f"| {NAMES[name]}; {options.waits} | {seconds:.1f} s | {options.waits / seconds:.0f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def _fresh_triggerer(airflow: Any) -> tuple[Any, Any]:
    """Start the triggerer anew, and return its supervisor and its runner."""
    from deployment import until

    airflow.components["triggerer"].stop()
    triggerer = airflow.restart("triggerer")
    until(lambda: len(triggerer.family()) > 1, "the triggerer runs")
    time.sleep(SETTLED)
    supervisor, *others = triggerer.family()
    # What it starts besides, to see what is installed, is small and soon gone.
    return supervisor, max(others, key=lambda process: process.memory_info().rss)


def _open(airflow: Any, dag_id: str, waits: int, count: int, due: datetime | None = None) -> list[Any]:
    conf = {"due": due.isoformat()} if due else {}
    label = f"{time.time():.0f}"
    return [airflow.run(dag_id, conf, run_id=f"{label}-{number}") for number in range(count // waits)]


def _until_open(triggerer: tuple[Any, Any], count: int) -> None:
    """Wait until so many triggers run: the supervisor has one open log for each."""
    from deployment import until

    until(lambda: _logs(triggerer[0]) >= count, f"{count} triggers run", timeout=60 + count, pause=0.2)


def _logs(process: Any) -> int:
    folder = Path(f"/proc/{process.pid}/fd")
    found = 0
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            found += ".trigger." in os.readlink(entry)
    return found


def _end(airflow: Any, runs: list[Any]) -> None:
    for run in runs:
        airflow.api("PATCH", run.path, {"state": "failed"})
    time.sleep(SETTLED)


def _pss(process: Any) -> int:
    """Return a process's share of memory, in KB."""
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def _busy(process: Any) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def spread(seconds: tuple[float, ...]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


PARTS: dict[str, Callable[[Any, argparse.Namespace], str]] = {
    "latency": latency,
    "memory": memory,
    "start": start,
    "burst": burst,
}


def write(tables: dict[str, str]) -> None:
    """Put the tables into the page, in place of those that are there; each stands below its marker."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release().split('-')[0]}"
    run = (
        f"{date.today().isoformat()}, Airflow {version('apache-airflow')}, standard provider "
        f"{version('apache-airflow-providers-standard')}, Python {platform.python_version()}, {machine}"
    )
    text = PAGE.read_text()
    for part, table in tables.items():
        before, begin, rest = text.partition(f"<!-- {part} -->\n")
        _, end, after = rest.partition(f"<!-- /{part} -->")
        assert begin and end, f"{PAGE} has no place for {part!r}"
        text = f"{before}{begin}{table}\n\nRun on {run}.\n{end}{after}"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
