"""The DAGs of ``benchmarks/compare.py``: for each contender one that is timed, and one with many waits."""

from __future__ import annotations

import time

from airflow.providers.standard.sensors.date_time import DateTimeSensorAsync
from airflow.sdk import DAG, task
from airflow_events import wait_for_event, wait_for_events
from airflow_events.listeners.timer import TimerListener
from airflow_events.operators.wait_for_event import WaitForEventOperator
from appears import Appears
from contenders import dags
from floor import Floor
from probe import Probe

DUE = "{{ params.due }}"
CONTENDERS = {
    "ours": lambda name: wait_for_event.override(task_id=name)(TimerListener, DUE).operator,
    "peer": lambda name: DateTimeSensorAsync(task_id=name, target_time=DUE),
    "peer_in_triggerer": lambda name: DateTimeSensorAsync(
        task_id=name, target_time=DUE, start_from_trigger=True, end_from_trigger=True
    ),
    "floor": lambda name: Floor(task_id=name),
    "appears": lambda name: Appears(task_id=name, path="{{ params.path }}"),
}

DAGS = dags(CONTENDERS, {"due": "2100-01-01T00:00:00Z", "path": "/nonexistent"}, 1, 3, 10, 300)

with DAG("probe", schedule=None):
    Probe(task_id="wait")

# Mapped waits start on workers.
with DAG("mapped_10", schedule=None, params={"due": "2100-01-01T00:00:00Z"}, max_active_runs=10_000):
    WaitForEventOperator.partial(task_id="wait", listener=TimerListener).expand(listener_args=[[DUE]] * 10)

with DAG("runs", schedule=None):

    @task(task_id="sleep")
    def sleep_long() -> None:
        time.sleep(3600)

    sleep_long()

with DAG("in_one", schedule=None):
    wait_for_events.override(task_id="wait")(TimerListener, ["2100-01-01T00:00:00Z"] * 1000)
