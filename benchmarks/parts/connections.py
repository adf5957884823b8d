"""How many connections open waits have to their broker, asked from the broker."""

from __future__ import annotations

import time
from typing import Any

from parts import Part, Rows, Stage
from parts.processes import end, fresh_triggerer, open_waits, settle, until_open
from parts.queues import SQS, sqs_queue

REDIS = ("of_redis", "Valkey")
NAMES = {
    "redis_ours": "ours: `RedisListener`, Valkey",
    "redis_watch": "ours: `RedisWatchListener`, Valkey",
    "sqs_ours": "ours: `SqsListener`, emulator",
    "sqs_peer_1s": "`SqsSensor(deferrable=True, poke_interval=1)`, emulator",
}


def connections(stage: Stage) -> Rows:
    most = max(stage.options.waits)
    found = []
    for name in NAMES:
        # Airflow starts two or three workers a second: a tenth is enough of those that begin on one.
        count = max(most // 100, 1) * 10 if name == "sqs_peer_1s" else most
        broker = stage.brokers["Sqs" if name.startswith("sqs") else "Valkey"]
        broker.fresh()
        where = sqs_queue(broker) if name.startswith("sqs") else broker.queue
        triggerer = fresh_triggerer(stage.airflow)
        before = _count(name, broker)
        runs = open_waits(stage.airflow, f"{name}_10", 10, count, queue=where)
        until_open(triggerer, count)
        settle()
        counts = []
        ends = time.monotonic() + stage.options.look
        while time.monotonic() < ends:
            counts.append(_count(name, broker) - before)
            time.sleep(0.05)
        end(stage.airflow, runs)
        found.append(
            {"name": name, "waits": count, "least": min(counts), "most": max(counts), "look": stage.options.look}
        )
        print(found[-1], flush=True)
    return found


def _count(name: str, broker: Any) -> int:
    if name.startswith("sqs"):
        import psutil

        own = {each.laddr.port for each in psutil.Process().net_connections("tcp")}
        theirs = psutil.Process(broker.server.process.pid).net_connections("tcp")
        there = [each for each in theirs if each.status == "ESTABLISHED" and each.laddr.port == broker.server.port]
        return sum(each.raddr.port not in own for each in there)
    with broker.client as client:
        return len(client.client_list()) - 1


def table(rows: Rows) -> str:
    lines = ["| open waits in one triggerer | connections to the broker |", "|---|---|"]
    lines += [f"| {NAMES[row['name']]}; {row['waits']:,} | {_range(row['least'], row['most'])} |" for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            "As the broker says (`CLIENT LIST`), or for the emulator the operating system, in "
            f"{rows[0]['look']:g} s: some open one for each question.",
        ]
    )


def _range(least: int, most: int) -> str:
    return str(most) if least == most else f"{least} to {most}"


PARTS = {"connections": Part(connections, table, tuple(f"{name}_10" for name in NAMES), (SQS, REDIS))}
