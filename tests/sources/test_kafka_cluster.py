"""Kafka on three brokers, of which one is killed at a time."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta, timezone

import pytest
from airflow_events.listeners.kafka import consume, group
from airflow_events.listeners.support.positions import Positions
from broker import nothing, soon, until_told
from confluent_kafka.admin import AdminClient, NewTopic
from of_kafka import Inbox, KafkaCluster, KafkaOneCoordinator

from deployment import until


def on(cluster):
    return pytest.mark.parametrize("server", [cluster], ids=[cluster.name], indirect=True)


EVENTS = 12  # before each kill
WAITS = 20


@on(KafkaCluster)
async def test_each_message_is_taken_once_though_each_broker_is_killed(broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "300")
    # As in a deployment: what is taken is in the inbox, and does not wait for the group's coordinator.
    Positions.of_loop().inbox = Inbox("a" * 32).exchange
    broker.make_topic(partitions=6)
    taken = []

    async def take(number):
        while True:
            event = await waits.poll(number)
            await waits.commit(event, number)
            taken.append(event["value"])

    takers = [asyncio.create_task(take(number)) for number in range(WAITS)]
    for number, server in enumerate(broker.servers):
        first = number * EVENTS
        messages = [{"value": str(value).encode()} for value in range(first, first + EVENTS)]
        await asyncio.to_thread(lambda sent=messages: broker.produce(*sent, **{"enable.idempotence": True}))
        server.kill()
        assert server.process.poll() is not None
        server.begin()
        await until_taken(taken, first + EVENTS)
        await asyncio.to_thread(server.wait, 120)
        everywhere = lambda: not broker.cluster.behind()  # noqa: E731
        await asyncio.to_thread(until, everywhere, "all brokers have everything", 120, 0.5)

    assert sorted(taken) == list(range(len(broker.servers) * EVENTS))
    for _ in range(300):  # the offsets follow
        if {number: offset for number, (offset, _) in broker.committed().items()} == broker.ends():
            break
        await asyncio.sleep(0.2)
    else:
        raise AssertionError(f"committed: {broker.committed()}, ends: {broker.ends()}")
    for taker in takers:
        taker.cancel()
    await asyncio.gather(*takers, return_exceptions=True)


async def one_partition_is_without_a_leader(broker):
    """Make a topic of which each partition has a message and is on one broker, and end the last of these."""
    broker.queue += "-alone"
    admin = AdminClient(broker.bootstrap)
    [made] = admin.create_topics([NewTopic(broker.queue, 3, replica_assignment=[[1], [2], [3]])]).values()
    made.result(30)
    await asyncio.to_thread(
        lambda: broker.produce(*({"value": str(number).encode(), "partition": number} for number in range(3)))
    )
    broker.servers[2].kill()


@on(KafkaCluster)
async def test_a_partition_without_a_leader_holds_up_no_other(broker, waits, caplog, impatient):
    await one_partition_is_without_a_leader(broker)
    taken = set()
    for number in range(2):
        event = await soon(waits.poll(number), 120)
        await waits.commit(event, number)
        taken.add(event["value"])
    assert taken == {0, 1}
    task = waits.poll(3)
    await until_told(caplog, "no broker leads partition 2")
    broker.servers[2].begin()
    assert (await soon(task, 120))["value"] == 2


@on(KafkaCluster)
async def test_a_partition_without_a_leader_holds_up_no_watch_of_others(broker, waits, caplog):
    await one_partition_is_without_a_leader(broker)
    since = datetime.now(timezone.utc) - timedelta(hours=1)
    early, other = (waits.watch(number, match=f"@ == `{number}`", since=since) for number in (2, 1))
    assert (await soon(other, 120))["value"] == 1
    await until_told(caplog, "no broker leads partition 2")
    late = waits.watch(3, match="@ == `2`", since=since - timedelta(hours=1))
    await nothing(late)
    broker.servers[2].begin()
    for task in (early, late):
        assert (await soon(task, 120))["value"] == 2


async def until_taken(taken, count):
    for _ in range(600):
        if len(taken) >= count:
            return
        await asyncio.sleep(0.2)
    raise TimeoutError(f"{len(taken)} of {count} messages were taken")


@pytest.fixture
async def impatient(monkeypatch):
    """An inbox, and hubs that look often, and for answers that do not come not long."""
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "300")
    for name, seconds in {"_LOOK_EVERY": 0.5, "_PAUSE": 0.5}.items():
        monkeypatch.setattr(consume, name, seconds)
    monkeypatch.setattr(group, "PATIENCE", 1)
    Positions.of_loop().inbox = Inbox("a" * 32).exchange


@on(KafkaOneCoordinator)
async def test_what_the_inbox_knows_is_read_while_the_groups_coordinator_is_away(broker, waits, impatient, caplog):
    coordinator = broker.coordinator()
    here = next(number for number in range(1, 4) if number != coordinator)
    broker.make_topic(on=here)

    async def take(number, value):
        event = await soon(waits.poll(number), 120)
        assert event["value"] == value
        await waits.commit(event, number)

    broker.send("before")
    await take(0, "before")
    waiting = waits.poll(1)
    await nothing(waiting)
    server = broker.servers[coordinator - 1]
    server.kill()
    await until_told(caplog, "the group's coordinator does not answer")
    await nothing(waiting, 10)
    assert (
        sum("coordinator does not answer" in each.message for each in caplog.records) == 2
    )  # ours, and the wait's
    broker.send("beside")
    await waits.commit(await soon(waiting, 120), 1)

    await waits.end()
    await asyncio.sleep(3)  # the hub ends some while after
    broker.send("again")
    await take(2, "again")

    assert "cannot be reached" not in caplog.text
    known = broker.queue
    broker.queue += "-too"
    broker.make_topic(on=here)
    broker.send("new")
    new = waits.poll(3)
    await nothing(new, 5)
    await asyncio.to_thread(server.start)
    assert (await soon(new, 120))["value"] == "new"
    broker.queue = known
    broker.send("after")
    await take(4, "after")
    await asyncio.to_thread(until, lambda: broker.committed()[0][0] == 4, "the offset follows", 60, 0.5)


@on(KafkaOneCoordinator)
async def test_reading_goes_on_without_the_only_broker_that_the_connection_names(
    broker, waits, impatient, monkeypatch, caplog
):
    coordinator = broker.coordinator()
    server = broker.servers[coordinator - 1]
    broker.make_topic(on=next(number for number in range(1, 4) if number != coordinator))
    named = broker.connection(extra={"bootstrap.servers": f"127.0.0.1:{server.port}"})
    monkeypatch.setenv("AIRFLOW_CONN_SOURCE", json.dumps(named))
    waiting = waits.poll()
    await nothing(waiting, 3)
    server.kill()
    await until_told(caplog, "the group's coordinator does not answer")
    await nothing(waiting, consume._BLIND + 10)
    broker.send("beside")
    assert (await soon(waiting, 120))["value"] == "beside"
    assert "cannot be reached" not in caplog.text
    await asyncio.to_thread(server.start)
