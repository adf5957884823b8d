#!/usr/bin/env python3
"""
From a triggerer's death to the delivery: python3 benchmarks/recovery.py [--repeat 5] [--thresholds 30 10].

A run waits for a file in one triggerer, and a second one runs beside it. The first is killed with SIGKILL, the
file is dropped, and what follows is timed. Everything but the threshold is as Airflow comes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bootstrap  # noqa: E402

AS_AIRFLOW_COMES = {
    "triggerer.job_heartbeat_sec": "5",
    "scheduler.scheduler_heartbeat_sec": "5",
    "scheduler.job_heartbeat_sec": "5",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="From a triggerer's death to the delivery.")
    parser.add_argument("--repeat", type=int, default=5, help="how often for each threshold (default: 5)")
    parser.add_argument(
        "--thresholds", type=int, nargs="+", default=[30, 10],
        help="[triggerer] triggerer_health_check_threshold, in seconds (default: 30, which is Airflow's, and 10)",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    options = arguments()
    bootstrap.run_inside("[test]")
    from deployment import Deployment

    rows = []
    for threshold in options.thresholds:
        home = Path(tempfile.mkdtemp(prefix="airflow-events-recovery-"))
        settings = {**AS_AIRFLOW_COMES, "triggerer.triggerer_health_check_threshold": str(threshold)}
        try:
            with Deployment(home, settings=settings) as airflow:
                airflow.prepare()
                airflow.add_dags(ROOT / "benchmarks" / "dags" / "recovery.py")
                airflow.start()
                airflow.wait_for_dags("recovery")
                for folder in ("drops", "delivered"):
                    (home / folder).mkdir()
                measure(airflow, "warm-up")
                for number in range(options.repeat):
                    calm = measure(airflow, f"calm{number}")
                    rows.append((threshold, calm, *survive(airflow, f"killed{number}")))
                    print(rows[-1], flush=True)
        finally:
            shutil.rmtree(home, ignore_errors=True)
    report(options, rows)


def measure(airflow, name: str) -> float:
    """Return the seconds from a dropped file to its delivery while nobody dies."""
    run = airflow.run("recovery", {"base": str(airflow.home)}, run_id=name)
    wait_for_poll(run, 1)
    return drop(airflow, name)


def survive(airflow, name: str) -> tuple[float, float]:
    """Return the seconds from the kill until another triggerer polls, and until the event is delivered."""
    from deployment import until

    run = airflow.run("recovery", {"base": str(airflow.home)}, run_id=name)
    wait_for_poll(run, 1)
    [first] = [c for n, c in airflow.components.items() if n.startswith("triggerer")]
    second = airflow.start_one("triggerer", as_name=f"triggerer@{name}")
    until(lambda: len(second.family()) > 1, "the second triggerer runs")
    time.sleep(5)  # until its loop runs
    first.kill()
    killed = time.time()
    del airflow.components[first.name]
    drop(airflow, name)
    delivered = time.time()
    return wait_for_poll(run, 2) - killed, delivered - killed


def wait_for_poll(run, count: int) -> float:
    """Wait until the run polls for the ``count``-th time, and return when that was."""
    from deployment import until

    def polls() -> list[float]:
        lines = [json.loads(line) for line in run.logs("wait").splitlines() if "Waiting for an event" in line]
        return sorted(
            datetime.fromisoformat(line["timestamp"].replace("Z", "+00:00")).timestamp() for line in lines
        )

    return until(lambda: polls()[count - 1 :], f"{run.run_id} polls", timeout=120)[0]


def drop(airflow, name: str) -> float:
    from deployment import until

    began = time.time()
    (airflow.home / "drops" / name).write_text(name)
    until(lambda: list((airflow.home / "delivered").glob(f"{name} *")), "it is delivered", 300, 0.02)
    return time.time() - began


def report(options, rows) -> None:
    print(
        "\n| `triggerer_health_check_threshold` | kill to poll | kill to delivery | in thresholds | undisturbed |"
    )
    print("|---|---|---|---|---|")
    for threshold in options.thresholds:
        calm, polled, delivered = zip(*[row[1:] for row in rows if row[0] == threshold], strict=True)
        ratio = statistics.median(delivered) / threshold
        print(
            f"| {threshold} s | {spread(polled)} | {spread(delivered)} | {ratio:.2f} | {spread(calm)} |",
            flush=True,
        )


def spread(seconds: tuple[float, ...]) -> str:
    return f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"


if __name__ == "__main__":
    main()
