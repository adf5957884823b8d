"""One event at a time: how long it takes until its wait has succeeded, and until the next task runs."""

from __future__ import annotations

import random
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from parts import Part, Rows, Stage, timers
from parts.processes import fresh_triggerer, until_open
from parts.queues import KAFKA, NATS, POSTGRES, RABBITMQ, REDIS, SQS, fresh_queue, order_of, send_at_once
from parts.timers import since, spread

# What is for one kind of event stands together, ours first.
NAMES = {
    "ours": "a timer, ours: `TimerListener`",
    "peer_in_triggerer": f"a timer, {timers.NAMES['peer_in_triggerer']}",
    "peer": "a timer, `DateTimeSensorAsync`",
    "file_ours": "a file, ours: `DirectoryListener(settle=0)`",
    "file_peer": "a file, `FileSensor(deferrable=True, poke_interval=1)`",
    "kafka_ours": "Kafka, ours: `KafkaListener`",
    "kafka_watch": "Kafka, ours: `KafkaWatchListener`",
    "kafka_peer_1s": "Kafka, `AwaitMessageSensor(poll_interval=1)`",
    "sqs_ours": "SQS, emulator, ours: `SqsListener`",
    "sqs_peer_1s": "SQS, emulator, `SqsSensor(deferrable=True, poke_interval=1)`",
    "redis_ours": "Valkey, ours: `RedisListener`",
    "postgres_ours": "PostgreSQL, ours: `PostgresListener`",
    "nats_ours": "NATS, ours: `NatsListener`",
    "rabbitmq_ours": "RabbitMQ, quorum queue, ours: `RabbitMQListener`",
}
# Seconds from when the waits are asked for until their first event.
AHEAD = 12


@dataclass
class Event:
    """
    The event of one wait.

    :param conf: of the run that waits for it.
    :param happens: makes it happen, in the moment that is given; told the run.
    """

    conf: dict[str, str]
    happens: Callable[[Any], Any]


def one(stage: Stage) -> Rows:
    """From the moment of each event, with seconds between two of them and a wait for each that is open before."""
    found: Rows = [{"name": name, "success": [], "running": [], "workers": []} for name in NAMES]
    timers.due_at_once(stage.airflow, "ours", 1, "warm-up")
    for turn in range(stage.options.repeat):
        triggerer = fresh_triggerer(stage.airflow)
        for row in found:
            for key, values in _happen(stage, triggerer, row["name"], turn).items():
                row[key] += values
            print(row["name"], row["success"], flush=True)
    return [{**row, "rounds": stage.options.repeat, "spread": stage.options.spread} for row in found]


def _happen(stage: Stage, triggerer: tuple[Any, Any], name: str, turn: int) -> dict[str, list[float]]:
    airflow, count = stage.airflow, stage.options.at_once
    # How long it takes depends on when an event comes, seen from who asks every so many seconds.
    draw = random.Random(turn)
    begin = datetime.now(timezone.utc) + timedelta(seconds=AHEAD)
    moments = [
        begin + timedelta(seconds=(number + draw.random()) * stage.options.spread / count)
        for number in range(count)
    ]
    events = [_event(stage, name, moment) for moment in moments]
    label = f"{name}-{turn}-{time.time():.0f}"
    runs = [
        airflow.run(f"{name}_1", {**event.conf, "number": f"{number}"}, run_id=f"{label}-{number}")
        for number, event in enumerate(events)
    ]
    until_open(airflow, triggerer, count)
    assert datetime.now(timezone.utc) < begin, f"{name}: the first event is due before all wait"
    for event, run, moment in zip(events, runs, moments, strict=True):
        time.sleep(max((moment - datetime.now(timezone.utc)).total_seconds(), 0))
        event.happens(run)
    found: dict[str, list[float]] = {"success": [], "running": [], "workers": []}
    for run, moment in zip(runs, moments, strict=True):
        assert run.finished(timeout=240) == "success", run
        tasks = run.tasks()
        found["success"].append(since(moment, tasks["wait"]["end_date"]))
        found["running"].append(since(moment, tasks["downstream"]["start_date"]))
        found["workers"].append(run.worker_starts("wait"))
    return found


def _event(stage: Stage, name: str, moment: datetime) -> Event:
    if name in timers.NAMES:
        return Event({"due": moment.isoformat()}, lambda run: None)
    if name.startswith("file_"):
        folder = Path(stage.airflow.home, "drops", uuid.uuid4().hex)
        folder.mkdir(parents=True)
        return Event({"queue": str(folder)}, lambda run: _drop(folder))
    broker, queue = fresh_queue(stage, name)
    of_it = broker.queue

    def send(run: Any) -> None:
        broker.queue = of_it
        send_at_once(broker, [{"order": order_of(run, "wait")}])

    return Event({"queue": queue}, send)


def _drop(folder: Path) -> None:
    being_written = folder.with_suffix(".part")
    being_written.write_text("{}")
    being_written.rename(folder / "order.json")


def table(rows: Rows) -> str:
    lines = [
        "| what is waited for, and by what | event to success | event to downstream running | worker processes "
        "per wait |",
        "|---" * 4 + "|",
    ]
    lines += [
        f"| {NAMES[row['name']]} | {spread(row['success'])} | {spread(row['running'])} "
        f"| {statistics.mean(row['workers']):.2f} |"
        for row in rows
    ]
    rounds = rows[0]["rounds"]
    return "\n".join(
        [
            *lines,
            "",
            f"Median (least to most); {rounds} rounds by turns, in each {len(rows[0]['success']) // rounds} waits "
            f"with an event of their own, spread over {rows[0]['spread']:g} s. From when a timer is due, a file "
            "has its name, or the request that sends a message begins. Topics of one partition, one broker; each "
            "of Airflow's waits for Kafka has a group of its own. SQS is moto, with which the tests run as well: "
            "what AWS takes comes on top.",
        ]
    )


PARTS = {
    "one": Part(
        one,
        table,
        tuple(f"{name}_1" for name in NAMES),
        (KAFKA, SQS, REDIS, POSTGRES, NATS, RABBITMQ),
        plot="From each event until its wait had succeeded, and until the next task ran",
    )
}
