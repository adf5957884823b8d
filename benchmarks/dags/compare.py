"""The DAGs of ``benchmarks/compare.py``: for each contender one that is timed, and one with many waits."""

from __future__ import annotations

from airflow.providers.standard.sensors.date_time import DateTimeSensorAsync
from airflow_events import wait_for_event
from airflow_events.listeners.timer import TimerListener
from contenders import dags
from floor import Floor

DUE = "{{ params.due }}"
CONTENDERS = {
    "ours": lambda name: wait_for_event.override(task_id=name)(TimerListener, DUE).operator,
    "peer": lambda name: DateTimeSensorAsync(task_id=name, target_time=DUE),
    "peer_in_triggerer": lambda name: DateTimeSensorAsync(
        task_id=name, target_time=DUE, start_from_trigger=True, end_from_trigger=True
    ),
    "floor": lambda name: Floor(task_id=name),
}

DAGS = dags(CONTENDERS, {"due": "2100-01-01T00:00:00Z"}, 1, 10, 300)
