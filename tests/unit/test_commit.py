"""The order of record and commit, which is the promise. The stores are real objects in memory."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from airflow_events.errors import CommitFailed, EventLost, EventNotSerializable, EventRejected
from airflow_events.listeners.base import EventListener, Wait, current_wait
from airflow_events.listeners.commit import Phase, Record, settle
from airflow_events.triggers.record import XComRecord

WAIT = Wait("dag", "run", "task")


class Store:
    after = ""

    def __init__(self, log: list, record: Record | None = None) -> None:
        self.log, self.record = log, record

    async def read(self) -> Record | None:
        return self.record

    async def write(self, record: Record) -> None:
        self.log.append(("write", record.phase.value, record.event))
        self.record = record

    async def drop(self, record: Record) -> None:
        self.log.append(("drop",))
        if self.record is not None and self.record.id == record.id:
            self.record = None


@pytest.fixture
def log():
    return []


@pytest.fixture
def listener(log):
    class Source(EventListener):
        failures: list[Exception] = []  # noqa: RUF012

        def __init__(self) -> None:
            self.instance = len(log)

        async def poll_for_event(self) -> Any: ...

        async def event_checkpointed(self, event):
            log.append(("commit", event, current_wait().id))
            if self.failures:
                raise self.failures.pop(0)

        async def event_released(self, event, *args, **kwargs):
            log.append(("release", event, args, kwargs))

    return Source


class Watch(EventListener):
    async def poll_for_event(self) -> Any: ...


async def test_an_event_is_recorded_then_committed_then_noted(listener, log):
    assert await settle(listener, WAIT, Store(log), "e") == "e"
    assert log == [("write", "recorded", "e"), ("commit", "e", WAIT.id), ("write", "committed", "e")]


async def test_without_a_commit_one_write_does(log):
    assert await settle(Watch, WAIT, Store(log), "e") == "e"
    assert log == [("write", "committed", "e")]


async def test_a_recorded_event_is_committed_and_not_recorded_again(listener, log):
    await settle(listener, WAIT, Store(log, Record("e", Phase.RECORDED)), "e")
    assert log == [("commit", "e", WAIT.id), ("write", "committed", "e")]


async def test_a_committed_event_is_delivered_without_asking_the_source(listener, log):
    assert await settle(listener, WAIT, Store(log, Record("e", Phase.COMMITTED)), "e") == "e"
    assert log == []


async def test_the_recorded_event_wins_and_the_other_is_released_after_the_commit(listener, log):
    store = Store(log, Record("first", Phase.RECORDED))
    assert await settle(listener, WAIT, store, "second", args=("a",), kwargs={"b": 1}) == "first"
    assert log == [
        ("commit", "first", WAIT.id),
        ("write", "committed", "first"),
        ("release", "second", ("a",), {"b": 1}),
    ]


async def test_a_lost_event_is_dropped(listener, log):
    listener.failures.append(EventLost("other has it"))
    with pytest.raises(EventLost):
        await settle(listener, WAIT, Store(log), "e")
    assert log[-1] == ("drop",)


async def test_what_was_polled_before_a_loss_is_given_back(listener, log):
    """It is claimed in a name that the wait has no more; a record of it would have no claim of its own."""
    store = Store(log)
    store.after = "0123456789"
    with pytest.raises(EventLost, match="has another name now"):
        await settle(listener, WAIT, store, "e", args=("a",))
    assert log == [("release", "e", ("a",), {})]


async def test_after_a_loss_an_event_is_committed_in_the_name_in_which_it_was_claimed(listener, log):
    store = Store(log)
    store.after = "0123456789"
    await settle(listener, dataclasses.replace(WAIT, after="0123456789"), store, "e")
    assert store.record.after == "0123456789"
    await settle(listener, WAIT, Store(log, dataclasses.replace(store.record, phase=Phase.RECORDED)), "e")
    assert [step for step in log if step[0] == "commit"] == [("commit", "e", "dag/run/task/-1~01234567")] * 2


async def test_the_record_of_another_triggerer_is_not_dropped(listener, log):
    """This one stood still between reading the record and learning that its event is lost."""
    store = Store(log)

    class Source(listener):
        async def event_checkpointed(self, event):
            store.record = Record("another", Phase.COMMITTED)
            raise EventLost("other has it")

    with pytest.raises(EventLost):
        await settle(Source, WAIT, store, "e")
    assert store.record == Record("another", Phase.COMMITTED)


async def test_a_superfluous_event_is_released_too_if_the_recorded_one_is_lost(listener, log):
    listener.failures.append(EventLost("other has it"))
    with pytest.raises(EventLost):
        await settle(listener, WAIT, Store(log, Record("first", Phase.RECORDED)), "second")
    assert [entry[0] for entry in log] == ["commit", "drop", "release"]


async def test_a_failing_commit_is_tried_again_and_the_record_stays(listener, log):
    listener.failures += [ConnectionError("away"), TimeoutError()]
    assert await settle(listener, WAIT, Store(log), "e") == "e"
    assert [entry[0] for entry in log] == ["write", "commit", "commit", "commit", "write"]


async def test_a_commit_that_never_succeeds_fails_with_its_cause(listener, log, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__COMMIT_TIMEOUT", "0.1")
    listener.failures += [ConnectionError("away")] * 9
    store = Store(log)
    with pytest.raises(CommitFailed, match="its event is recorded") as failed:
        await settle(listener, WAIT, store, "e")
    assert isinstance(failed.value.__cause__, ConnectionError)
    assert store.record == Record("e", Phase.RECORDED)


async def test_a_commit_that_hangs_is_given_up(log, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__COMMIT_TIMEOUT", "0.1")

    class Hangs(Watch):
        async def event_checkpointed(self, event):
            await asyncio.Event().wait()

    with pytest.raises(CommitFailed):
        await settle(Hangs, WAIT, Store(log), "e")


async def test_a_cancelled_commit_is_cancelled_and_not_tried_again(listener, log):
    listener.failures.append(asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        await settle(listener, WAIT, Store(log), "e")
    assert log == [("write", "recorded", "e"), ("commit", "e", WAIT.id)]


async def test_what_cannot_be_stored_is_refused_before_the_record(listener, log):
    with pytest.raises(EventNotSerializable, match=r"event\['a'\]\[1\]"):
        await settle(listener, WAIT, Store(log), {"a": [1, object()]})
    assert log == []


async def test_each_commit_has_an_instance_of_its_own(log):
    instances = []

    class Source(Watch):
        async def event_checkpointed(self, event):
            instances.append(self)
            if len(instances) < 3:
                raise ConnectionError

    await settle(Source, WAIT, Store(log), "e")
    assert len({id(instance) for instance in instances}) == 3


async def test_a_record_that_is_dropped_late_takes_no_later_one_with_it(monkeypatch):
    """Two triggerers learn that the first event is lost, and one of them is slow to say so."""
    xcoms = {}

    async def get(self, key):
        return xcoms.get(key)

    async def put(self, key, value):
        xcoms[key] = value

    monkeypatch.setattr(XComRecord, "_get", get)
    monkeypatch.setattr(XComRecord, "_set", put)
    store = XComRecord(WAIT)
    lost, later = Record("e", Phase.RECORDED, "1"), Record("e", Phase.COMMITTED, "2")
    await store.write(lost)
    assert await store.read() == lost
    await store.drop(lost)
    assert store.after == ""
    assert await store.read() is None
    assert store.after == "1"
    await store.write(later)
    await store.drop(lost)
    assert await store.read() == later


async def test_the_commit_keeps_the_moment_of_the_record(listener, log):
    store = Store(log)
    await settle(listener, WAIT, store, "event")
    recorded_at = store.record.recorded_at
    assert recorded_at
    read = Record.from_dict(store.record.as_dict())
    assert (read.phase, read.recorded_at) == (Phase.COMMITTED, recorded_at)
    assert next(iter(store.record.as_dict())) == "phase"  # by which the page finds records in the database


def test_a_record_of_an_earlier_version_has_no_moment():
    assert Record.from_dict({"phase": "recorded", "event": 1}).recorded_at == ""


async def test_an_event_that_came_early_does_not_lapse_once_it_is_taken(log):
    soon = datetime.now(timezone.utc) + timedelta(minutes=1)
    store = Store(log, Record("early", Phase.COMMITTED, "1", until=soon, receipt={"key": "k"}))
    assert await settle(Watch, WAIT, store, "early") == "early"
    assert store.record.until is None
    assert store.record.receipt == {"key": "k"}


def test_a_record_is_read_as_it_was_written():
    record = Record([1], Phase.COMMITTED, "1", datetime(2030, 1, 1, tzinfo=timezone.utc), {"key": None})
    assert Record.from_dict(record.as_dict()).as_dict() == record.as_dict()
    assert not record.lapsed
    assert Record([1], Phase.COMMITTED, "1", datetime(2020, 1, 1, tzinfo=timezone.utc)).lapsed
    assert set(Record(1, Phase.RECORDED).as_dict()) == {"phase", "event", "id", "recorded_at"}


async def test_a_wait_that_was_rejected_takes_no_event(log, listener):
    store = Store(log, Record({"reason": "no", "by": "ada", "generation": 3}, Phase.REJECTED, "1"))
    with pytest.raises(EventRejected, match="rejected by ada: no"):
        await settle(listener, WAIT, store, "polled")
    assert log == []
