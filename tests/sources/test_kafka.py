"""What is peculiar to Kafka."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from datetime import datetime, timedelta, timezone

import kafka_server
import pytest
from airflow_events.errors import EventUndecodable, SourceMisconfigured, SourceUnreachable
from airflow_events.listeners.kafka import consume, group, watch
from airflow_events.listeners.support.positions import Positions
from broker import hubs, nothing, running, soon, until_told
from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, ResourceType
from of_kafka import Inbox, Kafka
from test_watch import ago

from conftest import Waits
from deployment import until

pytestmark = pytest.mark.parametrize("server", [Kafka], ids=["kafka"], indirect=True)


@pytest.fixture
def inbox():
    return Inbox("a" * 32)


@pytest.fixture
def often(monkeypatch):
    """Hubs look often at what others did."""
    monkeypatch.setattr(consume, "_LOOK_EVERY", 0.5)


def offset_of(broker, partition=0):
    return broker.committed()[partition][0]


async def until_offset(broker, offset, partition=0):
    """The group's offset follows what is settled some while after it."""
    for _ in range(100):
        if (found := offset_of(broker, partition)) == offset:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"it is {found}, not {offset}")


async def taken(waits, count, first=0, **changes):
    """Let waits have that many messages, one after the other, and settle them; return their values."""
    events = []
    for number in range(first, first + count):
        events.append(await soon(waits.poll(number, **changes), 30))
        await waits.commit(events[-1], number)
    return [event["value"] for event in events]


async def gone(waits):
    """The hubs end with their waits, some while after."""
    await waits.end()
    await asyncio.sleep(3)


# Events.


async def test_the_event(broker, waits):
    broker.produce({
        "value": b'{"order_id": 42}', "key": b"k", "headers": {"trace": "\u00e4".encode(), "none": None},
        "timestamp": 1700000000123,
    })  # fmt: skip
    event = await soon(waits.poll())
    watched = {
        "topic": broker.queue,
        "partition": 0,
        "offset": 0,
        "timestamp": datetime(2023, 11, 14, 22, 13, 20, 123000, tzinfo=timezone.utc),
        "key": "k",
        "headers": {"trace": "ä", "none": None},
        "value": {"order_id": 42},
    }
    cluster, topic_id = event.pop("cluster"), event.pop("topic_id")
    assert len(cluster) == 22 and topic_id == broker.topic_id()
    assert event == {**watched, "group": "airflow", "kafka_config_id": "source"}
    assert await soon(waits.watch(match={"order_id": 42}, since="2023-11-14T00:00:00Z")) == watched


async def test_tombstones_and_messages_without_a_key(broker, waits):
    broker.produce({"key": b"gone"}, {"value": b"1"})
    first, second = await soon(waits.poll(1)), await soon(waits.poll(2))
    assert (first["key"], first["value"]) == ("gone", None)
    assert (second["key"], second["value"]) == (None, 1)


@pytest.mark.parametrize(
    ("key", "found"),
    [(b"\xff", "/w=="), ((7).to_bytes(8, "big"), "AAAAAAAAAAc="), ("größe".encode(), "größe")],
)
async def test_a_key_that_is_no_text_fails_no_wait(broker, waits, key, found):
    broker.produce({"key": key, "value": b'{"id": 1}', "headers": {"h": key}})
    event = await soon(waits.poll())
    assert (event["key"], event["headers"]) == (found, {"h": found})
    since = datetime.now(timezone.utc) - timedelta(minutes=5)
    assert (await soon(waits.watch(1, match={"id": 1}, since=since)))["key"] == found


async def test_a_key_that_is_no_json(broker, waits):
    broker.produce({"key": b"\xff", "value": b"1"})
    where = f"the key of the message at offset 0 in partition 0.*{broker.queue}"
    with pytest.raises(EventUndecodable, match=where):
        await soon(waits.poll(keys="json"))


async def test_a_timestamp_in_microseconds(broker, waits):
    broker.make_topic(message_timestamp_after_max_ms=2**63 - 1)
    broker.produce({"value": b'{"id": 1}', "timestamp": 1_700_000_000_000_000}, {"value": b'{"id": 2}'})
    first, second = await soon(waits.poll()), await soon(waits.poll(1))
    assert first["timestamp"] is None
    assert second["timestamp"] is not None
    since = datetime.now(timezone.utc) - timedelta(minutes=5)
    assert (await soon(waits.watch(2, match={"id": 1}, since=since)))["timestamp"] is None
    assert (await soon(waits.watch(3, match={"id": 2}, since=since)))["value"] == {"id": 2}


async def test_dead_letters_keep_what_they_were(broker, waits, caplog):
    broker.produce({"key": b"k", "value": b"{no json", "headers": {"h": b"1"}})
    task = waits.poll(on_undecodable="dead_letter", dead_letter=broker.dead_letter)
    await until_told(caplog, "Sent to the dead letters")
    [message] = broker.messages(broker.dead_letter)
    headers = dict(message.headers())
    assert (message.key(), message.value(), headers["h"]) == (b"k", b"{no json", b"1")
    assert b"Expecting property name" in headers["airflow-events-reason"]
    assert b"the message at offset 0 in partition 0 of the topic" in headers["airflow-events-source"]
    await until_offset(broker, 1)
    assert not task.done()


async def test_what_a_transaction_aborted_is_no_event_and_what_it_committed_is(broker, waits):
    task = waits.poll()
    producer = Producer({**broker.bootstrap, "transactional.id": f"sender of {broker.queue}"})
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(broker.queue, b'"aborted"')
    producer.flush(30)
    await nothing(task)
    producer.abort_transaction(30)
    producer.begin_transaction()
    producer.produce(broker.queue, b'"committed"')
    await nothing(task)
    producer.commit_transaction(30)
    event = await soon(task)
    assert (event["value"], event["offset"]) == ("committed", 2)
    await waits.commit(event)
    await until_offset(broker, 3)


# The group, as others see it.


async def test_waits_over_several_partitions_and_the_watermark_that_others_see(broker, waits):
    broker.make_topic(partitions=4)
    tasks = [waits.poll(number) for number in range(40)]
    await asyncio.sleep(0.5)
    broker.produce(*({"value": str(number).encode(), "partition": number % 4} for number in range(40)))
    events = [await soon(task, 120) for task in tasks]
    assert sorted(event["value"] for event in events) == list(range(40))
    left = list(enumerate(events))
    random.Random(2).shuffle(left)
    while left:
        done, left = left[:5], left[5:]
        await asyncio.gather(*(waits.commit(event, number) for number, event in done))
        for partition in range(4):
            uncommitted = [event["offset"] for _, event in left if event["partition"] == partition]
            await until_offset(broker, min(uncommitted, default=10), partition)


async def test_of_several_topics_one_that_is_not_there_holds_up_no_other(broker, waits, caplog, monkeypatch):
    monkeypatch.setattr(consume, "_LOOK_EVERY", 0.5)
    there, later = broker.queue, f"{broker.queue}-later"
    broker.send("a")
    broker.queue = [there, later]
    event = await soon(waits.poll())
    await waits.commit(event)
    assert event["value"] == "a"
    assert f"there is no topic '{later}' now; the others are read" in caplog.text
    task = waits.poll(1)
    broker.queue = later
    broker.make_topic()
    broker.send("b")
    event = await soon(task, 30)
    assert (event["topic"], event["value"]) == (later, "b")
    await waits.commit(event, 1)
    broker.queue = [there, later]
    task = waits.poll(2)
    await nothing(task)
    admin = AdminClient(broker.bootstrap)
    admin.delete_topics([later])[later].result(30)
    await asyncio.sleep(2)
    broker.queue = there
    broker.send("c")
    assert (await soon(task, 30))["value"] == "c"


async def test_a_header_by_a_name_that_airflow_reserves_fails_no_wait(broker, waits):
    broker.produce({"value": b"1", "headers": {"__type": b"a", "b": b"c"}})
    assert (await soon(waits.poll()))["headers"] == {"___type": "a", "b": "c"}


async def test_several_topics_in_one_wait(broker, waits):
    first = broker.queue
    broker.send("a")
    broker.queue += "-too"
    broker.make_topic()
    broker.send("b")
    broker.queue = [first, broker.queue]
    events = [await soon(waits.poll(number)) for number in range(2)]
    assert {event["topic"]: event["value"] for event in events} == dict(zip(broker.queue, "ab", strict=True))
    for event in events:
        await waits.commit(event)
        broker.queue = event["topic"]
        await until_offset(broker, 1)


async def test_a_group_that_is_there_already_goes_on_where_it_is(broker, waits):
    broker.send(*range(3))
    set_offset(broker, 2)
    assert await taken(waits, 1) == [2]


async def test_a_group_that_begins_at_the_end(broker, waits):
    broker.send("old")
    task = waits.poll(start="latest")
    for _ in range(60):  # what was sent before the group is there is not for it
        await asyncio.sleep(0.5)
        if broker.committed()[0][0] == 1:
            break
    broker.send("new")
    assert (await soon(task))["value"] == "new"


def set_offset(broker, offset):
    admin = AdminClient(broker.bootstrap)
    places = [TopicPartition(broker.queue, 0, offset)]

    def is_set():
        [asked] = admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions("airflow", places)]).values()
        # Of a broker that was just started: its coordinator may still be loading.
        return asked.result(30).topic_partitions[0].error is None

    until(is_set, "the offset is set", 30, 0.2)


async def test_where_a_group_begins_is_decided_once(broker, waits, inbox):
    Positions.of_loop().inbox = inbox.exchange
    broker.send("old")
    task = waits.poll(start="latest")
    await until_offset(broker, 1)
    await nothing(task, 0.1)
    await gone(waits)
    forget(broker)
    broker.send("while nobody looked")
    assert await taken(waits, 1, start="latest") == ["while nobody looked"]


async def test_a_group_whose_offsets_expired_goes_on_and_has_them_again(broker, waits, inbox):
    Positions.of_loop().inbox = inbox.exchange
    broker.send(*range(3))
    assert await taken(waits, 1) == [0]
    await until_offset(broker, 1)
    await gone(waits)
    forget(broker)
    task = waits.poll(1)
    assert (await soon(task))["value"] == 1
    await until_offset(broker, 1)


async def test_of_a_topic_that_is_recreated_and_soon_longer_nothing_comes_twice(broker, waits, caplog):
    broker.send("old")
    assert await taken(waits, 1) == ["old"]
    waiting = waits.poll(1)
    await asyncio.sleep(2)  # it reads, and has looked
    admin = AdminClient(broker.bootstrap)  # which has to outlive what it was asked
    admin.delete_topics([broker.queue])[broker.queue].result(30)
    broker.make_topic()
    broker.send("a", "b", "c", "d")
    found = [await soon(waiting, 120)]
    await waits.commit(found[0], 1)
    for number in range(2, 5):
        found.append(await soon(waits.poll(number), 120))
        await waits.commit(found[-1], number)
    assert [event["value"] for event in found] == ["a", "b", "c", "d"]
    assert "was deleted and recreated; it is read from its beginning" in caplog.text
    await nothing(waits.poll(5), 2)


def forget(broker):
    """Let the group's offsets be gone, as after seven days."""
    admin = AdminClient(broker.bootstrap)
    [asked] = admin.delete_consumer_groups(["airflow"]).values()
    asked.result(30)
    assert broker.committed()[0][0] < 0


async def test_what_is_settled_out_of_order_is_not_read_again(broker, waits, inbox):
    """Also by who comes after all that had read it, when the committed offset is before it."""
    Positions.of_loop().inbox = inbox.exchange
    broker.send(*range(4))
    events = [await soon(waits.poll(number)) for number in range(3)]
    await waits.commit(events[1], 1)
    await waits.commit(events[2], 2)
    await waits.release(events[0])
    await gone(waits)
    assert offset_of(broker) == 0
    assert await taken(waits, 2) == [0, 3]
    await until_offset(broker, 4)


async def test_a_long_run_of_what_is_settled_is_jumped_over(broker, waits, inbox, monkeypatch):
    monkeypatch.setattr(consume, "_FAR", 3)
    Positions.of_loop().inbox = inbox.exchange
    broker.send(*range(30))
    events = [await soon(waits.poll(number)) for number in range(20)]
    for number, event in enumerate(events[1:], 1):
        await waits.commit(event, number)
    await waits.release(events[0])
    await gone(waits)
    assert await taken(waits, 11) == [0, *range(20, 30)]


@pytest.mark.parametrize("beside", [False, True])
async def test_an_offset_that_somebody_set_further_on_is_followed(broker, waits, caplog, beside):
    broker.send(*range(6))
    first, second = [await soon(waits.poll(number)) for number in range(2)]
    await waits.commit(first)
    await until_offset(broker, 1)
    await waits.release(second)
    if not beside:
        await gone(waits)
    set_offset(broker, 4)
    value = None
    for number in range(2, 5):
        event = await soon(waits.poll(number))
        value = event["value"]
        await waits.commit(event)
        if value >= 4:
            break
    assert value == 4
    assert " to 4 by others; accepted" in caplog.text
    await until_offset(broker, 5)


async def test_an_offset_that_somebody_set_back_is_put_right_and_said(broker, waits, caplog, often):
    broker.send(*range(3))
    assert await taken(waits, 2) == [0, 1]
    await until_offset(broker, 2)
    await gone(waits)
    set_offset(broker, 0)
    assert await taken(waits, 1, 5) == [2]
    assert "was set from 2 to 0 by others; reset to the inbox's position" in caplog.text
    await until_offset(broker, 3)
    assert await taken(waits, 3, group="another") == [0, 1, 2]


async def test_the_group_of_another_airflow_is_refused(broker, waits, inbox):
    Positions.of_loop().inbox = inbox.exchange
    broker.send("a", "b")
    assert await taken(waits, 1) == ["a"]
    await until_offset(broker, 1)
    assert broker.committed()[0][1] == f"airflow-events {inbox.owner}"
    await gone(waits)
    for other in (Inbox("b" * 32).exchange, None):  # None is as in dag.test()
        Positions.of_loop().inbox = other
        with pytest.raises(SourceMisconfigured, match="was committed by another Airflow"):
            await soon(waits.poll())
    set_offset(broker, 1)
    Positions.of_loop().inbox = Inbox("b" * 32).exchange
    assert await taken(waits, 1) == ["b"]


async def test_a_database_that_was_restored_is_followed(broker, waits, inbox, caplog):
    Positions.of_loop().inbox = inbox.exchange
    broker.send(*range(3))
    assert await taken(waits, 1) == [0]
    backup = dict(inbox.settled)
    assert await taken(waits, 1, 1) == [1]
    await until_offset(broker, 2)
    await gone(waits)
    inbox.settled = backup
    assert await taken(waits, 2, 2) == [1, 2]
    assert "was set from 1 to 2 by this Airflow" in caplog.text


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
async def test_a_group_that_has_members_is_refused(broker, waits, protocol):
    broker.send("a")
    member = broker.consumer(f"g{protocol}", client_id="by-the-way", group_protocol=protocol)
    member.subscribe([broker.queue])
    until(lambda: member.poll(0.1) and member.assignment(), "the group has a member")
    with pytest.raises(SourceMisconfigured, match=r"the group has members, 'by-the-way' at /127\.0\.0\.1"):
        await soon(waits.poll(group=f"g{protocol}"), 120)
    member.close()
    assert await taken(waits, 1, group=f"g{protocol}") == ["a"]


async def test_a_member_that_joins_later_is_named_as_well(broker, waits, caplog, often):
    broker.send("a", "b")
    event, idle = await soon(waits.poll()), waits.poll(1)
    await soon(idle)
    waiting = waits.poll(2)
    await nothing(waiting, 1)
    member = broker.consumer(client_id="by-the-way")
    member.subscribe([broker.queue])
    until(lambda: member.poll(0.1) or member.assignment(), "the group has a member")
    with pytest.raises(SourceMisconfigured, match="the group has members, 'by-the-way'"):
        await soon(waiting, 120)
    await waits.commit(event)  # which the inbox knows
    member.close()
    broker.send("c")
    assert (await soon(waits.poll(3)))["value"] == "c"
    await until_offset(broker, 1)


# Several triggerers.


@pytest.fixture
def second(broker, monkeypatch):
    """Another connection to the same brokers: its waits have a hub of their own, as in another triggerer."""
    monkeypatch.setenv("AIRFLOW_CONN_SECOND", json.dumps(broker.connection()))
    return {"kafka_config_id": "second"}


async def test_each_triggerer_reads_everything_and_the_inbox_decides(broker, waits, second, often):
    broker.make_topic(partitions=3)
    has, count = {}, 60

    async def wait(number):
        """Do as a trigger does with what the inbox answers."""
        while True:
            event = await waits.poll(number, **(second if number % 2 else {}))
            id = broker.listener().event_id(event)
            mine = has.setdefault(id, number) == number
            await waits.commit(event, number)
            if mine:
                return event["value"]

    found = [asyncio.create_task(wait(number)) for number in range(count)]
    await asyncio.sleep(1)
    broker.produce(*({"value": str(number).encode(), "partition": number % 3} for number in range(count)))
    values = await asyncio.wait_for(asyncio.gather(*found), 60)
    assert sorted(values) == list(range(count))
    for partition in range(3):
        await until_offset(broker, count // 3, partition)


async def test_a_commit_that_comes_late_does_not_hide_what_another_triggerer_committed(
    broker, waits, inbox, monkeypatch
):
    monkeypatch.setattr(consume, "_LOOK_EVERY", 1000)
    commit, held, release = group.Group.commit, threading.Event(), threading.Event()

    def late(asked, offsets):
        if not held.is_set() and any(offset == 1 for offset, _ in offsets.values()):
            held.set()
            release.wait(120)
        return commit(asked, offsets)

    async def another_triggerer():
        Positions.of_loop().inbox = inbox.exchange
        others = Waits(broker)
        try:
            assert await taken(others, 1) == ["b"]
            await until_offset(broker, 2)
        finally:
            await others.end()

    monkeypatch.setattr(group.Group, "commit", late)
    Positions.of_loop().inbox = inbox.exchange
    broker.send("a", "b")
    first = waits.poll()
    waits.poll(1)  # it is given "b" here, and the hub stays for it
    await waits.commit(await soon(first))
    assert await asyncio.to_thread(held.wait, 30)
    await asyncio.to_thread(asyncio.run, another_triggerer())
    release.set()
    await asyncio.sleep(1)
    await until_offset(broker, 2)


async def test_what_another_triggerer_settled_is_not_offered(broker, waits, second, often):
    broker.send("a", "b")
    first, other = await soon(waits.poll()), await soon(waits.poll(1, **second))
    assert first["value"] == other["value"] == "a"
    assert broker.listener().event_id(first) == broker.listener().event_id(other)
    await waits.release(other, 1)
    await waits.commit(first)
    await asyncio.sleep(1)
    assert (await soon(waits.poll(2, **second)))["value"] == "b"


async def test_a_message_that_another_process_had_is_settled_by_its_offset(broker, waits, inbox):
    Positions.of_loop().inbox = inbox.exchange
    broker.send("a", "b")
    event = await soon(waits.poll())
    await gone(waits)
    await waits.commit(event)
    await until_offset(broker, 1)
    assert broker.committed()[0][1] == f"airflow-events {inbox.owner}"
    assert await taken(waits, 1, 1) == ["b"]


async def test_a_message_that_is_settled_while_the_brokers_are_away(broker, waits, inbox):
    Positions.of_loop().inbox = inbox.exchange
    broker.send("a", "b")
    event = await soon(waits.poll())
    broker.server.kill()
    await soon(asyncio.ensure_future(waits.commit(event)))
    broker.server.start()
    assert await taken(waits, 1, 1) == ["b"]
    await until_offset(broker, 2)


# What a topic may have lost.


async def test_what_retention_deleted_before_any_wait_had_it_is_told(broker, waits, caplog):
    broker.send(*range(5))
    assert await taken(waits, 1) == [0]
    await gone(waits)
    delete_records(broker, 3)
    assert await taken(waits, 1, 1) == [3]
    assert f"messages from offset 1 until before 3 of partition 0 of '{broker.queue}' were deleted" in caplog.text
    await until_offset(broker, 4)


def delete_records(broker, before):
    admin = AdminClient(broker.bootstrap)
    [asked] = admin.delete_records([TopicPartition(broker.queue, 0, before)]).values()
    asked.result(30)


async def test_a_compacted_topic(broker, waits):
    broker.make_topic(
        cleanup_policy="compact", segment_ms=100, min_cleanable_dirty_ratio=0.001, min_compaction_lag_ms=0
    )
    broker.produce(*({"key": str(number % 3).encode(), "value": str(number).encode()} for number in range(30)))

    def compacted():
        broker.produce({"key": b"roll", "value": b"-1"})  # the last segment is never compacted
        consumer = broker.consumer("nobody")
        consumer.assign([TopicPartition(broker.queue, 0, 0)])
        first = consumer.poll(10)
        consumer.close()
        return first.offset() == 27

    until(compacted, "it is compacted", 60, pause=0.5)
    events = [await soon(waits.poll(number)) for number in range(3)]
    assert [event["offset"] for event in events] == [27, 28, 29]
    for number, event in enumerate(events):
        await waits.commit(event, number)
    await until_offset(broker, 30)


@pytest.mark.parametrize("beside", [False, True])
async def test_a_topic_that_was_recreated_is_read_from_its_beginning(broker, waits, caplog, often, beside):
    broker.send(*range(3))
    assert await taken(waits, 2) == [0, 1]
    held = await soon(waits.poll(2))
    waiting = waits.poll(3) if beside else None
    await asyncio.sleep(1)
    if not beside:
        await gone(waits)
    admin = AdminClient(broker.bootstrap)
    admin.delete_topics([broker.queue])[broker.queue].result(30)
    broker.make_topic()
    broker.send("new", "newer")
    event = await soon(waiting or waits.poll(3), 120)
    assert (event["value"], event["offset"]) == ("new", 0)
    assert broker.listener().event_id(event) != broker.listener().event_id({**event, "topic_id": held["topic_id"]})
    assert "was deleted and recreated" in caplog.text
    await waits.commit(held)  # which changes nothing of the new one
    await waits.commit(event)
    await until_offset(broker, 1)


@pytest.mark.parametrize("has_it", [False, True])
async def test_an_acknowledgement_of_a_topic_that_is_gone_moves_nothing_in_the_new_one(
    broker, waits, inbox, has_it
):
    """Nobody has read the new one yet, whose messages are numbered from the beginning again."""
    Positions.of_loop().inbox = inbox.exchange
    broker.send(*range(3))
    assert await taken(waits, 2) == [0, 1]
    held = await soon(waits.poll(2))
    await until_offset(broker, 2)
    if not has_it:
        await waits.release(held, 2)
    await gone(waits)
    admin = AdminClient(broker.bootstrap)
    admin.delete_topics([broker.queue])[broker.queue].result(30)
    broker.make_topic()
    broker.send("new", "newer")
    await waits.commit(held, 2)
    if has_it:  # a hub that has not looked since commits what it knows
        await gone(waits)
    else:
        assert offset_of(broker) != 3
    assert await taken(waits, 2, 3) == ["new", "newer"]
    await until_offset(broker, 2)


# What is refused, or waited for.


async def test_a_topic_that_comes_later(broker, waits, monkeypatch, caplog):
    broker.queue = f"{broker.queue}-later"
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "2")
    for task in (waits.poll(), waits.watch(since=datetime.now(timezone.utc))):
        with pytest.raises(SourceUnreachable, match=f"'{broker.queue}'.*there is no such topic"):
            await soon(task, 30)
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "60")
    task, watched = waits.poll(), waits.watch(since=datetime.now(timezone.utc) - timedelta(minutes=1))
    await nothing(task, 2)
    admin = AdminClient(broker.bootstrap)
    assert broker.queue not in admin.list_topics(timeout=10).topics  # asking did not make it
    broker.make_topic()
    broker.send("a")
    assert (await soon(task, 30))["value"] == (await soon(watched, 30))["value"] == "a"
    assert "there is no such topic" in caplog.text


@pytest.mark.parametrize(
    ("setting", "value"), [("enable.auto.commit", True), ("enable.auto.commit", "true"),
                           ("isolation.level", "read_uncommitted")],
)  # fmt: skip
async def test_a_connection_that_would_lose_events(broker, waits, monkeypatch, setting, value):
    monkeypatch.setenv("AIRFLOW_CONN_LOSES", json.dumps(broker.connection(extra={setting: value})))
    with pytest.raises(SourceMisconfigured, match=f"'loses' has {setting}={value!r}.*is needed"):
        await soon(waits.poll(kafka_config_id="loses"))


async def test_a_setting_that_is_none(broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_ODD", json.dumps(broker.connection(extra={"no.such.setting": 1})))
    with pytest.raises(SourceMisconfigured, match=r"'odd'.*no\.such\.setting"):
        await soon(waits.poll(kafka_config_id="odd"))


async def test_partitions_that_are_added(broker, waits, monkeypatch, often):
    monkeypatch.setattr(watch, "_LISTING", 1)
    about = {"start": "latest"}
    tasks = [waits.poll(**about), waits.watch(1, match={"id": 1}, since=datetime.now(timezone.utc))]
    await nothing(tasks[0])
    admin = AdminClient(broker.bootstrap)
    admin.create_partitions([NewPartitions(broker.queue, 2)])[broker.queue].result(30)
    until(lambda: len(broker.ends()) == 2, "it is there")
    broker.produce({"value": b'{"id": 1}', "partition": 1})
    for task in tasks:
        assert (await soon(task, 30))["partition"] == 1


async def test_the_address_that_a_broker_gives_out_and_nobody_reaches_is_named(broker, waits, monkeypatch):
    misled = kafka_server.server(advertised_listeners="PLAINTEXT://127.0.0.1:1")
    misled.start()
    try:
        about = {"conn_type": "kafka", "extra": {"bootstrap.servers": f"127.0.0.1:{misled.port}"}}
        monkeypatch.setenv("AIRFLOW_CONN_MISLED", json.dumps(about))
        monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
        with pytest.raises(SourceUnreachable, match=r"127\.0\.0\.1:1/1: .*refused"):
            await asyncio.wait_for(waits.poll(kafka_config_id="misled"), 120)
    finally:
        misled.stop()


async def test_a_watch_that_looks_from_before_what_is_kept_is_warned(broker, waits, caplog):
    broker.send(*range(5))
    delete_records(broker, 4)
    assert (await soon(waits.watch(since=datetime.now(timezone.utc) - timedelta(hours=1))))["value"] == 4
    assert "has dropped messages until" in caplog.text


async def test_a_watch_of_messages_whose_metadata_is_odd(broker, waits):
    broker.make_topic(message_timestamp_after_max_ms=2**63 - 1)
    micros = round(time.time() * 1e6)
    long_key, binary = b"\0\0\0\0\0\0\0\x2a", {"h": b"\xff", "nul": b"\0"}
    broker.produce(
        {"value": b'{"id": 1}', "timestamp": micros},
        {"value": b'{"id": 2}', "key": long_key, "headers": binary},
        {"value": b'{"id": 3}'},
    )
    since = datetime.now(timezone.utc) - timedelta(minutes=1)
    first, second, third = [waits.watch(n, match={"id": n}, since=since) for n in (1, 2, 3)]
    assert (await soon(first))["timestamp"] is None
    assert (await soon(second))["key"] == "AAAAAAAAACo="
    assert (await soon(second))["headers"] == {"h": "/w==", "nul": "AA=="}
    assert (await soon(third))["key"] is None


async def test_a_topic_that_is_made_anew_while_it_is_watched(broker, waits, monkeypatch, caplog):
    monkeypatch.setattr(watch, "_LISTING", 1)
    broker.send(*range(20))
    task = waits.watch(match={"id": "new"}, since=datetime.now(timezone.utc))
    await nothing(task, 1)
    admin = AdminClient(broker.bootstrap)
    admin.delete_topics([broker.queue])[broker.queue].result(30)
    until(lambda: broker.queue not in admin.list_topics(timeout=10).topics, "it is gone")
    broker.make_topic()
    broker.send({"id": "new"}, *range(50))
    event = await soon(task, 30)
    assert (event["value"], event["offset"]) == ({"id": "new"}, 0)
    assert "was recreated" in caplog.text


# Permissions, on a broker of their own.


@pytest.fixture(scope="module")
def guarded():
    yield from running(kafka_server.guarded(), kafka_server.MISSING)


@pytest.mark.parametrize(
    ("user", "password", "message"),
    [
        ("reader", "wrong", "Authentication failed"),
        ("nobody", "nobody-secret", "TOPIC_AUTHORIZATION_FAILED"),
        ("reader", "reader-secret", "GROUP_AUTHORIZATION_FAILED"),
    ],
)
async def test_a_user_who_may_not(guarded, waits, monkeypatch, user, password, message):
    kafka_server.allow(guarded, "reader", "orders")
    extra = {
        "bootstrap.servers": f"127.0.0.1:{guarded.port}", "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
    }  # fmt: skip
    about = {"conn_type": "kafka", "login": user, "password": password, "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_GUARDED", json.dumps(about))
    waits.broker.queue = "orders"
    with pytest.raises(SourceMisconfigured, match=message) as caught:
        await soon(waits.poll(kafka_config_id="guarded"), 40)
    assert password not in str(caught.value)


async def test_the_rights_that_are_documented_are_enough(guarded, broker, waits, monkeypatch):
    """Read on topic and group."""
    kafka_server.allow(guarded, "reader", broker.queue)
    kafka_server.allow(guarded, "reader", "airflow-allowed", ResourceType.GROUP)
    extra = {
        "bootstrap.servers": f"127.0.0.1:{guarded.port}", "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
    }  # fmt: skip
    about = {"conn_type": "kafka", "login": "reader", "password": "reader-secret", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_GUARDED", json.dumps(about))
    rights = {"kafka_config_id": "guarded", "group": "airflow-allowed"}
    with monkeypatch.context() as patch:
        patch.setattr(Kafka, "bootstrap", kafka_server.as_admin(guarded))
        broker.send("a", "b")
        assert await taken(waits, 1, **rights) == ["a"]
        for _ in range(100):
            if broker.committed("airflow-allowed")[0][0] == 1:
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError("the offset does not follow")


def over_tls(guarded, ca, password="admin-secret", mechanism="PLAIN", **more):
    extra = {
        "bootstrap.servers": f"127.0.0.1:{guarded.tls_port}", "security.protocol": "SASL_SSL",
        "sasl.mechanism": mechanism, "ssl.ca.location": f"{guarded.folder}/{ca}.pem", **more,
    }  # fmt: skip
    return json.dumps({"conn_type": "kafka", "login": "admin", "password": password, "extra": extra})


@pytest.mark.parametrize("mechanism", kafka_server.MECHANISMS)
async def test_tls_and_sasl(guarded, broker, waits, monkeypatch, mechanism):
    kafka_server.allow(guarded, "reader", broker.queue)
    monkeypatch.setenv("AIRFLOW_CONN_TLS", over_tls(guarded, "ca", mechanism=mechanism))
    await see_it_let_in("tls", guarded, broker, waits, monkeypatch)


async def see_it_let_in(conn_id, guarded, broker, waits, monkeypatch):
    """See that a wait and a watch get a message over a connection, and that it is committed."""
    since = datetime.now(timezone.utc) - timedelta(minutes=1)
    task = waits.poll(kafka_config_id=conn_id)
    watched = waits.watch(1, kafka_config_id=conn_id, match={"id": 7}, since=since)
    with monkeypatch.context() as patch:
        patch.setattr(Kafka, "bootstrap", kafka_server.as_admin(guarded))
        broker.send({"id": 7})
        event = await soon(task, 120)
        assert event["value"] == (await soon(watched, 120))["value"] == {"id": 7}
        await waits.commit(event)
        await until_offset(broker, 1)


@pytest.mark.parametrize(
    ("ca", "password", "mechanism", "message"),
    [
        ("other", "admin-secret", "PLAIN", "certificate verify failed"),
        ("none", "admin-secret", "PLAIN", r"ssl\.ca\.location"),
        *(("ca", "s3cret", mechanism, "Authentication failed") for mechanism in kafka_server.MECHANISMS),
    ],
)
async def test_a_wrong_certificate_or_password(
    guarded, broker, waits, monkeypatch, caplog, ca, password, mechanism, message
):
    monkeypatch.setenv("AIRFLOW_CONN_TLS", over_tls(guarded, ca, password, mechanism))
    since = datetime.now(timezone.utc)
    for task in (waits.poll(kafka_config_id="tls"), waits.watch(kafka_config_id="tls", since=since)):
        with pytest.raises(SourceMisconfigured, match=f"the topic '{broker.queue}'.*'tls'.*{message}") as caught:
            await soon(task, 120)
        assert password not in str(caught.value) + caplog.text


async def test_a_client_that_speaks_no_tls(guarded, broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
    monkeypatch.setenv("AIRFLOW_CONN_TLS", over_tls(guarded, "ca", **{"security.protocol": "SASL_PLAINTEXT"}))
    with pytest.raises(
        (SourceUnreachable, SourceMisconfigured), match=f"the topic '{broker.queue}'.*'tls'"
    ) as caught:
        await soon(waits.poll(kafka_config_id="tls"), 120)
    assert "admin-secret" not in str(caught.value)


def by_tokens(guarded, **more):
    extra = {
        "bootstrap.servers": f"127.0.0.1:{guarded.port}", "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "OAUTHBEARER", **more,
    }  # fmt: skip
    return json.dumps({"conn_type": "kafka", "extra": extra})


async def test_a_login_by_tokens_that_a_function_fetches(guarded, broker, waits, monkeypatch):
    pytest.importorskip("airflow.providers.apache.kafka")
    kafka_server.allow(guarded, "reader", broker.queue)
    monkeypatch.setenv("AIRFLOW_CONN_TOKENS", by_tokens(guarded, oauth_cb="kafka_server.token"))
    with pytest.raises(
        SourceMisconfigured, match=r"'tokens' asks for a login by tokens.*callback_allowlist is empty"
    ):
        await soon(waits.poll(kafka_config_id="tokens"), 120)
    monkeypatch.setenv("AIRFLOW__APACHE_KAFKA__CALLBACK_ALLOWLIST", "kafka_server.token")
    await see_it_let_in("tokens", guarded, broker, waits, monkeypatch)


async def test_tokens_that_do_not_do(guarded, broker, waits, monkeypatch):
    pytest.importorskip("airflow.providers.apache.kafka")
    kafka_server.allow(guarded, "reader", broker.queue)
    monkeypatch.setenv("AIRFLOW__APACHE_KAFKA__CALLBACK_ALLOWLIST", "kafka_server.token")
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
    for who, refused, message in (
        ("nobody", SourceMisconfigured, "may not use it.*AUTHORIZATION_FAILED"),
        ("none", SourceUnreachable, "there is no token for the login: nobody gives one"),
    ):
        extra = {"oauth_cb": "kafka_server.token", "sasl.oauthbearer.config": who}
        monkeypatch.setenv("AIRFLOW_CONN_TOKENS", by_tokens(guarded, **extra))
        with pytest.raises(refused, match=f"'tokens'.*{message}"):
            await soon(waits.poll(kafka_config_id="tokens"), 120)


async def test_a_partition_that_is_added_is_read_from_where_all_others_were(broker, waits, monkeypatch):
    """Somebody who comes later may look from further back than who waited when it was seen."""
    monkeypatch.setattr(watch, "_LISTING", 3)
    first = waits.watch(1, match={"id": "never"}, since=ago(seconds=1))
    await nothing(first, 2)
    began = datetime.now(timezone.utc)
    waits.watch(2, match={"id": "never"}, since=ago(seconds=-20))
    await asyncio.sleep(1)
    first.cancel()
    admin = AdminClient(broker.bootstrap)
    admin.create_partitions([NewPartitions(broker.queue, 2)])[broker.queue].result(30)
    broker.produce({"value": b'{"id": 1}', "partition": 1})
    await asyncio.sleep(10)
    assert (await soon(waits.watch(3, match={"id": 1}, since=began)))["partition"] == 1


async def test_headers_count_as_bytes_of_what_is_kept(broker, waits):
    await nothing(waits.watch(since=ago(minutes=1), match={"id": "never"}))
    broker.produce({"value": b"{}", "headers": {"trace": b"a" * 1000, "none": None}})
    event = await soon(waits.watch(1, since=ago(minutes=1)), 30)
    assert event["value"] == {}
    assert sum(hub._end._bytes for hub in hubs()) == len("{}") + len("trace") + 1000 + len("none")
