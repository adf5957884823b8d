"""What every source owes that gives each event to one wait, against its real server."""

from __future__ import annotations

import asyncio
import json
import random

import pytest
from airflow_events.errors import SourceMisconfigured, SourceUnreachable
from airflow_events.listeners.support import serde
from broker import clients_at_rest, nothing, soon, until_clients_are, until_told


async def test_an_event_is_delivered_with_its_coordinates_and_can_be_stored(broker, waits):
    task = waits.poll()
    await nothing(task, 0.3)
    broker.send({"order_id": 1, "text": "äöü"})
    event = await soon(task)
    assert event["value"] == {"order_id": 1, "text": "äöü"}
    serde.check(event)
    assert broker.queue in json.dumps(event, default=str)
    assert broker.unacknowledged() == 1
    await waits.commit(event)
    assert broker.unacknowledged() == 0


async def test_what_came_before_the_wait_is_found(broker, waits):
    task = waits.poll()  # which makes what a group needs, should the source have groups
    await nothing(task, 0.3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    broker.send(1)
    assert (await soon(waits.poll(1)))["value"] == 1


async def test_an_event_is_the_same_by_whatever_format_it_is_read(broker, waits):
    listener, found = broker.listener(), []
    broker.send(1)
    for number, values in enumerate(("json", "text", "bytes")):
        event = await soon(waits.poll(number, values=values), 30)
        found.append((listener.event_id(event), listener.event_content(event)))
        await waits.release(event, number)
    assert found[1:] == found[:1] * 2


async def test_waits_at_once_get_an_event_each_and_commit_in_any_order(broker, waits):
    tasks = [waits.poll(number) for number in range(30)]
    await asyncio.sleep(0.5)
    broker.send(*range(30))
    events = [await soon(task, 30) for task in tasks]
    assert sorted(event["value"] for event in events) == list(range(30))
    order = list(enumerate(events))
    random.Random(1).shuffle(order)
    for number, event in order:
        await waits.commit(event, number)
    assert broker.unacknowledged() == 0


async def test_events_come_in_order(broker, waits):
    if not broker.has_order:
        pytest.skip("the source promises none")
    first = waits.poll()
    await nothing(first, 0.3)
    broker.send(*range(5))
    values = [(await soon(first))["value"]]
    values += [(await soon(waits.poll(number)))["value"] for number in range(1, 5)]
    assert values == list(range(5))


async def test_the_server_is_killed_while_waits_wait(broker, waits):
    tasks = [waits.poll(number) for number in range(3)]
    await asyncio.sleep(0.5)
    broker.server.kill()
    await asyncio.sleep(1.5)
    broker.server.start()
    broker.send(*range(3))
    events = [await soon(task, 120) for task in tasks]
    assert sorted(event["value"] for event in events) == [0, 1, 2]
    for number, event in enumerate(events):
        await waits.commit(event, number)
    assert broker.unacknowledged() == 0


async def test_the_server_is_away_until_the_hub_has_lost_it(broker, waits, caplog, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "300")
    task, patient = waits.poll(), waits.poll(1)
    broker.send("a")
    done, [patient] = await asyncio.wait([task, patient], return_when=asyncio.FIRST_COMPLETED, timeout=15)
    assert len(done) == 1
    broker.server.kill()
    await until_told(caplog, "cannot be reached")
    broker.server.start()
    broker.send("b")
    assert (await soon(patient, 120))["value"] == "b"


async def test_a_server_that_is_not_there(broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_NOWHERE", json.dumps(broker.connection(port=1)))
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
    name = next(key for key in broker.arguments()[1] if key.endswith(("conn_id", "config_id")))
    with pytest.raises(SourceUnreachable, match="nowhere"):
        await soon(waits.poll(**{name: "nowhere"}), 30)


async def test_a_connection_of_another_type(broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_OTHER", json.dumps({**broker.connection(), "conn_type": "ftp"}))
    name = next(key for key in broker.arguments()[1] if key.endswith(("conn_id", "config_id")))
    with pytest.raises(SourceMisconfigured, match=f"'other' is of type 'ftp', and '{broker.connection_type}'"):
        await soon(waits.poll(**{name: "other"}))


async def test_bytes(broker, waits):
    if not broker.has_bytes or not broker.has_binary:
        pytest.skip("the source holds nothing but JSON, or nothing but text")
    task = waits.poll(values="bytes")
    await nothing(task, 0.3)
    broker.send_raw(b"\x00\xff")
    assert (await soon(task))["value"] == "AP8="


async def test_many_waits_share_a_connection_which_ends_with_them(broker, waits):
    before = await clients_at_rest(broker)
    tasks = [waits.poll(number) for number in range(200)]
    shared = broker.clients_of_waits
    await until_clients_are(broker, shared, before + shared)
    await asyncio.sleep(1)
    assert not any(task.done() for task in tasks)
    assert shared <= broker.clients() <= before + shared
    await waits.end()
    await until_clients_are(broker, 0, before)


async def test_an_idle_wait_gets_its_event_after_a_while(broker, waits):
    task = waits.poll()
    await nothing(task, 4)
    broker.send("late")
    assert (await soon(task))["value"] == "late"
