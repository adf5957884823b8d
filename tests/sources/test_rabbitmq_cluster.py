"""RabbitMQ on three nodes, of which one is killed at a time."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from airflow_events.errors import AtRedelivery
from airflow_events.listeners.rabbitmq import RabbitMQListener
from broker import nothing, soon, until_told
from of_rabbitmq import RabbitMQCluster

from deployment import until

pytestmark = [
    pytest.mark.release,
    pytest.mark.parametrize("server", [RabbitMQCluster], ids=[RabbitMQCluster.name], indirect=True),
]

EVENTS = 12  # before each kill
WAITS = 8


async def again(broker, number):
    """Start a node that was killed, and wait until it is one of the cluster."""
    await asyncio.to_thread(broker.cluster.nodes[number].start)
    broker.turn_to(number)
    await asyncio.to_thread(until, lambda: broker.unacknowledged() >= 0, "the node knows its queues", 60, 1)


async def test_each_message_is_taken_once_though_each_node_is_killed(broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "300")
    known, taken = set(), []

    async def take(number):
        """Do as a trigger does with what the inbox answers."""
        while True:
            event = await waits.poll(number)
            id = RabbitMQListener().event_id(event)
            is_new = id not in known
            known.add(id)
            with suppress(AtRedelivery):  # the connection over which it came is gone, so it comes again
                await waits.commit(event, number)
            if is_new:
                taken.append(event["value"])

    takers = [asyncio.create_task(take(number)) for number in range(WAITS)]
    nodes = broker.cluster.nodes
    for number, node in enumerate(nodes):
        broker.turn_to((number + 1) % len(nodes))
        first = number * EVENTS
        await asyncio.to_thread(broker.send, *range(first, first + EVENTS))
        node.kill(0)
        assert node.process.poll() is not None
        await asyncio.to_thread(until, lambda last=first: len(taken) == last + EVENTS, "all are taken", 120)
        await again(broker, number)
    assert sorted(taken) == list(range(len(nodes) * EVENTS))
    await asyncio.to_thread(until, lambda: broker.unacknowledged() == 0, "all are acknowledged", 60, 1)
    for taker in takers:
        taker.cancel()
    await asyncio.gather(*takers, return_exceptions=True)


async def test_a_queue_whose_node_is_down_holds_up_no_other(broker, waits, caplog, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "300")
    alone = f"{broker.queue}-alone"
    broker.turn_to(2)
    broker.declare(alone, {"x-queue-type": "classic"})  # it is where it was declared
    broker.turn_to(0)
    broker.cluster.nodes[2].kill(0)
    assert broker.cluster.nodes[2].process.poll() is not None
    with_event, broker.queue, queue = waits.poll(0), alone, broker.queue
    without, broker.queue = waits.poll(1), queue
    broker.send("a")
    event = await soon(with_event, 120)
    assert event["value"] == "a"
    await waits.commit(event)
    await until_told(caplog, alone)
    await nothing(without)
    await again(broker, 2)
    broker.turn_to(2)
    broker.publish(b'"b"', to=alone, message_id="b")
    assert (await soon(without, 90))["value"] == "b"
