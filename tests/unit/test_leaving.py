"""How a trigger ends whose wait does not need it any more, and what Airflow makes of that."""

from __future__ import annotations

import asyncio

from airflow.jobs.triggerer_job_runner import TriggerRunner
from airflow.models.base import Base
from airflow.models.trigger import Trigger
from airflow.triggers.base import BaseTrigger
from airflow_events.inbox.entries import Answer, Status
from airflow_events.triggers import event, host
from airflow_events.triggers.host import HostTrigger
from airflow_events.triggers.inbox import Inbox
from sqlalchemy import create_engine, insert


class Leaves(BaseTrigger):
    def serialize(self):
        return "", {}

    async def run(self):
        event.leave()
        yield


class Returns(Leaves):
    async def run(self):
        return
        yield


async def ended(trigger):
    """The ids that Airflow's runner says have ended, and those whose tasks it says are to fail."""
    runner = TriggerRunner()
    runner.triggers[7] = {"task": None, "is_watcher": False, "name": "a trigger", "events": 0}
    task = asyncio.create_task(runner.run_trigger(7, trigger))
    runner.triggers[7]["task"] = task
    await asyncio.wait({task})
    return await runner.cleanup_finished_triggers(), [id for id, _ in runner.failed_triggers]


async def test_airflow_takes_leaving_for_no_failure():
    assert await ended(Leaves()) == ([7], [])
    assert await ended(Returns()) == ([7], [7])


def test_sqlite_gives_the_number_of_a_deleted_trigger_to_the_next_one():
    """For which a trigger must not stay until Airflow has removed it: see `leave`."""
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine, [Trigger.__table__])
    table = Trigger.__table__
    with engine.begin() as connection:
        made = []
        for _ in range(2):
            what = {"classpath": "a.B", "kwargs": "{}", "created_date": event._now()}
            made.append(connection.execute(insert(table).values(**what)).inserted_primary_key.id)
            connection.execute(table.delete())
    assert made == [1, 1]


async def test_a_host_that_has_another_trigger_leaves(monkeypatch):
    async def ask(inbox, entry):
        asked.append(entry)
        return Answer(Status.DONE if len(asked) < 3 else Status.OUTLIVED)

    asked = []
    monkeypatch.setattr(Inbox, "ask", ask)
    monkeypatch.setattr(host, "_LOOK_EVERY", 0.01)
    trigger = HostTrigger(host="ab")
    trigger.trigger_id = 7
    assert await ended(trigger) == ([7], [])
    assert {entry.trigger for entry in asked} == {7}
