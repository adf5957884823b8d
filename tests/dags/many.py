"""The DAGs of the end-to-end tests in which one task waits for many events."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, task
from airflow_events import wait_for_events
from airflow_events.listeners.timer import TimerListener
from probes import GatedDirectory, lay_down

BASE = "{{ params.base }}"
SOON = timedelta(seconds=1)


def dag(dag_id):
    return DAG(dag_id, schedule=None, catchup=False, params={"base": "/nonexistent"})


@task(retries=3, retry_delay=SOON)
def deliver(events, params=None, run_id=None, ti=None):
    """Note what downstream got, once for each run and try."""
    lay_down(Path(params["base"], "delivered", f"{run_id}.{ti.try_number}"), events)


@task
def base(params=None):
    return params["base"]


def wait(listener, arguments, common, **operator_arguments):
    override = wait_for_events.override(task_id="wait", retry_delay=SOON, **operator_arguments)
    return override(listener, arguments, **common)


@task
def places(count):
    return [{}] * count


with dag("many_timers"):

    @task
    def count(moments):
        return [len(moments), moments == sorted(moments, reverse=True)]

    count(wait(TimerListener, [timedelta(seconds=3, milliseconds=-n) for n in range(1000)], {}))

with dag("many_files"):
    deliver(wait(GatedDirectory, [{}] * 50, {"base": BASE}))

with dag("many_first"):
    deliver(wait(GatedDirectory, [{}] * 5, {"base": BASE}, first=2))

with dag("many_late"):
    deliver(wait(GatedDirectory, [{}] * 3, {"base": BASE}, timeout=10, default="none"))

with dag("many_upstream"):

    @task
    def moments():
        return [timedelta(seconds=n) for n in range(3)]

    wait_for_events.override(task_id="timers")(TimerListener, moments())
    deliver(wait(GatedDirectory, places(3), {"base": base()}))
