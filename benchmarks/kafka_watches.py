#!/usr/bin/env python3
"""
Many watches on one topic: python3 benchmarks/kafka_watches.py [--watches 1 100 10000] [--samples 30].

A process like a triggerer's (one event loop) has so many `KafkaWatchListener` waits open, each for its own
``order_id``. The broker's connections with it, its memory, and the time from sending a message until its wait has
it are measured; then every wait is sent its message. The same number of tasks that wait for nothing is the floor.
What Airflow's own triggers take comes on top.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "sources")]

import bootstrap  # noqa: E402

PARTITIONS = 6
# Seconds that new waits have to be open before their messages are sent, and of these for each of many.
SETTLE = 1.0
SETTLE_EACH = 0.001


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Many watches on one topic.")
    parser.add_argument("--watches", type=int, nargs="+", default=[1, 100, 10_000])
    parser.add_argument(
        "--samples", type=int, default=30, help="messages that are timed, for each number of watches"
    )
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.inside:
        asyncio.run(watch(options.inside))
        return
    bootstrap.run_inside("[test]")
    from of_kafka import Kafka

    broker = Kafka.make()
    if broker is None:
        bootstrap.fail(Kafka.missing)
    home = tempfile.mkdtemp(prefix="airflow-events-watches-")
    try:
        rows = [measure(broker, home, watches, options.samples) for watches in options.watches]
    finally:
        broker.stop()
        shutil.rmtree(home, ignore_errors=True)
    report(rows, options)


def measure(broker, home: str, watches: int, samples: int) -> dict[str, float]:
    """Open so many watches in a process of their own, and send to them."""
    broker.queue = f"payments{watches}"
    broker.make_topic(partitions=PARTITIONS)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")},
        "AIRFLOW_HOME": home,
        "AIRFLOW_CONN_KAFKA_DEFAULT": json.dumps(broker.connection()),
    }
    process = subprocess.Popen(
        [sys.executable, __file__, "--inside", broker.queue],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip

    def ask(do: str, **more):
        process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        process.stdin.flush()
        while line := process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the process that waits ended at {do!r} with {process.wait()}")

    try:
        send = sender(broker)
        send(-1)  # to nobody: the producer is connected then
        ask("wait", first=0, watches=1)
        time.sleep(SETTLE)
        one = pss(process.pid)  # with what the first one costs, and all share
        ask("idle", tasks=watches)
        floor = pss(process.pid) - one
        ask("end idle")
        ask("wait", first=1, watches=watches - 1)
        time.sleep(SETTLE + watches * SETTLE_EACH)
        found = {
            "watches": watches,
            "connections": connections(broker, process.pid),
            "clients": clients(process.pid),
            "floor": floor / watches,
            "memory": (pss(process.pid) - one) / max(watches - 1, 1),
        }
        latencies = []
        orders = deque(range(watches))
        for number in range(samples):
            send(orders.popleft())
            latencies.append(ask("next")["seconds"])
            orders.append(watches + number)
            ask("wait", first=orders[-1], watches=1)
            time.sleep(SETTLE)
        found["latency"] = statistics.median(latencies)
        found["p95"] = sorted(latencies)[round(0.95 * (len(latencies) - 1))]
        send(*orders)
        return {**found, **ask("rest", most=120)}
    finally:
        process.kill()
        process.wait()


def sender(broker):
    """Return what sends messages, over one connection."""
    from confluent_kafka import Producer

    producer = Producer({**broker.bootstrap, "linger.ms": 0})

    def send(*orders: int) -> None:
        for order in orders:
            producer.produce(broker.queue, json.dumps({"order_id": order, "sent": time.time()}).encode())
        assert producer.flush(60) == 0

    return send


def connections(broker, pid: int) -> int:
    """Count the connections that the broker has with a process."""
    import psutil

    ends = {each.laddr for each in psutil.Process(pid).net_connections("tcp")}
    theirs = psutil.Process(broker.server.process.pid).net_connections("tcp")
    return sum(each.status == "ESTABLISHED" and as_v4(each.raddr) in ends for each in theirs)


def as_v4(address) -> tuple[str, int] | None:
    """Return an address as the other end has it: Java listens on IPv6 for both."""
    return (address.ip.removeprefix("::ffff:"), address.port) if address else None


def clients(pid: int) -> int:
    """Count librdkafka's clients in a process: each has a thread of this name."""
    names = (thread / "comm" for thread in Path(f"/proc/{pid}/task").iterdir())
    return sum(name.read_text().strip() == "rdk:main" for name in names)


def pss(pid: int) -> int:
    """Return a process's proportional set size in bytes."""
    import psutil

    return int(psutil.Process(pid).memory_full_info().pss)


async def watch(topic: str) -> None:
    """Do what standard input says, a line of JSON each time, and answer with one."""
    from airflow_events.listeners.base import Wait, working_for
    from airflow_events.listeners.kafka import KafkaWatchListener

    since = datetime.now(timezone.utc)
    tasks: set[asyncio.Task] = set()
    idle: list[asyncio.Task] = []
    ended: asyncio.Queue[float] = asyncio.Queue()
    wrong = 0

    async def wait(order: int) -> None:
        nonlocal wrong
        with working_for(Wait("dag", f"run{order}", "task")):
            event = await KafkaWatchListener().poll_for_event(topic, match={"order_id": order}, since=since)
        ended.put_nowait(time.time() - event["value"]["sent"])
        wrong += event["value"]["order_id"] != order

    def start(order: int) -> None:
        task = asyncio.create_task(wait(order))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        answer: dict[str, float] = {"done": 1}
        if asked["do"] == "idle":
            idle = [asyncio.create_task(asyncio.Event().wait()) for _ in range(asked["tasks"])]
            await asyncio.sleep(0.1)
        elif asked["do"] == "end idle":
            for task in idle:
                task.cancel()
            idle = []
            await asyncio.sleep(0.1)
        elif asked["do"] == "wait":
            for order in range(asked["first"], asked["first"] + asked["watches"]):
                start(order)
            await asyncio.sleep(0.1)
        elif asked["do"] == "next":
            answer = {"seconds": await ended.get()}
        elif asked["do"] == "rest":
            if tasks:
                await asyncio.wait(tasks, timeout=asked["most"])
            answer = {"wrong": wrong, "open": len(tasks)}
        print(json.dumps(answer), flush=True)


def report(rows: list[dict[str, float]], options: argparse.Namespace) -> None:
    first = rows[0]
    lines = {
        "watches": [f"{row['watches']:,}" for row in rows],
        "Kafka clients in the process": [str(row["clients"]) for row in rows],
        "connections, as the broker has them": [str(row["connections"]) for row in rows],
        "memory for each (PSS)": [f"{row['memory'] / 1024:.1f} KB" if row["watches"] > 1 else "" for row in rows],
        "of it, a task that waits for nothing": [
            f"{row['floor'] / 1024:.1f} KB" if row["watches"] > 1 else "" for row in rows
        ],
        "sent to found, as a multiple of the first (median)": [
            f"{r['latency'] / first['latency']:.2f}" for r in rows
        ],
        "the same, 95th percentile": [f"{row['p95'] / first['p95']:.2f}" for row in rows],
        "got its own message, when all were sent": [
            f"{row['watches'] - row['open'] - row['wrong']:,}" for row in rows
        ],
    }
    print(f"\n{options.samples} samples; the first median is {1000 * first['latency']:.0f} ms")
    for number, (name, cells) in enumerate(lines.items()):
        print(f"| {name} | {' | '.join(cells)} |")
        if not number:
            print("|---" * (len(cells) + 1) + "|")


if __name__ == "__main__":
    main()
