"""The trigger of a host beside the inbox's transactions: which waits it polls for, and with what."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import greenback
import pytest
from airflow.models.trigger import Trigger
from airflow_events.errors import EventUndecodable, InboxRefused, ListenerUnavailable
from airflow_events.inbox import transactions
from airflow_events.inbox.entries import Answer, Record, Status
from airflow_events.inbox.models import EventHost, EventWait
from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.support import commit
from airflow_events.triggers import event as event_trigger
from airflow_events.triggers import host as host_trigger
from awaiting import until
from hosting import Hosting
from sqlalchemy import select, update


class Watch(EventListener):
    hosted = True
    polled: list[tuple[str, str]] = []  # noqa: RUF012
    portals: list[bool] = []  # noqa: RUF012

    async def poll_for_event(self, path):
        self.polled.append((current_wait().run_id, path))
        self.portals.append(greenback.has_portal())
        if path.startswith("raise "):
            raise ValueError(path)
        await asyncio.Event().wait()


class World(Hosting):
    """Hosted waits, in one database."""

    async def wait(self, path):
        ti = self.waits.deferred(**self.trigger())
        await self.begin(ti, path)
        return ti

    def clear(self, ti):
        return self.waits.again(ti, cleared=True, **self.trigger())

    async def begin(self, ti, path):
        """Do what its own trigger does: hand it to its host."""
        await self.waits.trigger(ti, listener="m:Watch", listener_args=[path]).until_ended()


@pytest.fixture
def world(waits, monkeypatch):
    Watch.polled.clear()
    Watch.portals.clear()
    return World(waits, monkeypatch, Watch)


@pytest.mark.parametrize("portal", [True, False])
async def test_a_listener_may_call_airflow_as_in_a_trigger_of_its_own(world, portal):
    await world.wait("a")
    async with world.running(portal=portal):
        await until(lambda: Watch.polled)
    assert Watch.portals == [portal]


async def test_a_cleared_wait_polls_with_the_arguments_of_now(world):
    """Its DAG was mended; until its new trigger has begun, its row has those of before."""
    first, second = await world.wait("/old"), await world.wait("/old")
    async with world.running():
        await until(lambda: len(Watch.polled) == 2)
        second = world.clear(second)
        await asyncio.sleep(0.3)
        await world.begin(second, "/new")
        await until(lambda: len(Watch.polled) == 3)
        await asyncio.sleep(0.5)
    assert Watch.polled[2:] == [(world.waits._keys[second][2], "/new")]
    assert "/new" in world.waits.row(second).call and "/old" in world.waits.row(first).call


async def test_a_wait_that_joined_by_a_clock_that_is_behind_is_polled_for(world, monkeypatch):
    ahead = datetime.now(timezone.utc) + timedelta(seconds=15)
    with monkeypatch.context() as patch:
        patch.setattr(transactions, "_now", lambda: ahead)
        await world.wait("ahead")
    async with world.running():
        await until(lambda: len(Watch.polled) == 1)
        await world.wait("behind")
        await until(lambda: len(Watch.polled) == 2)


@pytest.mark.parametrize("when", ["before it begins", "as it polls"])
async def test_a_hosted_wait_that_fails_fails_its_try(world, monkeypatch, when):
    """As of its listener's module after a triggerer's restart; or with a text that Airflow could not store."""
    first, second = await world.wait("raise \0 \ud83d"), await world.wait("raise \0 \ud83d")
    if when == "before it begins":

        def gone(_):
            raise ListenerUnavailable("the listener m:Watch cannot be imported here")

        monkeypatch.setattr(event_trigger.reference, "load", gone)
    async with world.running():
        await until(lambda: all(world.waits.state(ti).next_method == "__fail__" for ti in (first, second)))
    said = str(world.waits.state(first).next_kwargs)
    assert ("cannot be imported" if when == "before it begins" else "\\\\x00 \\\\ud83d") in said


async def test_one_that_cannot_be_read_fails_its_try_and_leaves_the_others_their_host(world, monkeypatch, caplog):
    unreadable, other = await world.wait("a"), await world.wait("b")
    session = world.waits.session
    of_it = EventWait.parked == world.waits.row(unreadable).parked
    session.execute(update(EventWait).where(of_it).values(parked="of another key"))
    session.commit()

    def refuse(token):
        raise ValueError("another Fernet key")

    monkeypatch.setattr(transactions, "get_fernet", lambda: SimpleNamespace(decrypt=refuse))
    async with world.running():
        await until(lambda: Watch.polled and world.waits.state(unreadable).next_method == "__fail__")
    assert Watch.polled == [(world.waits._keys[other][2], "b")]
    assert f"What the hosted wait {unreadable} keeps cannot be read" in caplog.text
    assert "cannot be read: is [core] fernet_key another one?" in str(world.waits.state(unreadable).next_kwargs)


async def test_one_that_another_version_has_begun_fails_its_try_and_leaves_the_others_their_host(world):
    later, other = await world.wait("a"), await world.wait("b")
    kwargs = Trigger._decrypt_kwargs(world.waits.row(later).parked)
    changed = EventWait.__table__.update().where(EventWait.run_id == world.waits._keys[later][2])
    world.waits.session.execute(changed.values(parked=Trigger.encrypt_kwargs({**kwargs, "of_later": 1})))
    async with world.running():
        await until(lambda: Watch.polled and world.waits.state(later).next_method == "__fail__")
    assert Watch.polled == [(world.waits._keys[other][2], "b")]
    assert "unexpected keyword argument 'of_later'" in str(world.waits.state(later).next_kwargs)


async def test_waits_are_read_once_and_not_at_each_look(world, monkeypatch):
    monkeypatch.setattr(transactions, "_OVERLAP", timedelta(seconds=0.1))
    read, kwargs = [], transactions._kwargs
    monkeypatch.setattr(transactions, "_kwargs", lambda row: (read.append(row.id), kwargs(row))[1])
    await world.wait("a")
    await asyncio.sleep(0.2)
    async with world.running():
        await until(lambda: Watch.polled)
        await asyncio.sleep(0.5)
    assert len(read) == 1


class Queue(EventListener):
    """One whose events are taken away by the commit."""

    hosted = True
    committed: list[str] = []  # noqa: RUF012
    released: list[str] = []  # noqa: RUF012
    may_commit = True

    async def poll_for_event(self, queue):
        return {"id": f"{queue} {current_wait().run_id}"}

    def event_id(self, event):
        return event["id"]

    async def event_checkpointed(self, event):
        while not Queue.may_commit:  # its source cannot be reached
            await asyncio.sleep(0.01)
        self.committed.append(event["id"])

    async def event_released(self, event, *args):
        self.released.append(event["id"])


@pytest.fixture
def queues(world, monkeypatch):
    monkeypatch.setattr(event_trigger.reference, "load", lambda _: Queue)
    monkeypatch.setattr(Queue, "committed", [])
    monkeypatch.setattr(Queue, "released", [])
    return world


def phases(world, *tis):
    return [world.waits.row(ti).phase for ti in tis]


async def test_those_of_a_queue_record_and_commit(queues):
    first, second = await queues.wait("q"), await queues.wait("q")
    async with queues.running():
        await until(lambda: len(Queue.committed) == 2)
        await until(lambda: phases(queues, first, second) == ["committed"] * 2)
    assert not Queue.released


async def test_what_is_recorded_and_not_committed_the_next_host_commits(queues, monkeypatch):
    """Also where none of its waits is without an event any more."""
    ti = await queues.wait("q")
    with monkeypatch.context() as patch:
        patch.setattr(Queue, "may_commit", False)
        async with queues.running():
            await until(lambda: phases(queues, ti) == ["recorded"])
    assert not Queue.committed
    async with queues.running():
        await until(lambda: phases(queues, ti) == ["committed"])
    assert len(Queue.committed) == 1


async def test_what_is_recorded_and_cannot_be_committed_is_given_back_as_the_try_fails(queues, monkeypatch):
    """The next try may be in another triggerer, which acknowledges it when it comes again."""

    async def fails(self, event):
        raise OSError("its source refuses it")

    monkeypatch.setenv("AIRFLOW__EVENTS__COMMIT_TIMEOUT", "0.1")
    monkeypatch.setattr(Queue, "event_checkpointed", fails)
    ti = await queues.wait("q")
    async with queues.running():
        await until(lambda: queues.waits.state(ti).next_method == "__fail__")
        await until(lambda: len(Queue.released) == 1)


@pytest.mark.parametrize("by", ["the database", "the API server"])
@pytest.mark.parametrize("hosted", [True, False])
async def test_an_event_that_the_inbox_cannot_record_fails_one_try_and_is_left_aside(
    queues, monkeypatch, hosted, by
):
    """One that is longer than the database takes, say; asked for ever, or by each, it would stop the queue."""
    ask, asked = queues.waits.ask, []

    async def refusing(entry):
        if isinstance(entry, Record):
            asked.append(entry)
            if by == "the API server":
                raise InboxRefused("record", "413, and max_allowed_packet does not matter")
            return Answer(Status.INVALID, "it is longer than max_allowed_packet")
        return await ask(entry)

    monkeypatch.setattr(queues.waits, "ask", refusing)
    monkeypatch.setattr(commit, "_LATER", 0.5)
    if hosted:
        ti = await queues.wait("q")
        async with queues.running():
            await until(lambda: queues.waits.state(ti).next_method == "__fail__")
        assert "max_allowed_packet" in str(queues.waits.state(ti).next_kwargs)
    else:
        monkeypatch.setattr(Queue, "hosted", False)
        trigger = queues.waits.trigger(
            queues.waits.deferred(**queues.trigger()), listener="m:Queue", listener_args=["q"]
        )
        with pytest.raises(EventUndecodable, match=r"not storable: .*max_allowed_packet"):
            await anext(trigger.run())
    assert not Queue.released
    await until(lambda: len(Queue.released) == 1)
    assert len(asked) == 1


async def test_what_the_api_server_refuses_after_the_trigger_was_cancelled_is_given_back(queues, monkeypatch):
    asked, may_answer = [], asyncio.Event()
    ask = queues.waits.ask

    async def refusing(entry):
        if not isinstance(entry, Record):
            return await ask(entry)
        asked.append(entry)
        await may_answer.wait()
        raise InboxRefused("record", "413")

    monkeypatch.setattr(queues.waits, "ask", refusing)
    monkeypatch.setattr(Queue, "hosted", False)
    ti = queues.waits.deferred(**queues.trigger())
    trigger = queues.waits.trigger(ti, listener="m:Queue", listener_args=["q"])
    task = asyncio.ensure_future(anext(trigger.run()))
    await until(lambda: asked)
    task.cancel()
    await asyncio.wait({task})
    may_answer.set()
    await trigger.on_kill()
    assert len(Queue.released) == 1


async def test_another_wait_passes_over_what_one_has_failed_for(queues, monkeypatch):
    """It is given the same message, which another triggerer had in hand; and then one that can be recorded."""
    ask = queues.waits.ask

    async def refusing(entry):
        if isinstance(entry, Record) and "poison" in entry.event:
            return Answer(Status.INVALID, "it is longer than max_allowed_packet")
        return await ask(entry)

    async def poll(self, queue):
        return {"id": next(ids)}

    ids = iter(["poison", "poison", "good"])
    monkeypatch.setattr(queues.waits, "ask", refusing)
    monkeypatch.setattr(Queue, "poll_for_event", poll)
    first, second = await queues.wait("q"), await queues.wait("q")
    async with queues.running():
        await until(lambda: sum(queues.waits.state(ti).next_method == "__fail__" for ti in (first, second)) == 1)
        await until(lambda: sorted(map(str, phases(queues, first, second))) == ["None", "committed"])
    assert Queue.committed == ["good"]


@pytest.fixture
def slow(queues, monkeypatch):
    """Lets records have no answer until it is set."""
    may_answer = asyncio.Event()
    ask = queues.waits.ask

    async def slowly(entry):
        if isinstance(entry, Record):
            await may_answer.wait()
        return await ask(entry)

    monkeypatch.setattr(queues.waits, "ask", slowly)
    return may_answer


def records(host):
    return bool(host._holding) and all(wait.has_event for wait in host._holding.values())


def has_another_trigger(world):
    world.waits.session.execute(select(EventHost)).scalar_one().trigger_id = None
    world.waits.session.flush()


@pytest.mark.parametrize("on_kill", [True, False])
async def test_what_is_in_hand_is_given_back_where_the_host_is_cancelled(queues, slow, on_kill):
    """Also where Airflow does not call `on_kill`, as once the time of the first anchor is up."""
    await queues.wait("q")
    async with queues.running() as host:
        await until(lambda: records(host))
    assert not Queue.released
    slow.set()
    if on_kill:
        await host.on_kill()
    await until(lambda: len(Queue.released) == 1)
    await host.on_kill()  # it has nothing any more that it could give back
    assert len(Queue.released) == 1


async def test_a_host_that_has_another_trigger_lets_its_commits_end(queues, slow, monkeypatch):
    monkeypatch.setattr(host_trigger, "_TO_COMMIT", 5)
    ti = await queues.wait("q")
    async with queues.running() as host:
        await until(lambda: records(host))
        has_another_trigger(queues)
        await asyncio.sleep(0.2)
        slow.set()
        await until(lambda: phases(queues, ti) == ["committed"])
    assert len(Queue.committed) == 1 and not Queue.released


async def test_what_does_not_end_then_is_given_back(queues, slow, monkeypatch):
    monkeypatch.setattr(host_trigger, "_TO_COMMIT", 0.1)
    await queues.wait("q")
    async with queues.running() as host:
        await until(lambda: records(host))
        has_another_trigger(queues)
        await asyncio.sleep(0.3)
        slow.set()
        await until(lambda: Queue.released)
    assert len(Queue.released) == 1


async def test_an_old_try_commits_nothing_any_more(queues, monkeypatch):
    """A clear with replay=False may have given its event back; what it then acknowledged would be lost."""
    ti = await queues.wait("q")
    tries = []

    async def failing(listener, event):
        tries.append(event)
        if len(tries) == 1:
            raise ConnectionError("the source is away")
        listener.committed.append(event["id"])

    monkeypatch.setattr(Queue, "event_checkpointed", failing)
    monkeypatch.setattr(host_trigger, "_LOOK_FOR_ALL_EVERY", 1000)
    async with queues.running():
        await until(lambda: tries)
        queues.clear(ti)
        await asyncio.sleep(2)
    assert len(tries) == 1 and not Queue.committed


async def test_the_waits_on_one_queue_are_one_hosts(queues, monkeypatch):
    """So one triggerer asks for its messages, however many there are."""
    monkeypatch.setattr(event_trigger.settings, "hosts", lambda: 1000)
    tis = [await queues.wait(queue) for queue in "aaabbb"]
    hosts = [queues.waits.row(ti).host for ti in tis]
    assert len(set(hosts[:3])) == len(set(hosts[3:])) == 1
    assert hosts[0] != hosts[3]
