#!/usr/bin/env python3
"""
Random kills: python3 scripts/chaos.py [--source redis] [--starts] [--events 100] [--kills 20] [--seed 1] ...

Starts an Airflow of its own, and no other can be given to it; starts one run for each event, each with a wait,
sends the events (files that are dropped, unless told otherwise), and kills a random process with SIGKILL every
few seconds, as the deliveries go on: a triggerer, its runner, a worker, the scheduler, the API server in which the
inbox is. Most waits need no worker; every seventh begins on one, and every seventh ends on one, where the source
has such waits. With ``--starts`` nothing waits, and each event starts a run. With ``--brokers`` the source's own
servers are killed too, and with ``--kill-database`` Airflow's PostgreSQL; they are started again on what they
left. In the end every event must have been delivered by one run, and both the source, asked by a client of its
own, and the inbox must say the same. The seed decides what is killed, in which order and at which intervals.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import bootstrap

TARGETS = {"triggerer": 4, "trigger runner": 2, "worker": 6, "scheduler": 2, "api-server": 4, "dag-processor": 1}
# Seconds to look for a worker to kill: there may be none at the moment.
LOOK_FOR_A_WORKER = 5
# Of the kills, with --brokers and with --kill-database.
BROKERS = 3
DATABASES = 2
# By how many kills these may be ahead of the events, or behind.
AHEAD = 5
# Seconds without a delivery after which kills go on anyhow, and seconds between these: what was killed has to come
# up. LocalExecutor was seen to stand still for good, all its processes waiting to write their results, until its
# scheduler was killed.
STUCK = 45
STUCK_PAUSE = 15
# The DAG that events start, with --starts.
STARTED = "started_under_chaos"
# For the DAGs: enough retries.
ENDURING = {"MATRIX_RETRIES": "50"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Waits under random kills, in an Airflow of their own.")
    parser.add_argument("--source", default="directory", help="of tests/plugins/sources.py (default: directory)")
    parser.add_argument("--starts", action="store_true", help="have each event start a run, instead of waits")
    parser.add_argument("--events", type=int, default=100, help="how many events, and runs (default: 100)")
    parser.add_argument("--kills", type=int, default=20, help="how many processes to kill (default: 20)")
    parser.add_argument("--every", type=float, default=2, help="mean seconds between two kills (default: 2)")
    parser.add_argument("--seed", type=int, default=1, help="replays the same kills (default: 1)")
    parser.add_argument("--triggerers", type=int, default=1, help="how many triggerers (default: 1)")
    parser.add_argument("--database", choices=("sqlite", "postgres", "mysql"), default="sqlite")
    parser.add_argument("--kill-database", action="store_true", help="kill it, too; of postgres alone")
    parser.add_argument("--under-way", type=int, default=60, help="how many runs at a time (default: 60)")
    parser.add_argument("--brokers", type=int, help="of the source, to be killed too (default: one, which is not)")
    parser.add_argument("--partitions", type=int, help="of the queue (default: as the source has it)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds in all (default: 3600)")
    return parser.parse_args()


@dataclass
class Killer:
    """Kills processes by a seed, and starts again what does not come back by itself."""

    airflow: object
    random: random.Random
    kills: int
    every: float
    targets: dict[str, int] = field(default_factory=TARGETS.copy)
    servers: Sequence[object] = ()
    database: object = None
    killed: Counter = field(default_factory=Counter)
    ended: Counter = field(default_factory=Counter)
    moments: list[float] = field(default_factory=list)
    due: float = 0
    delivered: float = 0
    delivered_at: float = field(default_factory=time.time)

    @property
    def done(self) -> bool:
        return sum(self.killed.values()) >= self.kills

    def is_ahead(self, delivered: float) -> bool:
        """Whether so many were killed that too few would be left for what is still to be delivered."""
        return sum(self.killed.values()) > AHEAD + delivered * self.kills

    def is_behind(self, published: float) -> bool:
        """Whether so few were killed that too many would be left for when everything is delivered."""
        return sum(self.killed.values()) + AHEAD < published * self.kills

    def revive(self) -> None:
        """Start again what has ended by itself, as a service manager would."""
        for name, component in list(self.airflow.components.items()):
            if not component.alive:
                self.ended[name.split("@")[0]] += 1
                self.airflow.restart(name)
        for server in self.servers:
            if server.process.poll() is not None:
                self.ended["broker"] += 1
                server.begin()

    def kill_if_due(self, delivered: float) -> None:
        """Kill something if it is time, where ``delivered`` of all events, from 0 to 1, have been."""
        if delivered > self.delivered:
            self.delivered, self.delivered_at = delivered, time.time()
        is_stuck = time.time() > self.delivered_at + STUCK
        if self.done or time.time() < self.due or (self.is_ahead(delivered) and not is_stuck):
            return
        target = self.random.choices(list(self.targets), list(self.targets.values()))[0]
        if self.kill(target, self.random.random()):
            self.killed[target] += 1
            self.moments.append(time.time())
        pause = self.random.uniform(0.2, 1.8) * self.every
        self.due = time.time() + (max(pause, STUCK_PAUSE) if is_stuck else pause)

    def kill(self, target: str, choice: float) -> bool:
        if target == "worker":
            return self.kill_worker(choice)
        if target == "broker":
            server = self.servers[int(choice * len(self.servers))]
            server.kill()
            server.begin()  # it answers when it does: the waits have to bear that
            return True
        if target == "database":
            self.database.crash()
            self.database.start()
            return True
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
        end = time.monotonic() + LOOK_FOR_A_WORKER
        while time.monotonic() < end:
            workers = self.airflow.workers()
            with contextlib.suppress(Exception):  # it has just ended
                workers[int(choice * len(workers))].kill()
                return True
            time.sleep(0.05)
        return False


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
    tests = bootstrap.ROOT / "tests"
    sys.path[:0] = [str(tests / folder) for folder in ("plugins", "matrix", "sources")]
    from proof import SETTINGS, furnish, served

    from databases import missing, serve
    from deployment import Deployment
    from sources import SOURCES

    known = {source.name: source for source in SOURCES if source.commits}
    if options.source not in known:
        bootstrap.fail(f"there is no source {options.source!r}; there are {', '.join(known)}")
    source = known[options.source]
    try:
        source.scale(options.brokers, options.partitions)
    except ValueError as error:
        bootstrap.fail(str(error))
    home = Path(tempfile.mkdtemp(prefix="airflow-events-chaos-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        if problem := missing(options.database):
            bootstrap.fail(problem)
        if options.kill_database and options.database != "postgres":
            bootstrap.fail("--kill-database takes --database postgres")
        server = stack.enter_context(serve(options.database))
        database = server.url if server else None
        settings = {**SETTINGS, "core.parallelism": "8"}
        variables = {**stack.enter_context(served(source.name)), **ENDURING}
        if options.starts:
            variables |= {"STARTS_BY": source.name, "STARTS_AT": str(home), "STARTS_UP_TO": str(options.under_way)}
        airflow = stack.enter_context(Deployment(home, database=database, settings=settings, variables=variables))
        airflow.prepare()
        furnish(airflow, gaps=False)
        if options.starts:
            airflow.add_dags(tests / "dags" / "starts_under_chaos.py")
        if not source.is_there:
            bootstrap.fail(f"the server of {source.name} is not installed: {source.missing}")
        (home / "delivered").mkdir()
        source.prepare(home)
        airflow.start()
        for number in range(1, options.triggerers):
            airflow.start_one("triggerer", as_name=f"triggerer@{number}")
        airflow.wait_for_dags(*([STARTED] if options.starts else (dag_of(source, number) for number in range(7))))
        endured = endure(options, source, airflow, home, server if options.kill_database else None)
        if source.acknowledges_later:
            acknowledge_the_rest(options, source, airflow, home)
        return judge(options, source, *endured)


def dag_of(source, number: int) -> str:
    """Say which DAG the run of this number is of: mostly of the first path of the source."""
    from paths import PATHS, dag_id

    name = source.paths[{3: 1, 5: 2}.get(number % 7, 0) % len(source.paths)]
    return dag_id(source, next(path for path in PATHS if path.name == name), None)


def endure(options, source, airflow, home: Path, database):
    """
    Run it, and return the killer, the runs and when each event was delivered.

    :param database: the server of Airflow's, if it is to be killed.
    """
    targets = {**TARGETS, **({"broker": BROKERS} if source.servers else {})}
    if database is not None:
        targets["database"] = DATABASES
    drawn = random.Random(options.seed)
    killer = Killer(airflow, drawn, options.kills, options.every, targets, source.servers, database)
    began = time.time()
    # The kills are in this thread, since what it starts ends with it.
    publishing = threading.Thread(target=publish, args=(killer, options, source, airflow, home), daemon=True)
    publishing.start()
    states: Counter = Counter()
    cleared = 0
    told = 0.0
    while time.time() - began < options.timeout:
        killer.revive()
        delivered = count(home)
        killer.kill_if_due(delivered / options.events)
        time.sleep(0.2)
        if time.time() - told < 5:
            continue
        told = time.time()
        with contextlib.suppress(Exception):  # the API server may just have been killed
            states = count_states(airflow)
            cleared += clear_failed(airflow)
        print(
            f"{told - began:6.0f} s  delivered {delivered:5} of {options.events}, "
            f"kills {sum(killer.killed.values()):4} of {options.kills}, runs {dict(states)}",
            flush=True,
        )
        if states["success"] == options.events and killer.done:
            break
    else:
        tell_what_hangs(airflow)
    return killer, states, cleared, home, time.time() - began


def tell_what_hangs(airflow) -> None:
    """Say of each run that is not over how far its tasks are, and what their logs say last."""
    from deployment import Run

    for found in airflow.api("GET", "/dags/~/dagRuns?state=running&limit=5")["dag_runs"]:
        run = Run(airflow, found["dag_id"], found["dag_run_id"])
        for task_id, task in run.tasks().items():
            if task["state"] == "success":
                continue
            print(f"{run} {task_id}: {task['state']}, try {task['try_number']}, trigger {task['trigger']}")
            for line in run.logs(task_id).splitlines()[-12:]:
                print(f"    {line[:400]}")


def acknowledge_the_rest(options, source, airflow, home: Path) -> None:
    """Wait once more, so that what came to processes that were killed comes again, and is acknowledged."""
    from deployment import until

    if not options.starts:  # which goes on waiting
        insist(lambda: start(airflow, dag_of(source, 0), "the-rest", home))
    with contextlib.suppress(TimeoutError):
        until(lambda: len(set(source.committed(home))) >= count(home), "all is acknowledged", 180, 1)


def publish(killer: Killer, options, source, airflow, home: Path) -> None:
    """Start a run and send an event, again and again, as long as there are not too many for the kills."""
    for number in range(options.events):
        while number - count(home) >= options.under_way or killer.is_behind(number / options.events):
            time.sleep(0.2)
        if not options.starts:
            insist(lambda number=number: start(airflow, dag_of(source, number), f"run{number:05}", home))
        source.send(home, f"event{number:05}")


def count(home: Path) -> int:
    """Say how many events were delivered."""
    return len(list((home / "delivered").iterdir()))


def start(airflow, dag: str, name: str, home: Path) -> None:
    from source import conf

    try:
        airflow.run(dag, conf(home), run_id=name)
    except RuntimeError as error:
        if " 409 " not in str(error):  # it was started, and the answer was lost with the API server
            raise


def count_states(airflow) -> Counter:
    return Counter(
        {
            state: airflow.api("GET", f"/dags/~/dagRuns?state={state}&limit=1")["total_entries"]
            for state in ("queued", "running", "success", "failed")
        }
    )


def clear_failed(airflow) -> int:
    """
    Clear the runs that failed, as an operator would, and return how many there were.

    Airflow itself fails a task for good if its database refuses the report of an end or a deferral, as SQLite
    now and then does under load.
    """
    from deployment import Run

    failed = airflow.api("GET", "/dags/~/dagRuns?state=failed&limit=100")["dag_runs"]
    for run in failed:
        Run(airflow, run["dag_id"], run["dag_run_id"]).clear_failed()
    return len(failed)


def contents(home: Path) -> dict[str, object]:
    """Return each event as it was delivered."""
    files = (home / "delivered").iterdir()
    return {file.name.partition(" ")[2]: json.loads(file.read_text()) for file in files}


def in_the_inbox(options, source, airflow) -> dict[str, str]:
    """Return by run which event the inbox has committed for it, as the source names it."""
    from airflow.models.dagrun import DagRun
    from airflow_events.inbox.entries import Phase
    from airflow_events.inbox.models import EventTaken, EventWait
    from airflow_events.listeners.support import serde
    from sqlalchemy import create_engine, func, select

    engine = create_engine(airflow.environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"])
    with engine.connect() as connection:
        if options.starts:  # of which it knows the run, and the run the event
            taken = dict(connection.execute(select(EventTaken.wait, func.count()).group_by(EventTaken.wait)).all())
            runs = connection.execute(select(DagRun.run_id, DagRun.conf).where(DagRun.dag_id == STARTED)).all()
            found = {run: conf["event"] for run, conf in runs if taken.get(f"{STARTED}/{run}") == 1}
        else:
            rows = connection.execute(
                select(EventWait.run_id, EventWait.event).where(EventWait.phase == Phase.COMMITTED)
            )
            found = {run: serde.decode(event) for run, event in rows.all() if event is not None}
    engine.dispose()
    return {run: source.identity(event) for run, event in found.items()}


def judge(options, source, killer: Killer, states: Counter, cleared: int, home: Path, seconds: float) -> int:
    """Ask the source and the downstream tasks what became of each event, and print the table."""
    for server in source.servers:
        server.wait(300)
    delivered: dict[str, set[str]] = {}
    moments = []
    for file in (home / "delivered").iterdir():
        run, event = file.name.split(" ")
        delivered.setdefault(event, set()).add(run)
        moments.append(file.stat().st_mtime)
    committed = set(source.committed(home))
    recorded = in_the_inbox(options, source, killer.airflow)
    as_delivered = sum(event == recorded.get(run) for event, runs in delivered.items() for run in runs)
    books = source.books(home, contents(home)) if states["success"] == options.events else None
    twice = sum(len(runs) > 1 for runs in delivered.values())
    lost = options.events - len(delivered)
    recovery = max((min((m for m in moments if m > k), default=k) - k for k in killer.moments), default=0)
    rows = {
        "events published": options.events,
        "events delivered": len(delivered),
        "events lost": lost,
        "events delivered twice": twice,
        "delivered, and acknowledged at the source": len(committed & delivered.keys()),
        "committed in the inbox for the run that delivered": as_delivered,
        **(books.found if books else {}),
        "runs that Airflow failed, and that were cleared": cleared,
        "components that ended by themselves, and were started again": sum(killer.ended.values()),
        **{f"kills: {target}": killer.killed[target] for target in killer.targets},
        "kills": sum(killer.killed.values()),
        "longest time from a kill to the next delivery (s)": round(recovery, 1),
        "seconds in all": round(seconds),
    }
    many = f", {options.brokers} brokers" if options.brokers else ""
    many += ", starting runs" if options.starts else ""
    print(f"\n{source.name}{many}, seed {options.seed}, {options.database}, {options.triggerers} triggerer(s)")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    for problem in books.problems if books else ():
        print(f"the source's books: {problem}")
    good = (
        not lost and not twice and committed == delivered.keys() and states["success"] == options.events
        and as_delivered == options.events and books is not None and not books.problems
    )  # fmt: skip
    if good:
        print("every event was delivered once")
    elif not twice and committed == delivered.keys() and seconds > options.timeout:
        print(f"the {options.timeout:.0f} s were over before all was delivered; nothing was delivered twice")
    else:
        print("THE PROMISE IS BROKEN")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
