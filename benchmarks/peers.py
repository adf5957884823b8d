#!/usr/bin/env python3
"""
The same messages and kills for our wait and others': python3 benchmarks/peers.py [--only NAME] ...

For each message there is one run that waits for one: with the Kafka provider's ``AwaitMessageSensor`` or
``KafkaListener``, and with the Amazon provider's ``SqsSensor`` or ``SqsListener``. Each has an Airflow and a topic
or queue of its own, and the same seed decides what is killed with SIGKILL. All the while the source is asked what
is acknowledged, and then Airflow's database what it has; in the end it is counted what became of each message.
Writes a row for each to the page of its source.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("scripts", "tests/plugins", "tests/matrix", "tests/sources")]

import bootstrap  # noqa: E402
from chaos import Killer, clear_failed, count_states, insist  # noqa: E402

PROVIDER = "apache-airflow-providers-apache-kafka"
# What is killed, and how often by comparison.
TARGETS = {"triggerer": 2, "trigger runner": 2, "worker": 4, "scheduler": 1}
PARTITIONS = 6
# As the provider's documentation has it. Only the last is added: the broker, and so the group, learns within 6 s,
# and not 45 s, that a triggerer is dead.
OF_CONSUMER = {"enable.auto.commit": False, "auto.offset.reset": "beginning", "session.timeout.ms": 6000}
# Whatever of a message Airflow's database has.
KEPT = """
    SELECT value::text FROM xcom UNION ALL SELECT value::text FROM task_state_store
    UNION ALL SELECT next_kwargs::text FROM task_instance WHERE next_kwargs IS NOT NULL
    UNION ALL SELECT event FROM event_wait
"""


class Topic:
    """A topic of Kafka's, with a group of its name: what the group is beyond is acknowledged."""

    page = ROOT / "docs" / "sources" / "kafka.md"
    client = "confluent-kafka"
    broker_is = ("of_kafka", "Kafka")

    def __init__(self, broker, name: str) -> None:
        self.broker, self.name = broker, name
        self.connections = {
            "kafka_default": broker.connection(),
            name: broker.connection(extra={"group.id": name, **OF_CONSUMER}),
        }
        self.address = name
        self.asking = broker.consumer(name)  # no member of the group
        self.sent: dict[str, tuple[int, int]] = {}  # partition and offset of each message

    def make(self) -> None:
        make_topic(self.broker, self.name)

    def send(self, number: int) -> None:
        from confluent_kafka import Producer

        value = message(number)

        def note(error, message) -> None:
            assert error is None, error
            self.sent[value] = (message.partition(), message.offset())

        producer = Producer({**self.broker.bootstrap, "enable.idempotence": True, "linger.ms": 0})
        producer.produce(self.name, json.dumps(value).encode(), partition=number % PARTITIONS, on_delivery=note)
        assert producer.flush(60) == 0

    def acknowledged(self) -> set[str]:
        from confluent_kafka import TopicPartition

        partitions = [TopicPartition(self.name, number) for number in range(PARTITIONS)]
        found = insist(lambda: self.asking.committed(partitions, timeout=30))
        offsets = {each.partition: each.offset for each in found}
        return {value for value, (number, offset) in self.sent.copy().items() if offset < offsets[number]}


class Queue:
    """A queue of SQS: what is deleted is acknowledged."""

    page = ROOT / "docs" / "sources" / "sqs.md"
    client = "moto"
    broker_is = ("of_sqs", "Sqs")

    def __init__(self, broker, name: str) -> None:
        self.broker, self.name, self.address = broker, name, ""
        self.connections = {"aws_default": broker.connection()}
        self.sent: set[str] = set()

    def make(self) -> None:
        self.broker.queue = self.name
        self.broker.client.create_queue(QueueName=self.name)
        self.address = self.broker.url

    def send(self, number: int) -> None:
        self.broker.send(message(number))
        self.sent.add(message(number))

    def acknowledged(self) -> set[str]:
        return {json.loads(body) for body in self.broker.deleted()}


def message(number: int) -> str:
    return f"message{number:05}"


# The DAG, which its topic or queue is named as; its source, and what it is, of which package.
CONTENDERS = {
    "await_message": (Topic, "`AwaitMessageSensor`", PROVIDER),
    "kafka_listener": (Topic, "`KafkaListener`", ""),
    "sqs_sensor": (Queue, "`SqsSensor`, deferrable,", "apache-airflow-providers-amazon"),
    "sqs_listener": (Queue, "`SqsListener`", ""),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The same messages and kills for our wait and others'.")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="only these")
    parser.add_argument("--events", type=int, default=60, help="how many messages, and runs (default: 60)")
    parser.add_argument("--kills", type=int, default=12, help="how many processes to kill (default: 12)")
    parser.add_argument("--every", type=float, default=4, help="mean seconds between two kills (default: 4)")
    parser.add_argument("--seed", type=int, default=1, help="decides what is killed (default: 1)")
    parser.add_argument(
        "--under-way", type=int, default=PARTITIONS,
        help="how many runs at a time (default: as many as there are partitions, so that each can have one)",
    )  # fmt: skip
    parser.add_argument("--triggerers", type=int, default=2, help="how many triggerers (default: 2)")
    parser.add_argument(
        "--quiet", type=float, default=60,
        help="seconds in which nothing happens, after which nothing is expected any more (default: 60)",
    )  # fmt: skip
    parser.add_argument("--timeout", type=float, default=540, help="seconds for each (default: 540)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    bootstrap.run_inside("[test,benchmark]")
    for name in options.only:
        kind, *_ = CONTENDERS[name]
        module, made = kind.broker_is
        broker = getattr(importlib.import_module(module), made).make()
        if broker is None:
            bootstrap.fail(f"the server of {made} is not installed")
        try:
            write(name, measure(options, kind(broker, name)))
        finally:
            broker.stop()


def measure(options, source: Topic | Queue) -> dict[str, object]:
    """Let the messages be taken by one of them, in an Airflow of its own."""
    from proof import SETTINGS

    from deployment import Deployment
    from postgres import Postgres

    home = Path(tempfile.mkdtemp(prefix="airflow-events-peers-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        database = stack.enter_context(Postgres()).url
        variables = {f"AIRFLOW_CONN_{key.upper()}": json.dumps(value) for key, value in source.connections.items()}
        settings = {**SETTINGS, "core.parallelism": "8"}
        airflow = stack.enter_context(Deployment(home, database=database, settings=settings, variables=variables))
        airflow.prepare()
        shutil.copy(ROOT / "benchmarks" / "plugins" / "take_message.py", airflow.plugins)
        airflow.add_dags(ROOT / "benchmarks" / "dags" / "peers.py")
        (home / "delivered").mkdir()
        source.make()
        airflow.start()
        for number in range(1, options.triggerers):
            airflow.start_one("triggerer", as_name=f"triggerer@{number}")
        airflow.wait_for_dags(source.name)
        return Course(options, source, airflow).run()


def make_topic(broker, name: str) -> None:
    from confluent_kafka.admin import AdminClient, NewTopic

    admin = AdminClient(broker.bootstrap)  # what it was asked ends with it
    admin.create_topics([NewTopic(name, PARTITIONS)])[name].result(60)


class Course:
    """One of them, from the first message to the last."""

    def __init__(self, options, source: Topic | Queue, airflow) -> None:
        import psycopg

        self.options = options
        self.source = source
        self.airflow = airflow
        self.name = source.name
        self.killer = Killer(airflow, random.Random(options.seed), options.kills, options.every, TARGETS)
        self.database = psycopg.connect(airflow.database.replace("+psycopg2", ""), autocommit=True)
        self.bare: set[str] = set()  # what was acknowledged at a moment when Airflow had it nowhere
        self.is_over = False

    def run(self) -> dict[str, object]:
        began = told = moved = time.time()
        threading.Thread(target=self.send, daemon=True).start()
        before, states = (0, 0), Counter()
        while time.time() - began < self.options.timeout:
            self.killer.revive()
            now = self.look(), len(self.deliveries())
            self.killer.kill_if_due(max(now) / self.options.events)
            if now != before or not self.killer.done or len(self.source.sent) < self.options.events:
                before, moved = now, time.time()
            if time.time() - moved > self.options.quiet:
                break
            time.sleep(0.1)
            if time.time() - told < 5:
                continue
            told = time.time()
            with contextlib.suppress(Exception):  # the API server may be busy
                states = count_states(self.airflow)
                clear_failed(self.airflow)
            print(
                f"{self.name}: {told - began:4.0f} s  acknowledged {now[0]:3}, deliveries {now[1]:3} of "
                f"{self.options.events}, kills {sum(self.killer.killed.values()):2}, runs {dict(states)}",
                flush=True,
            )
            if states["success"] == self.options.events and self.killer.done:
                break
        self.is_over = True
        return self.judge(time.time() - began)

    def send(self) -> None:
        """Start a run and send a message, again and again, as long as not too many are under way."""
        for number in range(self.options.events):
            while self.is_early(number):
                if self.is_over:
                    return
                time.sleep(0.2)
            insist(lambda number=number: self.start(f"run{number:05}"))
            self.source.send(number)

    def is_early(self, number: int) -> bool:
        gone = max(len(self.source.acknowledged()), len(self.deliveries()))
        return number - gone >= self.options.under_way or self.killer.is_behind(number / self.options.events)

    def start(self, run_id: str) -> None:
        try:
            conf = {"base": str(self.airflow.home / "delivered"), "queue": self.source.address}
            self.airflow.run(self.name, conf, run_id=run_id)
        except RuntimeError as error:
            if " 409 " not in str(error):  # it was started, and the answer was lost
                raise

    def deliveries(self) -> list[list[str]]:
        """Return each message that was delivered, and the run that has it."""
        return [file.name.split(" ") for file in (self.airflow.home / "delivered").iterdir()]

    def held(self) -> set[str]:
        """Return the messages that Airflow's database has."""
        texts = "\n".join(row[0] for row in self.database.execute(KEPT) if row[0])
        return {value for value in self.source.sent.copy() if value in texts}

    def look(self) -> int:
        """Say how many are acknowledged, and note which Airflow does not have: the source is asked first."""
        acknowledged = self.source.acknowledged()
        self.bare |= acknowledged - self.held()
        return len(acknowledged)

    def judge(self, seconds: float) -> dict[str, object]:
        from deployment import Run

        delivered = Counter(value for value, _ in self.deliveries())
        sent = len(self.source.sent)
        lost = self.source.acknowledged() - delivered.keys() - self.held()
        runs = [Run(self.airflow, self.name, f"run{number:05}") for number in range(sent)]
        workers = [run.worker_starts("wait") for run in runs]
        killed = self.killer.killed
        return {
            "messages": sent,
            "kills": f"{sum(killed.values())} ({', '.join(f'{killed[each]} {each}' for each in TARGETS)})",
            "delivered": len(delivered),
            "lost": len(lost),
            "delivered twice or more": sum(times > 1 for times in delivered.values()),
            "neither, in the end": sent - len(delivered) - len(lost),
            "seen acknowledged while Airflow had it nowhere": len(self.bare),
            "worker processes for a wait": f"{sum(workers) / max(len(workers), 1):.1f}",
            "seconds": f"{seconds:.0f}" + (" (the time was up)" if seconds > self.options.timeout else ""),
        }


def write(name: str, row: dict[str, object]) -> None:
    """Print the row, and put it into the page, in place of the one that is there."""
    source, title, package = CONTENDERS[name]
    of = f" of {package} {version(package)}" if package else ""
    line = f"| {title}{of} | {' | '.join(map(str, row.values()))} |"
    print(f"\n| | {' | '.join(row)} |\n{line}\n", flush=True)
    before, old, after = place(source.page, "peers")
    starts = {key: f"| {title} " for key, (_, title, _) in CONTENDERS.items()}
    rows = {key: each for each in old for key, start in starts.items() if each.startswith(start)}
    rows[name] = line
    table = [
        f"| | {' | '.join(row)} |",
        "|---" * (len(row) + 1) + "|",
        *(rows[key] for key in CONTENDERS if key in rows),
        "",
        f"Last run on {date.today().isoformat()}, Airflow {version('apache-airflow')}, {source.client} "
        f"{version(source.client)}, {machine()}.",
    ]
    source.page.write_text(before + "\n".join(table) + after)


def place(page: Path, name: str) -> tuple[str, list[str], str]:
    """Return what stands before the table of that name in a page, its lines, and what stands after it."""
    before, begin, rest = page.read_text().partition(f"<!-- {name} -->\n")
    old, end, after = rest.partition(f"<!-- /{name} -->")
    assert begin and end, f"{page} has no place for the table"
    return f"{before}{begin}", old.splitlines(), f"\n{end}{after}"


def machine() -> str:
    """Say where it was run."""
    kernel = platform.release().split("-")[0]
    return f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}, Linux {kernel}"


if __name__ == "__main__":
    main()
