"""A message of an SQS queue: ours against Airflow's own sensor, both on the emulator that the tests use."""

from __future__ import annotations

import random
import time
from datetime import datetime, timezone
from typing import Any

from parts import Part, Rows, Stage
from parts.processes import fresh_triggerer, until_open
from parts.timers import latency_lines, note

SQS = ("of_sqs", "Sqs")
NAMES = {
    "sqs_ours": "ours: `SqsListener`",
    "sqs_peer": "`SqsSensor(deferrable=True)`",
    "sqs_peer_1s": "`SqsSensor(deferrable=True, poke_interval=1)`",
}


def sqs(stage: Stage) -> Rows:
    """From the moment that a message is sent until what follows the wait runs."""
    found: Rows = [{"name": name, "success": [], "running": [], "workers": []} for name in NAMES]
    for turn in range(stage.options.repeat):
        for row in found:
            for key, values in _sent(stage, row["name"], turn).items():
                row[key] += values
            print(row["name"], row["running"], flush=True)
    return [{**row, "rounds": stage.options.repeat, "spread": stage.options.spread} for row in found]


def _sent(stage: Stage, name: str, turn: int) -> dict[str, list[float]]:
    """Open waits, each on a queue of its own, and send to them at moments that are spread evenly."""
    airflow, count = stage.airflow, stage.options.at_once
    triggerer = fresh_triggerer(airflow)
    brokers = [queue(stage) for _ in range(count)]
    label = f"{name}-{turn}-{time.time():.0f}"
    runs = [airflow.run(f"{name}_1", {"queue": url}, run_id=f"{label}-{n}") for n, url in enumerate(brokers)]
    until_open(triggerer, count)
    began = time.time()
    # How long it takes depends on when a message comes, seen from who asks every so many seconds.
    draw = random.Random(turn)
    moments = [(n + draw.random()) * stage.options.spread / count for n in range(count)]
    sent = []
    for url, moment in zip(brokers, moments, strict=True):
        time.sleep(max(0.0, began + moment - time.time()))
        sent.append(datetime.now(timezone.utc))
        stage.brokers["Sqs"].client.send_message(QueueUrl=url, MessageBody='{"order": 1}')
    found: dict[str, list[float]] = {"success": [], "running": [], "workers": []}
    for run, moment in zip(runs, sent, strict=True):
        assert run.finished(timeout=240) == "success", run
        note(found, run, run.tasks(), moment)
    return found


def queue(stage: Stage) -> str:
    """Make a queue, and return its address."""
    broker: Any = stage.brokers["Sqs"]
    broker.fresh()
    return str(broker.url)


def sqs_table(rows: Rows) -> str:
    lines = latency_lines("SQS message", "sent", NAMES, rows)
    rounds = rows[0]["rounds"]
    return "\n".join(
        [
            *lines,
            "",
            f"{rounds} rounds by turns, {len(rows[0]['running']) // rounds} waits in each, on queues of their "
            f"own; a message for each, spread over {rows[0]['spread']:g} s. On an emulator, moto, with which the "
            "tests run as well: what AWS takes comes on top.",
        ]
    )


PARTS = {"sqs": Part(sqs, sqs_table, tuple(f"{name}_1" for name in NAMES), (SQS,))}
