#!/usr/bin/env python3
"""
Waits under random kills: python3 scripts/chaos.py [--events 100] [--kills 20] [--seed 1] [--database postgres].

Starts an Airflow of its own, and no other can be given to it; starts one run for each event, each with a wait for
a file, drops the files, and kills a random process with SIGKILL every few seconds. In the end every file must have
been delivered by one run. The seed decides what is killed, in which order and at which intervals.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import bootstrap

TARGETS = {"triggerer": 4, "trigger runner": 2, "worker": 10, "scheduler": 2, "api-server": 2, "dag-processor": 1}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Waits under random kills, in an Airflow of their own.")
    parser.add_argument("--events", type=int, default=100, help="how many files, and runs (default: 100)")
    parser.add_argument("--kills", type=int, default=20, help="how many processes to kill (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="replays the same kills (default: 1)")
    parser.add_argument("--triggerers", type=int, default=1, help="how many triggerers (default: 1)")
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds in all (default: 3600)")
    return parser.parse_args()


@dataclass
class Killer:
    """Kills processes by a seed, and starts again what does not come back by itself."""

    airflow: object
    random: random.Random
    kills: int
    killed: Counter = field(default_factory=Counter)
    moments: list[float] = field(default_factory=list)
    due: float = 0

    @property
    def done(self) -> bool:
        return sum(self.killed.values()) >= self.kills

    def kill_if_due(self) -> None:
        if self.done or time.time() < self.due:
            return
        target = self.random.choices(list(TARGETS), list(TARGETS.values()))[0]
        if self.kill(target, self.random.random()):
            self.killed[target] += 1
            self.moments.append(time.time())
        self.due = time.time() + self.random.uniform(0.5, 4)

    def kill(self, target: str, choice: float) -> bool:
        if target == "worker":
            return self.kill_worker(choice)
        kind = "triggerer" if target == "trigger runner" else target
        components = [c for name, c in self.airflow.components.items() if name.split("@")[0] == kind]
        component = components[int(choice * len(components))]
        if component.alive and target == "trigger runner":
            children = component.family()[1:]
            for process in children:
                with contextlib.suppress(Exception):
                    process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                component.process.wait(5)  # a triggerer ends when its runner is gone
        component.kill()
        self.airflow.restart(component.name)
        return True

    def kill_worker(self, choice: float) -> bool:
        scheduler = self.airflow.components["scheduler"]
        # Below the scheduler are the executor's processes, and below those the tasks.
        workers = [p for p in scheduler.family()[1:] if parent(p) != scheduler.pid]
        if not workers:
            return False
        with contextlib.suppress(Exception):
            workers[int(choice * len(workers))].kill()
            return True
        return False


def parent(process) -> int:
    with contextlib.suppress(Exception):
        return int(process.ppid())
    return 0


def insist(work, patience: float = 120):
    """Do it although the API server may just have been killed."""
    end = time.monotonic() + patience
    while True:
        try:
            return work()
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def main() -> int:
    options = arguments()
    bootstrap.run_inside("[test]")
    from deployment import Deployment
    from postgres import Postgres

    home = Path(tempfile.mkdtemp(prefix="airflow-events-chaos-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        database = stack.enter_context(Postgres()).url if options.database == "postgres" else None
        settings = {
            "events.directory_rescan_interval": "1",
            "events.commit_timeout": "20",
            # A killed scheduler leaves its queued tasks, which Airflow otherwise looks for every five minutes.
            "scheduler.scheduler_health_check_threshold": "6",
            "scheduler.orphaned_tasks_check_interval": "5",
        }
        airflow = stack.enter_context(Deployment(home, database=database, settings=settings))
        airflow.prepare()
        airflow.add_dags(bootstrap.ROOT / "tests" / "dags" / "chaos.py")
        airflow.start()
        for number in range(1, options.triggerers):
            airflow.start_one("triggerer", as_name=f"triggerer@{number}")
        airflow.wait_for_dags("chaos")
        return judge(options, *endure(options, airflow, home))


def endure(options, airflow, home: Path):
    """Run it, and return the killer, the runs and when each event was delivered."""
    for folder in ("drops", "delivered"):
        (home / folder).mkdir()
    killer = Killer(airflow, random.Random(options.seed), options.kills)
    began = time.time()
    # The kills are in this thread, since what it starts ends with it.
    publishing = threading.Thread(target=publish, args=(options.events, airflow, home), daemon=True)
    publishing.start()
    states: Counter = Counter()
    told = 0.0
    while time.time() - began < options.timeout:
        killer.kill_if_due()
        time.sleep(0.2)
        if time.time() - told < 5:
            continue
        told = time.time()
        with contextlib.suppress(Exception):  # the API server may just have been killed
            states = count_states(airflow)
        print(
            f"{told - began:6.0f} s  delivered {len(list((home / 'delivered').iterdir())):5} of {options.events}, "
            f"kills {sum(killer.killed.values()):4} of {options.kills}, runs {dict(states)}",
            flush=True,
        )
        if states["success"] + states["failed"] == options.events and killer.done:
            break
    return killer, states, home, time.time() - began


def publish(events: int, airflow, home: Path) -> None:
    """Start a run and drop a file, again and again."""
    for number in range(events):
        insist(lambda number=number: start(airflow, f"run{number:05}", home))
        (home / "drops" / f"event{number:05}").write_text(str(number))


def start(airflow, name: str, home: Path) -> None:
    try:
        airflow.run("chaos", {"base": str(home)}, run_id=name)
    except RuntimeError as error:
        if " 409 " not in str(error):  # it was started, and the answer was lost with the API server
            raise


def count_states(airflow) -> Counter:
    return Counter(
        {
            state: airflow.api("GET", f"/dags/chaos/dagRuns?state={state}&limit=1")["total_entries"]
            for state in ("queued", "running", "success", "failed")
        }
    )


def judge(options, killer: Killer, states: Counter, home: Path, seconds: float) -> int:
    """Ask the source and the downstream tasks what became of each event, and print the table."""
    from airflow_events.listeners.base import Wait
    from airflow_events.listeners.directory.claims import key_of

    delivered: dict[str, set[str]] = {}
    moments = []
    for file in (home / "delivered").iterdir():
        run, event = file.name.split(" ")
        delivered.setdefault(event, set()).add(run)
        moments.append(file.stat().st_mtime)
    archive = home / "drops" / ".airflow-events" / "archive"
    committed = {(entry.parent.parent.name, entry.parent.name) for entry in archive.glob("*/*/*")}
    by_delivery = {
        (key_of(Wait("chaos", run, "wait")), event) for event, runs in delivered.items() for run in runs
    }
    twice = sum(len(runs) > 1 for runs in delivered.values())
    lost = options.events - len(delivered)
    recovery = max((min((m for m in moments if m > k), default=k) - k for k in killer.moments), default=0)
    rows = {
        "events published": options.events,
        "events delivered": len(delivered),
        "events lost": lost,
        "events delivered twice": twice,
        "committed at the source by the run that delivered": len(committed & by_delivery),
        "runs that failed": states["failed"],
        **{f"kills: {target}": killer.killed[target] for target in TARGETS},
        "kills": sum(killer.killed.values()),
        "longest time from a kill to the next delivery (s)": round(recovery, 1),
        "seconds in all": round(seconds),
    }
    print(f"\nseed {options.seed}, {options.database}, {options.triggerers} triggerer(s)")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    good = not lost and not twice and committed == by_delivery and states["success"] == options.events
    print("every event was delivered once" if good else "THE PROMISE IS BROKEN")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
