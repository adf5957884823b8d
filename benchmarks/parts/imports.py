"""What a DAG file pays at each parse for the names that it imports."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from parts import Part, Rows, Stage

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
PEERS = (
    "from airflow.providers.standard.sensors.date_time import DateTimeSensorAsync",
    "from airflow.providers.apache.kafka.sensors.kafka import AwaitMessageSensor",
    "from airflow.providers.amazon.aws.sensors.sqs import SqsSensor",
)
# Clients of brokers, none of which a DAG file needs that only names its listener.
CLIENTS = ("confluent_kafka", "redis", "psycopg", "nats", "aiormq", "pamqp", "aiobotocore", "botocore", "boto3")
CHILD = """
import sys, time
import airflow.dag_processing.processor, airflow.sdk
exec(sys.argv[1])
began, loaded = time.process_time(), set(sys.modules)
exec(sys.argv[2])
print("MEASURED", 1000 * (time.process_time() - began), *(sys.modules.keys() - loaded), sep="\\n")
"""


def imports(stage: Stage) -> Rows:
    """
    Import each in fresh processes that have done what Airflow's DAG processor has before it parses a file.

    Their processor time is taken, of which other processes do not add.
    """
    statements = {FACE: ("", FACE)}
    statements |= {
        f"from airflow_events.listeners.{module} import {name}": (
            FACE,
            f"import airflow_events.listeners.{module}",
        )
        for module, name in LISTENERS.items()
    }
    statements |= {peer: ("", peer) for peer in PEERS}
    found: dict[str, dict[str, Any]] = {
        shown: {"name": shown, "milliseconds": [], "modules": 0, "clients": []} for shown in statements
    }
    with tempfile.TemporaryDirectory() as home:
        _run(home, "", "")  # which makes the home, and compiles
        for _ in range(stage.options.repeat):  # by turns, so that all of them have had the same neighbours
            for shown, (before, statement) in statements.items():
                milliseconds, modules = _run(home, before, statement)
                found[shown]["milliseconds"].append(round(milliseconds, 1))
                found[shown]["modules"] = len(modules)
                found[shown]["clients"] = [client for client in CLIENTS if client in modules]
    return list(found.values())


def _run(home: str, before: str, statement: str) -> tuple[float, list[str]]:
    """Return the milliseconds of processor time that ``statement`` took, and which modules it loaded."""
    environment = {**os.environ, "AIRFLOW_HOME": home, "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    command = [sys.executable, "-c", CHILD, before, statement]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{statement or 'Airflow'} failed:\n{done.stderr}"
    milliseconds, *modules = done.stdout.rpartition("MEASURED")[2].split()
    return float(milliseconds), modules


def table(rows: Rows) -> str:
    lines = ["| in a DAG file | processor time | modules | clients of brokers |", "|---|---|---|---|"]
    lines += [
        f"| `{row['name']}` | {statistics.median(row['milliseconds']):.0f} ms | {row['modules']:,} "
        f"| {', '.join(row['clients']) or 'none'} |"
        for row in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"Medians of {len(rows[0]['milliseconds'])} fresh processes, in which Airflow's DAG processor is "
            "imported; of our listeners what they add to the first line.",
        ]
    )


PARTS = {"imports": Part(imports, table)}
