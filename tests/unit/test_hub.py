"""A hub over a source in memory that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections import Counter

import pytest
from airflow_events.errors import SourceMissing, SourceUnreachable
from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.support.hub import Hub, Seeker, Troubles, shared_log


class Source:
    def __init__(self):
        self.there = True
        self.serves = True
        self.broken = None
        self.events = []
        self.connections = 0


class MemoryHub(Hub):
    def __init__(self, source):
        self.source = source
        super().__init__("the source")

    async def connect(self):
        self.check()
        self.source.connections += 1

    async def serve(self):
        self.check()
        if not self.source.serves:
            raise ConnectionError("it does not serve")
        for seeker in list(self.seekers):
            if self.source.events and not seeker.done:
                seeker.give(self.source.events.pop(0))
        await self.pause(0.02)

    async def disconnect(self):
        pass

    def check(self):
        if not self.source.there:
            raise ConnectionError("away")
        if self.source.broken:
            raise self.source.broken


@pytest.fixture
async def hub():
    hub = MemoryHub(Source())
    yield hub
    await asyncio.wait_for(hub.close(), 5)


def take(hub):
    return asyncio.create_task(hub.take(Seeker()))


async def soon(task):
    return await asyncio.wait_for(task, 5)


async def test_events_go_to_who_waits_first(hub):
    tasks = [take(hub), take(hub)]
    await asyncio.sleep(0.05)
    hub.source.events += ["a", "b"]
    assert [await soon(task) for task in tasks] == ["a", "b"]
    assert hub.seekers == {}
    assert hub.source.connections == 1


async def test_who_is_cancelled_takes_nothing(hub):
    gone, there = take(hub), take(hub)
    await asyncio.sleep(0.05)
    gone.cancel()
    await asyncio.sleep(0)
    hub.source.events.append("a")
    assert await soon(there) == "a"


async def test_it_connects_again(hub):
    task = take(hub)
    await asyncio.sleep(0.05)
    hub.source.there = False
    await asyncio.sleep(0.3)
    assert not task.done()
    hub.source.there = True
    hub.source.events.append("a")
    assert await soon(task) == "a"
    assert hub.source.connections == 2


async def test_what_is_deleted_right_after_it_was_found_is_waited_for():
    """As a source that blocks for seconds when it is asked, and is deleted before the first answer."""

    class Deleted(MemoryHub):
        async def serve(self):
            if self.source.connections == 1:
                raise SourceMissing("there is no such queue")
            await super().serve()

    hub = Deleted(Source())
    hub.source.events.append("a")
    try:
        assert await soon(take(hub)) == "a"
    finally:
        await hub.close()


async def test_a_source_that_is_away_for_too_long(hub, monkeypatch, caplog):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "20")
    hub.source.there = False
    task = take(hub)
    while "the source cannot be reached; trying again for up to 20 s: away" not in caplog.text:
        await asyncio.sleep(0.02)
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
    with pytest.raises(SourceUnreachable, match="the source could not be reached"):
        await soon(task)
    # Who comes later is served, should it be there again.
    hub.source.there = True
    hub.source.events.append("a")
    assert await soon(take(hub)) == "a"


async def test_a_source_that_lets_us_connect_and_does_nothing_more_is_away(hub, monkeypatch, caplog):
    hub.source.serves = False
    task = take(hub)
    while caplog.text.count("cannot be reached") < 2:
        await asyncio.sleep(0.02)
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "0.5")
    with pytest.raises(SourceUnreachable, match=r"the source could not be reached for .* it does not serve"):
        await soon(task)
    assert caplog.text.count("the source cannot be reached") == 2  # in both logs
    assert "reachable again" not in caplog.text
    hub.source.serves = True
    hub.source.events.append("a")
    assert await soon(take(hub)) == "a"


async def test_it_is_told_when_a_source_is_there_again(hub, caplog):
    caplog.set_level(logging.INFO)
    hub.source.serves = False
    task = take(hub)
    while "cannot be reached" not in caplog.text:
        await asyncio.sleep(0.02)
    hub.source.serves = True
    while "the source is reachable again" not in caplog.text:
        await asyncio.sleep(0.02)
    hub.source.events.append("a")
    assert await soon(task) == "a"
    assert caplog.text.count("reachable again") == 2


async def test_what_does_not_go_away_fails_the_waits_at_once_and_later_ones_try_anew(hub):
    hub.source.broken = ValueError("not yours")
    with pytest.raises(ValueError, match="not yours"):
        await soon(take(hub))
    hub.source.broken = None
    hub.source.events.append("a")
    assert await soon(take(hub)) == "a"


async def test_who_joins_while_it_is_away_is_told_too_and_each_once(hub, caplog):
    hub.source.there = False
    first = take(hub)
    while caplog.text.count("cannot be reached") < 2:  # in the log of the triggerer and of the task
        await asyncio.sleep(0.02)
    second = take(hub)
    await asyncio.sleep(0)
    assert caplog.text.count("cannot be reached") == 3
    caplog.set_level(logging.INFO)
    hub.source.there = True
    while "reachable again" not in caplog.text:
        await asyncio.sleep(0.02)
    assert caplog.text.count("cannot be reached") == 3
    assert caplog.text.count("reachable again") == 3
    third = take(hub)
    await asyncio.sleep(0)
    assert caplog.text.count("cannot be reached") == 3
    hub.source.events += ["a", "b", "c"]
    assert [await soon(task) for task in (first, second, third)] == ["a", "b", "c"]


async def test_waits_that_share_a_log_are_told_in_one_line(hub, caplog):
    """As those of a host, of which there may be thousands; a line about one of them has its name."""

    def hosted():
        shared_log.set("a host")
        with working_for(Wait("dag", "run", "task")):
            return take(hub)

    hub.source.there = False
    tasks = [contextvars.copy_context().run(hosted) for _ in range(5)]
    while caplog.text.count("cannot be reached") < 2:  # in the log of the triggerer and of the host
        await asyncio.sleep(0.02)
    tasks.append(contextvars.copy_context().run(hosted))
    await asyncio.sleep(0.1)
    assert caplog.text.count("cannot be reached") == 2
    next(iter(hub.seekers)).tell(logging.WARNING, "its event may be gone")
    assert "dag/run/task/-1: its event may be gone" in caplog.text
    assert "the source cannot be reached" in Troubles.of_loop().of("a host")
    assert not Troubles.of_loop().of("another host")
    hub.source.there = True
    while Troubles.of_loop().of("a host"):
        await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Proxy:
    """What stands before a server that echoes lines: it takes each connection, and is silent if it is told so."""

    def __init__(self):
        self.silent = True
        self.connections = 0

    async def __aenter__(self):
        self._writers = []
        self._server = await asyncio.start_server(self._talk, "127.0.0.1")
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _talk(self, reader, writer):
        self.connections += 1
        self._writers.append(writer)
        while line := await reader.readline():
            if not self.silent:
                writer.write(line)


class EchoHub(Hub):
    """Over a real socket, with a client that knows no time-outs."""

    connect_within = 0.3
    serve_within = 0.3
    asks_first = True

    def __init__(self, port):
        self._port = port
        self._writer = None
        super().__init__("the proxy")

    async def connect(self):
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        if self.asks_first:
            await self.ask()

    async def serve(self):
        answer = await self.ask()
        for seeker in self.seekers:
            seeker.give(answer)

    async def disconnect(self):
        if self._writer is not None:
            self._writer.close()

    async def ask(self):
        self._writer.write(b"hello\n")
        return await self._reader.readline()


class AsksLate(EchoHub):
    asks_first = False


@pytest.mark.parametrize("kind", [EchoHub, AsksLate])
async def test_a_server_that_takes_the_connection_and_says_nothing_is_away(kind, monkeypatch, caplog):
    async with Proxy() as proxy:
        hub = kind(proxy.port)
        try:
            task = take(hub)
            while caplog.text.count("the proxy cannot be reached; trying again") < 2:
                await asyncio.sleep(0.02)
            monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
            with pytest.raises(SourceUnreachable, match=r"the proxy could not be reached for .* not answered"):
                await soon(task)
            assert caplog.text.count("the proxy cannot be reached; trying again") == 2
            assert proxy.connections > 1
        finally:
            await soon(asyncio.create_task(hub.close()))


@pytest.mark.parametrize("kind", [EchoHub, AsksLate])
async def test_a_server_that_says_nothing_for_a_while(kind, caplog):
    caplog.set_level(logging.INFO)
    async with Proxy() as proxy:
        hub = kind(proxy.port)
        try:
            task = take(hub)
            while "cannot be reached" not in caplog.text:
                await asyncio.sleep(0.02)
            proxy.silent = False
            assert await soon(task) == b"hello\n"
        finally:
            await soon(asyncio.create_task(hub.close()))


class Long(MemoryHub):
    """Its serve makes many requests."""

    serve_within = 0.3

    async def serve(self):
        for _ in range(10):
            await asyncio.sleep(0.1)
            self.heard()
        await super().serve()


async def test_a_serve_that_is_long_and_hears_of_its_source_is_not_cut(caplog):
    hub = Long(Source())
    hub.source.events.append("a")
    try:
        assert await soon(take(hub)) == "a"
        assert "cannot be reached" not in caplog.text
        assert hub.source.connections == 1
    finally:
        await hub.close()


class Cancels(MemoryHub):
    """Its client cancels whoever uses it when the connection is lost, as that of RabbitMQ does."""

    async def serve(self):
        if not self.source.serves:
            raise asyncio.CancelledError
        await super().serve()


async def test_a_client_that_cancels_its_user_does_not_end_the_hub(caplog):
    hub = Cancels(Source())
    hub.source.serves = False
    try:
        task = take(hub)
        while "its client has given up" not in caplog.text:
            await asyncio.sleep(0.02)
        hub.source.serves = True
        hub.source.events.append("a")
        assert await soon(task) == "a"
    finally:
        await hub.close()


class Stubborn(MemoryHub):
    """Its client swallows the first cancellation."""

    async def serve(self):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        await asyncio.sleep(3600)


async def test_it_ends_although_its_client_swallows_a_cancellation(monkeypatch):
    monkeypatch.setattr("airflow_events.listeners.support.hub._GOODBYE", 0.2)
    hub = Stubborn(Source())
    task = take(hub)
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait_for(hub.close(), 5)


async def test_an_event_that_many_want_is_given_to_some_of_them_in_each_turn(hub, turn):
    done = []

    async def one():
        await hub.take(Seeker())
        done.append(turn())

    tasks = [asyncio.create_task(one()) for _ in range(200)]
    await asyncio.sleep(0)
    for seeker in hub.seekers:
        seeker.give("a")
    await soon(asyncio.gather(*tasks))
    assert max(Counter(done).values()) == 50
