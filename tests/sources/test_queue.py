"""What a source owes whose messages stay unacknowledged until the inbox has them, against its real server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from airflow_events.errors import AtRedelivery, EventUndecodable
from airflow_events.listeners.support import serde
from broker import nothing, soon

from deployment import until

ANOTHER = Path(__file__).with_name("another_triggerer.py")
# Seconds; short, so that a test need not wait for long.
LEASE = 2


@pytest.fixture
def short(broker):
    """What makes the source deliver again soon, if its connection's end alone does not."""
    return {} if broker.gives_back_at_once else {"lease": LEASE}


def id_of(broker, event):
    return broker.listener().event_id(event)


@contextlib.asynccontextmanager
async def another_triggerer(broker, **changes):
    """Yield the process of another triggerer, which is connected and holds what it polls until it is killed."""
    args, kwargs = broker.arguments(**changes)
    listener = [broker.listener.__module__, broker.listener.__qualname__]
    process = subprocess.Popen([sys.executable, ANOTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps({"listener": listener, "args": args, "kwargs": kwargs}))
    process.stdin.close()
    try:
        assert await asyncio.to_thread(process.stdout.readline) == "connected\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def polled(process):
    return serde.decode(process.stdout.readline())


async def settled(waits, event, number=0):
    """Acknowledge; if that takes the redelivery, by that. Return the event as it was acknowledged."""
    with contextlib.suppress(AtRedelivery):
        await waits.commit(event, number)
        return event
    again = await soon(waits.poll(90 + number), 120)
    await waits.commit(again, 90 + number)
    return again


async def test_an_event_has_an_id_that_is_not_another_ones(broker, waits):
    tasks = [waits.poll(number) for number in range(3)]
    await asyncio.sleep(0.3)
    broker.send("same", "same", "other")
    events = [await soon(task) for task in tasks]
    assert len({id_of(broker, event) for event in events}) == 3
    for number, event in enumerate(events):
        await waits.commit(event, number)
    assert broker.unacknowledged() == 0


async def test_a_triggerer_is_killed_and_what_it_held_is_delivered_again_the_same(broker, waits, short):
    async with another_triggerer(broker, **short) as process:
        broker.send({"n": 1})
        event = await asyncio.to_thread(polled, process)
        process.kill()
        assert process.wait() == -9
    until(lambda: broker.unacknowledged() == 1, "it is unacknowledged")
    again = await soon(waits.poll(**short), 120)
    assert id_of(broker, again) == id_of(broker, event)
    assert serde.encode(again) == serde.encode(event)
    await waits.commit(again)
    assert broker.unacknowledged() == 0


async def test_what_a_killed_triggerer_had_recorded_another_acknowledges(broker, waits, short):
    async with another_triggerer(broker, **short) as process:
        broker.send("a")
        event = await asyncio.to_thread(polled, process)
    if broker.acknowledges_anywhere:
        await waits.commit(event)
    else:
        with pytest.raises(AtRedelivery):
            await waits.commit(event)
        again = await soon(waits.poll(1, **short), 120)
        assert id_of(broker, again) == id_of(broker, event)
        await waits.commit(again, 1)
    assert broker.unacknowledged() == 0
    await nothing(waits.poll(2, **short), 2 * LEASE)


async def test_what_is_held_for_long_is_not_delivered_again(broker, waits, short):
    if broker.everybody_reads:
        pytest.skip("it is delivered to others, and the inbox decides")
    task = waits.poll(**short)
    await asyncio.sleep(0.3)
    broker.send("a")
    event = await soon(task)
    async with another_triggerer(broker, **short) as process:
        other = asyncio.create_task(asyncio.to_thread(polled, process))
        await nothing(other, 4 * LEASE)
        await waits.commit(event)
        broker.send("b")
        assert (await soon(other, 30))["value"] == "b"


async def test_what_is_given_back_goes_to_another_wait_of_the_same_triggerer(broker, waits):
    first, second = waits.poll(0), waits.poll(1)
    await asyncio.sleep(0.3)
    broker.send("a")
    done, [other] = await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED, timeout=15)
    [event] = [task.result() for task in done]
    await waits.release(event)
    again = await soon(other)
    assert again == event
    await waits.commit(again)
    await waits.release(again)  # of what is acknowledged it changes nothing
    assert broker.unacknowledged() == 0
    await nothing(waits.poll(2))


async def test_what_is_given_back_goes_to_another_triggerer(broker, waits):
    if broker.everybody_reads:
        pytest.skip("it is everybody's anyway")
    task = waits.poll()
    await asyncio.sleep(0.3)
    broker.send("a")
    event = await soon(task)
    async with another_triggerer(broker) as process:
        other = asyncio.create_task(asyncio.to_thread(polled, process))
        await nothing(other, 2)
        await waits.release(event)
        assert id_of(broker, await soon(other, 30)) == id_of(broker, event)


async def test_what_a_cancelled_poll_was_given_goes_to_another(broker, waits):
    tasks = [waits.poll(number) for number in range(2)]
    await asyncio.sleep(0.5)
    broker.send("a")
    for task in tasks:  # whichever was given it, in whatever state it is
        await asyncio.sleep(0.05)
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if not isinstance(result, BaseException):
            await waits.release(result)
    assert (await soon(waits.poll(2), 30))["value"] == "a"


async def test_a_commit_may_come_again_by_whomever(broker, waits):
    tasks = [waits.poll(number) for number in range(2)]
    await asyncio.sleep(0.3)
    broker.send("a", "b")
    event, _ = [await soon(task) for task in tasks]
    for number in (0, 0, 1):
        with contextlib.suppress(AtRedelivery):
            await waits.commit(event, number)
    assert broker.unacknowledged() == 1


async def test_the_server_is_killed_while_a_message_is_in_hand(broker, waits, short):
    if not broker.survives_kill:
        pytest.skip("this server keeps nothing on disk")
    tasks = [waits.poll(number, **short) for number in range(2)]
    await asyncio.sleep(0.3)
    broker.send("a", "b")
    event, other = [await soon(task) for task in tasks]
    broker.server.kill()
    broker.server.start()
    await committed(waits, event)
    for _ in range(2):
        if broker.unacknowledged() < 2:
            break
        again = await soon(waits.poll(2, **short), 120)  # a redelivery, which the inbox would know
        assert id_of(broker, again) in {id_of(broker, event), id_of(broker, other)}
        if id_of(broker, again) == id_of(broker, event):
            await waits.commit(again, 2)
    assert broker.unacknowledged() == 1


async def committed(waits, event):
    """Commit as a trigger does: again and again, until it is done, or is left to the redelivery."""
    for _ in range(60):
        try:
            await waits.commit(event)
        except AtRedelivery:
            return
        except Exception:
            await asyncio.sleep(0.5)
        else:
            return
    raise AssertionError("it could not be committed")


async def test_the_server_is_killed_after_the_commit(broker, waits, short):
    if not broker.survives_kill:
        pytest.skip("this server keeps nothing on disk")
    task = waits.poll(**short)
    await asyncio.sleep(0.3)
    broker.send("a")
    event = await soon(task)
    await waits.commit(event)
    broker.server.kill()
    broker.server.start()
    await committed(waits, event)
    broker.send("b")
    found = await soon(waits.poll(1, **short), 120)
    if found["value"] == "a":  # the server had not written the acknowledgement yet
        assert id_of(broker, found) == id_of(broker, event)
        await waits.commit(found, 1)
        found = await soon(waits.poll(2, **short), 120)
    assert found["value"] == "b"


BAD = b"{no json"
UNSTORABLE = b'{"text": "\\u0000"}'
TOO_LARGE = b'"%s"' % (b"x" * 190_000)


@pytest.fixture
def small_inbox(monkeypatch):
    """An inbox that takes requests of so many bytes, with which ``TOO_LARGE`` is too large."""
    monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_MAX_BODY", "200000")


async def test_what_cannot_be_read_fails_one_wait_and_the_next_gets_the_next(broker, waits):
    if not broker.has_bytes:
        pytest.skip("the source holds nothing but JSON")
    first = waits.poll()
    await nothing(first, 0.3)
    broker.send_raw(BAD)
    broker.send_raw(UNSTORABLE)
    broker.send("good")
    found, errors = [], []
    for number, task in enumerate([first, waits.poll(1), waits.poll(2)]):
        try:
            found.append(await soon(task))
            await waits.commit(found[-1], number)
        except EventUndecodable as error:
            errors.append(error)
    assert [event["value"] for event in found] == ["good"]
    assert len({error.event_id for error in errors}) == 2
    assert all(broker.queue in str(error) for error in errors)
    assert broker.unacknowledged() == 2
    broker.send("another")
    another = await soon(waits.poll(3))
    assert another["value"] == "another"


async def test_what_cannot_be_stored_is_what_cannot_be_read(broker, waits):
    if broker.has_bytes:
        pytest.skip("as the tests of what cannot be read have it")
    task = waits.poll()
    await nothing(task, 0.3)
    broker.send({"__type": "a class of another system's"})
    with pytest.raises(EventUndecodable, match=broker.queue):
        await soon(task)


BY_KIND = {"no json": BAD, "unstorable": UNSTORABLE, "a class": b'{"__type": "x"}', "too large": TOO_LARGE}


@pytest.mark.parametrize("bad", BY_KIND.values(), ids=BY_KIND)
async def test_what_cannot_be_read_is_skipped_by_choice(broker, waits, caplog, bad, small_inbox):
    if not broker.has_bytes:
        pytest.skip("the source holds nothing but JSON")
    task = waits.poll(on_undecodable="skip")
    await nothing(task, 0.3)
    broker.send_raw(bad)
    broker.send("good")
    event = await soon(task)
    assert event["value"] == "good"
    assert "Passed over, and acknowledged" in caplog.text
    await waits.commit(event)
    assert broker.unacknowledged() == 0


async def test_what_cannot_be_read_goes_to_the_dead_letters_by_choice(broker, waits, small_inbox):
    if not broker.has_bytes:
        pytest.skip("the source holds nothing but JSON")
    if broker.dead_letter is None:
        pytest.skip("the source has no place for them")
    changes = {"on_undecodable": "dead_letter"}
    if broker.dead_letter is not True:
        changes["dead_letter"] = broker.dead_letter
    task = waits.poll(**changes)
    await nothing(task, 0.3)
    broker.send_raw(BAD)
    broker.send_raw(UNSTORABLE)
    broker.send_raw(TOO_LARGE)
    broker.send("good")
    event = await soon(task)
    assert event["value"] == "good"
    await waits.commit(event)
    assert broker.unacknowledged() == 0
    until(lambda: len(broker.dead_letters()) == 3, "all are there")
    assert set(broker.dead_letters()) == {BAD, UNSTORABLE, TOO_LARGE}


async def test_choices_that_are_none(broker, waits):
    with pytest.raises(ValueError, match=r"'json', 'text', 'bytes'.*, not 'xml'"):
        await soon(waits.poll(values="xml"))
    with pytest.raises(ValueError, match=r"'fail' or 'skip'.*, not 'drop'"):
        await soon(waits.poll(on_undecodable="drop"))
