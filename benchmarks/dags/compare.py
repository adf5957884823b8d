"""The DAGs of ``benchmarks/compare.py``: for each contender one that is timed, and one with many waits."""

from __future__ import annotations

from airflow.providers.standard.sensors.date_time import DateTimeSensorAsync
from airflow.sdk import DAG, task
from airflow_events import wait_for_event
from airflow_events.listeners.timer import TimerListener
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


@task
def downstream():
    pass


def dag(dag_id, make, waits):
    with DAG(
        dag_id,
        schedule=None,
        catchup=False,
        params={"due": "2100-01-01T00:00:00Z"},
        max_active_runs=10_000,
        max_active_tasks=100_000,
    ) as made:
        names = ["wait"] if waits == 1 else [f"wait{number}" for number in range(waits)]
        for name in names:
            wait = make(name)
            if waits == 1:
                wait >> downstream()
    return made


DAGS = [dag(f"{name}_{waits}", make, waits) for name, make in CONTENDERS.items() for waits in (1, 10, 300)]
