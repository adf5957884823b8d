"""Watching a log in memory, by the hub that all sources use: what is read, and how often."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from datetime import datetime, timedelta, timezone

import pendulum
import pytest
from airflow_events.errors import EventUndecodable
from airflow_events.listeners.base import Wait
from airflow_events.listeners.support import watching as log
from airflow_events.listeners.support.values import Match
from airflow_events.listeners.support.watching import message_of, since_of
from memory_log import NOW, MemoryHub


@pytest.fixture
async def hub():
    hub = MemoryHub()
    yield hub
    await asyncio.wait_for(hub.close(), 5)


async def soon(task):
    return await asyncio.wait_for(task, 10)


async def until(condition):
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise TimeoutError


def fill(hub, count, span):
    """Send messages without a match, evenly over the time that ``span`` has until a minute ago."""
    for number in range(count):
        hub.send({"id": "old"}, datetime.now(timezone.utc) - timedelta(minutes=1) - span * (1 - number / count))


def ago(**kwargs):
    return datetime.now(timezone.utc) - timedelta(**kwargs)


async def at_the_end(hub):
    """Open a wait that stays, at the log's end."""
    task = hub.watch({"id": "never"}, ago(seconds=1))
    await until(lambda: hub._end is not None and hub._end.position == len(hub.messages))
    return task


async def test_an_old_since_does_not_send_the_reader_at_the_end_back(hub):
    fill(hub, 1000, timedelta(hours=1))
    staying = await at_the_end(hub)
    old = [hub.watch({"id": "never"}, ago(hours=2)) for _ in range(5)]
    await until(lambda: len(hub.reads) > 50)
    hub.send({"id": "new"})
    assert (await soon(hub.watch({"id": "new"}, ago(seconds=0.5))))["value"] == {"id": "new"}
    await until(lambda: hub._end.watchers.keys() >= set(hub.seekers))
    at_end, catching_up = hub.read_by()
    assert (at_end, catching_up) == (1, 1000)
    assert hub.open == 1
    assert not any(task.done() for task in (*old, staying))


async def test_many_that_come_one_after_another_are_caught_up_together(hub):
    """A hundred waits that look from an hour before, each when a tenth of that was read since the last one."""
    fill(hub, 1000, timedelta(hours=1))
    await at_the_end(hub)
    hub.reads_left = 0
    tasks = []
    for number in range(100):
        tasks.append(hub.watch({"id": "new", "n": number}, ago(hours=2)))
        hub.reads_left = 20  # of which the reader at the end makes half
        await until(lambda: hub.reads_left == 0)
    hub.reads_left = math.inf
    await until(lambda: hub._end.watchers.keys() >= set(hub.seekers))
    at_end, *catching_up = hub.read_by()
    assert at_end == 0
    assert catching_up == [1000] * len(catching_up)
    assert 10 <= len(catching_up) <= 13
    for number in range(100):
        hub.send({"id": "new", "n": number})
    assert [(await soon(task))["number"] for task in tasks] == list(range(1000, 1100))


async def test_who_has_little_to_catch_up_does_not_wait_for_who_has_much(hub):
    fill(hub, 5000, timedelta(days=30))
    fill(hub, 100, timedelta(minutes=10))
    hub.send({"id": "late"}, ago(seconds=50))
    await at_the_end(hub)
    months = [hub.watch({"id": "late"}, ago(days=days)) for days in (32, 31)]
    await until(lambda: len(hub.reads) > 10)
    await soon(hub.watch({"id": "late"}, ago(minutes=12)))
    assert not any(task.done() for task in months)
    assert max(hub.read_by()) < 1000
    for task in months:
        await soon(task)


async def test_who_joins_those_at_the_end_misses_nothing_and_gets_the_first(hub):
    """While the readers go on, messages are sent: each wait gets the first of its own, whoever reads it for it."""
    fill(hub, 500, timedelta(hours=1))
    await at_the_end(hub)
    tasks = []
    for number in range(300):
        hub.send({"id": number, "time": 1})
        if number % 3 == 0:
            tasks.append((number, hub.watch({"id": number}, ago(hours=2))))
        if number % 7 == 0:
            await asyncio.sleep(0)
        hub.send({"id": number, "time": 2})
    for number in range(300, 400):
        tasks.append((number, hub.watch({"id": number}, ago(hours=2))))
    for number in range(300, 400):
        hub.send({"id": number, "time": 1})
        hub.send({"id": number, "time": 2})
        await asyncio.sleep(0)
    for number, task in tasks:
        assert (await soon(task))["value"] == {"id": number, "time": 1}


async def test_a_connection_that_is_lost_while_some_catch_up_loses_nothing(hub):
    fill(hub, 300, timedelta(hours=1))
    hub.messages[200] = message_of(hub.messages[200].timestamp, 1, "it", lambda: {"value": {"id": "it"}})
    staying = await at_the_end(hub)
    task = hub.watch({"id": "it"}, ago(hours=2))
    for reads in (5, 10, 15):
        await until(lambda: len(hub.reads) > reads)  # noqa: B023
        hub.trouble = ConnectionError("lost")
    assert (await soon(task))["value"] == {"id": "it"}
    hub.send({"id": "never"})
    await soon(staying)


async def test_the_kept_messages_are_bounded_by_number_and_by_bytes(hub, monkeypatch):
    monkeypatch.setattr(log, "_KEPT", 100)
    monkeypatch.setattr(log, "_KEPT_BYTES", 1000)
    monkeypatch.setattr(log, "_TOGETHER", 1)  # so that they are dropped one by one
    await at_the_end(hub)
    for size, kept in ((1, 100), (50, 20), (5000, 0)):
        for _ in range(200):
            hub.send({"id": size}, size=size)
        await until(lambda: hub._end.position == len(hub.messages))
        await asyncio.sleep(0.01)
        assert len(hub._end.kept()) == kept
        # What is not kept any more is read again.
        assert (await soon(hub.watch({"id": size}, ago(minutes=1))))["value"] == {"id": size}


async def test_what_is_read_one_by_one_is_kept_with_few_positions(hub):
    await at_the_end(hub)
    for number in range(250):
        hub.send({"id": number})
        await until(lambda: hub._end.position == len(hub.messages))
    assert len(hub._end.kept()) == 250
    assert len(hub._end._batches) <= 4
    for number in (0, 99, 100, 249):
        assert (await soon(hub.watch({"id": number}, ago(minutes=1))))["value"] == {"id": number}


async def test_a_log_that_was_made_anew_is_read_from_its_beginning(hub):
    for _ in range(50):
        hub.send({"id": "old"})
    task = await at_the_end(hub)
    hub.messages.clear()
    hub.send({"id": "never"})
    for _ in range(100):
        hub.send({"id": "old"})
    hub.made_anew, hub.trouble = True, ConnectionError("the log is gone")
    assert (await soon(task))["number"] == 0


def fails(error):
    def event():
        raise error

    return event


@pytest.mark.parametrize(
    "bad",
    [
        fails(OverflowError("date value out of range")),
        fails(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no")),
        fails(RecursionError("too deep")),
        fails(KeyError("x")),
        {"id": 1, "text": "a\0b"},
        {"id": 1, "__type": "Order"},
        {"id": 1, "number": 2**70},
        {"id": 1, "": "\ud800"},
    ],
)
async def test_one_message_fails_nobody_but_those_that_want_it_to(hub, bad, caplog):
    patient = hub.watch({"id": 1})
    strict = hub.watch(None, on_undecodable="fail")
    hub.send(bad)
    hub.send({"id": 1})
    with pytest.raises(EventUndecodable, match="the message 0 is not"):
        await soon(strict)
    assert (await soon(patient))["number"] == 1
    assert "skipped: the message 0" in caplog.text


async def test_a_message_that_cannot_be_stored_is_of_no_concern_to_those_that_do_not_want_it(hub):
    strict = hub.watch({"id": 2}, on_undecodable="fail")
    hub.send({"id": 1, "__type": "Order"})
    hub.send({"id": 2})
    assert (await soon(strict))["number"] == 1


async def test_a_message_without_a_moment_counts_as_published_now(hub):
    task = hub.watch(None, ago(seconds=0))
    hub.messages.append(message_of(None, 1, "it", lambda: {"value": 1}))
    assert await soon(task) == {"value": 1}


def test_since_when_a_watch_looks():
    start = datetime(2026, 5, 1, 8, tzinfo=timezone.utc)
    wait = Wait("dag", "run", "task", run_start=start, timezone="Europe/Berlin")
    assert since_of(None, wait) == start
    assert since_of(timedelta(hours=-1), wait) == start - timedelta(hours=1)
    queued = dataclasses.replace(wait, run_created=start - timedelta(hours=2))
    assert since_of(None, queued) == start - timedelta(hours=2)
    assert since_of(timedelta(hours=-1), queued) == start - timedelta(hours=3)
    # As {{ data_interval_start }} is rendered for a backfill, as text and as it is.
    interval = pendulum.datetime(2026, 1, 1, tz="Europe/Berlin")
    for since in (str(interval), interval, interval.isoformat()):
        assert since_of(since, wait) == datetime(2025, 12, 31, 23, tzinfo=timezone.utc)
    with pytest.raises(ValueError, match=r"counts from the start of the run, and .* has none"):
        since_of(None, Wait("dag", "run", "task"))


async def test_waits_that_have_left_are_not_held(hub):
    fill(hub, 100, timedelta(hours=1))
    await at_the_end(hub)
    tasks = [hub.watch({"id": number}, ago(hours=number % 3)) for number in range(100)]
    await asyncio.sleep(0)
    for task in tasks[:50]:  # before they are read for
        task.cancel()
    await until(lambda: len(hub._end.watchers) == 51)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    hub.watch({"id": "other"}, ago(seconds=0))
    await until(lambda: len(hub._end.watchers) == 2)
    assert (len(hub._places), hub._new, hub._late, hub._catching) == (2, [], {}, {})


async def test_those_that_are_matched_slowly_miss_nothing(hub):
    """Matching takes longer than the source may be silent, as it does with thousands of expressions."""
    hub.serve_within = 0.05
    many = [hub.watch(f"order.id == '{number}' && status == 'paid'", ago(seconds=50)) for number in range(3000)]
    await until(lambda: hub._end is not None and len(hub._end.watchers) == 3000)
    for number in range(10):
        hub.send({"order": {"id": str(number)}, "status": "paid"})
    found = await asyncio.wait_for(asyncio.gather(*many[:10]), 60)
    assert [event["number"] for event in found] == list(range(10))


async def test_what_is_kept_is_matched_with_those_who_come(hub, monkeypatch):
    waiting = [hub.watch(f"id == `{number}`") for number in range(1000, 1300)]
    await until(lambda: hub._end is not None and len(hub._end.watchers) == 300)
    for number in range(100):
        hub.send({"id": number})
    await until(lambda: hub._end.position == 100 and not hub._end._not_offered)
    tried = []
    monkeypatch.setattr(Match, "_matches", lambda match, value: tried.append(match) or value["id"] == 90)
    assert (await soon(hub.watch("id == `90`")))["number"] == 90
    assert len(tried) <= 100 + 300
    for task in waiting:
        task.cancel()


@pytest.mark.parametrize("who", ["at the end", "new"])
async def test_what_was_read_is_offered_again_if_the_source_is_lost_meanwhile(hub, monkeypatch, who):
    hub.watch({"id": "nothing"})
    await until(lambda: hub._end is not None)
    offer, cut = hub._offer, []

    async def cut_short(messages, reading, only=None):
        if len(messages) < 10 or cut or (only is None) == (who == "new"):
            return await offer(messages, reading, only)
        cut.append(len(messages))
        await offer(messages[:5], reading, only)
        raise OSError("the source is lost")

    monkeypatch.setattr(hub, "_offer", cut_short)
    found = hub.watch({"id": 9}) if who == "at the end" else None
    await until(lambda: len(hub._end.watchers) == (1 if found is None else 2))
    for number in range(10):
        hub.messages.append(message_of(datetime.now(timezone.utc), 1, "it", lambda n=number: {"value": {"id": n}}))
    if found is None:
        await until(lambda: hub._end.position == 10)
        found = hub.watch({"id": 9})
    assert (await soon(found))["value"] == {"id": 9}
    assert cut


async def test_a_moment_that_the_source_has_cut_is_not_before_since(hub):
    since = NOW.replace(microsecond=123_456)
    cut = since.replace(microsecond=123_000)
    for number, at in enumerate([cut - timedelta(milliseconds=1), cut]):
        hub.messages.append(message_of(at, 1, "it", lambda n=number: {"value": n}, log.MILLISECOND))
    assert (await soon(hub.watch(since=since)))["value"] == 1
    assert (
        message_of(datetime.max.replace(tzinfo=timezone.utc), 1, "it", dict, log.MILLISECOND).timestamp.year
        == 9999
    )
