"""What is peculiar to Redis Streams."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import datetime, timedelta, timezone

import pytest
import servers
from airflow_events.errors import EventUndecodable, SourceMisconfigured
from airflow_events.listeners.redis import watch
from airflow_events.listeners.support.values import digest_of
from broker import nothing, soon
from of_redis import Redis6, Valkey

pytestmark = pytest.mark.parametrize("server", [Valkey, Redis6], ids=lambda broker: broker.name, indirect=True)


async def test_what_is_added_while_a_stream_is_made_again_is_all_new(broker, waits):
    """Also for a group that began at the end of the stream, and though the connection was lost meanwhile."""
    task = waits.poll(start="$")
    await nothing(task)
    with broker.client as client:
        together = client.pipeline()
        together.delete(broker.queue)
        together.xadd(broker.queue, {"v": '"a"'})
        together.client_kill_filter(_type="normal", skipme=True)
        together.execute()
    assert (await soon(task))["value"] == "a"


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
        "digest": digest_of(b"order_id", b"42", b"text", "ä".encode()),
        "server": f"127.0.0.1:{broker.server.port}/0",
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


async def test_all_read_as_one_consumer(broker, waits):
    tasks = [waits.poll(number) for number in range(20)]
    await asyncio.sleep(1)
    with broker.client as client:
        broker.send(*range(5))
        done, _ = await asyncio.wait(tasks, timeout=3)
        assert len(done) == 5
        [consumer] = client.xinfo_consumers(broker.queue, "airflow")
        assert (consumer["name"], consumer["pending"]) == (b"airflow", 5)
        for number, task in enumerate(tasks):
            if task.done():
                await waits.commit(task.result(), number)
        [consumer] = client.xinfo_consumers(broker.queue, "airflow")
        assert consumer["pending"] == 0


async def test_what_claims_of_the_first_edition_hold_is_delivered_when_nobody_keeps_it(broker, waits):
    broker.send("a")
    with broker.client as client:
        client.xgroup_create(broker.queue, "airflow", "0")
        client.xreadgroup("airflow", "dag/run0/task/-1", {broker.queue: ">"})
    event = await soon(waits.poll(lease=1))
    await waits.commit(event)
    assert (event["value"], broker.unacknowledged()) == ("a", 0)


async def test_an_entry_that_is_trimmed_while_it_is_in_hand(broker, waits):
    task = waits.poll()
    broker.send("a")
    event = await soon(task)
    with broker.client as client:
        client.xtrim(broker.queue, maxlen=0, approximate=False)
    await waits.commit(event)  # the record has it
    assert broker.unacknowledged() == 0


async def test_an_entry_that_is_trimmed_while_nobody_has_it_is_passed_over(broker, waits):
    with broker.client as client:
        broker.send("a")
        client.xgroup_create(broker.queue, "airflow", "0")
        client.xreadgroup("airflow", "airflow", {broker.queue: ">"})
        client.xtrim(broker.queue, maxlen=0, approximate=False)
    broker.send("b")
    await asyncio.sleep(1.1)
    assert (await soon(waits.poll(lease=1)))["value"] == "b"


async def test_an_entry_that_somebody_else_acknowledged(broker, waits):
    task = waits.poll()
    broker.send("a")
    event = await soon(task)
    with broker.client as client:
        client.xack(broker.queue, "airflow", event["id"])
    await waits.commit(event)
    assert broker.unacknowledged() == 0


async def test_a_stream_that_is_deleted_and_made_again_while_waits_wait(broker, waits):
    task = waits.poll()
    await nothing(task, 0.5)
    with broker.client as client:
        client.delete(broker.queue)
    broker.send("a")
    event = await soon(task)
    await waits.commit(event)
    assert broker.unacknowledged() == 0


async def test_a_user_with_what_a_consumer_needs(broker, waits, monkeypatch):
    commands = ["+xreadgroup", "+xack", "+xclaim", "+xautoclaim", "+client|setinfo", "+client|setname"]
    with broker.client as client:
        client.xgroup_create(broker.queue, "airflow", "0", mkstream=True)
        if isinstance(broker, Redis6):
            commands = [*commands[:4], "+client"]
        client.acl_setuser("consumer", enabled=True, passwords=["+secret"], keys=[broker.queue], commands=commands)
    login = broker.connection(login="consumer", password="secret")
    monkeypatch.setenv("AIRFLOW_CONN_CONSUMER", json.dumps(login))
    task = waits.poll(redis_conn_id="consumer")
    broker.send("a")
    event = await soon(task)
    await waits.commit(event)
    assert broker.unacknowledged() == 0


async def test_a_server_without_memory_lets_its_entries_be_read(broker, waits):
    """It refuses to make a group, which is there; reading and acknowledging is what frees its memory."""
    broker.send("a")
    with broker.client as client:
        client.xgroup_create(broker.queue, "airflow", "0")
        client.config_set("maxmemory", 1)
    try:
        await waits.commit(await soon(waits.poll()))
    finally:
        with broker.client as client:
            client.config_set("maxmemory", 0)
    assert broker.unacknowledged() == 0


async def test_groups_are_independent_and_may_begin_at_the_end(broker, waits):
    broker.send("a")
    assert (await soon(waits.poll(1, group="one")))["value"] == "a"
    assert (await soon(waits.poll(2, group="two")))["value"] == "a"
    late = waits.poll(3, group="three", start="$")
    await nothing(late)
    broker.send("b")
    assert (await soon(late))["value"] == "b"


async def test_a_watched_stream_that_is_made_again_with_older_ids_is_read_again(broker, waits, monkeypatch):
    """As from a backup, under their own ids."""
    monkeypatch.setattr(watch, "_LOOK_EVERY", 0.2)
    broker.send("a")
    task = waits.watch(match="@ == 'b'", since="2020-01-01T00:00:00Z")
    await nothing(task)
    with broker.client as client:
        client.delete(broker.queue)
        client.xadd(broker.queue, {"v": b'"b"'}, id="1700000000000-0")
    assert (await soon(task, 20))["value"] == "b"


async def test_a_key_that_is_no_stream(broker, waits):
    with broker.client as client:
        client.set(broker.queue, "text")
    with pytest.raises(SourceMisconfigured, match=f"'{broker.queue}'.*'source'.*and it is no stream"):
        await soon(waits.poll())
    with pytest.raises(SourceMisconfigured, match="and it is no stream"):
        await soon(waits.watch(since="2020-01-01T00:00:00Z"))


async def test_a_login_that_is_refused(broker, waits, monkeypatch):
    with broker.client as client:
        client.acl_setuser("reader", enabled=True, passwords=["+right"], keys=["*"], commands=["+xread", "+ping"])
    for password, message in (("wrong", "refuses the connection's login"), ("right", "may not use it")):
        monkeypatch.setenv("AIRFLOW_CONN_READER", json.dumps(broker.connection(login="reader", password=password)))
        with pytest.raises(SourceMisconfigured, match=message) as caught:
            await soon(waits.poll(redis_conn_id="reader"))
        assert password not in str(caught.value)


async def test_a_server_that_is_of_no_cluster(broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", json.dumps(broker.connection(extra={"cluster": True})))
    with pytest.raises(
        SourceMisconfigured, match="'cluster': the connection says that it is of a cluster, and the server is none"
    ):
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
        with pytest.raises(
            SourceMisconfigured, match=r"appendonly is 'no', save is ''.*require_persistence=False"
        ):
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


async def test_a_primary_that_is_demoted_for_a_while(broker, waits):
    waiting, watching = waits.poll(), waits.watch(since="2023-11-14T00:00:00Z")
    await asyncio.sleep(1)
    with broker.client as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        try:
            await asyncio.sleep(3)
            late = waits.poll(1)
            await asyncio.sleep(0.5)
        finally:
            client.execute_command("REPLICAOF", "NO", "ONE")
    assert not waiting.done()
    assert not watching.done()
    broker.send(1, 2)
    events = [await soon(task) for task in (waiting, late)]
    assert {event["value"] for event in events} == {1, 2}
    assert (await soon(watching))["value"] == 1


async def test_a_watch_of_entries_whose_metadata_is_odd(broker, waits, caplog):
    start = datetime.now(timezone.utc) - timedelta(minutes=1)
    task = waits.watch(match={"id": 3}, since=start, values="json")
    fields = waits.watch(1, field=None, match={"id": "4"}, since=start)
    await nothing(task, 0.5)
    with broker.client as client:
        client.xadd(broker.queue, {"v": b'{"id": 1, "text": "a\\u0000b"}'})
        client.xadd(broker.queue, {b"\xff": b"x"})
        client.xadd(broker.queue, {"v": b'{"id": 3}'}, id=f"{2**63}-1")
        client.xadd(broker.queue, {"id": b"4"}, id=f"{2**63}-2")
    event = await soon(task)
    assert (event["id"], event["timestamp"]) == (f"{2**63}-1", None)
    assert (await soon(fields))["id"] == f"{2**63}-2"
    assert "skipped" in caplog.text


async def test_large_entries_are_read_a_few_at_once(broker, waits, monkeypatch):

    monkeypatch.setattr(watch, "READ_BYTES", 100_000)
    asked = []
    read = watch.Redis.xread
    monkeypatch.setattr(
        watch.Redis, "xread", lambda *args, **kwargs: asked.append(kwargs) or read(*args, **kwargs)
    )
    broker.send(*({"id": number, "pad": "x" * 10_000} for number in range(200)))
    last = waits.watch(match={"id": 199}, since=datetime.now(timezone.utc) - timedelta(minutes=1))
    assert (await soon(last))["value"]["id"] == 199
    assert [each["count"] for each in asked][1:3] == [9, 9]


async def test_dead_letters_do_not_go_to_the_stream_itself(broker, waits):
    with pytest.raises(ValueError, match="dead_letter is another stream than the one that is read"):
        await soon(waits.poll(on_undecodable="dead_letter", dead_letter=broker.queue))


@pytest.mark.parametrize("micro", [100, 900])
async def test_an_entry_of_the_same_millisecond_counts(broker, waits, micro):
    now = datetime.now(timezone.utc).replace(microsecond=123_000)
    with broker.client as client:
        client.xadd(broker.queue, {"v": b'{"id": 1}'}, id=f"{round(now.timestamp() * 1000)}-0")
    since = now + timedelta(microseconds=micro)
    assert (await soon(waits.watch(match={"id": 1}, since=since)))["value"] == {"id": 1}
