"""What every source owes that can be watched, against its real server."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import datetime, timedelta, timezone

import pytest
from airflow_events.errors import EventUndecodable
from airflow_events.listeners.support import watching as log
from broker import clients_at_rest, nothing, soon, until_clients_are, until_told


@pytest.fixture
def broker(broker):
    if broker.watcher is None:
        pytest.skip("the source cannot be watched")
    return broker


def ago(**kwargs):
    return datetime.now(timezone.utc) - timedelta(**kwargs)


async def test_each_watch_gets_what_matches_and_takes_nothing(broker, waits):
    one = waits.watch(1, match={"order.id": 1}, since=ago(minutes=1))
    also_one = waits.watch(2, match={"order.id": "1"}, since=ago(minutes=1))
    large = waits.watch(3, match="order.amount > `100`", since=ago(minutes=1))
    first = waits.watch(4, since=ago(minutes=1))
    never = waits.watch(5, match={"order.id": 99}, since=ago(minutes=1))
    await asyncio.sleep(0.5)
    broker.send({"order": {"id": 2, "amount": 500}}, {"order": {"id": 1, "amount": 5}}, "no mapping at all")
    assert (await soon(one))["value"]["order"]["id"] == 1
    assert await soon(also_one) == await soon(one)
    assert (await soon(large))["value"]["order"]["id"] == 2
    assert (await soon(first))["value"]["order"]["id"] == 2
    await nothing(never, 0.5)


async def test_what_was_published_before_the_watch_began_is_found(broker, waits):
    start = ago(seconds=0.5)
    broker.send({"id": 1}, {"id": 2})
    await asyncio.sleep(1)
    assert (await soon(waits.watch(match={"id": 2}, since=start)))["value"] == {"id": 2}
    await nothing(waits.watch(1, match={"id": 1}, since=ago(seconds=0)), 1.5)


async def test_a_later_watch_that_looks_from_further_back_is_served_beside_the_others(broker, waits):
    start = ago(seconds=0.5)
    broker.send({"id": "old"})
    await asyncio.sleep(1)
    other = waits.watch(1, match={"id": "new"}, since=ago(seconds=0))
    await nothing(other, 1)
    assert (await soon(waits.watch(2, match={"id": "old"}, since=start)))["value"] == {"id": "old"}
    broker.send({"id": "new"})
    assert (await soon(other))["value"] == {"id": "new"}
    assert (await soon(waits.watch(3, match={"id": "old"}, since=start)))["value"] == {"id": "old"}


async def test_waits_with_an_old_since_do_not_send_the_others_back(broker, waits, monkeypatch):
    reads = Counter()
    read = log._Reading.read

    async def counted(reading, hub, seconds):
        before, messages = reading.position, await read(reading, hub, seconds)
        assert before is None or hub.reached(reading.position, before)
        reads[reading] += len(messages)
        return messages

    monkeypatch.setattr(log._Reading, "read", counted)
    start = ago(seconds=3)
    broker.send(*({"id": number} for number in range(700)))
    await asyncio.sleep(1.5)  # a timestamp may be of whole seconds
    staying = waits.watch(1000, match={"id": "new"}, since=ago(seconds=0))
    await nothing(staying, 1)
    for number in range(0, 700, 100):
        tasks = [waits.watch(number + n, match={"id": number + n}, since=start) for n in range(10)]
        assert [(await soon(task))["value"]["id"] for task in tasks] == list(range(number, number + 10))
    broker.send({"id": "new"})
    assert (await soon(staying))["value"] == {"id": "new"}
    [at_end] = [count for reading, count in reads.items() if isinstance(reading, log._End)]
    assert at_end < 700
    assert len(reads) > 1


async def test_what_was_published_while_the_server_was_lost_is_found(broker, waits):
    task = waits.watch(match={"id": 7}, since=ago(minutes=1))
    await nothing(task, 0.5)
    broker.server.kill()
    await asyncio.sleep(1.5)
    broker.server.start()
    broker.send({"id": 7})
    assert (await soon(task, 120))["value"] == {"id": 7}


async def test_the_server_is_away_until_the_hub_has_lost_it(broker, waits, caplog, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "300")
    first, second = (waits.watch(number, match={"id": number}, since=ago(minutes=1)) for number in (1, 2))
    broker.send({"id": 1})
    await soon(first)
    broker.server.kill()
    await until_told(caplog, "cannot be reached")
    broker.server.start()
    broker.send({"id": 2})
    assert (await soon(second, 120))["value"] == {"id": 2}


async def test_an_undecodable_message_is_passed_over_or_fails_by_choice(broker, waits, caplog):
    if not broker.has_bytes:
        pytest.skip("the source holds nothing but JSON")
    patient = waits.watch(1, match={"id": 1}, since=ago(minutes=1))
    strict = waits.watch(2, match={"id": 1}, since=ago(minutes=1), on_undecodable="fail")
    await asyncio.sleep(0.5)
    broker.send_raw(b"{no json")
    with pytest.raises(EventUndecodable, match=broker.queue):
        await soon(strict)
    broker.send({"id": 1})
    assert (await soon(patient))["value"] == {"id": 1}
    assert "no json" in caplog.text


async def test_a_thousand_watches_are_one_connection(broker, waits):
    before = await clients_at_rest(broker)
    tasks = [waits.watch(number, match={"id": number}, since=ago(minutes=1)) for number in range(1000)]
    shared = broker.clients_of_watches
    await until_clients_are(broker, shared, len(tasks))
    await asyncio.sleep(1.5)  # for those that there should not be
    assert broker.clients() <= before + shared
    broker.send(*({"id": number} for number in reversed(range(1000))))
    events = [await soon(task, 120) for task in tasks]
    assert [event["value"]["id"] for event in events] == list(range(1000))
    await until_clients_are(broker, 0, before)


async def test_matches_that_are_none(broker, waits):
    with pytest.raises(ValueError, match="JMESPath"):
        await soon(waits.watch(match="a b"))
    with pytest.raises(TypeError, match="a mapping, a JMESPath expression or None, not 5"):
        await soon(waits.watch(match=5))


async def test_a_quiet_log_is_read_for_who_comes_later_from_further_back(broker, waits):
    """Who came before reads on until it meets the end, which nothing new has come to."""
    broker.send({"id": "it"}, {"id": "other"})
    await asyncio.sleep(1.5)
    await nothing(waits.watch(1, match={"id": "never"}, since=ago(minutes=5)), 2)
    assert (await soon(waits.watch(2, match={"id": "it"}, since=ago(minutes=5))))["value"] == {"id": "it"}


async def test_a_moment_before_all_others_harms_nobody(broker, waits):
    other = waits.watch(1, match={"id": 1}, since=ago(seconds=1))
    await nothing(other, 1.5)
    old = waits.watch(2, match={"id": 1}, since="1970-01-01T00:00+01:00")
    await nothing(other, 1.5)
    broker.send({"id": 1})
    assert [(await soon(task))["value"] for task in (other, old)] == [{"id": 1}] * 2
