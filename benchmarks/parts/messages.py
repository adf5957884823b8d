"""Many messages at once, one for each of the waits that are open: how fast these end."""

from __future__ import annotations

import statistics
from datetime import datetime, timezone
from typing import Any

from parts import Part, Rows, Stage, connections
from parts.processes import opened, tenth
from parts.queues import KAFKA, NATS, POSTGRES, RABBITMQ, REDIS, SQS, fresh_queue, order_of, send_at_once
from parts.timers import ends_of, successes

NAMES = {
    **{name: what for name, what in connections.NAMES.items() if name not in (connections.FLOOR, "redis_watch")},
    "postgres_ours": "ours: `PostgresListener`",
    "nats_ours": "ours: `NatsListener`",
    "rabbitmq_ours": "ours: `RabbitMQListener`, quorum queue",
}
BROKERS = (KAFKA, SQS, REDIS, POSTGRES, NATS, RABBITMQ)
# Seconds that the last of them may take.
LONGEST = 1200


def messages(stage: Stage) -> Rows:
    most = max(stage.options.waits)
    found = []
    for name in NAMES:
        count = tenth(most) if name in connections.ON_WORKERS else most
        found.append({"name": name, "waits": count, **_sent(stage, name, count)})
        print(name, found[-1]["ends"][-1], flush=True)
    return found


def _sent(stage: Stage, name: str, count: int) -> dict[str, Any]:
    """Have so many waits open, send as many messages, and return when each wait succeeded."""
    broker, where = fresh_queue(stage, name)
    with opened(stage.airflow, f"{name}_10", 10, count, queue=where) as those:
        those.rest()
        waits = [(run, f"wait{number}") for run in those.runs for number in range(10)]
        begin = datetime.now(timezone.utc)
        send_at_once(broker, [{"order": order_of(run, wait)} for run, wait in waits])
        sending = (datetime.now(timezone.utc) - begin).total_seconds()
        return {
            "sending": round(sending, 1),
            "ends": successes(those.runs, begin, LONGEST),
            "workers": statistics.mean(run.worker_starts(wait) for run, wait in waits),
        }


def table(rows: Rows) -> str:
    lines = [
        "| open waits, and a message for each at once | worker processes per wait "
        "| sent to the first success | the median | the last | per second |",
        "|---" * 6 + "|",
    ]
    lines += [
        f"| {NAMES[row['name']]}; {row['waits']:,} | {row['workers']:.2f} | {ends_of(row)} |" for row in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            "Runs of a DAG with 10 waits; a wait's success is the end of its task instance. From when the first "
            f"message is sent; sending all took up to {max(row['sending'] for row in rows):.1f} s.",
        ]
    )


PARTS = {"messages": Part(messages, table, tuple(f"{name}_10" for name in NAMES), BROKERS)}
