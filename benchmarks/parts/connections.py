"""What open waits for brokers take: connections, asked from the broker, memory, and processor time."""

from __future__ import annotations

from typing import Any

from parts import Part, Rows, Stage, timers
from parts.processes import opened, tenth
from parts.queues import KAFKA, REDIS, SQS, fresh_queue

FLOOR = "floor"
NAMES = {
    FLOOR: timers.NAMES[FLOOR],
    "kafka_ours": "ours: `KafkaListener`, Kafka",
    "kafka_watch": "ours: `KafkaWatchListener`, Kafka",
    "kafka_peer": "`AwaitMessageSensor`, Kafka",
    "kafka_queue": '`MessageQueueTrigger(scheme="kafka")`, Kafka',
    "redis_ours": "ours: `RedisListener`, Valkey",
    "redis_watch": "ours: `RedisWatchListener`, Valkey",
    "sqs_ours": "ours: `SqsListener`, emulator",
    "sqs_peer_1s": "`SqsSensor(deferrable=True, poke_interval=1)`, emulator",
}
# Those that begin on one.
ON_WORKERS = ("kafka_peer", "kafka_queue", "sqs_peer_1s")


def connections(stage: Stage) -> Rows:
    most = max(stage.options.waits)
    found = []
    for name in NAMES:
        count = tenth(most) if name in ON_WORKERS else most
        found.append({"name": name, "waits": count, "look": stage.options.look, **_have(stage, name, count)})
        print(found[-1], flush=True)
    return found


def _have(stage: Stage, name: str, count: int) -> dict[str, Any]:
    broker, where = fresh_queue(stage, name)
    counts: list[int] = []

    def look() -> None:
        counts.append(0 if name == FLOOR else _count(name, broker))

    with opened(stage.airflow, f"{name}_10", 10, count, before=look, queue=where) as those:
        those.rest()
        cores = those.idle(stage.options.look, look)
        memory = those.memory()
    before, *then = counts
    return {"least": min(then) - before, "most": max(then) - before, **memory, **cores}


def _count(name: str, broker: Any) -> int:
    if name.startswith("redis"):
        with broker.client as client:
            return len(client.client_list()) - 1
    return sockets_of(broker)


def sockets_of(broker: Any) -> int:
    """Count the connections that other processes have to a broker."""
    return sockets(broker.server.process.pid, broker.server.port)


def sockets(server: int, port: int) -> int:
    """Count the connections that other processes have to this port of a server."""
    import psutil

    own = {each.laddr.port for each in psutil.Process().net_connections("tcp")}
    theirs = psutil.Process(server).net_connections("tcp")
    there = [each for each in theirs if each.status == "ESTABLISHED" and each.laddr.port == port]
    return sum(each.raddr.port not in own for each in there)


def table(rows: Rows) -> str:
    lines = [
        "| open waits in one triggerer | connections to the broker "
        "| memory of the runner, for all of them, and per wait "
        "| of its supervisor, per wait | cores while nothing happens: runner, supervisor |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        count = row["waits"]
        lines.append(
            f"| {NAMES[row['name']]}; {count:,} "
            f"| {'' if row['name'] == FLOOR else _range(row['least'], row['most'])} "
            f"| {row['runner'] / 1024:.1f} MB, {row['runner'] / count:.1f} KB "
            f"| {row['supervisor'] / count:.1f} KB "
            f"| {row['runner_cores']:.3f}, {row['supervisor_cores']:.3f} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "Connections as Valkey says (`CLIENT LIST`), and of the others the operating system, in "
            f"{rows[0]['look']:g} s: some open one for each question. PSS after a collection, above that of a "
            "triggerer without waits. Waits of Airflow's sensors begin on workers, and so bring no copy of their "
            "DAG.",
        ]
    )


def _range(least: int, most: int) -> str:
    return str(most) if least == most else f"{least} to {most}"


PARTS = {"connections": Part(connections, table, tuple(f"{name}_10" for name in NAMES), (KAFKA, SQS, REDIS))}
