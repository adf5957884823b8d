"""States that pass by themselves, and logins that are refused, without a server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time

import pytest
from aiormq.exceptions import ChannelAccessRefused
from airflow.sdk import Connection
from airflow.sdk.bases.hook import BaseHook
from airflow_events.errors import SourceMisconfigured, SourceMissing
from airflow_events.listeners.kafka import consume
from airflow_events.listeners.kafka.client import Clients
from airflow_events.listeners.kafka.client import Source as KafkaSource
from airflow_events.listeners.kafka.consume import GroupHub
from airflow_events.listeners.kafka.schemas import Formats
from airflow_events.listeners.nats import client as nats
from airflow_events.listeners.rabbitmq import client as rabbitmq
from airflow_events.listeners.redis import RedisListener
from airflow_events.listeners.redis import client as redis
from airflow_events.listeners.sqs import client as sqs
from airflow_events.listeners.support import hub as hubs
from airflow_events.listeners.support.hub import Hub, Seeker
from airflow_events.listeners.support.positions import Known, Positions
from airflow_events.listeners.support.queue import receive
from botocore.exceptions import ClientError
from redis.exceptions import AuthenticationError


def _redis_refuses():
    with redis.refusals(redis.Source("r", "orders")):
        raise AuthenticationError("WRONGPASS invalid username-password pair or user is disabled.")


def _sqs_refuses():
    answer = {"Error": {"Code": "ExpiredToken", "Message": "expired"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    with sqs.refusals(sqs.Source("s", None, "orders")):
        raise ClientError(answer, "ReceiveMessage")


class Renewed(Hub):
    """Its login ends after it was served, and another one is in the Airflow connection by then, or not."""

    def __init__(self, refuse, is_renewed):
        self.refuse, self.is_renewed = refuse, is_renewed
        self.connections = self.serves = 0
        super().__init__("the source")

    async def connect(self):
        self.connections += 1
        if self.connections > 1 and not self.is_renewed:
            self.refuse()

    async def serve(self):
        self.serves += 1
        if self.connections == 1 and self.serves > 1:
            self.refuse()
        if self.connections > 1:
            for seeker in list(self.seekers):
                seeker.give("event")
        await asyncio.sleep(0.01)

    async def disconnect(self):
        pass


@pytest.mark.parametrize("refuse", [_redis_refuses, _sqs_refuses])
async def test_a_login_that_was_renewed_fails_no_wait(refuse):
    hub = Renewed(refuse, is_renewed=True)
    try:
        assert await asyncio.wait_for(hub.take(Seeker()), 5) == "event"
    finally:
        await hub.close()


@pytest.mark.parametrize("refuse", [_redis_refuses, _sqs_refuses])
async def test_a_login_that_was_not_fails_them_at_once(refuse):
    hub = Renewed(refuse, is_renewed=False)
    try:
        with pytest.raises(SourceMisconfigured):
            await asyncio.wait_for(hub.take(Seeker()), 5)
        assert hub.connections == 2
    finally:
        await hub.close()


@pytest.mark.parametrize(
    ("says", "where"),
    [("endpoint_url = http://127.0.0.1:4999", "http://127.0.0.1:4999"), ("use_fips_endpoint = true", "sqs-fips.")],
)
def test_sqs_takes_all_that_a_profile_says(monkeypatch, tmp_path, says, where):
    (tmp_path / "config").write_text(f"[profile shop]\nregion = us-east-1\n{says}\n")
    (tmp_path / "credentials").write_text("[shop]\naws_access_key_id = A\naws_secret_access_key = B\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    found = Connection(conn_id="shop", conn_type="aws", extra='{"profile_name": "shop"}')

    async def endpoint():
        session, options = sqs._prepare(sqs.Source("shop", None, "orders"), found)
        async with session.create_client("sqs", **options) as client:
            return client.meta.endpoint_url

    assert where in asyncio.run(endpoint())


async def test_an_api_server_that_is_away_is_no_silence_of_kafkas(monkeypatch, caplog):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "0.3")
    monkeypatch.setattr(hubs, "_ELSEWHERE", 0.05, raising=False)
    there = asyncio.Event()

    async def ask(*_):
        await there.wait()
        return Known()

    class OfAPast(GroupHub):
        connect_within = serve_within = 0.2

        async def connect(self):
            self._topics = {"orders": consume._Topic("c", "id", "us")}

        async def serve(self):
            await self._exchange("orders", {})
            for seeker in list(self.seekers):
                seeker.give("event")

        async def disconnect(self):
            pass

    monkeypatch.setattr(Positions.of_loop(), "inbox", ask)
    hub = OfAPast(KafkaSource("k", ("orders",), "etl"), "earliest", Formats("json", "text", None))
    asyncio.get_running_loop().call_later(1.5, there.set)
    taking = asyncio.ensure_future(hub.take(Seeker()))
    try:
        done, _ = await asyncio.wait({taking}, timeout=5)
        assert done and taking.exception() is None, taking
        assert "inbox does not answer" in caplog.text
    finally:
        await hub.close()


async def test_a_jetstream_that_is_switched_off_may_come_again(monkeypatch):
    class Answer:
        data = json.dumps({"error": {"code": 503, "err_code": 10039, "description": "not enabled for account"}})

    server = nats.Server("n")

    async def request(*_):
        return Answer

    monkeypatch.setattr(server, "request", request)
    with pytest.raises(SourceMissing):
        await server.api("STREAM.INFO.orders")


class RefusingBroker:
    """Speaks as much of Kafka as it takes to refuse a login, a tenth of a second late, as Kafka does."""

    def __init__(self):
        self.logins = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._socket.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self._socket.accept()[:1], daemon=True).start()

    def _serve(self, client):
        with contextlib.suppress(OSError, struct.error), client, client.makefile("rb") as sent:
            while True:
                request = sent.read(struct.unpack(">i", sent.read(4))[0])
                key, version, correlation = struct.unpack(">hhi", request[:8])
                if key == 18:
                    apis = [(18, 0, 0), (17, 0, 1), (36, 0, 1), (3, 0, 12), (10, 0, 3), (60, 0, 0), (75, 0, 0)]
                    answer = struct.pack(">hi", 35 if version else 0, len(apis))
                    answer += b"".join(struct.pack(">hhh", *api) for api in apis)
                elif key == 17:
                    answer = struct.pack(">hih5s", 0, 1, 5, b"PLAIN")
                else:
                    self.logins += 1
                    time.sleep(0.1)
                    answer = struct.pack(">hh7sh", 58, 7, b"refused", 0)
                answer = struct.pack(">i", correlation) + answer
                client.sendall(struct.pack(">i", len(answer)) + answer)
                if key == 36:
                    return


async def test_a_refused_kafka_login_is_not_tried_until_it_is_locked(monkeypatch):
    broker = RefusingBroker()
    extra = {
        "bootstrap.servers": f"127.0.0.1:{broker.port}",
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
    }

    async def found(_):
        return Connection(conn_id="k", conn_type="kafka", login="etl", password="wrong", extra=json.dumps(extra))

    monkeypatch.setattr(BaseHook, "aget_connection", found)
    source = KafkaSource("k", ("orders",), "etl")
    with pytest.raises(SourceMisconfigured, match="may not use it"):
        await receive(
            "refused", lambda: GroupHub(source, "earliest", Formats("json", "text", None)), lambda m: m.read()
        )
    assert broker.logins < 15  # they were 120 and more
    broker.close()


def test_a_backend_that_cannot_say_whether_a_rabbitmq_user_may_is_waited_for():
    says = (
        "ACCESS_REFUSED - read access to queue 'orders' in vhost '/' refused for user 'etl', backend "
        "rabbit_auth_backend_ldap returned an error: ldap_connect_error"
    )
    with pytest.raises(ConnectionError), rabbitmq.refusals(rabbitmq.Source("r", "orders")):
        raise ChannelAccessRefused(says)


async def _serve_as_a_cluster(reader, writer):
    """Stands for the only node of a Redis cluster, which takes a moment to acknowledge."""
    port = writer.get_extra_info("sockname")[1]
    answers = {
        b"HELLO": b"%2\r\n$7\r\nversion\r\n$5\r\n7.2.0\r\n$5\r\nproto\r\n:3\r\n",
        b"CLUSTER": b"*1\r\n*3\r\n:0\r\n:16383\r\n*3\r\n$9\r\n127.0.0.1\r\n:%d\r\n$4\r\nabcd\r\n" % port,
        b"COMMAND": b"*1\r\n*6\r\n$4\r\nxack\r\n:-4\r\n*1\r\n$5\r\nwrite\r\n:1\r\n:1\r\n:1\r\n",
        b"INFO": b"$19\r\ncluster_enabled:1\r\n\r\n",
        b"XACK": b":1\r\n",
    }
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ValueError):
        while True:
            words = []
            for _ in range(int((await reader.readline())[1:])):
                size = int((await reader.readline())[1:])
                words.append((await reader.readexactly(size + 2))[:-2])
            if words[0].upper() == b"XACK":
                await asyncio.sleep(0.01)
            writer.write(answers.get(words[0].upper(), b"+OK\r\n"))
            await writer.drain()
    writer.close()


async def test_many_waits_acknowledge_at_a_redis_cluster_what_another_process_received(monkeypatch):
    server = await asyncio.start_server(_serve_as_a_cluster, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def found(_):
        return Connection(conn_id="c", conn_type="redis", host="127.0.0.1", port=port, extra='{"cluster": true}')

    monkeypatch.setattr(BaseHook, "aget_connection", found)
    event = {"redis_conn_id": "c", "stream": "orders", "group": "etl"}
    await asyncio.gather(*(RedisListener().acknowledge({**event, "id": f"{number}-1"}) for number in range(50)))
    server.close()


@pytest.mark.parametrize("extra", [{"reconnect.backoff.ms": 5000}, {"reconnect.backoff.max.ms": 500}])
async def test_kafka_takes_one_of_two_settings_that_have_to_fit(monkeypatch, extra):
    told = json.dumps({"bootstrap.servers": "127.0.0.1:1", **extra})

    async def found(_):
        return Connection(conn_id="k", conn_type="kafka", extra=told)

    monkeypatch.setattr(BaseHook, "aget_connection", found)
    (await Clients.of(KafkaSource("k", ("orders",), "etl"))).consumer().close()
