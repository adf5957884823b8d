#!/usr/bin/env python3
"""
How long the page's questions take in a database with many waits: python3 benchmarks/waits.py [--open 10000].

Airflow's real tables and the inbox's in a PostgreSQL of its own (or, with --database sqlite, in a file), filled
with open waits, ended ones with their events, and other tasks. It prints the median and the 95th percentile of
each question.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bootstrap

NOW = datetime.now(timezone.utc)


def main() -> None:
    parser = argparse.ArgumentParser(description="How long the page's questions take.")
    parser.add_argument("--open", type=int, default=10_000, help="open waits")
    parser.add_argument("--ended", type=int, default=100_000, help="ended waits, each with an event")
    parser.add_argument("--others", type=int, default=200_000, help="task instances that are no waits")
    parser.add_argument("--database", choices=("postgres", "sqlite"), default="postgres")
    parser.add_argument("--times", type=int, default=20, help="how often each question is asked")
    options = parser.parse_args()
    bootstrap.run_inside("[test]")

    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session

    from postgres import Postgres

    with contextlib.ExitStack() as stack:
        if options.database == "postgres":
            url = stack.enter_context(Postgres()).url
        else:
            url = f"sqlite:///{stack.enter_context(tempfile.TemporaryDirectory())}/airflow.db"
        engine = create_engine(url)
        fill(engine, options)
        print(f"{options.database}: {options.open} open, {options.ended} ended, {options.others} other tasks")
        with Session(engine) as session:
            for name, question in questions().items():
                times = []
                for _ in range(options.times):
                    begun = time.perf_counter()
                    question(session)
                    times.append(1000 * (time.perf_counter() - begun))
                    session.expire_all()
                times.sort()
                p95 = times[min(len(times) - 1, round(0.95 * len(times)))]
                print(f"{name:42} median {statistics.median(times):7.1f} ms   p95 {p95:7.1f} ms")


def questions():
    from airflow_events import waits
    from airflow_events.waits import Order, Stage

    some = {f"dag_{n}" for n in range(50)}
    return {
        "open, first page": lambda s: waits.find(s, Stage.OPEN),
        "open, page 150": lambda s: waits.find(s, Stage.OPEN, offset=7_450),
        "open, by deadline, descending": lambda s: waits.find(
            s, Stage.OPEN, order=Order.DEADLINE, descending=True
        ),
        "open, by triggerer": lambda s: waits.find(s, Stage.OPEN, order=Order.TRIGGERER),
        "open, text that matches one": lambda s: waits.find(s, Stage.OPEN, text="o_4242"),
        "open, of 50 DAGs that one may see": lambda s: waits.find(s, Stage.OPEN, dag_ids=some),
        "recorded": lambda s: waits.find(s, Stage.RECORDED),
        "ended, first page": lambda s: waits.find(s, Stage.ENDED),
        "count, for the metrics": waits.count,
        "one wait": lambda s: waits.show(s, ("dag_7", "o_7", "wait", -1)),
    }


def fill(engine, options) -> None:
    import uuid6
    from airflow import models
    from airflow.jobs.job import Job
    from airflow.models.base import Base
    from airflow.models.dagrun import DagRun
    from airflow.models.taskinstance import TaskInstance
    from airflow.models.trigger import Trigger
    from airflow_events.inbox import models as inbox
    from airflow_events.inbox.entries import Phase
    from airflow_events.listeners.support import serde
    from sqlalchemy import insert

    models.import_all_models()
    Base.metadata.create_all(engine)
    inbox.Base.metadata.create_all(engine)
    call = {"listener": "shop:Queue", "listener_args": ["orders"], "listener_kwargs": {"key": 1}, "timeout": 60.0}
    kwargs = Trigger.encrypt_kwargs(call)
    ids = iter(range(1, 10**9))

    def put(model, rows):
        with engine.begin() as connection:
            for start in range(0, len(rows), 5_000):
                connection.execute(insert(model.__table__), rows[start : start + 5_000])

    def tasks(prefix, count, state, operator, task_id):
        runs, instances = [], []
        for n in range(count):
            dag_id, run_id, at = f"dag_{n % 200}", f"{prefix}_{n}", NOW - timedelta(seconds=n)
            run = {"id": next(ids), "dag_id": dag_id, "run_id": run_id, "run_type": "manual"}
            runs.append({**run, "run_after": at, "state": "running", "span_status": "not_started"})
            instances.append(
                {
                    "id": uuid6.uuid7(), "dag_id": dag_id, "run_id": run_id, "task_id": task_id, "map_index": -1,
                    "state": state, "operator": operator, "custom_operator_name": "Queue", "pool": "default_pool",
                    "pool_slots": 1, "span_status": "not_started", "start_date": at, "try_number": 1,
                    "end_date": at if state == "success" else None, "trigger_timeout": at + timedelta(hours=1),
                    "trigger_id": n + 1 if state == "deferred" else None,
                }
            )  # fmt: skip
        put(DagRun, runs)
        put(TaskInstance, instances)
        return runs

    job = {"id": 1, "state": "running", "job_type": "TriggererJob", "hostname": "box", "latest_heartbeat": NOW}
    put(Job, [job])
    trigger = {"classpath": "airflow_events.triggers.event.EventTrigger", "kwargs": kwargs, "created_date": NOW}
    put(Trigger, [{**trigger, "id": n + 1, "triggerer_id": 1} for n in range(options.open)])
    waiting = tasks("o", options.open, "deferred", "WaitForEventOperator", "wait")
    ended = tasks("e", options.ended, "success", "WaitForEventOperator", "wait")
    tasks("x", options.others, "success", "BashOperator", "bash")

    event = serde.encode({"order": 42, "items": ["a"] * 20})

    def rows(runs, phase=None):
        recorded = {"event": event, "record_id": "r", "record_clears": 1, "recorded_at": NOW} if phase else {}
        return [
            {
                "dag_id": run["dag_id"], "task_id": "wait", "run_id": run["run_id"], "map_index": -1, "place": -1,
                "listener": "Queue", "call": "Queue('orders', key=1)", "generation": 1, "clears": 1,
                "holder": "box:17", "since": run["run_after"], "deadline": NOW, "phase": phase, **recorded,
            }
            for run in runs
        ]  # fmt: skip

    stuck, others = waiting[:20], waiting[20:]
    for some, phase in ((ended, Phase.COMMITTED.value), (stuck, Phase.RECORDED.value), (others, None)):
        put(inbox.EventWait, rows(some, phase))
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")


if __name__ == "__main__":
    main()
