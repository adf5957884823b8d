"""Metrics with Airflow's own StatsD client and a real socket; each process reads Airflow's settings once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from statsd_receiver import Receiver

from deployment import until

SETTLE = """
import asyncio, time
from airflow_events import metrics
from airflow_events.errors import EventLost
from airflow_events.inbox.entries import Answer, Record
from airflow_events.listeners.base import EventListener, Wait
from airflow_events.listeners.support.commit import delivered
from airflow_events.triggers.calls import Calls
from airflow_events.triggers.gathering import Gathering, Held

class Source(EventListener):
    async def poll_for_event(self): return "event"
    async def event_checkpointed(self, event):
        if self.raises:
            raise self.raises.pop(0)

async def ask(entry):
    if isinstance(entry, Record):
        await asyncio.sleep(0.2)
    return Answer("done")

async def once(*raises):
    Source.raises = list(raises)
    wait = Wait("orders", "run", "wait")
    gathering = Gathering(Source, wait, Calls([[]], {}), Held(ask, "", 1, ""), wanted=1)
    await gathering.begin()
    while not gathering.complete:
        await gathering.changed(5)
    delivered(Source, wait, time.time() - 0.2)

for raises in ([], [ConnectionError("away"), ConnectionError("away")], [EventLost("gone")]):
    asyncio.run(once(*raises))
"""


def run(code: str, **settings: str) -> subprocess.CompletedProcess[str]:
    variables = {f"AIRFLOW__{key.replace('.', '__').upper()}": value for key, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONWARNINGS": "ignore", **variables},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture
def receiver():
    with Receiver() as receiver:
        yield receiver


def test_what_becomes_of_an_event_is_told(receiver):
    run(SETTLE, **receiver.settings)
    tags = {"dag_id": "orders", "listener": "Source"}
    expected = {
        "events.recorded": 4,
        "events.committed": 3,
        "events.commit_failed": 2,
        "events.lost": 1,
        "events.time_to_record": 4,
        "events.time_to_delivery": 3,
    }

    def counts():
        return {name: len(receiver.of(name, **tags)) for name in expected}

    until(lambda: counts() == expected, f"{counts()} is {expected}", 10)
    assert {metric.kind for metric in receiver.of("events.recorded")} == {"c"}
    assert {metric.kind for metric in receiver.of("events.time_to_record")} == {"ms"}
    assert all(metric.value >= 200 for metric in receiver.of("events.time_to_record"))


def test_where_metrics_are_off_nothing_is_asked_or_told():
    run(f"{SETTLE}\nassert not metrics.are_on()\nassert metrics._stats.cache_info().misses == 0")


def test_a_metric_that_cannot_be_sent_harms_nothing():
    done = run(
        "from airflow_events import metrics\nmetrics.count(metrics.LOST, dag_id='a')\nprint('went on')",
        **{"metrics.statsd_on": "True", "metrics.statsd_custom_client_path": "nobody.Nothing"},
    )
    assert done.stdout.strip().endswith("went on")
    assert "A metric could not be sent" in done.stdout + done.stderr
