#!/usr/bin/env python3
"""
What a DAG file pays at each parse for the names that it imports: python3 benchmarks/imports.py [--repeat 9].

Each import is made in fresh processes that have done what Airflow's DAG processor has done before it parses a
file. Their processor time is taken, of which other processes do not add; the listeners come on top of
`wait_for_event`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bootstrap

FACE = "from airflow_events import wait_for_event"
LISTENERS = {
    "timer": "TimerListener",
    "directory": "DirectoryListener",
    "http": "HttpListener",
    "kafka": "KafkaListener",
    "nats": "NatsListener",
    "postgres": "PostgresListener",
    "rabbitmq": "RabbitMQListener",
    "redis": "RedisListener",
    "sqs": "SqsListener",
}
CHILD = """
import sys, time
import airflow.dag_processing.processor, airflow.sdk
exec(sys.argv[1])
began, loaded = time.process_time(), len(sys.modules)
exec(sys.argv[2])
print(1000 * (time.process_time() - began), len(sys.modules) - loaded)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="What a DAG file pays for the names that it imports.")
    parser.add_argument("--repeat", type=int, default=9, help="fresh processes for each import (default: 9)")
    options = parser.parse_args()
    bootstrap.run_inside("[test]")
    measure(options.repeat)


def measure(repeat: int) -> None:
    imports = {FACE: ("", FACE)}
    imports |= {
        f"from airflow_events.listeners.{module} import {name}": (
            FACE,
            f"import airflow_events.listeners.{module}",
        )
        for module, name in LISTENERS.items()
    }
    found: dict[str, list[tuple[float, int]]] = {shown: [] for shown in imports}
    with tempfile.TemporaryDirectory() as home:
        run(home, "", "")  # which makes the home, and compiles
        for _ in range(repeat):  # one after the other, so that all of them have had the same neighbours
            for shown, (before, statement) in imports.items():
                found[shown].append(run(home, before, statement))
    print("| in a DAG file | processor time | modules |\n|---|---|---|")
    for shown, runs in found.items():
        times = [milliseconds for milliseconds, _ in runs]
        print(f"| `{shown}` | {statistics.median(times):.0f} ms | {runs[0][1]} |")


def run(home: str, before: str, statement: str) -> tuple[float, int]:
    """Return the milliseconds of processor time that ``statement`` took, and how many modules it loaded."""
    environment = {**os.environ, "AIRFLOW_HOME": home, "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    command = [sys.executable, "-c", CHILD, before, statement]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{statement or 'Airflow'} failed:\n{done.stderr}")
    milliseconds, modules = done.stdout.split()[-2:]
    return float(milliseconds), int(modules)


if __name__ == "__main__":
    main()
