"""Hosted waits that watch a log: each rests until something is found for it, and goes the usual way then."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from types import SimpleNamespace

import pytest
from airflow.models.trigger import Trigger
from airflow_events.errors import SourceMisconfigured
from airflow_events.inbox.models import EventWait
from airflow_events.listeners.support.watch_listener import LogWatchListener
from airflow_events.listeners.support.watching import Watch, watches
from airflow_events.triggers import event as event_trigger
from airflow_events.triggers import host as host_trigger
from airflow_events.triggers import resting as resting_waits
from awaiting import until
from hosting import Hosting
from memory_log import MemoryHub
from sqlalchemy import update


class MemoryWatch(LogWatchListener):
    """Watches the log of the test."""

    hubs: list[MemoryHub] = []  # noqa: RUF012

    @watches
    def poll_for_event(self, *, match=None, since=None, on_undecodable="skip"):
        def make():
            self.hubs.append(MemoryHub())
            return self.hubs[-1]

        return Watch("the log", make, match, since, on_undecodable)


class Polls(MemoryWatch):
    """Somebody's own, of which only the poll itself can tell what it looks for."""

    polled = 0

    async def poll_for_event(self, **arguments):
        Polls.polled += 1
        return {"mine": await super().poll_for_event(**arguments)}


class World(Hosting):
    async def wait(self, **more):
        """A wait that its own trigger hands to its host."""
        ti = self.waits.deferred(**self.trigger())
        arguments = {name: more.pop(name) for name in ("match", "since", "on_undecodable") if name in more}
        await self.waits.trigger(ti, listener="m:MemoryWatch", listener_kwargs=arguments, **more).until_ended()
        return ti

    def state(self, ti):
        return self.waits.state(ti).state

    @property
    def log(self):
        return MemoryWatch.hubs[-1]


@pytest.fixture
def world(waits, monkeypatch):
    MemoryWatch.hubs.clear()
    Polls.polled = 0
    return World(waits, monkeypatch, MemoryWatch)


async def resting(world, host, count):
    await until(lambda: MemoryWatch.hubs and len(world.log.seekers) == count and not host._waits)
    assert len(host._resting) == count


async def test_it_is_nothing_of_asyncio_until_its_message_is_there(world):
    first, second, third = [await world.wait(match={"n": n}) for n in (1, 2, 2)]
    async with world.running() as host:
        await resting(world, host, 3)
        generation = world.waits.row(second).generation
        world.log.send({"n": 2})
        await until(lambda: {world.state(ti) for ti in (second, third)} == {"success"})
        assert world.waits.xcoms(second)["return_value"]["value"] == {"n": 2}
        assert world.waits.row(second).generation == generation  # nothing was asked but to record it
        assert world.state(first) == "deferred"
        await resting(world, host, 1)


async def test_it_ends_when_its_time_is_up(world):
    default, worker, none = [
        await world.wait(match={"n": 1}, timeout=0.5, default=["late"]),
        await world.wait(match={"n": 2}, timeout=0.5),
        await world.wait(match={"n": 3}),
    ]
    async with world.running() as host:
        await until(lambda: world.state(default) == "success" and world.state(worker) == "scheduled")
        assert world.waits.xcoms(default) == {"return_value": "late"}
        await resting(world, host, 1)
    assert world.state(none) == "deferred"


async def test_when_the_clock_is_set_forward_its_time_is_up_within_a_step(world, monkeypatch):
    monkeypatch.setattr(resting_waits, "_LONGEST_PAUSE", 0.05)
    ti = await world.wait(match={"n": 1}, timeout=3600, default=["late"])
    async with world.running() as host:
        await resting(world, host, 1)
        ahead = time.time() + 4000
        monkeypatch.setattr(resting_waits, "time", SimpleNamespace(time=lambda: ahead))
        await until(lambda: not host._resting)
    assert world.state(ti) == "deferred"  # by the clock of the inbox there is time left: it polls on


async def test_what_the_source_refuses_fails_the_try_of_each(world):
    tis = [await world.wait(match={"n": n}) for n in range(3)]
    async with world.running() as host:
        await resting(world, host, 3)
        world.log.trouble = SourceMisconfigured("no right to read")
        await until(lambda: all(world.waits.state(ti).next_method == "__fail__" for ti in tis))
        assert len(host._resting) == 0
    assert "no right to read" in str(world.waits.state(tis[0]).next_kwargs)


async def test_a_message_that_cannot_be_read_fails_the_one_that_wants_to_know(world):
    fails, skips = await world.wait(on_undecodable="fail"), await world.wait(on_undecodable="skip")

    def broken():
        raise ValueError("half a message")

    async with world.running() as host:
        await resting(world, host, 2)
        world.log.send(broken)
        await until(lambda: world.waits.state(fails).next_method == "__fail__")
        await resting(world, host, 1)
        world.log.send({"n": 1})
        await until(lambda: world.state(skips) == "success")


async def test_one_that_is_cleared_or_ended_by_others_is_served_no_more(world):
    stays, cleared, marked = [await world.wait(match={"n": 1}) for _ in range(3)]  # the first is the anchor
    async with world.running() as host:
        await resting(world, host, 3)
        world.waits.again(cleared, cleared=True, state=None, next_method=None, trigger_id=None)
        world.waits.set(marked, state="failed", trigger_id=None)
        await resting(world, host, 1)
        assert set(host._resting) == {stays}


async def test_of_two_processes_that_have_the_host_one_ends_the_task(world):
    """Airflow moves a trigger while the process that had it still lives: each finds the message."""
    ti = await world.wait(match={"n": 1})
    async with world.running() as one, world.running() as other:
        await until(lambda: MemoryWatch.hubs and len(world.log.seekers) == 2)
        world.log.send({"n": 1})
        await until(lambda: world.state(ti) == "success")
        await until(lambda: not one._waits and not world.log.seekers)
        assert not other._resting
    assert world.waits.row(ti).phase == "committed"


async def test_one_that_another_process_has_begun_since_begins_again_before_it_records(world):
    ti = await world.wait(match={"n": 1})
    async with world.running() as host:
        await resting(world, host, 1)
        assert world.waits.begin(ti, hosted=True).status == "done"
        world.log.send({"n": 1})
        await until(lambda: world.state(ti) == "success")
    assert world.waits.row(ti).generation > 2


async def test_one_that_has_an_event_by_now_ends_with_that(world):
    ti = await world.wait(match={"n": 1})
    async with world.running() as host:
        await resting(world, host, 1)
        generation = world.waits.row(ti).generation
        assert world.waits.record(ti, generation, '"sent"', committed=True).status == "done"
        world.log.send({"n": 1})
        await until(lambda: world.state(ti) == "success")
    assert world.waits.xcoms(ti) == {"return_value": "sent"}


async def test_with_the_host_it_leaves_the_log(world):
    await world.wait(match={"n": 1})
    async with world.running() as host:
        await resting(world, host, 1)
    assert not world.log.seekers


async def test_it_looks_from_where_its_run_was_created(world):
    """As a poll does, which learns it from the inbox; a message of before is not its own."""
    await world.wait(match={"n": 1})
    async with world.running() as host:
        await resting(world, host, 1)
        [watcher] = world.log.seekers
        assert watcher.since == datetime(2026, 11, 23, 12, tzinfo=timezone.utc)


async def test_one_that_an_earlier_version_handed_over_is_polled_for(world):
    """It does not say when its run was created."""
    ti = await world.wait(match={"n": 1})
    kwargs = Trigger._decrypt_kwargs(world.waits.row(ti).parked)
    del kwargs["wait"]["run_created"]
    world.waits.session.execute(update(EventWait).values(parked=Trigger.encrypt_kwargs(kwargs)))
    async with world.running() as host:
        await until(lambda: MemoryWatch.hubs and len(world.log.seekers) == 1)
        assert (len(host._resting), len(host._waits)) == (0, 1)
        world.log.send({"n": 1})
        await until(lambda: world.state(ti) == "success")


async def test_the_anchor_begins_for_its_log_is_that_of_the_host(world, capsys):
    anchor, other = await world.wait(match={"n": 1}), await world.wait(match={"n": 2})
    capsys.readouterr()
    async with world.running(anchor=anchor) as host:
        await until(lambda: MemoryWatch.hubs and len(world.log.seekers) == 2)
        assert (set(host._resting), set(host._waits)) == ({other}, {anchor})
        assert "Waiting for an event" in capsys.readouterr().out


async def test_a_poll_of_somebodys_own_is_made(world, monkeypatch):
    monkeypatch.setattr(event_trigger.reference, "load", lambda _: Polls)
    ti = await world.wait(match={"n": 1})
    async with world.running() as host:
        await until(lambda: MemoryWatch.hubs and len(world.log.seekers) == 1)
        assert (Polls.polled, len(host._resting)) == (1, 0)
        world.log.send({"n": 1})
        await until(lambda: world.state(ti) == "success")
    assert world.waits.xcoms(ti)["return_value"]["mine"]["value"] == {"n": 1}


async def test_what_is_wrong_with_its_arguments_fails_its_try(world):
    ti, other = await world.wait(match=5), await world.wait(match={"n": 1})
    async with world.running() as host:
        await until(lambda: world.waits.state(ti).next_method == "__fail__")
        await until(lambda: set(host._resting) == {other})
    assert "match is a mapping" in str(world.waits.state(ti).next_kwargs)


async def test_what_concerns_it_is_told_with_its_name_in_the_log_of_the_host(world, caplog):
    ti = await world.wait(match={"n": 1})
    async with world.running() as host:
        await resting(world, host, 1)
        world.log.start_over("was recreated")
    _, _, run_id, _ = world.waits._keys[ti]
    assert f"shop/{run_id}/wait/-1: the log was recreated" in caplog.text


async def test_a_message_that_all_wait_for_lets_others_have_the_loop(world, turn):
    tis = [await world.wait() for _ in range(300)]
    async with world.running() as host:
        await resting(world, host, 300)
        begun = turn()
        world.log.send({"n": 1})
        await until(lambda: all(world.state(ti) == "success" for ti in tis[-3:]) and not host._waits)
        assert turn() - begun > 300 / host_trigger._AT_ONCE
