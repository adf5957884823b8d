#!/usr/bin/env python3
"""
One task that waits for many: python3 benchmarks/many.py [--count 10000] [--seconds 60].

Starts an Airflow of its own on PostgreSQL. A task waits for that many timers, which all go off at once, and one
watches a directory for as many files by their names, which are all dropped at once. Printed are, for each: seconds
from the run's start until all of it waits; the triggerer's memory (PSS of its processes) above that of the
triggerer before, which has had one wait; seconds from the last event until the task has ended; and the longest
time for which the triggerer's loop stood still, as Airflow logs it.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bootstrap  # noqa: E402

DAGS = """
from datetime import timedelta
from airflow.sdk import DAG
from airflow_events import wait_for_events
from airflow_events.listeners.directory import DirectoryWatchListener
from airflow_events.listeners.timer import TimerListener

with DAG("one", schedule=None):
    wait_for_events(TimerListener, [timedelta(seconds=1)])
with DAG("timers", schedule=None):
    wait_for_events.override(task_id="wait")(TimerListener, [timedelta(seconds={seconds})] * {count})
with DAG("watches", schedule=None):
    wait_for_events.override(task_id="wait")(
        DirectoryWatchListener,
        [{{"pattern": f"{{n}}.csv"}} for n in range({count})],
        directory="{drops}",
        settle=0,
    )
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One task that waits for many.")
    parser.add_argument("--count", type=int, default=10_000, help="how many events (default: 10,000)")
    parser.add_argument("--seconds", type=int, default=60, help="when the timers go off (default: 60)")
    parser.add_argument("--what", nargs="+", choices=("timers", "watches"), default=["timers", "watches"])
    return parser.parse_args()


def main() -> None:
    options = arguments()
    bootstrap.run_inside("[test]")
    from deployment import Deployment
    from postgres import Postgres

    home = Path(tempfile.mkdtemp(prefix="airflow-events-many-"))
    drops = home / "drops"
    drops.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        postgres = stack.enter_context(Postgres())
        airflow = stack.enter_context(Deployment(home, database=postgres.url))
        airflow.prepare()
        (airflow.dags / "many.py").write_text(DAGS.format(drops=drops, **vars(options)))
        airflow.start()
        airflow.wait_for_dags("one", "timers", "watches")
        print("| what | all wait after | memory above | last event to end | longest block |")
        print("|---|---|---|---|---|")
        for dag in options.what:
            airflow.components["triggerer"].stop()
            airflow.restart("triggerer")
            # Of what a triggerer builds for its first wait, the others take nothing more.
            airflow.run("one").finished()
            measure(airflow, dag, drops, options)


def measure(airflow, dag: str, drops: Path, options: argparse.Namespace) -> None:
    from deployment import until

    before = memory(airflow)
    read = airflow.components["triggerer"].log.stat().st_size
    began = time.time()
    run = airflow.run(dag)
    until(lambda: "are waited for" in run.logs("wait"), "all wait", 300, 0.1)
    waiting = time.time() - began
    time.sleep(3)
    above = memory(airflow) - before
    if dag == "watches":
        for number in range(options.count):
            (drops / f"{number}.csv").touch()
        due = time.time()
    else:
        due = began + options.seconds
    assert run.finished(timeout=1200) == "success"
    ended = time.time() - due
    with airflow.components["triggerer"].log.open(errors="replace") as log:
        log.seek(read)
        blocks = [float(seconds) for seconds in re.findall(r"blocked for ([\d.]+) seconds", log.read())]
    longest = f"{max(blocks):.2f} s" if blocks else "below 0.2 s"
    print(f"| {options.count:,} {dag} | {waiting:.1f} s | {above / 1e6:.0f} MB | {ended:.1f} s | {longest} |")


def memory(airflow) -> int:
    return sum(process.memory_full_info().pss for process in airflow.components["triggerer"].family())


if __name__ == "__main__":
    main()
