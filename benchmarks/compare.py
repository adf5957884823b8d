#!/usr/bin/env python3
"""
What a wait costs, ours and others': python3 benchmarks/compare.py [--only latency memory ...] [--waits N ...].

Starts a real Airflow on PostgreSQL, runs in it by turns what is compared, and writes what was measured to
docs/benchmarks.json. From that file, and from nothing else, it makes the tables of docs/benchmarks.md and
docs/sizing.md and the plots in docs/images; ``--draw`` makes them again without measuring.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "sources"), str(BENCHMARKS)]

from parts import (  # noqa: E402
    Stage,
    at_once,
    connections,
    database,
    imports,
    large,
    load,
    messages,
    mixed,
    one,
    pages,
    processes,
    ray_workflow,
    steady,
    timers,
    triggerers,
)

import bootstrap  # noqa: E402

PARTS = {
    **one.PARTS,
    **timers.PARTS,
    **large.PARTS,
    **ray_workflow.PARTS,
    **connections.PARTS,
    **at_once.PARTS,
    **messages.PARTS,
    **mixed.PARTS,
    **steady.PARTS,
    **triggerers.PARTS,
    **load.PARTS,
    **imports.PARTS,
    **database.PARTS,
}
# Of connections to Kafka, as the provider's documentation has them. Only the last is added: the broker learns
# within 6 s, and not 45 s, that a triggerer of the round before is gone.
KAFKA = {"enable.auto.commit": False, "auto.offset.reset": "beginning", "session.timeout.ms": 6000}
SETTINGS = {
    "triggerer.capacity": "100000",
    # As it comes: what stands still for longer than a third of it polls again.
    "triggerer.triggerer_health_check_threshold": "30",
    "core.parallelism": "16",
    # As it comes, so that latencies are what a user sees.
    "scheduler.scheduler_heartbeat_sec": "5",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a wait costs, ours and others'.")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="only these tables")
    parser.add_argument("--repeat", type=int, default=5, help="rounds of one event at a time (default: 5)")
    parser.add_argument("--at-once", type=int, default=8, help="waits in each of its rounds (default: 8)")
    parser.add_argument(
        "--waits", type=tens, nargs="+", default=[1000],
        help="open waits, where many are; memory takes each of these, other parts the most (default: 1000)",
    )  # fmt: skip
    parser.add_argument(
        "--copies", type=int, default=0,
        help="waits of the part mixed that are copies in Airflow's tables, besides those that begin (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--rate", type=int, default=50, help="messages a second, where they are steady (default: 50)"
    )
    parser.add_argument("--minutes", type=int, default=5, help="for how long they are (default: 5)")
    parser.add_argument("--in-one-dag", type=int, default=300, help="waits in DAGs of 300 tasks (default: 300)")
    parser.add_argument(
        "--spread", type=float, default=24, help="seconds over which their events are spread (default: 24)"
    )
    parser.add_argument(
        "--others", type=int, nargs="+", default=[0, 10_000, 100_000, 1_000_000],
        help="waits of other triggerers that are in the database while its queries are counted",
    )  # fmt: skip
    parser.add_argument(
        "--look", type=float, default=30, help="seconds that are looked at what idles (default: 30)"
    )
    parser.add_argument("--settle", type=float, default=10, help="seconds until all is at rest (default: 10)")
    parser.add_argument("--note", default="", help="to say of the run besides: 'other work on the machine'")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    return parser.parse_args()


def tens(text: str) -> int:
    """Read a number of waits, of which ten are in a DAG."""
    if not text.isdigit() or not int(text) or int(text) % 10:
        raise argparse.ArgumentTypeError(f"{text!r} is no multiple of ten")
    return int(text)


def main() -> None:
    options = arguments()
    # In their own order: what counts the database's queries leaves it full.
    options.only = [name for name in PARTS if name in options.only]
    bootstrap.run_inside("[test,benchmark]")
    from parts import plots

    failed = []
    if not options.draw:
        # One open log file a wait.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        processes.settled = options.settle
        with airflow_for(options) as stage:
            for name in options.only:
                try:
                    rows = PARTS[name].measure(stage)
                except Exception:
                    traceback.print_exc()
                    failed.append(name)
                    continue
                pages.keep(name, rows, options.note)
                print(f"\n{PARTS[name].table(rows)}\n", flush=True)
    for page, text in pages.made(PARTS).items():
        page.write_text(text)
    print("Drawn:", *plots.draw(pages.kept()))
    if failed:
        bootstrap.fail(f"not measured, for the reasons above: {', '.join(failed)}")


@contextlib.contextmanager
def airflow_for(options: argparse.Namespace) -> Iterator[Stage]:
    """Start what the parts need, and end it."""
    from deployment import Deployment
    from postgres import Postgres

    home = Path(tempfile.mkdtemp(prefix="airflow-events-compare-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        postgres = stack.enter_context(Postgres())
        # Of Airflow's sensor for files.
        brokers, connections = {}, {"AIRFLOW_CONN_FS_DEFAULT": json.dumps({"conn_type": "fs"})}
        for module, name in sorted({broker for part in options.only for broker in PARTS[part].brokers}):
            kind = getattr(importlib.import_module(module), name)
            brokers[name] = broker = kind.make()
            if broker is None:
                bootstrap.fail(f"{kind.name} is not there: {kind.missing}")
            stack.callback(broker.stop)
            source = {"amqp": "rabbitmq"}.get(kind.connection_type, kind.connection_type)
            connections[f"AIRFLOW_CONN_{source.upper()}_DEFAULT"] = json.dumps(broker.connection())
            if name == "Kafka":
                in_tens = range(processes.tenth(max(options.waits)) // 10)
                for group in (*range(options.at_once), *(f"{run}{wait}" for run in in_tens for wait in range(10))):
                    peer = broker.connection(extra={**KAFKA, "group.id": f"peer{group}"})
                    connections[f"AIRFLOW_CONN_KAFKA_{group}"] = json.dumps(peer)
        airflow = Deployment(home, database=postgres.url, settings=SETTINGS, variables=connections)
        stack.enter_context(airflow)
        airflow.prepare()
        for plugin in ("appears", "floor", "probe", "contenders", "take_message", "message_queue"):
            shutil.copy(BENCHMARKS / "plugins" / f"{plugin}.py", airflow.plugins)
        airflow.add_dags(*(BENCHMARKS / "dags" / f"{name}.py" for name in ("compare", "brokers")))
        airflow.start()
        airflow.wait_for_dags(*{dag for part in options.only for dag in PARTS[part].dags})
        yield Stage(airflow, postgres, brokers, options)


if __name__ == "__main__":
    main()
