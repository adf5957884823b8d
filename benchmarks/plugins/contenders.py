"""What the DAGs of ``benchmarks/compare.py`` are made by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from airflow.sdk import DAG, task


def dags(contenders: dict[str, Callable[[str], Any]], params: dict[str, str], *waits: int) -> list[DAG]:
    """
    Make a DAG of each contender for each number of waits; what waits alone has a task behind it.

    :param contenders: what makes a waiting task of a name, by its own name.
    """
    return [
        _dag(f"{name}_{number}", make, params, number) for name, make in contenders.items() for number in waits
    ]


@task
def downstream():
    pass


def _dag(dag_id: str, make: Callable[[str], Any], params: dict[str, str], waits: int) -> DAG:
    with DAG(
        dag_id,
        schedule=None,
        catchup=False,
        params=params,
        max_active_runs=10_000,
        max_active_tasks=100_000,
    ) as dag:
        if waits == 1:
            make("wait") >> downstream()
        else:
            for number in range(waits):
                make(f"wait{number}")
    return dag
