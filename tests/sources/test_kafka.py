"""What is peculiar to Kafka."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from datetime import datetime, timedelta, timezone

import kafka_server
import pytest
from airflow_events.errors import EventLost, EventUndecodable, SourceUnfit, SourceUnreachable
from airflow_events.listeners.kafka import ledger, state, watch
from broker import nothing, running, soon
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewPartitions, NewTopic, ResourceType
from kafka_process import STEPS, Process
from of_kafka import Kafka

from deployment import until

pytestmark = pytest.mark.parametrize("server", [Kafka], ids=["kafka"], indirect=True)


@pytest.fixture
def process(broker):
    processes = []

    def start():
        processes.append(Process())
        return processes[-1]

    yield start
    for started in processes:
        started.end()


def writer(broker, name):
    producer = Producer({**broker.bootstrap, "transactional.id": name, "linger.ms": 0})
    producer.init_transactions(30)
    return producer


def commit_offset(broker, producer, group, offset, metadata):
    member = broker.consumer(group)
    producer.begin_transaction()
    place = TopicPartition(broker.queue, 0, offset, metadata=metadata)
    producer.send_offsets_to_transaction([place], member.consumer_group_metadata(), 30)
    producer.commit_transaction(30)
    member.close()


# What the ledger is built on.


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
async def test_a_transaction_is_a_compare_and_set_of_offsets_for_any_process(broker, protocol):
    member = Consumer({
        **broker.bootstrap, "group.id": f"g{protocol}", "group.protocol": protocol, "enable.auto.commit": False,
    })  # fmt: skip
    member.subscribe([broker.queue])
    until(lambda: member.poll(0.1) or member.assignment(), "the group has a member", 30)

    outside = broker.consumer(f"g{protocol}")
    with pytest.raises(KafkaException, match="UNKNOWN_MEMBER_ID"):
        outside.commit(offsets=[TopicPartition(broker.queue, 0, 1)], asynchronous=False)
    outside.close()

    first = writer(broker, f"{broker.queue}{protocol}")
    commit_offset(broker, first, f"g{protocol}", 5, "first")
    assert broker.committed(f"g{protocol}") == {0: (5, "first")}
    second = writer(broker, f"{broker.queue}{protocol}")
    with pytest.raises(KafkaException) as fenced:
        commit_offset(broker, first, f"g{protocol}", 9, "too late")
    assert fenced.value.args[0].fatal()
    assert broker.committed(f"g{protocol}") == {0: (5, "first")}
    commit_offset(broker, second, f"g{protocol}", 7, "second")
    assert broker.committed(f"g{protocol}") == {0: (7, "second")}
    member.close()


async def test_who_died_within_a_transaction_holds_nobody_up(broker, waits):
    broker.send("a", "b")
    await waits.commit(await soon(waits.poll()))
    dead = writer(broker, f"airflow-events/airflow/{broker.queue}")
    dead.begin_transaction()
    dead.produce("airflow-events.state", b"{", f"airflow/{broker.queue}", partition=0)
    assert dead.flush(30) == 0
    member = broker.consumer()
    dead.send_offsets_to_transaction(
        [TopicPartition(broker.queue, 0, 99, metadata="{}")], member.consumer_group_metadata(), 30
    )
    member.close()
    event = await soon(waits.poll(1))
    assert event["value"] == "b"
    await waits.commit(event, 1)
    assert broker.unacknowledged() == 0


async def test_a_transaction_that_others_have_open_on_the_ledger_holds_nobody_up(broker, waits):
    broker.send("a", "b")
    await waits.commit(await soon(waits.poll()))
    other = writer(broker, f"other of {broker.queue}")
    other.begin_transaction()
    other.produce("airflow-events.state", b"{}", "other/topic", partition=0)
    assert other.flush(30) == 0
    event = await soon(waits.poll(1))
    await waits.commit(event, 1)
    other.abort_transaction(30)
    await waits.commit(event, 1)
    assert broker.unacknowledged() == 0


# Events.


async def test_the_event(broker, waits):
    broker.produce({
        "value": b'{"order_id": 42}', "key": b"k", "headers": {"trace": "\u00e4".encode(), "none": None},
        "timestamp": 1700000000123,
    })  # fmt: skip
    event = await soon(waits.poll())
    assert event.pop("mark") >= 0
    watched = {
        "topic": broker.queue,
        "partition": 0,
        "offset": 0,
        "timestamp": datetime(2023, 11, 14, 22, 13, 20, 123000, tzinfo=timezone.utc),
        "key": "k",
        "headers": {"trace": "ä", "none": None},
        "value": {"order_id": 42},
    }
    assert event == {**watched, "group": "airflow", "ledger": "airflow-events", "kafka_config_id": "source"}
    assert await soon(waits.watch(match={"order_id": 42}, since="2023-11-14T00:00:00Z")) == watched


async def test_tombstones_and_messages_without_a_key(broker, waits):
    broker.produce({"key": b"gone"}, {"value": b"1"})
    first, second = await soon(waits.poll(1)), await soon(waits.poll(2))
    assert (first["key"], first["value"]) == ("gone", None)
    assert (second["key"], second["value"]) == (None, 1)


async def test_a_key_that_is_no_text(broker, waits):
    broker.produce({"key": b"\xff", "value": b"1"})
    with pytest.raises(
        EventUndecodable, match=f"the key of the message at offset 0 in partition 0.*{broker.queue}"
    ):
        await soon(waits.poll())
    assert (await soon(waits.poll(keys="bytes")))["key"] == "/w=="


async def test_what_a_transaction_aborted_is_no_event_and_what_it_committed_is(broker, waits):
    task = waits.poll()
    producer = writer(broker, f"sender of {broker.queue}")
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
    assert broker.committed()[0][0] == 3


# The group, as others see it.


async def test_waits_over_several_partitions_and_the_watermark_that_others_see(broker, waits):
    broker.make_topic(partitions=4)
    tasks = [waits.poll(number) for number in range(40)]
    await asyncio.sleep(0.5)
    broker.produce(*({"value": str(number).encode(), "partition": number % 4} for number in range(40)))
    events = [await soon(task, 60) for task in tasks]
    assert sorted(event["value"] for event in events) == list(range(40))
    left = list(enumerate(events))
    random.Random(2).shuffle(left)
    for step in range(8):
        done, left = left[:5], left[5:]
        await asyncio.gather(*(waits.commit(event, number) for number, event in done))
        for partition, (offset, metadata) in broker.committed().items():
            uncommitted = [event["offset"] for _, event in left if event["partition"] == partition]
            assert offset == min(uncommitted, default=10)
            assert json.loads(metadata)["airflow-events"] >= 0
        if step == 3:
            assert read_as_a_member(broker) >= {event["value"] for _, event in left}
    who = {key: about["wait"] for key, about in broker.records("airflow-events.commits") if broker.queue in key}
    assert who == {
        f"airflow/{broker.queue}/{event['partition']}/{event['offset']}": f"dag/run{number}/task/-1"
        for number, event in enumerate(events)
    }


def read_as_a_member(broker):
    """What an ordinary consumer of the group reads, which commits nothing."""
    member = broker.consumer()
    member.subscribe([broker.queue])
    found = set()
    until(lambda: found.update(m.value() for m in member.consume(100, 1)) or len(found) >= 20, "it is read", 30)
    member.close()
    return {json.loads(value) for value in found}


async def test_a_group_that_is_older_than_the_ledger_goes_on_where_it_is(broker, waits):
    broker.send(*range(3))
    member = broker.consumer()
    member.commit(offsets=[TopicPartition(broker.queue, 0, 2)], asynchronous=False)
    member.close()
    assert (await soon(waits.poll()))["value"] == 2


async def test_a_group_that_begins_at_the_end(broker, waits):
    broker.send("old")
    task = waits.poll(start="latest")
    for _ in range(60):  # what was sent before the group is there is not for it
        await asyncio.sleep(0.5)
        if broker.committed()[0][0] == 1:
            break
    broker.send("new")
    assert (await soon(task))["value"] == "new"


@pytest.mark.parametrize("beside", [False, True])
async def test_offsets_that_somebody_set_are_followed(broker, waits, caplog, beside):
    broker.send(*range(6))
    events = [await soon(waits.poll(number)) for number in range(4)]
    await waits.commit(events[0], 0)
    if beside:  # a wait keeps the clients open, and what they know
        busy = [waits.poll(number) for number in range(4, 6)]
        await asyncio.gather(*map(soon, busy))
        idle = waits.poll(10)
        await asyncio.sleep(0.5)
    set_offset(broker, 3)
    with pytest.raises(EventLost, match=r"committed by nobody \(the group's offsets were set by others"):
        await waits.commit(events[1], 1)
    await waits.commit(events[3], 3)
    assert "was set from 1 to 3 by others, which is followed" in caplog.text
    set_offset(broker, 0)
    again = await soon(idle if beside else waits.poll(10))
    assert again["value"] == 0
    await waits.commit(again, 10)
    await waits.commit(events[0], 0)  # it did commit it, before
    with pytest.raises(EventLost, match="was committed by dag/run0/task/-1 and dag/run10/task/-1"):
        await waits.commit(events[0], 1)


def set_offset(broker, offset):
    admin = AdminClient(broker.bootstrap)
    places = [TopicPartition(broker.queue, 0, offset)]
    [asked] = admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions("airflow", places)]).values()
    asked.result(30)


async def test_a_group_that_an_ordinary_consumer_has_open(broker, waits, caplog):
    """It holds nobody up, and is told of; what it commits is followed, as what anybody sets is."""
    broker.send(*range(6))
    member = broker.consumer(client_id="by-the-way")
    member.subscribe([broker.queue])
    until(lambda: member.poll(0.1) and member.assignment(), "the group has a member", 60)
    first, second = await soon(waits.poll(1), 60), await soon(waits.poll(2))
    assert (first["value"], second["value"]) == (0, 1)
    assert "the group has members besides (by-the-way at /127.0.0.1)" in caplog.text
    await waits.commit(second, 2)
    assert broker.committed()[0][0] == 0
    member.commit(offsets=[TopicPartition(broker.queue, 0, 4)], asynchronous=False)
    with pytest.raises(EventLost, match="the group's offsets were set by others"):
        await waits.commit(first, 1)
    third = await soon(waits.poll(3))
    assert third["value"] == 4
    await waits.commit(third, 3)
    assert broker.committed()[0][0] == 5
    member.close()


async def test_a_group_that_somebody_had_forgotten_begins_anew(broker, waits):
    broker.send(*range(2))
    for number in range(2):
        await waits.commit(await soon(waits.poll(number)), number)
    admin = AdminClient(broker.bootstrap)
    [asked] = admin.delete_consumer_groups(["airflow"]).values()
    asked.result(30)
    forgotten = Producer(broker.bootstrap)
    forgotten.produce("airflow-events.state", None, f"airflow/{broker.queue}", partition=0)
    assert forgotten.flush(30) == 0
    assert (await soon(waits.poll(2)))["value"] == 0


async def test_a_group_whose_offsets_expired_is_still_known(broker, waits):
    broker.send(*range(3))
    await waits.commit(await soon(waits.poll()))
    admin = AdminClient(broker.bootstrap)
    [asked] = admin.delete_consumer_groups(["airflow"]).values()
    asked.result(30)
    event = await soon(waits.poll(1))
    assert event["value"] == 1
    await waits.commit(event, 1)
    assert broker.committed()[0][0] == 2


# Several processes.


async def test_a_commit_from_another_process(broker, waits, process):
    broker.send("a", "b")
    event = await soon(waits.poll(1))
    other = process()
    assert (await other.ask("commit", wait=2, event=event))["error"] == "EventLost"
    assert await other.ask("commit", wait=1, event=event) is None
    assert await other.ask("commit", wait=1, event=event) is None
    await waits.commit(event, 1)
    with pytest.raises(EventLost, match="was committed by dag/run1/task/-1"):
        await waits.commit(event, 2)
    assert broker.unacknowledged() == 1


async def test_processes_race_for_the_same_messages(broker, process):
    broker.make_topic(partitions=3)
    broker.produce(*({"value": str(number).encode(), "partition": number % 3} for number in range(90)))
    kwargs = {"topic": broker.queue, "kafka_config_id": "source"}
    processes = [process() for _ in range(3)]
    for number, each in enumerate(processes):
        await each.ask("take", wait=number * 10, waits=5, kwargs=kwargs)
    taken = []
    end = time.monotonic() + 120
    while len(taken) < 90 and time.monotonic() < end:
        await asyncio.sleep(1)
        taken = [pair for each in processes for pair in await each.ask("taken", wait=0)]
    assert sorted(value for value, _ in taken) == list(range(90))
    who = {key: about["wait"] for key, about in broker.records("airflow-events.commits") if broker.queue in key}
    assert sorted(who.values()) == sorted(wait for _, wait in taken)
    assert {offset for offset, _ in broker.committed().values()} == {30}


async def test_a_process_that_stood_still_has_lost_its_event(broker, waits, process):
    broker.send("a")
    kwargs = {"topic": broker.queue, "kafka_config_id": "source", "claim_timeout": 1}
    late = process()
    event = await late.ask("poll", wait=1, kwargs=kwargs)
    await late.ask("idle", wait=5, kwargs=kwargs)  # so that it keeps its producer
    os.kill(late.process.pid, signal.SIGSTOP)
    late.tell("commit", wait=1, event=event)
    other = await soon(waits.poll(2, claim_timeout=60), 30)
    assert other["value"] == "a"
    os.kill(late.process.pid, signal.SIGCONT)
    assert (await late.answer())["error"] == "EventLost"
    await waits.commit(other, 2)
    assert broker.unacknowledged() == 0


async def test_a_claim_that_another_process_gave_back(broker, waits, process):
    broker.send("{no json")
    task = waits.poll(1)
    event = await soon(task)
    other = process()
    other.tell("poll", wait=2, kwargs={"topic": broker.queue, "kafka_config_id": "source", "claim_timeout": 60})
    await asyncio.sleep(2)
    await waits.release(event, 1)
    assert (await other.answer())["offset"] == 0


# SIGKILL within a transaction, and right after it.


def what_is_so(broker):
    """What the ledger and the group's offsets say, asked by a client that is none of ours."""

    def of(topic, isolation):
        return [(key, value) for key, value in broker.records(topic, isolation) if broker.queue in key]

    admin = AdminClient(broker.bootstrap)
    [asked] = admin.list_consumer_group_offsets(
        [ConsumerGroupTopicPartitions("airflow", [TopicPartition(broker.queue, 0)])], require_stable=False
    ).values()  # fmt: skip
    states = {iso: of("airflow-events.state", iso) for iso in ("read_committed", "read_uncommitted")}
    return {
        "states": len(states["read_committed"]),
        "undecided states": len(states["read_uncommitted"]) - len(states["read_committed"]),
        "open": {offset: claim["wait"] for offset, claim in states["read_committed"][-1][1]["partitions"]["0"]
                 ["open"].items()},
        "commits": [(key.rpartition("/")[2], value["wait"]) for key, value in of("airflow-events.commits",
                                                                                 "read_committed")],
        "offset": asked.result(30).topic_partitions[0].offset,
    }  # fmt: skip


async def killed_at(step, process, do, **asked):
    """A process that does it, up to that step of its transaction, and is killed there."""
    dead = process()
    await dead.ask("stop", at=step)
    assert await dead.ask(do, **asked) == {"stands at": step}
    dead.end()
    assert dead.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("next_wait", ["the same", "another"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_process_that_is_killed_while_it_claims(broker, process, step, next_wait):
    broker.send("a", "b", "c")
    kwargs = {"topic": broker.queue, "kafka_config_id": "source"}
    first = process()
    event = await first.ask("poll", wait=9, kwargs=kwargs)
    assert await first.ask("commit", wait=9, event=event) is None
    first.end()
    before = what_is_so(broker)

    await killed_at(step, process, "poll", wait=1, kwargs=kwargs)
    after = what_is_so(broker)
    if step == "committed":
        assert after == {**before, "states": before["states"] + 1, "open": {"1": "dag/run1/task/-1"}}
    else:
        assert after == {**before, "undecided states": before["undecided states"] + 1}

    follower = process()
    wait = 1 if next_wait == "the same" else 2
    claimed = step == "committed" and wait == 2
    event = await follower.ask("poll", wait=wait, kwargs=kwargs)
    assert event["value"] == ("c" if claimed else "b")
    assert await follower.ask("commit", wait=wait, event=event) is None
    end = what_is_so(broker)
    assert end["commits"] == [("0", "dag/run9/task/-1"), (str(event["offset"]), f"dag/run{wait}/task/-1")]
    assert end["open"] == ({"1": "dag/run1/task/-1"} if claimed else {})
    assert end["offset"] == (1 if claimed else 2)


@pytest.mark.parametrize("step", STEPS)
async def test_a_process_that_is_killed_while_it_commits(broker, process, step):
    broker.send("a", "b")
    kwargs = {"topic": broker.queue, "kafka_config_id": "source"}
    first = process()
    event = await first.ask("poll", wait=1, kwargs=kwargs)
    first.end()
    before = what_is_so(broker)
    assert before["open"] == {"0": "dag/run1/task/-1"}
    assert (before["offset"], before["commits"]) == (0, [])

    await killed_at(step, process, "commit", wait=1, event=event)
    after = what_is_so(broker)
    committed = {"open": {}, "commits": [("0", "dag/run1/task/-1")], "offset": 1}
    if step == "committed":
        assert after == {**before, "states": before["states"] + 1, **committed}
    else:
        assert after == {**before, "undecided states": before["undecided states"] + 1}

    follower = process()
    assert await follower.ask("commit", wait=1, event=event) is None  # as whoever has the record does
    assert await follower.ask("commit", wait=1, event=event) is None
    assert (await follower.ask("commit", wait=2, event=event))["error"] == "EventLost"
    end = what_is_so(broker)
    assert {name: end[name] for name in committed} == committed
    assert (await follower.ask("poll", wait=2, kwargs=kwargs))["value"] == "b"


# What a topic may have lost.


async def test_what_retention_deleted_before_any_wait_had_it_is_told(broker, waits, caplog):
    broker.send(*range(5))
    first = await soon(waits.poll())
    await waits.commit(first)
    delete_records(broker, 3)
    event = await soon(waits.poll(1))
    assert event["value"] == 3
    assert "messages from offset 1 until before 3 of partition 0 were deleted" in caplog.text


async def test_what_retention_deleted_while_it_was_claimed(broker, waits, caplog):
    broker.send(*range(3))
    recorded, lost = await soon(waits.poll(1)), await soon(waits.poll(2))
    delete_records(broker, 2)
    await waits.commit(recorded, 1)  # the record has it
    assert (await soon(waits.poll(2)))["value"] == 2
    assert "the message at offset 1 of partition 0 was deleted while it was claimed" in caplog.text
    with pytest.raises(EventLost):
        await waits.commit(lost, 2)


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
    assert broker.committed()[0][0] == 30


async def test_a_topic_that_was_made_anew(broker, waits):
    broker.send(*range(3))
    await waits.commit(await soon(waits.poll()))
    event = await soon(waits.poll(1))
    admin = AdminClient(broker.bootstrap)
    admin.delete_topics([broker.queue])[broker.queue].result(30)
    broker.make_topic()
    with pytest.raises(SourceUnfit, match="ends at offset 0, and its group is at 2: the topic was made anew"):
        await soon(waits.poll(2))
    del event


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
    with pytest.raises(SourceUnfit, match=f"'loses' has {setting}={value!r}.*is needed"):
        await soon(waits.poll(kafka_config_id="loses"))


async def test_a_setting_that_is_none(broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_ODD", json.dumps(broker.connection(extra={"no.such.setting": 1})))
    with pytest.raises(SourceUnfit, match=r"'odd'.*no\.such\.setting"):
        await soon(waits.poll(kafka_config_id="odd"))


@pytest.mark.parametrize(
    ("which", "config", "partitions", "message"),
    [
        ("state", {"cleanup.policy": "delete"}, 1, "has cleanup.policy=delete; it needs cleanup.policy=compact"),
        ("commits", {"retention.ms": "1000"}, 1, "has retention.ms=1000; it needs retention.ms=604800000"),
        ("state", {"cleanup.policy": "compact"}, 2, "has 2 partitions; it needs one"),
    ],
)
async def test_a_ledger_that_would_forget(broker, waits, which, config, partitions, message):
    ledger_name = f"ledger-{broker.queue}"
    admin = AdminClient(broker.bootstrap)
    topic = NewTopic(f"{ledger_name}.{which}", partitions, 1, config=config)
    admin.create_topics([topic])[topic.topic].result(30)
    with pytest.raises(SourceUnfit, match=f"'{ledger_name}.{which}' {message}"):
        await soon(waits.poll(ledger=ledger_name))


async def test_another_ledger_than_the_groups(broker, waits):
    broker.send("a", "b")
    await soon(waits.poll())
    with pytest.raises(SourceUnfit, match=r"'other-ledger\.state' has none: was it deleted, or do other waits"):
        await soon(waits.poll(1, ledger="other-ledger"), 60)


@pytest.mark.parametrize("which", ["state", "commits"])
async def test_a_ledger_whose_topic_is_deleted(broker, waits, which, caplog):
    """With the claims gone no wait may guess; the log of commits is made anew."""
    about = {"ledger": f"deleted-{which}"}
    broker.send(*range(3))
    await waits.commit(await soon(waits.poll(**about)))
    event = await soon(waits.poll(1, **about))
    admin = AdminClient(broker.bootstrap)
    name = f"deleted-{which}.{which}"
    admin.delete_topics([name])[name].result(30)
    with pytest.raises(ConnectionError, match=f"there is no topic '{name}' any more: it was deleted"):
        await waits.commit(event, 1)  # tried again by whoever calls it, until the topic is there
    if which == "state":
        with pytest.raises(SourceUnfit, match=f"'{name}' has none: was it deleted"):
            await soon(waits.poll(2, **about), 60)
    else:
        assert (await soon(waits.poll(2, **about), 60))["value"] == 2
        await waits.commit(event, 1)
        with pytest.raises(EventLost):
            await waits.commit(event, 3)


async def test_brokers_that_have_no_transactions(waits, broker, monkeypatch):
    """As one broker alone has none, with Kafka's own defaults."""
    alone = kafka_server.server(transaction_state_log_replication_factor=3)
    assert alone is not None
    with alone:
        monkeypatch.setenv("AIRFLOW_CONN_ALONE", json.dumps(broker.connection(port=alone.port)))
        monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
        there = AdminClient({"bootstrap.servers": f"127.0.0.1:{alone.port}"})
        there.create_topics([NewTopic(broker.queue, 1, 1)])[broker.queue].result(30)
        with pytest.raises(SourceUnreachable, match=r"no transaction can be begun.*transaction\.state\.log"):
            await soon(waits.poll(kafka_config_id="alone"), 90)


async def test_the_ledgers_topics_are_made_to_keep_what_they_must(broker, waits):
    broker.send("a")
    await soon(waits.poll())
    admin = AdminClient(broker.bootstrap)
    for name, setting, value in (
        ("airflow-events.state", "cleanup.policy", "compact"),
        ("airflow-events.commits", "retention.ms", "604800000"),
    ):
        [asked] = admin.describe_configs([ConfigResource(ResourceType.TOPIC, name)]).values()
        assert asked.result(30)[setting].value == value


async def test_claims_for_which_there_is_no_room_wait(broker, waits, monkeypatch, caplog):
    monkeypatch.setattr(state, "MOST_BYTES", 250)
    tasks = [waits.poll(number) for number in range(4)]
    await asyncio.sleep(0.5)
    broker.send(*range(4))
    for _ in range(2):
        await asyncio.wait([task for task in tasks if not task.done()], timeout=30, return_when="FIRST_COMPLETED")
    done, left = await asyncio.wait(tasks, timeout=2)
    assert len(done) == 2
    assert "there is no room for more than its 2 open claims" in caplog.text
    for task in done:
        await waits.commit(task.result(), tasks.index(task))
    for task in left:
        await soon(task, 30)


async def test_partitions_that_are_added(broker, waits, monkeypatch):
    monkeypatch.setattr(ledger, "_LISTING", 1)
    monkeypatch.setattr(watch, "_LISTING", 1)
    tasks = [waits.poll(), waits.watch(1, match={"id": 1}, since=datetime.now(timezone.utc))]
    await nothing(tasks[0])
    admin = AdminClient(broker.bootstrap)
    admin.create_partitions([NewPartitions(broker.queue, 2)])[broker.queue].result(30)
    until(lambda: len(broker.ends()) == 2, "it is there", 30)
    broker.produce({"value": b'{"id": 1}', "partition": 1})
    for task in tasks:
        assert (await soon(task, 30))["partition"] == 1


async def test_a_watch_that_looks_from_before_what_is_kept_is_warned(broker, waits, caplog):
    broker.send(*range(5))
    delete_records(broker, 4)
    assert (await soon(waits.watch(since=datetime.now(timezone.utc) - timedelta(hours=1))))["value"] == 4
    assert "has dropped messages until" in caplog.text


# Permissions, on a broker of their own.


@pytest.fixture(scope="module")
def guarded():
    yield from running(kafka_server.guarded(), kafka_server.MISSING)


@pytest.mark.parametrize(
    ("user", "password", "message"),
    [
        ("reader", "wrong", "Authentication failed"),
        ("nobody", "nobody-secret", "TOPIC_AUTHORIZATION_FAILED"),
        ("reader", "reader-secret", "for claims and commits, and the connection's user may not make it"),
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
    with pytest.raises(SourceUnfit, match=message) as caught:
        await soon(waits.poll(kafka_config_id="guarded"), 40)
    assert password not in str(caught.value)


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
    since = datetime.now(timezone.utc) - timedelta(minutes=1)
    task = waits.poll(kafka_config_id="tls")
    watched = waits.watch(1, kafka_config_id="tls", match={"id": 7}, since=since)
    with monkeypatch.context() as patch:
        patch.setattr(Kafka, "bootstrap", kafka_server.as_admin(guarded))
        broker.send({"id": 7})
        event = await soon(task, 60)
        assert event["value"] == (await soon(watched, 60))["value"] == {"id": 7}
        await waits.commit(event)
        assert broker.committed()[0][0] == 1
        assert broker.unacknowledged() == 0


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
        with pytest.raises(SourceUnfit, match=f"the topic '{broker.queue}'.*'tls'.*{message}") as caught:
            await soon(task, 60)
        assert password not in str(caught.value) + caplog.text


async def test_a_client_that_speaks_no_tls(guarded, broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
    monkeypatch.setenv("AIRFLOW_CONN_TLS", over_tls(guarded, "ca", **{"security.protocol": "SASL_PLAINTEXT"}))
    with pytest.raises((SourceUnreachable, SourceUnfit), match=f"the topic '{broker.queue}'.*'tls'") as caught:
        await soon(waits.poll(kafka_config_id="tls"), 60)
    assert "admin-secret" not in str(caught.value)
