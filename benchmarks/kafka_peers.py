#!/usr/bin/env python3
"""
The same messages and kills for two ways to wait: python3 benchmarks/kafka_peers.py [--events 100] [--kills 20] ...

One run for each message: first with the Kafka provider's AwaitMessageSensor, in one consumer group and with the
connection that its documentation shows, then with KafkaListener. Each has an Airflow of its own, whose triggerers
and workers are killed with SIGKILL by the same seed as the messages are taken. In the end it counts what became of
each message.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("scripts", "tests/plugins", "tests/matrix", "tests/sources")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]

import bootstrap  # noqa: E402
from chaos import Killer, clear_failed, count_states, insist  # noqa: E402

# What is killed, and how often by comparison.
TARGETS = {"triggerer": 1, "worker": 1}
PARTITIONS = 6
PROVIDER = "apache-airflow-providers-apache-kafka"
# The DAG is named as its topic and connection are; its consumer group.
GROUPS = {"await_message_sensor": "awaiting_message", "kafka_listener": "etl"}
TITLES = {"await_message_sensor": "`AwaitMessageSensor`", "kafka_listener": "`KafkaListener`"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The same messages and kills for two ways to wait.")
    parser.add_argument("--events", type=int, default=100, help="how many messages, and runs (default: 100)")
    parser.add_argument("--kills", type=int, default=20, help="how many processes to kill (default: 20)")
    parser.add_argument("--every", type=float, default=3, help="mean seconds between two kills (default: 3)")
    parser.add_argument("--seed", type=int, default=1, help="replays the same kills (default: 1)")
    parser.add_argument("--under-way", type=int, default=12, help="how many runs at a time (default: 12)")
    parser.add_argument("--triggerers", type=int, default=2, help="how many triggerers (default: 2)")
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="postgres")
    parser.add_argument(
        "--quiet", type=float, default=90,
        help="seconds without a delivery after which a message that was taken is lost (default: 90)",
    )  # fmt: skip
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for each (default: 1800)")
    parser.add_argument("--only", choices=GROUPS, help="only one of the two")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    bootstrap.run_inside("[test,benchmark]")
    from of_kafka import Kafka

    broker = Kafka.make()
    if broker is None:
        bootstrap.fail(Kafka.missing)
    try:
        found = {name: measure(options, broker, name) for name in GROUPS if options.only in (None, name)}
    finally:
        broker.stop()
    report(options, found)


def measure(options, broker, name: str) -> dict[str, object]:
    """Let the messages be taken by one of the two, in an Airflow of its own."""
    from proof import SETTINGS

    from deployment import Deployment
    from postgres import Postgres

    home = Path(tempfile.mkdtemp(prefix="airflow-events-peers-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        database = stack.enter_context(Postgres()).url if options.database == "postgres" else None
        connections = {
            # As the provider's documentation has it; only the last is for the broker to see sooner that a
            # triggerer is dead, which makes the measurement shorter.
            "await_message_sensor": broker.connection(
                extra={
                    "group.id": GROUPS["await_message_sensor"],
                    "enable.auto.commit": False,
                    "auto.offset.reset": "beginning",
                    "session.timeout.ms": 6000,
                }
            ),
            "kafka_default": broker.connection(),
        }
        variables = {f"AIRFLOW_CONN_{key.upper()}": json.dumps(value) for key, value in connections.items()}
        settings = {**SETTINGS, "core.parallelism": "8"}
        airflow = stack.enter_context(Deployment(home, database=database, settings=settings, variables=variables))
        airflow.prepare()
        for plugin in (ROOT / "benchmarks" / "plugins").glob("*.py"):
            shutil.copy(plugin, airflow.plugins)
        airflow.add_dags(ROOT / "benchmarks" / "dags" / "kafka_peers.py")
        (home / "delivered").mkdir()
        make_topic(broker, name)
        airflow.start()
        for number in range(1, options.triggerers):
            airflow.start_one("triggerer", as_name=f"triggerer@{number}")
        airflow.wait_for_dags(name)
        return Course(options, broker, airflow, name).run()


def make_topic(broker, name: str) -> None:
    from confluent_kafka.admin import AdminClient, NewTopic

    broker.queue = name
    admin = AdminClient(broker.bootstrap)
    [made] = admin.create_topics([NewTopic(name, PARTITIONS)]).values()
    made.result(60)


class Course:
    """One of the two, from the first message to the last."""

    def __init__(self, options, broker, airflow, name: str) -> None:
        self.options = options
        self.broker = broker
        self.airflow = airflow
        self.name = name
        self.killer = Killer(airflow, random.Random(options.seed), options.kills, options.every, TARGETS)
        self.sent: dict[str, tuple[int, int]] = {}  # partition and offset of each message
        self.asking = broker.consumer(GROUPS[name])  # no member of the group

    def run(self) -> dict[str, object]:
        began = told = moved = time.time()
        threading.Thread(target=self.send, daemon=True).start()
        before, cleared, states = 0, 0, Counter()
        while time.time() - began < self.options.timeout:
            self.killer.revive()
            taken, delivered = len(insist(self.taken)), len(self.delivered())
            self.killer.kill_if_due(taken / self.options.events)
            if delivered > before or not self.killer.done or taken < self.options.events:
                before, moved = delivered, time.time()
            time.sleep(0.3)
            if time.time() - told < 5:
                continue
            told = time.time()
            with contextlib.suppress(Exception):  # it may be busy
                states = count_states(self.airflow)
                cleared += clear_failed(self.airflow)
            print(
                f"{self.name}: {told - began:6.0f} s  taken {taken:4}, delivered {delivered:4} of "
                f"{self.options.events}, kills {sum(self.killer.killed.values()):3}, runs {dict(states)}",
                flush=True,
            )
            if states["success"] == self.options.events and self.killer.done:
                break
            is_over = self.killer.done and taken == self.options.events
            if is_over and time.time() - moved > self.options.quiet:
                break
        return self.judge(cleared, time.time() - began)

    def send(self) -> None:
        """Start a run and send a message, again and again, as long as not too many are under way."""
        for number in range(self.options.events):
            while insist(lambda number=number: self.is_early(number)):
                time.sleep(0.3)
            insist(lambda number=number: self.start(f"run{number:05}"))
            self.produce(f"message{number:05}")

    def is_early(self, number: int) -> bool:
        gone = max(len(self.taken()), len(self.delivered()))
        return number - gone >= self.options.under_way or self.killer.is_behind(number / self.options.events)

    def start(self, run_id: str) -> None:
        try:
            self.airflow.run(self.name, {"base": str(self.airflow.home / "delivered")}, run_id=run_id)
        except RuntimeError as error:
            if " 409 " not in str(error):  # it was started, and the answer was lost
                raise

    def produce(self, value: str) -> None:
        from confluent_kafka import Producer

        def note(error, message) -> None:
            assert error is None, error
            self.sent[value] = (message.partition(), message.offset())

        producer = Producer({**self.broker.bootstrap, "enable.idempotence": True, "linger.ms": 0})
        producer.produce(self.name, json.dumps(value).encode(), on_delivery=note)
        assert producer.flush(60) == 0

    def delivered(self) -> dict[str, set[str]]:
        """Return the runs to which each message was delivered."""
        found: dict[str, set[str]] = {}
        for file in (self.airflow.home / "delivered").iterdir():
            value, run = file.name.split(" ")
            found.setdefault(value, set()).add(run)
        return found

    def taken(self) -> set[str]:
        """Return the messages that the group has committed."""
        from confluent_kafka import TopicPartition

        partitions = [TopicPartition(self.name, number) for number in range(PARTITIONS)]
        offsets = {each.partition: each.offset for each in self.asking.committed(partitions, timeout=30)}
        return {value for value, (number, offset) in self.sent.copy().items() if offset < offsets[number]}

    def judge(self, cleared: int, seconds: float) -> dict[str, object]:
        from deployment import Run

        delivered, taken = self.delivered(), insist(self.taken)
        runs = [Run(self.airflow, self.name, f"run{number:05}") for number in range(len(self.sent))]
        workers = [run.worker_starts("wait") for run in runs]
        return {
            "messages, and runs that wait for one": len(self.sent),
            **{f"kills: {target}": self.killer.killed[target] for target in TARGETS},
            "delivered": len(delivered),
            "**lost**: committed, and no run got it": len(taken - delivered.keys()),
            "**delivered twice**": sum(len(runs) > 1 for runs in delivered.values()),
            "neither taken nor delivered in the end": len(self.sent.keys() - taken - delivered.keys()),
            "runs that got a message": len({run for runs in delivered.values() for run in runs}),
            "runs that failed, and were cleared": cleared,
            "worker processes for a wait, on average": f"{sum(workers) / max(len(workers), 1):.1f}",
            "worker processes for a wait, at most": max(workers, default=0),
            "seconds in all": round(seconds),
        }


def report(options, found: dict[str, dict[str, object]]) -> None:
    print(f"\n{PROVIDER} {version(PROVIDER)}, seed {options.seed}, {options.database}")
    print("| |", " | ".join(TITLES[name] for name in found), "|")
    print("|---" * (len(found) + 1) + "|")
    for row in next(iter(found.values())):
        print(f"| {row} | {' | '.join(str(rows[row]) for rows in found.values())} |")


if __name__ == "__main__":
    main()
