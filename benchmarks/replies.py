#!/usr/bin/env python3
"""
How long a sender waits for the reply: python3 benchmarks/replies.py [--open 1 100 10000] [--times 100].

One sender posts events to waiting tasks of a real Airflow, one after another, while so many waits are open: the
API server and PostgreSQL, without a scheduler or a triggerer, so that nothing else is measured. The waits are rows
in Airflow's tables and the inbox's. The sizes take turns, so that what else the machine does falls on all of them.
At last scheduler and triggerer come too, and it is timed when the next task runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bootstrap  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How long a sender waits for the reply.")
    parser.add_argument("--open", type=int, nargs="+", default=[1, 100, 10_000], help="open waits")
    parser.add_argument("--times", type=int, default=100, help="posts for each of them in each round")
    parser.add_argument("--rounds", type=int, default=3, help="how often each size has its turn")
    parser.add_argument("--runs", type=int, default=20, help="runs whose next task is timed")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    bootstrap.run_inside("[test]")
    from deployment import Deployment
    from postgres import Postgres

    home = Path(tempfile.mkdtemp(prefix="airflow-events-replies-"))
    try:
        with Postgres() as postgres, Deployment(home, database=postgres.url) as airflow:
            airflow.prepare()
            airflow.add_dags(ROOT / "benchmarks" / "dags" / "replies.py")
            airflow.airflow("dags", "reserialize")
            airflow.start("api-server")
            airflow.api("GET", "/dags?limit=1")  # logs in
            report(options, replies(airflow, options))
            airflow.start("scheduler", "dag-processor", "triggerer")
            report_downstream(downstream(airflow, options))
    finally:
        shutil.rmtree(home, ignore_errors=True)


def replies(airflow, options) -> dict[tuple[int, str], list[float]]:
    """Return the milliseconds of each reply, by number of open waits and kind of address."""
    times: dict[tuple[int, str], list[float]] = {}
    with sender(airflow) as http, Waits(airflow) as waits:
        for _ in range(20):  # what the API server does only once
            post(http, waits, "address")
            post(http, waits, "key")
        for number in range(options.rounds):
            for size in options.open:
                waits.clear()
                waits.add(size - 1)
                for kind in ("address", "key"):
                    times.setdefault((size, kind), []).extend(
                        post(http, waits, kind) for _ in range(options.times)
                    )
                print(f"round {number + 1}, {size} open: done", file=sys.stderr, flush=True)
        waits.clear()
    return times


def post(http, waits: Waits, kind: str) -> float:
    """Let one more wait begin, send it an event, and return the milliseconds until the reply."""
    name = waits.add(1)
    path = f"/dags/replies/runs/{name}/tasks/wait" if kind == "address" else f"/keys/{name}"
    begun = time.perf_counter()
    answer = http.post(f"/events{path}", json={"order": 42})
    took = 1000 * (time.perf_counter() - begun)
    assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
    return took


def downstream(airflow, options) -> list[tuple[float, float]]:
    """Return, for each run, the seconds from the post to the reply, and to the next task's beginning to run."""
    from deployment import until

    airflow.wait_for_dags("replies")
    found = []
    with sender(airflow) as http:
        for number in range(options.runs + 1):
            run = airflow.run("replies", {"key": f"d{number}"}, run_id=f"d{number}")
            run.until_task("wait", "deferred")
            time.sleep(1)  # until nothing of the wait's beginning goes on any more
            begun = time.time()
            answer = http.post(f"/events/dags/replies/runs/d{number}/tasks/wait", json={"order": 42})
            replied = time.time()
            assert answer.status_code == 200, answer.text
            start = until(lambda run=run: run.tasks()["after"]["start_date"], "the next task runs", pause=0.2)
            ran = datetime.fromisoformat(start.replace("Z", "+00:00")).timestamp()
            found.append((replied - begun, ran - begun))
            run.finished()
    return found[1:]  # the first is a warm-up


def sender(airflow):
    import httpx

    return httpx.Client(base_url=airflow.url, headers={"Authorization": f"Bearer {airflow._token}"}, timeout=60)


class Waits:
    """Open waits, as rows of Airflow's tables."""

    def __init__(self, airflow) -> None:
        # What this process writes must be what the API server can decrypt.
        os.environ.update({k: v for k, v in airflow.environment.items() if k.startswith("AIRFLOW")})
        from airflow.models.trigger import Trigger
        from airflow_events.listeners.http import HttpListener
        from airflow_events.triggers import reference
        from airflow_events.triggers.event import EventTrigger
        from sqlalchemy import create_engine, text

        self._ids = itertools.count(1)
        self._trigger = EventTrigger.__module__ + "." + EventTrigger.__qualname__
        self._kwargs = Trigger.encrypt_kwargs({"listener": reference.name(HttpListener)})
        self._engine = create_engine(airflow.database)
        with self._engine.connect() as connection:
            self._version = connection.scalar(text("SELECT id FROM dag_version WHERE dag_id = 'replies'"))

    def __enter__(self) -> Waits:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.dispose()

    def add(self, count: int) -> str:
        """Let so many waits begin, and return the name of the last one: of its run, and its key."""
        import uuid6
        from airflow.models.dagrun import DagRun
        from airflow.models.taskinstance import TaskInstance
        from airflow.models.trigger import Trigger
        from airflow_events.inbox.models import EventWait
        from airflow_events.listeners.http import address_of
        from sqlalchemy import insert

        rows: dict[type, list[dict]] = {Trigger: [], DagRun: [], TaskInstance: [], EventWait: []}
        name, now = "", datetime.now(timezone.utc)
        for number in itertools.islice(self._ids, count):
            name = f"w{number}"
            of_run = {"dag_id": "replies", "run_id": name}
            of_wait = {**of_run, "task_id": "wait", "map_index": -1}
            rows[Trigger].append(
                {"id": number, "classpath": self._trigger, "kwargs": self._kwargs, "created_date": now}
            )
            rows[DagRun].append(
                {
                    **of_run, "id": number, "run_type": "manual", "run_after": now, "start_date": now,
                    "state": "running", "span_status": "not_started", "created_dag_version_id": self._version,
                }
            )  # fmt: skip
            rows[TaskInstance].append(
                {
                    **of_wait, "id": uuid6.uuid7(), "state": "deferred", "operator": "WaitForEventOperator",
                    "custom_operator_name": "HttpListener", "pool": "default_pool", "pool_slots": 1,
                    "span_status": "not_started", "start_date": now, "try_number": 1, "max_tries": 3,
                    "trigger_id": number, "dag_version_id": self._version, "queue": "default",
                }
            )  # fmt: skip
            address = bytes.fromhex(address_of(name))
            rows[EventWait].append(
                {**of_wait, "place": -1, "address": address, "generation": 1, "clears": 3, "since": now}
            )
        for model, some in rows.items():
            for start in range(0, len(some), 5_000):
                with self._engine.begin() as connection:
                    connection.execute(insert(model.__table__), some[start : start + 5_000])
        if count > 1_000:
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("ANALYZE")
        return name

    def clear(self) -> None:
        """Take all of them away."""
        with self._engine.begin() as connection:
            connection.exec_driver_sql("TRUNCATE dag_run, task_instance, event_wait, event_kept, trigger CASCADE")


def report(options, times: dict[tuple[int, str], list[float]]) -> None:
    print("\n| open waits | to the wait: median, p95 | to its key: median, p95 | medians, against the first row |")
    print("|---|---|---|---|")
    for size in options.open:
        cells, ratios = [], []
        for kind in ("address", "key"):
            mine = times[size, kind]
            cells.append(f"{statistics.median(mine):.0f} ms, {p95(mine):.0f} ms")
            ratios.append(statistics.median(mine) / statistics.median(times[options.open[0], kind]))
        print(f"| {size:,} | {cells[0]} | {cells[1]} | {ratios[0]:.2f}, {ratios[1]:.2f} |", flush=True)


def report_downstream(found: list[tuple[float, float]]) -> None:
    replied, ran = zip(*found, strict=True)
    print(f"\nPOST to reply: median {statistics.median(replied):.2f} s, 95th percentile {p95(replied):.2f} s")
    print(f"POST to next task running: median {statistics.median(ran):.2f} s, 95th percentile {p95(ran):.2f} s")
    print(f"against the reply: {statistics.median(ran) / statistics.median(replied):.1f}", flush=True)


def p95(numbers) -> float:
    ordered = sorted(numbers)
    return ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]


if __name__ == "__main__":
    main()
