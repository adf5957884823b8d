"""The DAGs of ``benchmarks/compare.py`` whose waits are for messages."""

from __future__ import annotations

from airflow.providers.amazon.aws.sensors.sqs import SqsSensor
from airflow.sdk import DAG, task
from airflow_events import wait_for_event
from airflow_events.listeners.redis import RedisListener, RedisWatchListener
from airflow_events.listeners.sqs import SqsListener

QUEUE = "{{ params.queue }}"
CONTENDERS = {
    "sqs_ours": lambda name: wait_for_event.override(task_id=name)(SqsListener, QUEUE).operator,
    "sqs_peer": lambda name: SqsSensor(task_id=name, sqs_queue=QUEUE, deferrable=True),
    "sqs_peer_1s": lambda name: SqsSensor(task_id=name, sqs_queue=QUEUE, deferrable=True, poke_interval=1),
    "redis_ours": lambda name: wait_for_event.override(task_id=name)(RedisListener, QUEUE).operator,
    "redis_watch": lambda name: (
        wait_for_event.override(task_id=name)(RedisWatchListener, QUEUE, field="v", match={"order": 1}).operator
    ),
}


@task
def downstream():
    pass


def dag(dag_id, make, waits):
    with DAG(
        dag_id,
        schedule=None,
        catchup=False,
        params={"queue": "none"},
        max_active_runs=10_000,
        max_active_tasks=100_000,
    ) as made:
        for name in ["wait"] if waits == 1 else [f"wait{number}" for number in range(waits)]:
            wait = make(name)
            if waits == 1:
                wait >> downstream()
    return made


DAGS = [dag(f"{name}_{waits}", make, waits) for name, make in CONTENDERS.items() for waits in (1, 10)]
