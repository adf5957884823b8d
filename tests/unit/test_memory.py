"""What Airflow's triggerer holds for a wait that starts in it."""

from __future__ import annotations

import asyncio
import gc
import uuid
import weakref
from datetime import datetime, timezone

from airflow.executors.workloads import TaskInstance
from airflow.jobs.triggerer_job_runner import TriggerRunner
from airflow.sdk import DAG
from airflow.serialization.serialized_objects import DagSerialization
from airflow_events import wait_for_event
from airflow_events.listeners.timer import TimerListener
from airflow_events.triggers.event import EventTrigger

NOW = datetime.now(timezone.utc)
RUN = {
    "dag_id": "d", "run_id": "run", "logical_date": None, "data_interval_start": None, "data_interval_end": None,
    "run_after": NOW, "start_date": NOW, "end_date": None, "clear_number": 0, "run_type": "manual",
    "state": "running", "conf": {}, "triggering_user_name": None, "consumed_asset_events": [],
    "partition_key": None, "partition_date": None, "note": None,
}  # fmt: skip


class Forever(EventTrigger):
    async def run(self):
        await asyncio.Event().wait()
        yield


async def start(runner, trigger):
    """Do what ``TriggerRunner.create_triggers`` does, and return a reference to the DAG that it builds."""
    with DAG("d", schedule=None, params={"moment": "2100-01-01T00:00:00Z"}) as dag:
        wait_for_event.override(task_id="wait")(TimerListener, "{{ params.moment }}")
    ti = TaskInstance.model_construct(
        id=uuid.uuid4(), dag_id="d", run_id="run", task_id="wait", map_index=-1, try_number=1
    )
    runtime = runner.create_runtime_ti(ti, DagSerialization.to_dict(dag), RUN)
    trigger.task_instance = runtime
    runner.triggers[1] = {"name": "wait", "is_watcher": False, "events": 0}
    coroutine = runner.run_trigger(1, trigger, None, runtime.get_template_context())
    return weakref.ref(runtime.task.dag), asyncio.create_task(coroutine)


async def test_the_dag_is_not_held_while_a_trigger_runs():
    runner = TriggerRunner()
    trigger = Forever(
        listener="airflow_events.listeners.timer:TimerListener", listener_args=["{{ params.moment }}"]
    )
    held, task = await start(runner, trigger)
    while trigger.wait is None:
        await asyncio.sleep(0.01)
    gc.collect()
    assert held() is None
    assert trigger.listener_args == ["2100-01-01T00:00:00Z"]
    assert trigger.wait["run_start"] == NOW
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
