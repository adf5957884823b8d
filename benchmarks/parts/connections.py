"""How many connections open waits have to their broker, asked from the broker."""

from __future__ import annotations

import time
from typing import Any

from parts import Part, Rows, Stage
from parts.processes import end, fresh_triggerer, open_waits, settle, tenth, until_open
from parts.queues import KAFKA, SQS, sqs_queue

REDIS = ("of_redis", "Valkey")
NAMES = {
    "kafka_ours": "ours: `KafkaListener`, Kafka",
    "kafka_watch": "ours: `KafkaWatchListener`, Kafka",
    "kafka_peer": "`AwaitMessageSensor`, Kafka",
    "kafka_queue": '`MessageQueueTrigger(scheme="kafka")`, Kafka',
    "redis_ours": "ours: `RedisListener`, Valkey",
    "redis_watch": "ours: `RedisWatchListener`, Valkey",
    "sqs_ours": "ours: `SqsListener`, emulator",
    "sqs_peer_1s": "`SqsSensor(deferrable=True, poke_interval=1)`, emulator",
}
BROKERS = {"kafka": KAFKA, "redis": REDIS, "sqs": SQS}
# Those that begin on one.
ON_WORKERS = ("kafka_peer", "kafka_queue", "sqs_peer_1s")


def connections(stage: Stage) -> Rows:
    most = max(stage.options.waits)
    found = []
    for name in NAMES:
        count = tenth(most) if name in ON_WORKERS else most
        broker = stage.brokers[BROKERS[name.partition("_")[0]][1]]
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
    if name.startswith("redis"):
        with broker.client as client:
            return len(client.client_list()) - 1
    return sockets(broker.server.process.pid, broker.server.port)


def sockets(server: int, port: int) -> int:
    """Count the connections that other processes have to this port of a server."""
    import psutil

    own = {each.laddr.port for each in psutil.Process().net_connections("tcp")}
    theirs = psutil.Process(server).net_connections("tcp")
    there = [each for each in theirs if each.status == "ESTABLISHED" and each.laddr.port == port]
    return sum(each.raddr.port not in own for each in there)


def table(rows: Rows) -> str:
    lines = ["| open waits in one triggerer | connections to the broker |", "|---|---|"]
    lines += [f"| {NAMES[row['name']]}; {row['waits']:,} | {_range(row['least'], row['most'])} |" for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            "As Valkey says (`CLIENT LIST`), and of the others the operating system, in "
            f"{rows[0]['look']:g} s: some open one for each question.",
        ]
    )


def _range(least: int, most: int) -> str:
    return str(most) if least == most else f"{least} to {most}"


PARTS = {"connections": Part(connections, table, tuple(f"{name}_10" for name in NAMES), (KAFKA, SQS, REDIS))}
