"""Kafka's messages by a schema registry."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
import uuid
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal

import pytest
import registry_server
from airflow_events.errors import EventUndecodable, SourceMisconfigured, SourceUnreachable
from airflow_events.listeners.support.serde import check
from broker import nothing, running, soon
from of_kafka import Kafka

from deployment import free_port

pytest.importorskip("confluent_kafka.schema_registry.avro")

from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

pytestmark = pytest.mark.parametrize("server", [Kafka], ids=["kafka"], indirect=True)

ORDER = {
    "type": "record", "name": "Order", "fields": [
        {"name": "order_id", "type": "long"},
        {"name": "day", "type": {"type": "int", "logicalType": "date"}},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
        {"name": "token", "type": {"type": "string", "logicalType": "uuid"}},
        {"name": "raw", "type": "bytes"},
        {"name": "note", "type": ["null", "string"], "default": None},
    ],
}  # fmt: skip
AT = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
TOKEN = uuid.UUID(int=7)
SENT = {
    "order_id": 42,
    "day": date(2026, 3, 1),
    "at": AT,
    "price": Decimal("9.90"),
    "token": TOKEN,
    "raw": b"\xff",
}
FOUND = {**SENT, "price": "9.90", "raw": "/w==", "note": None}
POSITIVE = {
    "$schema": "http://json-schema.org/draft-07/schema#", "title": "Order", "type": "object",
    "properties": {"order_id": {"type": "integer", "minimum": 1}}, "required": ["order_id"],
}  # fmt: skip


@pytest.fixture(scope="module")
def registry():
    yield from running(registry_server.server(), registry_server.MISSING)


@pytest.fixture
def client(registry, monkeypatch):
    """The registry's client, and an Airflow connection to it."""
    about = {"conn_type": "http", "host": f"127.0.0.1{registry_server.PATH}", "port": registry.port}
    monkeypatch.setenv("AIRFLOW_CONN_REGISTRY", json.dumps(about))
    return SchemaRegistryClient({"url": f"http://127.0.0.1:{registry.port}{registry_server.PATH}"})


def serialized(broker, serializer, value, field=MessageField.VALUE):
    return serializer(value, SerializationContext(broker.queue, field))


AVRO = {"values": "avro", "registry_conn_id": "registry"}


async def test_avro(broker, waits, client):
    value = serialized(broker, AvroSerializer(client, json.dumps(ORDER)), SENT)
    key = serialized(broker, AvroSerializer(client, '"long"'), 7, MessageField.KEY)
    broker.produce({"value": value, "key": key}, {"key": key})
    first = await soon(waits.poll(1, keys="avro", **AVRO), 120)
    assert (first["key"], first["value"]) == (7, FOUND)
    check(first)
    await waits.commit(first, 1)
    tombstone = await soon(waits.poll(2, keys="avro", **AVRO))
    assert tombstone["value"] is None
    await waits.commit(tombstone, 2)
    assert broker.unacknowledged() == 0


@pytest.mark.parametrize(
    "match",
    [{"order_id": "42"}, {"day": "2026-03-01"}, {"at": AT.isoformat(), "token": str(TOKEN)}, "price == '9.90'"],
)
async def test_a_watch_of_avro(broker, waits, client, match):
    serializer = AvroSerializer(client, json.dumps(ORDER))
    other = {**SENT, "order_id": 1, "day": date(2026, 3, 2), "at": AT + timedelta(1), "price": Decimal("1.00")}
    broker.produce(
        {"value": b"no avro"}, *({"value": serialized(broker, serializer, each)} for each in (other, SENT))
    )
    since = datetime.now(timezone.utc) - timedelta(minutes=5)
    assert (await soon(waits.watch(match=match, since=since, **AVRO), 120))["value"] == FOUND


async def test_json_schema(broker, waits, client):
    good = serialized(broker, JSONSerializer(json.dumps(POSITIVE), client), {"order_id": 42})
    bad = good[:5] + b'{"order_id": 0}'
    broker.produce({"value": good}, {"value": bad}, {"value": b'{"order_id": 1}'})
    kwargs = {"values": "json_schema", "registry_conn_id": "registry"}
    first = await soon(waits.poll(1, **kwargs), 120)
    assert first["value"] == {"order_id": 42}
    with pytest.raises(EventUndecodable, match=r"offset 1 in partition .* is not json_schema: 0 is less than"):
        await soon(waits.poll(2, **kwargs))
    with pytest.raises(EventUndecodable, match="offset 2"):
        await soon(waits.poll(3, **kwargs))
    await waits.commit(first, 1)
    assert broker.unacknowledged() == 2
    await waits.end()
    await asyncio.sleep(3)
    last = waits.poll(4, on_undecodable="skip", **kwargs)
    for _ in range(30):
        await nothing(last)
        if broker.unacknowledged() == 0:
            return
    raise AssertionError("what is undecodable was not skipped")


@pytest.mark.parametrize(
    "begin",
    [b"\x00\x7f\xff\xff\xff", b"\x00\xff\xff\xff\xff", b"\x01" + bytes(range(16))],
    ids=["id", "large id", "GUID, of which this registry knows nothing"],
)
async def test_a_schema_that_the_registry_does_not_know(broker, waits, client, begin):
    broker.send_raw(begin + b"rest")
    broker.produce({"value": serialized(broker, AvroSerializer(client, '"long"'), 7)})
    with pytest.raises(EventUndecodable, match=r"is not avro: .*404"):
        await soon(waits.poll(1, **AVRO), 120)
    assert (await soon(waits.poll(2, **AVRO), 120))["value"] == 7


async def test_a_schema_that_changed(broker, waits, client):
    """Each message is read by the schema that it was written with."""
    for order in (ORDER, {**ORDER, "fields": [*ORDER["fields"], {"name": "more", "type": "int", "default": 0}]}):
        broker.produce(
            {"value": serialized(broker, AvroSerializer(client, json.dumps(order)), {**SENT, "more": 3})}
        )
    first, second = await soon(waits.poll(1, **AVRO), 120), await soon(waits.poll(2, **AVRO))
    assert "more" not in first["value"]
    assert second["value"]["more"] == 3


# A registry that is not there, or not for us.


class _Answering(http.server.BaseHTTPRequestHandler):
    """A proxy before the registry, as it is said to be at ``server.says``."""

    def do_GET(self):
        self.server.asked += 1
        body = json.dumps({"error_code": self.server.says, "message": "says the test"}).encode()
        self.send_response(self.server.says)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def in_front():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answering) as server:
        server.asked = 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def connect(monkeypatch, there, **more):
    about = {"conn_type": "http", "host": "127.0.0.1", "port": there, "login": "me", "password": "s3cret", **more}
    monkeypatch.setenv("AIRFLOW_CONN_REGISTRY", json.dumps(about))


@pytest.mark.parametrize("watching", [False, True])
async def test_while_the_registry_is_away_nothing_is_skipped(
    broker, waits, client, registry, monkeypatch, caplog, watching
):
    broker.produce({"value": serialized(broker, AvroSerializer(client, json.dumps(ORDER)), SENT)})
    port = free_port()
    connect(monkeypatch, port)
    since = datetime.now(timezone.utc) - timedelta(minutes=5)
    task = waits.watch(since=since, **AVRO) if watching else waits.poll(on_undecodable="skip", **AVRO)
    await nothing(task, 4)
    assert "the schema registry of the connection 'registry' does not answer" in caplog.text
    if not watching:
        assert broker.unacknowledged() == 1
    relay = await asyncio.start_server(lambda r, w: relayed(r, w, registry.port), "127.0.0.1", port)
    try:
        assert (await soon(task, 120))["value"] == FOUND
    finally:
        relay.close()


async def relayed(reader, writer, port):
    """Pass one question on to the registry."""
    head = (await reader.readuntil(b"\r\n\r\n")).replace(b"GET /", f"GET {registry_server.PATH}/".encode(), 1)
    head = head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    there, back = await asyncio.open_connection("127.0.0.1", port)
    back.write(head)
    writer.write(await there.read())
    await writer.drain()
    back.close()
    writer.close()


async def test_a_registry_that_stays_away(broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
    connect(monkeypatch, free_port())
    broker.send_raw(b"\x00\x00\x00\x00\x01rest")
    with pytest.raises(SourceUnreachable, match="the schema registry of the connection 'registry'") as caught:
        await soon(waits.poll(**AVRO), 120)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("says", "error"),
    [(401, SourceMisconfigured), (403, SourceMisconfigured), (404, SourceUnreachable), (500, SourceUnreachable)],
)
async def test_a_registry_that_refuses_or_is_another_server(broker, waits, monkeypatch, in_front, says, error):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
    in_front.says = says
    connect(monkeypatch, in_front.server_port)
    broker.send_raw(b"\x00\x00\x00\x00\x01rest")
    with pytest.raises(error, match=f"schema registry of the connection 'registry'.*{says}") as caught:
        await soon(waits.poll(on_undecodable="skip", **AVRO), 120)
    assert "s3cret" not in str(caught.value)
    assert in_front.asked
    assert broker.unacknowledged() == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"conn_type": "kafka"}, "'registry' is of type 'kafka', and 'http' or 'https' is needed"),
        ({"host": None, "port": None}, "'registry' has no host"),
        ({"extra": {"no.such": 1}}, r"the connection 'registry'.*no\.such"),
        ({"extra": {"ssl.ca.location": "/none.pem"}}, "the connection 'registry'.*No such file"),
        ({"host": "ftp://there"}, "'registry' has a URL that begins neither"),
    ],
)
async def test_a_connection_that_is_none_of_a_registry(broker, waits, monkeypatch, more, message):
    connect(monkeypatch, 1, **more)
    broker.send_raw(b"\x00\x00\x00\x00\x01rest")
    with pytest.raises(SourceMisconfigured, match=message) as caught:
        await soon(waits.poll(**AVRO), 120)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"values": "avro"}, "values='avro' needs registry_conn_id"),
        ({"keys": "json_schema"}, "keys='json_schema' needs registry_conn_id"),
        ({"keys": "xml"}, "keys is one of 'json', 'text', 'bytes', 'avro', 'json_schema', not 'xml'"),
    ],
)
async def test_formats_that_are_not_to_be_had(broker, waits, kwargs, message):
    for begin in (waits.poll, waits.watch):
        with pytest.raises(ValueError, match=message):
            await soon(begin(**kwargs))
