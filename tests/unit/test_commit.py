"""How a recorded event is committed: by a fresh listener, again while it fails, and not for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from airflow_events.errors import CommitFailed, EventLost
from airflow_events.listeners.base import EventListener, Wait, current_wait
from airflow_events.listeners.support.commit import commit, release

WAIT = Wait("dag", "run", "task", index=3, after="0123456789")


@pytest.fixture
def log():
    return []


@pytest.fixture
def listener(log):
    class Source(EventListener):
        failures: list[Exception] = []  # noqa: RUF012

        async def poll_for_event(self) -> Any: ...

        async def event_checkpointed(self, event):
            log.append(("commit", event, current_wait().id))
            if self.failures:
                raise self.failures.pop(0)

        async def event_released(self, event, *args, **kwargs):
            log.append(("release", event, args, kwargs))
            if self.failures:
                raise self.failures.pop(0)

    return Source


class Watch(EventListener):
    async def poll_for_event(self) -> Any: ...


async def test_an_event_is_committed_in_the_name_of_its_wait(listener, log):
    await commit(listener, WAIT, "e")
    assert log == [("commit", "e", "dag/run/task/-1#3~01234567")]


async def test_a_failing_commit_is_tried_again(listener, log):
    listener.failures += [ConnectionError("away"), TimeoutError()]
    await commit(listener, WAIT, "e")
    assert len(log) == 3


async def test_a_lost_event_is_lost_at_once(listener, log):
    listener.failures.append(EventLost("other has it"))
    with pytest.raises(EventLost):
        await commit(listener, WAIT, "e")
    assert len(log) == 1


async def test_a_commit_that_never_succeeds_fails_with_its_cause(listener, log, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__COMMIT_TIMEOUT", "0.1")
    listener.failures += [ConnectionError("away")] * 9
    with pytest.raises(CommitFailed, match="its event is recorded") as failed:
        await commit(listener, WAIT, "e")
    assert isinstance(failed.value.__cause__, ConnectionError)


async def test_a_commit_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__COMMIT_TIMEOUT", "0.1")

    class Hangs(Watch):
        async def event_checkpointed(self, event):
            await asyncio.Event().wait()

    with pytest.raises(CommitFailed):
        await commit(Hangs, WAIT, "e")


async def test_a_cancelled_commit_is_cancelled_and_not_tried_again(log):
    class Hangs(Watch):
        async def event_checkpointed(self, event):
            log.append("begun")
            try:
                await asyncio.Event().wait()
            finally:
                log.append("ended")

    task = asyncio.create_task(commit(Hangs, WAIT, "e"))
    while not log:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["begun", "ended"]


@pytest.mark.parametrize("raised", [asyncio.CancelledError(), SystemExit(3)])
async def test_what_ends_others_is_a_failure_of_the_commit(listener, log, raised, caplog):
    """What it awaits may be cancelled by its client; and a helper may call ``sys.exit``."""
    listener.failures.append(raised)
    await commit(listener, WAIT, "e")
    assert len(log) == 2
    assert "event_checkpointed " + ("called sys.exit(3)" if raised.args else "cancelled itself") in caplog.text


async def test_each_commit_has_an_instance_of_its_own():
    instances = []

    class Source(Watch):
        async def event_checkpointed(self, event):
            instances.append(self)
            if len(instances) < 3:
                raise ConnectionError

    await commit(Source, WAIT, "e")
    assert len({id(instance) for instance in instances}) == 3


async def test_what_cannot_be_given_back_harms_nothing(listener, log):
    listener.failures.append(ConnectionError("away"))
    await release(listener, WAIT, "e", ("a",), {"b": 1})
    assert log == [("release", "e", ("a",), {"b": 1})]
    await release(Watch, WAIT, "e", (), {})
