"""As many waits as one triggerer can have: what they cost it, and how long its loop stands still."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from typing import Any

from parts import Part, Rows, Stage
from parts.connections import sockets_of
from parts.processes import opened, settle
from parts.queues import KAFKA, order_of
from parts.timers import NAMES, since

WATCH = "kafka_watch"
WHO = {
    "floor": NAMES["floor"],
    "ours": NAMES["ours"],
    WATCH: "ours: `KafkaWatchListener`, each for a message of its own in one topic",
    "peer_in_triggerer": NAMES["peer_in_triggerer"],
}
# Messages that are sent one after another while all wait, and for how many seconds each is looked for.
SENT = 10
LOOKED_FOR = 900


def large(stage: Stage) -> Rows:
    """Have the most waits, each in the triggerer by itself, and see what that triggerer does."""
    count = max(stage.options.waits)
    found = []
    for name in WHO:
        found.append({"name": name, "waits": count, "look": stage.options.look, **_have(stage, name, count)})
        print(found[-1], flush=True)
    return found


def _have(stage: Stage, name: str, count: int) -> dict[str, Any]:
    airflow, broker = stage.airflow, stage.brokers[KAFKA[1]]
    broker.fresh()
    connected, clock = 0, time.time()

    def before() -> None:
        nonlocal connected, clock
        connected, clock = sockets_of(broker), time.time()

    with opened(airflow, f"{name}_10", 10, count, beside="probe", before=before, queue=broker.queue) as those:
        settle()
        rested = time.time()
        cores = those.idle(stage.options.look)
        begun, rest = _stood_still(airflow, clock, rested), _stood_still(airflow, rested, time.time())
        return {
            "made": those.made,
            "seconds": those.seconds,
            **those.memory(),
            "files": those.files,
            "connections": sockets_of(broker) - connected,
            **cores,
            "stood_still_beginning": round(begun, 3),
            "stood_still": round(rest, 3),
            "sent": [_until_told(broker, run) for run in those.runs[:: max(len(those.runs) // SENT, 1)]]
            if name == WATCH
            else [],
        }


def _until_told(broker: Any, run: Any) -> float:
    """Send a message that one of the waits is for, and return the seconds until that has succeeded."""
    from deployment import until

    sent = datetime.now(timezone.utc)
    broker.send({"order": order_of(run, "wait0")})
    until(lambda: run.task_state("wait0") == "success", f"wait0 of {run} has its message", LOOKED_FOR, 0.2)
    return since(sent, run.tasks()["wait0"]["end_date"])


def _stood_still(airflow: Any, begin: float, end: float) -> float:
    """Return for how many seconds the loop stood still at most, between two moments."""
    lines = [json.loads(line) for line in (airflow.home / "probe.jsonl").read_text().splitlines()]
    seen = [longest for moment, longest in lines if begin < moment < end]
    assert seen, "the probe has seen nothing"
    return float(max(seen))


def table(rows: Rows) -> str:
    floor = rows[0]
    lines = [
        "| open waits, each started in the triggerer | until all wait | memory of the runner per wait "
        "| above the floor | memory of its supervisor per wait | open files | connections to Kafka "
        "| cores at rest: runner, supervisor | the loop stood still, at most: as they began, at rest |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        count = row["waits"]
        lines.append(
            f"| {WHO[row['name']]}; {count:,} | {row['seconds']:.0f} s | {row['runner'] / count:.1f} KB "
            f"| {(row['runner'] - floor['runner']) / count:+.1f} KB | {row['supervisor'] / count:.1f} KB "
            f"| {row['files']:,} | {row['connections']} "
            f"| {row['runner_cores']:.3f}, {row['supervisor_cores']:.3f} "
            f"| {row['stood_still_beginning']:.2f} s, {1000 * row['stood_still']:.0f} ms |"
        )
    watches = [row for row in rows if row["sent"]]
    told = "".join(
        f" With all {row['waits']:,} watches open, {len(row['sent'])} messages made the one wait that each was "
        f"for succeed after {min(row['sent']):.2f} to {max(row['sent']):.2f} s."
        for row in watches
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Runs of a DAG with 10 waits, which took {floor['made']:.0f} to "
            f"{max(row['made'] for row in rows):.0f} s to ask for. PSS after a collection; at rest is over "
            f"{floor['look']:g} s. Standing still is what a trigger that sleeps for 10 ms slept longer.{told}",
        ]
    )


PARTS = {"large": Part(large, table, (*(f"{name}_10" for name in WHO), "probe"), (KAFKA,))}
