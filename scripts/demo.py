#!/usr/bin/env python3
"""
Start an Airflow of one's own and watch waits end by real events: python3 scripts/demo.py [--port 8080] [--once].

Everything is in .demo/, listens on 127.0.0.1, and ends with Ctrl-C.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import time
from datetime import datetime
from pathlib import Path

import bootstrap

HOME = bootstrap.ROOT / ".demo"
STARTED = "events_start_runs"


def say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S}  {text}", flush=True)


def port_is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Start an Airflow of one's own and watch waits end by real events."
    )
    parser.add_argument("--port", type=int, default=8080, help="of the Airflow page on 127.0.0.1 (default: 8080)")
    parser.add_argument("--once", action="store_true", help="end after the demonstration instead of by Ctrl-C")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if port_is_taken(options.port):
        bootstrap.fail(f"port {options.port} on 127.0.0.1 is taken; give another with --port")
    bootstrap.run_inside()

    from deployment import Deployment

    shutil.rmtree(HOME, ignore_errors=True)
    airflow = Deployment(HOME, port=options.port, say=say)
    try:
        show(airflow, options.once)
    except KeyboardInterrupt:
        print()
    finally:
        say("Ending Airflow")
        airflow.stop()


def show(airflow, once: bool) -> None:
    from airflow_events import example_dags

    say(f"Preparing Airflow in {HOME.relative_to(bootstrap.ROOT)} (SQLite, LocalExecutor)")
    airflow.prepare()
    # The others need a server, and its client.
    folder = Path(example_dags.__file__).parent
    airflow.add_dags(
        *(folder / f"{name}.py" for name in ("ray_events", "file_drops", "own_listener", "event_starts"))
    )
    drops, starts = HOME / "drops", HOME / "starts"
    drops.mkdir()
    starts.mkdir()
    airflow.start()
    airflow.wait_for_dags("events_ray_example", "events_file_drops", "events_own_listener", STARTED)
    say(f"Airflow answers at {airflow.url} (no login)")

    say("")
    say("1. Two timers, of 2 and 3 seconds, and a task that gathers both")
    run = airflow.run("events_ray_example")
    follow(run)
    say(f"   worker processes of the waits: {workers(run, 'event_1', 'event_2')}")

    say("")
    say("2. Two runs wait for a file each; then two files are dropped")
    runs = [airflow.run("events_file_drops") for _ in range(2)]
    for run in runs:
        run.until_task("order", "deferred")
    say(f"   both wait, in the triggerer: {runs[0].url}")
    for name, lines in (("north.csv", 3), ("south.csv", 5)):
        (drops / name).write_text("a,b\n" * lines)
        say(f"   dropped {(drops / name).relative_to(bootstrap.ROOT)}")
    for run in runs:
        follow(run)
        say(f"   it got {run.xcom('count_lines')}; worker processes of the wait: {workers(run, 'order')}")

    say("")
    say("3. The first of them is cleared: it delivers its own event again, and takes no other")
    (drops / "west.csv").write_text("a,b\n")
    runs[0].clear("order", "count_lines")
    time.sleep(1)
    follow(runs[0])
    say(f"   it got {runs[0].xcom('count_lines')}, and west.csv is still there: {(drops / 'west.csv').exists()}")

    say("")
    say("4. Nothing waits, and three files are dropped: each starts a run of its own")
    for name in ("east.csv", "centre.csv", "coast.csv"):
        (starts / name).write_text("a,b\n")
        say(f"   dropped {(starts / name).relative_to(bootstrap.ROOT)}")
    for run in started_runs(airflow, 3):
        say(f"   {STARTED}: run {run['dag_run_id']} for {run['conf']['event']['name']}: {run['state']}")

    say("")
    say(f"What waits, and what starts runs: {airflow.url}/plugin/event-waits")
    say(f"Look around: {airflow.url}/dags  (a run of events_file_drops will take {drops}/west.csv)")
    if not once:
        say("Ctrl-C ends all of it")
        while all(component.alive for component in airflow.components.values()):
            time.sleep(1)
        ended = [component for component in airflow.components.values() if not component.alive]
        say(f"{ended[0].name} has ended by itself; see {ended[0].log}")


def started_runs(airflow, count: int) -> list:
    """Return the runs that events have started, once so many have finished."""
    while True:
        runs = airflow.api("GET", f"/dags/{STARTED}/dagRuns?order_by=id")["dag_runs"]
        if sum(run["state"] in ("success", "failed") for run in runs) >= count:
            return runs
        time.sleep(0.5)


def follow(run) -> None:
    """Print each change of the run's tasks until it has finished."""
    seen: dict[str, str | None] = {}
    while True:
        state = run.state
        for name, task in sorted(run.tasks().items()):
            if task["state"] != seen.get(name):
                seen[name] = task["state"]
                say(f"   {run.dag_id}: {name} is {WORDS.get(task['state'], task['state'])}")
        if state in ("success", "failed"):
            say(f"   {run.dag_id}: the run ended, {state}")
            return
        time.sleep(0.3)


WORDS = {"deferred": "deferred (it waits in the triggerer)"}


def workers(run, *tasks: str) -> str:
    return ", ".join(f"{task}: {run.worker_starts(task)}" for task in tasks)


if __name__ == "__main__":
    main()
