#!/usr/bin/env python3
"""
The API server is unreachable: python3 scripts/outage.py [--minutes 10] [--waits 5] [--sources redis ...].

Starts an Airflow of its own and the servers of the sources, with waits at each of them; kills the API server with
SIGKILL, sends each wait a message, and starts the API server again after so many minutes, for which the messages
are received and cannot be recorded. Where a server gives up what was delivered a few times, it does after two. In
the end each message must have been delivered by one run and acknowledged, and none be a dead letter, as the
source's server says, which a client of its own asks.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

import bootstrap

# Seconds in which the messages come to the triggerer once they are sent.
COME = 15.0
# Seconds in which all has to end once the API server is there again.
PATIENCE = 300.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Messages that come while the API server is unreachable.")
    parser.add_argument("--minutes", type=float, default=10, help="for how long (default: 10)")
    parser.add_argument("--waits", type=int, default=5, help="how many at each source (default: 5)")
    parser.add_argument("--sources", nargs="+", metavar="SOURCE", default=[], help="only these (default: all)")
    parser.add_argument("--database", choices=("postgres", "mysql"), default="postgres")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    bootstrap.run_inside("[test]")
    tests = bootstrap.ROOT / "tests"
    sys.path[:0] = [str(tests / folder) for folder in ("plugins", "matrix", "sources")]
    from brokers import BROKERS
    from proof import SETTINGS, furnish, served

    from databases import missing, serve
    from deployment import Deployment, until

    if unknown := set(options.sources) - {source.name for source in BROKERS}:
        known = ", ".join(source.name for source in BROKERS)
        bootstrap.fail(f"there is no source {', '.join(map(repr, unknown))}; there are {known}")
    if problem := missing(options.database):
        bootstrap.fail(problem)
    sources = [source for source in BROKERS if not options.sources or source.name in options.sources]
    for source in sources:
        source.few_deliveries = True
    home = Path(tempfile.mkdtemp(prefix="airflow-events-outage-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        database = stack.enter_context(serve(options.database))
        variables = stack.enter_context(served(*(source.name for source in sources)))
        airflow = stack.enter_context(
            Deployment(home, database=database.url, settings=SETTINGS, variables=variables)
        )
        airflow.prepare()
        furnish(airflow, gaps=False)
        bases = {source: home / source.name for source in sources if source.is_there}
        for source, base in bases.items():
            (base / "delivered").mkdir(parents=True)
            source.prepare(base)
        airflow.start()
        runs = begin(options, airflow, bases)
        strike(options, airflow, bases, runs)
        with contextlib.suppress(TimeoutError):
            until(lambda: all(run.state in ("success", "failed") for run in runs), "all ends", PATIENCE, 1)
        with contextlib.suppress(TimeoutError):  # a source is told after the task has ended, or some while later
            until(lambda: all(is_told(source, base) for source, base in bases.items()), "all is told", 60, 1)
        return judge(options, bases, runs)


def begin(options, airflow, bases) -> list:
    """Start the runs, and return them when all of them wait."""
    from source import conf

    from chaos import dag_of
    from deployment import until

    dags = {source: dag_of(source, 0) for source in bases}
    airflow.wait_for_dags(*dags.values())
    runs = [
        airflow.run(dags[source], conf(base), run_id=f"{source.name}-{number}")
        for source, base in bases.items()
        for number in range(options.waits)
    ]
    until(lambda: all(run.tasks()["wait"]["state"] == "deferred" for run in runs), "all wait", 180, 1)
    time.sleep(COME)
    return runs


def strike(options, airflow, bases, runs) -> None:
    """Send the messages while the API server is dead, and return when it answers again."""
    from deployment import until

    airflow.components["api-server"].kill()
    assert not airflow.components["api-server"].alive
    for source, base in bases.items():
        source.send(base, *(f"event{number}" for number in range(options.waits)))
    time.sleep(COME)
    for source in bases:
        log = "\n".join(run.logs("wait") for run in runs if run.run_id.startswith(f"{source.name}-"))
        print(
            f"{source.name}: waits say {log.count('cannot be reached')} times that the API server is unreachable"
        )
    rest = options.minutes * 60 - COME
    print(f"the API server stays dead for {max(rest, 0):.0f} s more", flush=True)
    time.sleep(max(rest, 0))
    airflow.restart("api-server")
    until(airflow.answers, "the API server answers")


def is_told(source, base: Path) -> bool:
    return len(source.committed(base)) == len(list((base / "delivered").iterdir()))


def judge(options, bases, runs) -> int:
    """Ask each source what became of its messages, and print the table."""
    print(f"\n{options.minutes:g} minutes without an API server, {options.waits} waits at each source")
    print("| source | delivered | twice | acknowledged at the source | dead letters | runs that failed |")
    print("|---|---|---|---|---|---|")
    good = True
    for source, base in bases.items():
        names = [file.name.partition(" ")[2] for file in (base / "delivered").iterdir()]
        failed = sum(run.state != "success" for run in runs if run.run_id.startswith(f"{source.name}-"))
        committed, dead = len(source.committed(base)), source.dead_letters(base)
        twice = len(names) - len(set(names))
        print(f"| {source.name} | {len(set(names))} | {twice} | {committed} | {dead} | {failed} |")
        found = (len(set(names)), twice, committed, dead, failed)
        good = good and found == (options.waits, 0, options.waits, 0, 0)
    print("every message was delivered once" if good else "THE PROMISE IS BROKEN")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
