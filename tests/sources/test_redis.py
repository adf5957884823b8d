"""What is peculiar to Redis Streams."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import datetime, timedelta, timezone

import pytest
import servers
from airflow_events.errors import EventLost, EventUndecodable, SourceUnfit
from broker import nothing, soon
from of_redis import Redis6, Valkey

pytestmark = pytest.mark.parametrize("server", [Valkey, Redis6], ids=lambda broker: broker.name, indirect=True)


async def test_an_entry_of_several_fields_is_a_dict_of_texts(broker, waits):
    task = waits.poll(field=None)
    with broker.client as client:
        client.xadd(broker.queue, {"order_id": 42, "text": "ä"}, id="1700000000000-0")
    event = await soon(task)
    assert event == {
        "stream": broker.queue,
        "group": "airflow",
        "id": "1700000000000-0",
        "timestamp": datetime(2023, 11, 14, 22, 13, 20, tzinfo=timezone.utc),
        "value": {"order_id": "42", "text": "ä"},
        "redis_conn_id": "source",
    }
    watched = await soon(waits.watch(field=None, match={"order_id": 42}, since="2023-11-14T00:00:00Z"))
    assert watched["value"] == event["value"]


async def test_an_entry_without_the_field(broker, waits):
    task = waits.poll()
    with broker.client as client:
        client.xadd(broker.queue, {"other": 1})
    with pytest.raises(EventUndecodable, match="it has no field 'v', only b'other'"):
        await soon(task)


async def test_consumers_do_not_pile_up(broker, waits):
    tasks = [waits.poll(number) for number in range(20)]
    await asyncio.sleep(1)
    with broker.client as client:
        assert client.xinfo_consumers(broker.queue, "airflow") == []
        broker.send(*range(5))
        done, _ = await asyncio.wait(tasks, timeout=3)
        assert len(done) == 5
        assert len(client.xinfo_consumers(broker.queue, "airflow")) == 5
        for number, task in enumerate(tasks):
            if task.done():
                await waits.commit(task.result(), number)
        assert client.xinfo_consumers(broker.queue, "airflow") == []


async def test_an_entry_that_is_trimmed_while_it_is_claimed(broker, waits):
    task = waits.poll()
    broker.send("a")
    event = await soon(task)
    with broker.client as client:
        client.xtrim(broker.queue, maxlen=0, approximate=False)
    await waits.commit(event)  # the record has it
    assert broker.unacknowledged() == 0


async def test_an_entry_that_is_trimmed_before_its_wait_polls_again_is_passed_over(broker, waits):
    task = waits.poll()
    broker.send("a")
    event = await soon(task)
    with broker.client as client:
        client.xtrim(broker.queue, maxlen=0, approximate=False)
    broker.send("b")
    assert (await soon(waits.poll()))["value"] == "b"
    with pytest.raises(EventLost):
        await waits.commit(event)


async def test_an_entry_that_somebody_else_acknowledged(broker, waits):
    task = waits.poll()
    broker.send("a")
    event = await soon(task)
    with broker.client as client:
        client.xack(broker.queue, "airflow", event["id"])
    with pytest.raises(EventLost, match=r"held by nobody \(it was acknowledged by others, or trimmed\)"):
        await waits.commit(event)


async def test_groups_are_independent_and_may_begin_at_the_end(broker, waits):
    broker.send("a")
    assert (await soon(waits.poll(1, group="one")))["value"] == "a"
    assert (await soon(waits.poll(2, group="two")))["value"] == "a"
    late = waits.poll(3, group="three", start="$")
    await nothing(late)
    broker.send("b")
    assert (await soon(late))["value"] == "b"


async def test_a_key_that_is_no_stream(broker, waits):
    with broker.client as client:
        client.set(broker.queue, "text")
    with pytest.raises(SourceUnfit, match=f"'{broker.queue}'.*'source'.*and it is no stream"):
        await soon(waits.poll())
    with pytest.raises(SourceUnfit, match="and it is no stream"):
        await soon(waits.watch(since="2020-01-01T00:00:00Z"))


async def test_a_login_that_is_refused(broker, waits, monkeypatch):
    with broker.client as client:
        client.acl_setuser("reader", enabled=True, passwords=["+right"], keys=["*"], commands=["+xread", "+ping"])
    for password, message in (("wrong", "refuses the connection's login"), ("right", "may not use it")):
        monkeypatch.setenv("AIRFLOW_CONN_READER", json.dumps(broker.connection(login="reader", password=password)))
        with pytest.raises(SourceUnfit, match=message) as caught:
            await soon(waits.poll(redis_conn_id="reader"))
        assert password not in str(caught.value)


async def test_a_cluster(broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", json.dumps(broker.connection(extra={"cluster": True})))
    with pytest.raises(SourceUnfit, match="'cluster' is of a cluster"):
        await soon(waits.poll(redis_conn_id="cluster"))


async def test_another_database_number(broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_THREE", json.dumps(broker.connection(extra={"db": 3})))
    task = waits.poll(redis_conn_id="three")
    with broker.client as client:
        client.select(3)
        client.xadd(broker.queue, {"v": json.dumps("in three")})
    assert (await soon(task))["value"] == "in three"


async def test_a_server_that_keeps_nothing(broker, waits, monkeypatch):
    server = servers.redis() if isinstance(broker, Redis6) else servers.valkey(persistent=False)
    with server:
        if isinstance(broker, Redis6):
            from redis import Redis

            Redis(port=server.port).config_set("appendonly", "no")
        monkeypatch.setenv("AIRFLOW_CONN_FORGETS", json.dumps({**broker.connection(), "port": server.port}))
        with pytest.raises(SourceUnfit, match=r"appendonly is 'no', save is ''.*require_persistence=False"):
            await soon(waits.poll(redis_conn_id="forgets"))
        await nothing(waits.poll(redis_conn_id="forgets", require_persistence=False))


async def test_a_watch_that_looks_from_before_what_is_kept_is_warned(broker, waits, caplog):
    if isinstance(broker, Redis6):
        pytest.skip("before Redis 7 a stream does not tell what was trimmed")
    broker.send(*range(5))
    with broker.client as client:
        client.xtrim(broker.queue, maxlen=1, approximate=False)
    with caplog.at_level(logging.WARNING):
        await soon(waits.watch(since=datetime.now(timezone.utc) - timedelta(hours=1)))
        assert "has dropped messages until" in caplog.text
        caplog.clear()
        await asyncio.sleep(0.5)
        broker.send(1)
        await soon(waits.watch(since=datetime.now(timezone.utc) - timedelta(seconds=0.2)))
        assert "has dropped messages" not in caplog.text
