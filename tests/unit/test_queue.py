"""What a hub of a queue does with its messages, whatever the source."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta, timezone

import pytest
from airflow_events.errors import AtRedelivery, EventUndecodable
from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.support import queue
from airflow_events.listeners.support.hub import Seeker
from airflow_events.listeners.support.queue import InHand, QueueListener, receive, skip
from airflow_events.listeners.support.shared import shared
from airflow_events.triggers.event import recording
from airflow_events.triggers.polling import Poll, TimeIsUp
from awaiting import until
from boxes import Box, BoxHub


class BoxListener(QueueListener):
    box = None

    async def poll_for_event(self, on_undecodable="fail"):
        def read(message):
            return {"id": message, "value": json.loads(message)}

        return await receive("box", lambda: BoxHub(self.box), read, {"skip": skip}.get(on_undecodable))

    def event_id(self, event):
        return event["id"]


class Slow(BoxListener):
    """It does something with what it received before it returns it."""

    async def poll_for_event(self):
        event = await super().poll_for_event()
        while event["value"] == 1:
            await asyncio.sleep(0.01)
        return event


class Choosy(BoxListener):
    """It wants only some of what it receives."""

    async def poll_for_event(self):
        while (event := await super().poll_for_event())["value"] < 3:
            pass
        return event


@pytest.fixture
async def box():
    BoxListener.box = Box()
    return BoxListener.box


def wait(number=0):
    return Wait("dag", f"run{number}", "task")


def poll(number=0, listener=BoxListener, **kwargs):
    return Poll(listener, wait(number), [], kwargs, None)


async def soon(awaitable):
    return await asyncio.wait_for(awaitable, 5)


async def give_back(event, number=0):
    with working_for(wait(number)):
        await BoxListener().event_released(event)


async def commit(event, number=0):
    with working_for(wait(number)):
        await BoxListener().event_checkpointed(event)


def test_a_redelivery_over_another_connection_is_the_same_event():
    event = {"id": "1", "value": 1, "box_conn_id": "one"}
    contents = {
        recording(BoxListener, "box", wait(), {**event, "box_conn_id": conn_id, **more})["content"]
        for conn_id, more in (("one", {}), ("other", {}), ("one", {"value": 2}))
    }
    assert len(contents) == 2


async def test_no_more_is_received_than_waits_want(box):
    box.put("1", "2", "3")
    event = await soon(poll().run())
    await asyncio.sleep(0.2)
    assert box.waiting == ["2", "3"]
    await commit(event)
    assert box.told == [("acknowledge", "1")]


async def test_what_is_acknowledged_at_once_goes_in_few_batches(box):
    tasks = [asyncio.create_task(poll(number).run()) for number in range(200)]
    await asyncio.sleep(0)
    box.put(*(str(number) for number in range(200)))
    events = await soon(asyncio.gather(*tasks))
    await asyncio.gather(*(commit(event, number) for number, event in enumerate(events)))
    assert sorted(int(id) for _, *ids in box.told for id in ids) == list(range(200))
    assert len(box.told) < 10


async def test_what_comes_at_once_costs_a_look_or_two_each(box, monkeypatch):
    looks = []
    done = Seeker.done.fget
    monkeypatch.setattr(Seeker, "done", property(lambda seeker: looks.append(1) or done(seeker)))
    tasks = [asyncio.create_task(poll(number).run()) for number in range(1000)]
    async with shared("box", lambda: BoxHub(box)) as hub:
        await until(lambda: hub.wanted == 1000)
    looks.clear()
    for number in range(1000):
        hub.offer(str(number), str(number))
    assert len(looks) < 5000
    await soon(asyncio.gather(*tasks))


async def test_where_a_bad_message_cannot_be_moved_it_is_tried_again_after_a_while(box, monkeypatch):
    """As of a dead-letter place that is full: it is no matter of the connection, and others get what is behind."""
    monkeypatch.setattr(queue, "_POSTPONED", 0.2)
    tried = []

    async def bury(hub, delivery, error):
        tried.append(delivery.id)
        if len(tried) < 3:
            raise ConnectionError("no space is left")

    def read(message):
        if message == "bad":
            raise ValueError("no JSON")
        return {"id": message, "value": message}

    def of_box():
        return receive("box", lambda: BoxHub(box), read, bury)

    box.put("bad", "good")
    with working_for(wait()):
        event = await soon(of_box())
    assert event["value"] == "good" and len(tried) == 1
    box.put("next")
    with working_for(wait(1)):
        assert (await soon(of_box()))["value"] == "next"
        last = asyncio.create_task(of_box())
    await until(lambda: len(tried) == 3)
    await nothing_more(last)
    assert ("acknowledge", "bad") in box.told


async def nothing_more(task):
    await asyncio.sleep(0.1)
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})


async def test_a_batch_that_fails_fails_those_in_it_and_they_may_come_again(box):
    box.put("1")
    event = await soon(poll().run())
    box.fails = OSError("the connection is gone")
    with pytest.raises(OSError, match="is gone"):
        await commit(event)
    box.fails = None
    await commit(event)
    assert box.told == [("acknowledge", "1")]
    with pytest.raises(AtRedelivery):  # it is in hand no longer, so another process may have had it
        await commit(event)


async def test_a_poll_that_is_cancelled_in_its_listener_keeps_nothing(box):
    box.put("1")
    task = asyncio.create_task(poll(listener=Slow).run())
    await until(lambda: InHand.of_loop().hubs)
    other = asyncio.create_task(poll(1).run())
    await asyncio.sleep(0.1)
    assert not other.done()
    task.cancel()
    assert (await soon(other))["value"] == 1
    await asyncio.gather(task, return_exceptions=True)


async def test_what_a_listener_received_and_does_not_return_is_given_back(box):
    box.put("1", "2", "3")
    event = await soon(poll(listener=Choosy).run())
    assert event["value"] == 3
    await until(lambda: sorted(box.waiting) == ["1", "2"])
    assert list(InHand.of_loop().hubs) == ["3"]


async def test_the_time_is_up_while_a_listener_holds_something(box):
    box.put("1")
    late = datetime.now(timezone.utc) + timedelta(seconds=0.3)
    with pytest.raises(TimeIsUp):
        await soon(Poll(Slow, wait(), [], {}, late).run())
    await until(lambda: box.waiting == ["1"])


async def test_a_redelivery_of_what_is_in_hand_is_given_to_nobody(box):
    box.put("1")
    event = await soon(poll().run())
    other = asyncio.create_task(poll(1).run())
    box.put("1")
    await asyncio.sleep(0.2)
    assert not other.done()
    await commit(event)
    box.put("2")
    assert (await soon(other))["value"] == 2


async def test_over_a_new_connection_it_is_acknowledged_when_it_comes_again(box):
    box.put("1")
    event = await soon(poll().run())
    hub = InHand.of_loop().hubs["1"]
    hub.connection_lost()
    other = asyncio.create_task(poll(1).run())
    box.put("1")  # the redelivery, over the new one
    await asyncio.sleep(0.2)
    await commit(event)
    assert box.told == [("acknowledge", "1")]
    box.put("2")
    event = await soon(other)
    hub.connection_lost()
    with pytest.raises(AtRedelivery, match="the connection over which 2 came is gone"):
        await commit(event, 1)


async def test_what_cannot_be_read_is_kept_from_the_waits_of_the_hub(box):
    box.put("bad", "1")
    with pytest.raises(EventUndecodable) as caught:
        await soon(poll().run())
    assert caught.value.event_id == "bad"
    assert (await soon(poll(1).run()))["value"] == 1
    box.put("bad", "2")  # a redelivery
    assert (await soon(poll(2).run()))["value"] == 2
    assert box.told == []


async def test_what_is_skipped_is_acknowledged(box):
    box.put("bad", "1")
    assert (await soon(poll(on_undecodable="skip").run()))["value"] == 1
    assert box.told == [("acknowledge", "bad")]


async def test_what_is_in_hand_is_acknowledged_also_after_the_hub_gave_up(box, monkeypatch):
    box.put("1")
    event = await soon(poll().run())
    hub = InHand.of_loop().hubs["1"]
    box.breaks = ValueError("the source is set up in a way that somebody has to mend")
    with pytest.raises(ValueError, match="somebody has to mend"):
        await soon(poll(1).run())
    box.breaks = None
    assert not hub._up.is_set()
    await soon(commit(event))
    assert box.told == [("acknowledge", "1")]


async def test_a_hub_stays_as_long_as_its_source_waits_to_hear(box, monkeypatch):
    monkeypatch.setattr("airflow_events.listeners.support.shared._LINGER", 0.1)
    box.put("1")
    event = await soon(poll().run())
    hub = InHand.of_loop().hubs["1"]
    await asyncio.sleep(0.5)
    assert not hub._work.done()
    await commit(event)
    await until(hub._work.done)


async def test_a_hub_that_closes_gives_back_what_it_has(box):
    box.put("bad", "1")
    with pytest.raises(EventUndecodable):
        await soon(poll().run())
    await soon(poll(1).run())
    hub = InHand.of_loop().hubs["1"]
    await hub.close()
    assert sorted(box.waiting) == ["1", "bad"]
    assert not InHand.of_loop().hubs


class Hesitant(BoxHub):
    """Its source takes a while to be given something back."""

    async def give_back(self, deliveries):
        await self.box.gives_back.wait()
        await super().give_back(deliveries)


class Quick(Hesitant):
    """It delivers again before it answers that it was given something back."""

    async def give_back(self, deliveries):
        await super().give_back(deliveries)
        self.box.waiting.clear()


async def test_a_message_is_given_back_also_if_who_asks_for_it_is_cancelled(box, monkeypatch):
    box.gives_back = asyncio.Event()
    monkeypatch.setitem(globals(), "BoxHub", Hesitant)
    box.put("1")
    event = await soon(poll(0).run())
    asking = asyncio.create_task(give_back(event))
    await asyncio.sleep(0.05)
    asking.cancel()
    await asyncio.wait({asking})
    other = asyncio.create_task(poll(1).run())
    box.gives_back.set()
    await until(lambda: box.told == [("give back", "1")])
    box.changed.set()
    assert (await soon(other))["value"] == 1


async def test_what_comes_again_while_it_is_given_back_goes_to_another_wait(box, monkeypatch):
    box.gives_back = asyncio.Event()
    monkeypatch.setitem(globals(), "BoxHub", Quick)
    box.put("1")
    event = await soon(poll(0).run())
    hub = InHand.of_loop().hubs["1"]
    asking = asyncio.create_task(give_back(event))
    await asyncio.sleep(0.05)
    other = asyncio.create_task(poll(1).run())
    await until(lambda: hub.wanted == 1)
    hub.offer("1", "1")
    assert not other.done()
    box.gives_back.set()
    await asking
    assert (await soon(other))["value"] == 1


@pytest.mark.parametrize("back_after", [0.0, 0.5], ids=["before it was given back", "afterwards"])
async def test_what_was_given_back_while_its_commit_waited_is_not_said_to_be_acknowledged(
    box, monkeypatch, back_after
):
    """A wait is cleared while its commit waits for the source, and its next try in this process commits, too."""
    monkeypatch.setattr(queue, "_LONGEST_RETURN", 0.2)
    monkeypatch.setattr("airflow_events.listeners.support.shared._LINGER", 0.1)
    box.put("1")
    event = await soon(poll(0).run())
    hub = InHand.of_loop().hubs["1"]
    hub._up.clear()  # the source is unreachable
    first = asyncio.create_task(commit(event))
    await asyncio.sleep(0.02)
    first.cancel()
    await asyncio.wait({first})
    returning = asyncio.create_task(give_back(event))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(commit(event))
    await returning
    await asyncio.sleep(back_after)
    assert not hub._work.done()  # it stays as long as the commit waits
    hub._up.set()
    with pytest.raises(AtRedelivery):
        await soon(second)
    assert ("acknowledge", "1") not in box.told


async def test_two_that_acknowledge_a_message_at_once_are_both_told_that_it_is(box):
    """One of them was given it by another hub of this process."""
    box.put("1")
    event = await soon(poll(0).run())
    await soon(asyncio.gather(commit(event), commit(event, 1)))
    assert box.told == [("acknowledge", "1")]


class AnyConnection(BoxListener):
    """Its messages can be acknowledged by what they are."""

    async def acknowledge(self, event):
        self.box.told.append(("acknowledge by id", event["id"]))


async def test_what_is_not_in_hand_any_more_is_acknowledged_by_its_coordinates_where_that_can_be(box):
    """Another hub of this process has received it meanwhile, say, and given it back."""
    box.put("1")
    event = await soon(poll(0, AnyConnection).run())
    hub = InHand.of_loop().hubs["1"]
    hub._up.clear()
    with working_for(wait(0)):
        committing = asyncio.create_task(AnyConnection().event_checkpointed(event))
    await asyncio.sleep(0.02)
    hub.forget("1")
    hub._up.set()
    await soon(committing)
    assert box.told == [("acknowledge by id", "1")]
