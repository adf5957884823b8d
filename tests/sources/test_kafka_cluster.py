"""Kafka on three brokers, of which one is killed at a time."""

from __future__ import annotations

import asyncio

import pytest
from kafka_process import Process
from of_kafka import KafkaCluster

from deployment import until

pytestmark = pytest.mark.parametrize("server", [KafkaCluster], ids=["kafka cluster"], indirect=True)

EVENTS = 12  # before each kill
WAITS = 10  # in each of two processes


@pytest.fixture
def processes(broker, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "300")
    found = [Process(), Process()]
    yield found
    for process in found:
        process.end()


async def test_each_message_is_taken_once_though_each_broker_is_killed(broker, processes):
    broker.make_topic(partitions=6)
    kwargs = {"topic": broker.queue, "kafka_config_id": "source"}
    for number, process in enumerate(processes):
        await process.ask("take", wait=100 * number, waits=WAITS, kwargs=kwargs)
    for number, server in enumerate(broker.servers):
        first = number * EVENTS
        messages = [{"value": str(value).encode()} for value in range(first, first + EVENTS)]
        broker.produce(*messages, **{"enable.idempotence": True})
        server.kill()
        assert server.process.poll() is not None
        server.begin()
        await until_taken(processes, first + EVENTS)
        server.wait(120)
        until(lambda: not broker.cluster.behind(), "all brokers have everything", 120, 0.5)

    taken = [pair for process in processes for pair in await process.ask("taken", wait=0)]
    everything = len(broker.servers) * EVENTS
    assert sorted(value for value, _ in taken) == list(range(everything))
    assert {number: offset for number, (offset, _) in broker.committed().items()} == broker.ends()
    assert not any(partition["open"] for partition in broker.state().values())
    prefix = f"airflow/{broker.queue}/"
    notes = [note["wait"] for key, note in broker.records("airflow-events.commits") if key.startswith(prefix)]
    assert sorted(notes) == sorted(wait for _, wait in taken)


async def until_taken(processes, count):
    for _ in range(600):
        if sum([len(await process.ask("taken", wait=0)) for process in processes]) >= count:
            return
        await asyncio.sleep(0.2)
    raise TimeoutError(f"not all of {count} messages were taken")


async def test_everything_of_the_ledger_is_on_three_brokers(broker, waits):
    from confluent_kafka.admin import AdminClient

    broker.send(1)
    await waits.commit(await waits.poll())
    admin = AdminClient(broker.bootstrap)
    topics = admin.list_topics(timeout=30).topics
    copies = {name: {len(p.replicas) for p in topic.partitions.values()} for name, topic in topics.items()}
    for name in ("airflow-events.state", "airflow-events.commits", "__consumer_offsets", "__transaction_state"):
        assert copies[name] == {3}
