#!/usr/bin/env python3
"""
Messages that start runs: python3 benchmarks/kafka_starts.py [--messages 300] [--kills 0].

Each message of a topic is to start a run: by an asset that Airflow's own ``MessageQueueTrigger`` watches, and by
``start_on``. One Airflow has both, each a topic and a group of its own; one after the other gets as many messages
at once. Then Airflow's database says which runs there are, and which messages they have. Writes the table of
docs/events-that-start-runs.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("scripts", "tests/plugins", "tests/matrix", "tests/sources")]

from peers import OF_CONSUMER, PARTITIONS, PROVIDER, machine, make_topic, place  # noqa: E402

import bootstrap  # noqa: E402

PAGE = ROOT / "docs" / "events-that-start-runs.md"
# The DAG, which its topic, connection and group are named as; what it is; which messages each of its runs has.
CONTENDERS = {
    "asset_watcher": (
        f"an asset's watcher with `MessageQueueTrigger`, {PROVIDER} {{provider}}",
        """
        SELECT run.run_id, extract(epoch FROM run.created_at), event.extra -> 'payload'
        FROM dag_run AS run
        JOIN dagrun_asset_event AS has ON has.dag_run_id = run.id
        JOIN asset_event AS event ON event.id = has.event_id
        WHERE run.dag_id = 'asset_watcher'
        """,
    ),
    "start_on": (
        "`start_on(KafkaListener, …)`",
        """
        SELECT run_id, extract(epoch FROM created_at), conf -> 'event' -> 'value'
        FROM dag_run WHERE dag_id = 'start_on'
        """,
    ),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Messages that start runs, by Airflow's own watcher and by ours.")
    parser.add_argument("--messages", type=int, default=300, help="how many, at once (default: 300)")
    parser.add_argument("--kills", type=int, default=0, help="how often to kill the triggerer (default: 0)")
    parser.add_argument("--every", type=float, default=8, help="seconds between two kills (default: 8)")
    parser.add_argument(
        "--quiet", type=float, default=45,
        help="seconds without another run after which none is expected any more (default: 45)",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    options = arguments()
    bootstrap.run_inside("[test,benchmark]")
    from of_kafka import Kafka
    from proof import SETTINGS

    from deployment import Deployment
    from postgres import Postgres

    broker = Kafka.make()
    if broker is None:
        bootstrap.fail(Kafka.missing)
    home = Path(tempfile.mkdtemp(prefix="airflow-events-starts-"))
    with contextlib.ExitStack() as stack:
        stack.callback(broker.stop)
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        database = stack.enter_context(Postgres()).url
        connections = {
            "kafka_default": broker.connection(),
            "asset_watcher": broker.connection(extra={"group.id": "asset_watcher", **OF_CONSUMER}),
        }
        variables = {f"AIRFLOW_CONN_{key.upper()}": json.dumps(value) for key, value in connections.items()}
        airflow = stack.enter_context(Deployment(home, database=database, settings=SETTINGS, variables=variables))
        airflow.prepare()
        shutil.copy(ROOT / "benchmarks" / "plugins" / "take_message.py", airflow.plugins)
        airflow.add_dags(ROOT / "benchmarks" / "dags" / "kafka_starts.py")
        for name in CONTENDERS:
            make_topic(broker, name)
        airflow.start()
        airflow.wait_for_dags(*CONTENDERS)
        wait_for_triggers(database)
        rows = {name: measure(options, broker, airflow, name) for name in CONTENDERS}
    write(options, rows)


def asked(database: str, query: str) -> list[tuple]:
    import psycopg

    with psycopg.connect(database.replace("+psycopg2", "")) as connection:
        return connection.execute(query).fetchall()


def wait_for_triggers(database: str) -> None:
    from deployment import until

    taken = "SELECT count(*) FROM trigger WHERE triggerer_id IS NOT NULL"
    until(lambda: asked(database, taken)[0][0] == len(CONTENDERS), "the triggers run", 120, 0.5)
    time.sleep(10)  # until they poll


def measure(options, broker, airflow, name: str) -> dict[str, object]:
    """Send the messages, and wait until no more of them starts a run."""
    from confluent_kafka import Producer

    producer = Producer({**broker.bootstrap, "enable.idempotence": True})
    began = time.time()
    for number in range(options.messages):
        producer.produce(name, json.dumps(f"message{number:05}").encode(), partition=number % PARTITIONS)
    assert producer.flush(60) == 0
    before, moved, kills = 0, time.time(), 0
    while time.time() - moved < options.quiet:
        if kills < options.kills and time.time() - began > options.every * (kills + 1):
            airflow.components["triggerer"].kill()
            airflow.restart("triggerer")
            kills += 1
        found = asked(airflow.database, CONTENDERS[name][1])
        if len(found) != before or kills < options.kills:
            before, moved = len(found), time.time()
        if len({value for *_, value in found}) == options.messages and kills == options.kills:
            break
        time.sleep(0.2)
    times = Counter(value for *_, value in found)
    last = max((moment for _, moment, _ in found), default=began)
    seconds = float(last) - began
    print(f"{name}: {len(times)} of {options.messages} messages in {seconds:.1f} s", flush=True)
    return {
        "messages": options.messages,
        "triggerer killed": kills,
        "in a run": len(times),
        "in no run": options.messages - len(times),
        "in several": sum(number > 1 for number in times.values()),
        "runs": len({run for run, *_ in found}),
        "first message to last run": seconds,
        "messages a second": len(times) / max(seconds, 0.001),
    }


def write(options, rows: dict[str, dict[str, object]]) -> None:
    """Print the rows, and put them into the page in place of those that are there for as many kills."""
    lines = []
    for name, row in rows.items():
        title = CONTENDERS[name][0].format(provider=version(PROVIDER))
        cells = [f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    of_ours, of_others = (rows[name]["messages a second"] for name in ("start_on", "asset_watcher"))
    print("\n".join(lines), f"\nratio: {of_ours / of_others:.1f}", flush=True)
    before, old, after = place(PAGE, "starts")
    kept = [line for line in old if line.startswith("| ") and "`" in line]
    kept = [line for line in kept if line.split(" | ")[2] != str(options.kills)]
    table = [
        f"| | {' | '.join(rows['start_on'])} |",
        "|---" * (len(rows["start_on"]) + 1) + "|",
        *sorted([*kept, *lines], key=lambda line: int(line.split(" | ")[2])),
        "",
        f"Last run on {date.today().isoformat()}, Airflow {version('apache-airflow')}, PostgreSQL, {machine()}.",
    ]
    PAGE.write_text(before + "\n".join(table) + after)


if __name__ == "__main__":
    main()
