"""Redis as people have it: by TLS, by Sentinels, as a cluster."""

from __future__ import annotations

import asyncio
import json

import pytest
import redis_cluster
import servers
from airflow_events.errors import SourceMisconfigured, SourceUnreachable
from airflow_events.listeners.base import working_for
from airflow_events.listeners.redis import RedisListener, RedisWatchListener
from broker import soon
from of_redis import Valkey
from redis import ConnectionError, Redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry
from tls_proxy import tls_before

from conftest import wait
from deployment import until


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "20")


@pytest.fixture
def connect(monkeypatch):
    def laid(uri=None, **fields):
        monkeypatch.setenv("AIRFLOW_CONN_OWN", uri or json.dumps({"conn_type": "redis", **fields}))

    return laid


def poll(stream, number=0, **arguments):
    with working_for(wait(number)):
        polling = RedisListener().poll_for_event(stream, field="v", redis_conn_id="own", **arguments)
        return asyncio.create_task(polling)


def watch(stream, number=0, **arguments):
    with working_for(wait(number)):
        watching = RedisWatchListener().poll_for_event(stream, field="v", redis_conn_id="own", **arguments)
        return asyncio.create_task(watching)


async def commit(event, number=0):
    with working_for(wait(number)):
        await RedisListener().event_checkpointed(event)


@pytest.fixture
def valkey():
    server = servers.valkey()
    if server is None:
        pytest.skip(Valkey.missing)
    with server:
        yield server


async def test_by_tls_with_a_certificate_of_the_clients_own(valkey, connect, tmp_path, monkeypatch):
    with Redis(port=valkey.port) as client:
        client.xadd("orders", {"v": "1"})
    own = {"ssl_ca_certs": f"{tmp_path}/ca.pem", "ssl_certfile": f"{tmp_path}/client.pem"}
    async with tls_before(valkey.port, tmp_path) as port:
        connect(conn_type="rediss", host="localhost", port=port, extra=own)
        event = await soon(poll("orders"))
        await commit(event)
        assert event["value"] == 1
        connect(host=f"rediss://127.0.0.1:{port}", extra={**own, "ssl_check_hostname": False})
        assert (await soon(watch("orders", since="2020-01-01T00:00:00Z")))["value"] == 1
        monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
        lacking = {"ssl_certfile": own["ssl_certfile"]}, {"ssl_ca_certs": own["ssl_ca_certs"]}
        for number, wrong in enumerate((*lacking, own)):
            host = "127.0.0.1" if wrong is own else "localhost"
            connect(conn_type="rediss", host=host, port=port, extra=wrong)
            with pytest.raises(SourceUnreachable):
                await soon(poll(f"orders-{number}", 1), 15)  # of another hub than that which is connected


async def test_sentinels_lead_to_the_server_that_is_promoted(valkey, connect):
    replica = servers.valkey("--replicaof", f"127.0.0.1 {valkey.port}")
    with replica, servers.sentinel("main", valkey) as sentinel:
        with Redis(port=sentinel.port) as asked:
            until(lambda: len(asked.sentinel_slaves("main")) == 1, "the Sentinel knows the replica")
        connect(host=f"127.0.0.1:1,127.0.0.1:{sentinel.port}", extra={"sentinel_master": "main", "db": 2})
        with Redis(port=valkey.port, db=2) as client:
            client.xadd("orders", {"v": "1"})
            event = await soon(poll("orders"), 20)
            await commit(event)
            client.wait(1, 5000)
        task = poll("orders", 1)
        await asyncio.sleep(0.5)
        valkey.kill()
        again = Retry(NoBackoff(), 3)  # who is promoted ends the connections that it had as a replica
        with Redis(port=replica.port, db=2, retry=again, retry_on_error=[ConnectionError]) as client:
            until(lambda: client.role()[0] == b"master", "the replica is promoted")
            client.xadd("orders", {"v": "2"})
            late = await soon(task, 20)
            assert (event["value"], late["value"]) == (1, 2)
            await commit(late, 1)
            assert client.xpending("orders", "airflow")["pending"] == 0


async def test_the_connections_to_sentinels_are_closed_with_their_client(valkey, connect):
    with servers.sentinel("main", valkey) as sentinel, Redis(port=sentinel.port) as asked:
        before = len(asked.client_list())
        connect(host="127.0.0.1", port=sentinel.port, extra={"sentinel_master": "main"})
        with Redis(port=valkey.port) as client:
            client.xadd("orders", {"v": "1"})
        await commit(await soon(poll("orders"), 20))
        for _ in range(20):  # some while after the last wait
            if len(asked.client_list()) <= before:
                return
            await asyncio.sleep(0.5)
        raise AssertionError("somebody is connected to the Sentinel")


@pytest.fixture(scope="module")
def cluster():
    cluster = redis_cluster.cluster()
    if cluster is None:
        pytest.skip(Valkey.missing)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


async def test_a_database_that_the_server_does_not_have(valkey, connect):
    connect(host="127.0.0.1", port=valkey.port, extra={"db": 99})
    with pytest.raises(SourceMisconfigured, match="the server has no database of the number that the connection"):
        await soon(poll("orders"), 20)


@pytest.mark.parametrize("form", ["{}", ["{}"], [{"host": "127.0.0.1", "port": "{}"}]])
async def test_further_nodes_of_a_cluster_are_a_text_or_a_list(cluster, connect, form):
    nodes = json.loads(json.dumps(form).replace("{}", f"127.0.0.1:{cluster.nodes[0].port}"))
    if isinstance(nodes[0], dict):
        nodes[0]["port"] = cluster.nodes[0].port
    connect(host="127.0.0.1:1", extra={"cluster": True, "startup_nodes": nodes})
    task = poll("further-nodes")
    with RedisCluster(startup_nodes=[ClusterNode("127.0.0.1", cluster.nodes[0].port)]) as client:
        client.xadd("further-nodes", {"v": "1"})
        event = await soon(task, 20)
        await commit(event)
        client.delete("further-nodes")


async def test_a_cluster_whose_nodes_have_a_stream_each(cluster, connect):
    down, first = "127.0.0.1:1", cluster.nodes[0].port
    connect(host=down, extra={"cluster": True, "startup_nodes": f"127.0.0.1:{first}"})
    with RedisCluster(startup_nodes=[ClusterNode("127.0.0.1", first)]) as client:
        streams = {client.get_node_from_key(f"orders-{number}").port: f"orders-{number}" for number in range(30)}
        assert len(streams) == 3
        for stream in streams.values():
            waiting = [poll(stream, 0), poll(stream, 1)]
            watched = watch(stream, 2, match={"id": 2}, since="2020-01-01T00:00:00Z")
            for number in (1, 2):
                client.xadd(stream, {"v": json.dumps({"id": number})})
            events = [await soon(task, 20) for task in waiting]
            assert sorted(event["value"]["id"] for event in events) == [1, 2]
            assert (await soon(watched, 20))["value"] == {"id": 2}
            for number, event in enumerate(events):
                await commit(event, number)
            assert client.xpending(stream, "airflow")["pending"] == 0


async def test_a_node_of_a_cluster_that_comes_back(cluster, connect):
    node = cluster.nodes[1]
    connect(host=f"127.0.0.1:{cluster.nodes[0].port}", extra={"cluster": True})
    with RedisCluster(startup_nodes=[ClusterNode("127.0.0.1", cluster.nodes[0].port)]) as client:
        stream = next(
            name for name in (f"late-{n}" for n in range(99)) if client.get_node_from_key(name).port == node.port
        )
    task = poll(stream)
    await asyncio.sleep(1)
    node.kill()
    await asyncio.sleep(3)
    node.start()
    with Redis(port=node.port) as client:
        until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "the cluster is whole")
        client.xadd(stream, {"v": "1"})
    assert (await soon(task, 20))["value"] == 1


async def test_a_login_that_a_cluster_refuses(cluster, connect):
    connect(
        host="127.0.0.1",
        port=cluster.nodes[0].port,
        login="nobody",
        password="s3cret-word",
        extra={"cluster": True},
    )
    with pytest.raises(SourceMisconfigured, match="refuses the connection's login") as refused:
        await soon(poll("orders"), 20)
    assert "s3cret-word" not in str(refused.value)
