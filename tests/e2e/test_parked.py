"""Waits that nobody polls for, in a real Airflow: they have no trigger, and end though no triggerer is there."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from airflow.models.asset import AssetWatcherModel
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from sqlalchemy import create_engine, func, select

from deployment import until

TASKS = ("timer", "event", "skips", "default", "late")
LIMIT = 45  # seconds, as the DAG has it


def parked(airflow, inbox, conf):
    """Start a run, and wait until all of its waits are parked."""
    run = airflow.run("parked", conf)
    for task in TASKS:
        until(lambda task=task: (row := inbox(run, task)) and row.parked, f"{task} is parked")
    return run


@pytest.fixture
def triggers(airflow):
    """Count the trigger rows of a run, and those that nobody has."""
    engine = create_engine(airflow.environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"])

    def count(run=None):
        query = select(func.count()).select_from(Trigger)
        query = query.outerjoin(TaskInstance, TaskInstance.trigger_id == Trigger.id)
        if run:
            query = query.where(TaskInstance.run_id == run.run_id)
        else:
            watch = select(AssetWatcherModel.trigger_id)
            query = query.where(TaskInstance.id.is_(None), Trigger.id.not_in(watch))
        with engine.connect() as connection:
            return connection.scalar(query)

    yield count
    engine.dispose()


@pytest.fixture
def another(strict):
    """The second API server, which lives again afterwards."""
    yield strict
    if not strict.components["api-server"].alive:
        strict.restart("api-server")
        until(strict.answers, "it answers")


def test_without_a_trigger_they_get_their_events_and_keep_their_deadlines(airflow, another, inbox, triggers):
    """All API servers and the triggerer are killed meanwhile, and the triggerer stays dead."""
    due = datetime.now(timezone.utc) + timedelta(seconds=LIMIT)
    run = parked(airflow, inbox, {"due": due.isoformat(), "key": "parked"})
    api_servers = airflow.components["api-server"], another.components["api-server"]
    for component in (*api_servers, airflow.components["triggerer"]):
        component.kill()
        assert not component.alive
    ends = max(due, *(inbox(run, task).deadline for task in ("skips", "default", "late")))
    assert datetime.now(timezone.utc) < due, "the first moment has passed before nobody was there"
    until(lambda: datetime.now(timezone.utc) > ends, "all moments pass while no API server is there")
    airflow.restart("api-server")
    until(airflow.answers, "the API server answers")

    states = {"timer": "success", "skips": "skipped", "default": "success", "late": "failed"}
    for task, state in states.items():
        run.until_task(task, state)
    assert run.xcom("timer")["__data__"]["timestamp"] == due.timestamp()
    assert run.xcom("default") == {"of": "default"}
    assert {task: run.worker_starts(task) for task in states} == {"timer": 0, "skips": 0, "default": 0, "late": 1}
    assert "No event of HttpListener came" in run.logs("late")
    assert "The wait is parked" in run.logs("timer")

    run.clear("event")  # there is nobody who could begin it again
    airflow.restart("triggerer")
    until(lambda: inbox(run, "event").parked and inbox(run, "event").generation == 2, "the cleared wait is parked")
    airflow.components["triggerer"].kill()
    sent = airflow.request("POST", f"{airflow.url}/events/keys/parked", {"n": 1})
    assert sent["status"] == "delivered"
    run.until_task("event", "success")
    assert run.xcom("event") == {"n": 1}


def test_a_user_ends_and_clears_a_parked_wait(airflow, inbox, triggers):
    due = datetime.now(timezone.utc) + timedelta(hours=1)
    run = parked(airflow, inbox, {"due": due.isoformat(), "key": "nobody's"})
    assert (triggers(run), {run.task_state(task) for task in TASKS}) == (0, {"deferred"})
    until(lambda: triggers() == 0, "Airflow has deleted the triggers")
    run.mark("timer", "success")
    run.mark("event", "failed")
    run.clear("late")
    until(lambda: inbox(run, "late").generation == 2 and inbox(run, "late").parked, "it is parked again")
    for task in ("skips", "default", "late"):
        run.mark(task, "failed")
    assert run.finished() == "failed"
    assert triggers(run) == 0
