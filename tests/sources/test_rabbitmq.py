"""What is peculiar to RabbitMQ: ids, what becomes of a message's properties, and how channels hold messages."""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
import zlib
from contextlib import suppress
from datetime import datetime, timedelta, timezone

import aiormq
import pamqp.frame
import pytest
import servers
from airflow_events.errors import AtRedelivery, EventUndecodable, SourceMisconfigured, SourceUnreachable
from airflow_events.listeners import rabbitmq
from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.rabbitmq import client, consume, frames, messages
from airflow_events.listeners.support import serde
from airflow_events.listeners.support.queue import InHand
from airflow_events.listeners.support.values import digest_of
from broker import nothing, soon, until_told
from of_rabbitmq import Quorum, RabbitMQ
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from deployment import until


@pytest.fixture(scope="module", params=(RabbitMQ, Quorum), ids=lambda broker: broker.name)
def server(request):
    broker = request.param.make()
    if broker is None:
        pytest.skip(f"{request.param.name}: {request.param.missing}")
    yield broker
    broker.stop()


def id_of(event):
    return rabbitmq.RabbitMQListener().event_id(event)


async def ended(*tasks):
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


async def test_an_event_says_what_the_message_says(broker, waits):
    headers = {
        "text": "ä", "number": 2**40, "bytes": bytearray(b"\xff\x00"), "time": MOMENT, "none": None,
        "nested": {"list": [1, 2.5, True]}, "nul": "a\0b", "CC": ["nowhere"],
    }  # fmt: skip
    broker.publish(
        b"1", broker.queue, headers=headers, content_type="application/json", correlation_id="c", reply_to="r",
        priority=3, message_type="t", app_id="a", timestamp=MOMENT, message_id="m", expiration="600000",
        user_id="guest", delivery_mode=1,
    )  # fmt: skip
    event = await soon(waits.poll())
    assert event == {
        "server": f"127.0.0.1:{broker.server.port}",
        "virtual_host": "/",
        "queue": broker.queue,
        "message_id": "m",
        "timestamp": MOMENT,
        "digest": digest_of(b"1"),
        "value": 1,
        "exchange": "",
        "routing_key": broker.queue,
        "content_type": "application/json",
        "headers": {**headers, "bytes": "/wA=", "nul": "YQBi"},
        "properties": {
            "correlation_id": "c", "reply_to": "r", "priority": 3, "message_type": "t", "app_id": "a",
            "expiration": "600000", "user_id": "guest",
        },
        "rabbitmq_conn_id": "source",
    }  # fmt: skip
    assert json.loads(id_of(event)) == [event["server"], "/", broker.queue, "m"]
    await waits.release(event)
    again = await soon(waits.poll(1))
    assert serde.encode(again) == serde.encode(event)
    await waits.commit(again, 1)
    assert broker.unacknowledged() == 0


async def test_a_message_without_a_body_or_properties(broker, waits):
    broker.publish(b"", broker.queue, headers=None, delivery_mode=None, message_id="m")
    event = await soon(waits.poll(values="text"))
    assert (event["value"], event["timestamp"], event["headers"], event["properties"]) == ("", None, {}, {})


def short(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return bytes([len(raw)]) + raw


def table(*entries):
    return struct.pack(">I", len(b"".join(entries))) + b"".join(entries)


def raw_properties(headers=None, message_id="m", timestamp=None, correlation_id=None):
    """Write flags and properties, in AMQP's order."""
    found = [
        (13, headers), (10, correlation_id and short(correlation_id)), (7, message_id and short(message_id)),
        (6, timestamp),
    ]  # fmt: skip
    flags = sum(1 << bit for bit, raw in found if raw is not None)
    return struct.pack(">H", flags) + b"".join(raw for _, raw in found if raw is not None)


GOOD = short("good") + b"I" + struct.pack(">i", 1)
UNREADABLE = [
    pytest.param({"timestamp": struct.pack(">Q", 1_700_000_000_000_000)}, {}, id="microseconds"),
    pytest.param({"timestamp": struct.pack(">q", -1)}, {}, id="a negative timestamp"),
    pytest.param(
        {"headers": table(short("größe".encode("latin-1")) + b"t\1", GOOD)}, {"größe": True, "good": 1},
        id="a name in Latin-1",
    ),
    pytest.param(
        {"headers": table(short("when") + b"T" + struct.pack(">q", -1), GOOD)}, {"good": 1},
        id="a header that is no moment",
    ),
    pytest.param(
        {"headers": table(short("in") + b"F" + table(short(b"\xe4") + b"t\1"))}, {"in": {"ä": True}},
        id="a name within a header",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("properties", "headers"), UNREADABLE)
async def test_metadata_that_cannot_be_read_stops_nothing(broker, waits, caplog, properties, headers):
    tasks = [waits.poll(number) for number in range(2)]
    await asyncio.sleep(0.3)
    broker.publish(b'"odd"', broker.queue, raw=raw_properties(**properties))
    broker.publish(b'"next"', broker.queue, message_id="next")
    events = {event["value"]: event for event in [await soon(task) for task in tasks]}
    odd = events["odd"]
    assert (odd["timestamp"], odd["headers"], odd["message_id"]) == (None, headers, "m")
    for event in events.values():
        await waits.commit(event)
    assert broker.unacknowledged() == 0
    assert "Unexpected" not in caplog.text
    assert "Cancelling" not in caplog.text


async def test_a_watch_survives_it_too(broker, waits):
    if broker.watcher is None:
        pytest.skip("the source cannot be watched")
    watch = waits.watch(match={"id": 2}, since=datetime.now(timezone.utc) - timedelta(minutes=1))
    broker.publish(b'{"id": 1}', broker.stream, raw=raw_properties(timestamp=struct.pack(">q", -1)))
    broker.publish(gzip.compress(b'{"id": 2}'), broker.stream, content_encoding="gzip")
    assert (await soon(watch))["value"] == {"id": 2}


def frame_of(kind, payload):
    return struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce"


async def read_by(raw):
    """Read a frame in the three parts in which the client does."""
    reader = asyncio.StreamReader()
    reader.feed_data(raw)
    reader.feed_eof()
    lenient = frames.Frames(reader)
    start = await lenient.readexactly(1) + await lenient.readexactly(6)
    rest = await lenient.readexactly(int.from_bytes(start[3:], "big") + 1)
    assert lenient.at_eof()
    return pamqp.frame.unmarshal(start + rest)[2]


async def test_a_delivery_by_a_key_in_latin_1():
    where = short("tag") + struct.pack(">QB", 7, 1) + short("shop") + short("größe".encode("latin-1"))
    found = await read_by(frame_of(1, struct.pack(">HH", 60, 60) + where))
    assert isinstance(found, Basic.Deliver)
    assert (found.consumer_tag, found.delivery_tag, found.redelivered) == ("tag", 7, True)
    assert (found.exchange, found.routing_key) == ("shop", "größe")


@pytest.mark.parametrize(
    "properties", [b"\xff\xfe", struct.pack(">HI", 1 << 13, 99)], ids=["no values", "a table that is not there"]
)
async def test_a_header_that_is_no_sense_has_no_properties(properties):
    found = await read_by(frame_of(2, struct.pack(">HHQ", 60, 0, 5) + properties))
    assert (found.body_size, found.properties.message_id, found.properties.headers) == (5, None, None)


async def test_what_can_be_read_is_left_as_it_is():
    header = ContentHeader(body_size=3, properties=Basic.Properties(headers={"a": [1]}, timestamp=MOMENT))
    found = await read_by(pamqp.frame.marshal(header, 1))
    assert found.properties == header.properties


def in_parts(body):
    return gzip.compress(body[:4]) + gzip.compress(body[4:])


@pytest.mark.parametrize(
    ("pack", "encoding"), [(gzip.compress, "gzip"), (in_parts, "gzip"), (zlib.compress, "deflate")]
)
async def test_a_compressed_body_is_unpacked(broker, waits, pack, encoding):
    broker.publish(pack(b'{"n": 1}'), broker.queue, content_encoding=encoding, message_id="m")
    assert (await soon(waits.poll()))["value"] == {"n": 1}


@pytest.mark.parametrize(
    "body",
    [b'{"n": 1}', gzip.compress(b'{"n": 1}')[:-9], gzip.compress(b"1" * 2000)],
    ids=["not compressed", "cut off", "too large"],
)
async def test_a_body_that_cannot_be_unpacked_is_undecodable(broker, waits, monkeypatch, body):
    monkeypatch.setattr(messages, "_LARGEST", 1000)
    broker.publish(body, broker.queue, content_encoding="gzip", message_id="m")
    with pytest.raises(EventUndecodable, match=f"{broker.queue}.* is not gzip"):
        await soon(waits.poll())


async def test_a_message_without_an_id_fails_one_wait_and_stays(broker, waits):
    broker.publish(b'"ping"', broker.queue)
    broker.send("good")
    with pytest.raises(
        EventUndecodable, match=r"is not known by a message_id.*without_id='at_least_once'"
    ) as first:
        await soon(waits.poll(on_undecodable="skip"))
    event = await soon(waits.poll(1, on_undecodable="skip"))
    assert event["value"] == "good"
    await waits.commit(event, 1)
    assert broker.unacknowledged() == 1
    await asyncio.sleep(3)  # the hub gives it back
    with pytest.raises(EventUndecodable) as again:
        await soon(waits.poll(2))
    assert again.value.event_id == first.value.event_id  # so the inbox lets no other wait fail


async def test_messages_without_an_id_are_dead_letters_by_choice(broker, waits):
    broker.publish(b'"ping"', broker.queue)
    broker.send("good")
    event = await soon(waits.poll(on_undecodable="dead_letter"))
    assert event["value"] == "good"
    await waits.commit(event)
    until(lambda: broker.dead_letters() == [b'"ping"'], "it is there")


async def test_messages_without_an_id_are_taken_at_least_once_by_choice(broker, waits):
    broker.publish(b'"ping"', broker.queue)
    broker.publish(b'"ping"', broker.queue)
    first, second = [await soon(waits.poll(number, without_id="at_least_once")) for number in range(2)]
    assert (first["value"], second["value"], first["message_id"]) == ("ping", "ping", None)
    assert id_of(first) != id_of(second)
    await waits.commit(first)
    await waits.release(second, 1, without_id="at_least_once")
    again = await soon(waits.poll(2, without_id="at_least_once"))
    assert again["value"] == "ping"
    assert id_of(again) != id_of(first)
    await waits.commit(again, 2)
    broker.publish(b"{", broker.queue)
    broker.publish(b'"pong"', broker.queue)
    event = waits.poll(3, without_id="at_least_once", on_undecodable="skip")
    await waits.commit(await soon(event), 3)
    assert broker.unacknowledged() == 0


async def test_a_word_that_is_none(broker, waits):
    with pytest.raises(ValueError, match="without_id is 'refuse' or 'at_least_once', not 'maybe'"):
        await soon(waits.poll(without_id="maybe"))


async def test_two_messages_with_one_id_come_one_after_the_other(broker, waits):
    """Whether they are one that was sent twice, the inbox decides."""
    tasks = [waits.poll(number) for number in range(2)]
    await asyncio.sleep(0.3)
    for value in (b'"a"', b'"a"', b'"b"'):
        broker.publish(value, broker.queue, message_id="one")
    done, [other] = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=15)
    event = done.pop().result()
    await nothing(other)
    await waits.commit(event)
    second = await soon(other)
    assert (second["value"], id_of(second)) == ("a", id_of(event))
    assert broker.unacknowledged() == 2
    await waits.commit(second, 1)
    third = await soon(waits.poll(2))
    assert (third["value"], id_of(third)) == ("b", id_of(event))
    await waits.commit(third, 2)
    assert broker.unacknowledged() == 0


async def test_another_message_by_the_id_of_one_that_went_with_the_connection_is_another(broker, waits):
    """Another triggerer has the one by then, and what this one knows of it is old."""
    task = waits.poll()
    await nothing(task)
    broker.publish(b'"A"', broker.queue, message_id="x")
    event = await soon(task)
    [hub] = InHand.of_loop().hubs.values()
    await hub.disconnect()

    async def other():
        channel = await broker.channel()
        while isinstance((got := await channel.basic_get(broker.queue)).delivery, Basic.GetEmpty):
            await asyncio.sleep(0.05)
        return channel, got

    channel, got = await asyncio.to_thread(broker.do, other())
    assert got.body == b'"A"'
    await asyncio.to_thread(broker.publish, b'"B"', broker.queue, message_id="x")
    second = waits.poll(1)
    await nothing(second, 2)
    with pytest.raises(AtRedelivery):
        await waits.commit(event)
    assert (await soon(second))["value"] == "B"
    broker.do(channel.basic_ack(got.delivery.delivery_tag))


async def test_what_corrects_a_message_that_cannot_be_read_comes_under_the_same_id(broker, waits):
    broker.publish(b"{", broker.queue, message_id="one")
    with pytest.raises(EventUndecodable):
        await soon(waits.poll())
    task = waits.poll(1)
    broker.publish(b'"corrected"', broker.queue, message_id="one")
    broker.publish(b'"next"', broker.queue, message_id="two")
    for number, value in enumerate(("corrected", "next"), 1):
        event = await soon(task)
        assert event["value"] == value
        await waits.commit(event, number)
        task = waits.poll(number + 1)
    assert broker.unacknowledged() == 1


@pytest.mark.parametrize("pause", [0, 0.1])
async def test_the_server_is_killed_soon_after_a_commit_and_the_redelivery_is_known(broker, waits, pause):
    task = waits.poll()
    await asyncio.sleep(0.3)
    broker.send({"n": 1})
    event = await soon(task)
    await waits.commit(event)
    broker.server.kill(pause=pause)
    broker.server.start()
    task = waits.poll(1)
    again = None
    for _ in range(8):  # it is empty, or it is delivered again, however long the server takes to come back
        with suppress(asyncio.TimeoutError):
            again = await soon(task, 15)
        with suppress(TimeoutError):  # it has no leader yet
            if again is not None or not broker.unacknowledged():
                break
    if again is not None:  # the server had not written the acknowledgement down yet
        assert serde.encode(again) == serde.encode(event)
        assert id_of(again) == id_of(event)
        await waits.commit(again, 1)
    assert broker.unacknowledged() == 0


async def test_while_the_server_is_gone_a_commit_is_left_to_the_redelivery(broker, waits, caplog, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "300")
    tasks = [waits.poll(number) for number in range(2)]
    await asyncio.sleep(0.3)
    broker.send("a")
    done, [other] = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=15)
    event = done.pop().result()
    broker.server.kill()
    await until_told(caplog, "cannot be reached")
    with pytest.raises(AtRedelivery):
        await soon(asyncio.create_task(waits.commit(event)))
    broker.server.start()
    again = await soon(other, 120)
    assert serde.encode(again) == serde.encode(event)
    await waits.commit(again, 1)
    assert broker.unacknowledged() == 0


async def test_a_message_is_held_for_longer_than_the_server_lets_a_channel(broker, waits):
    """The server looks at it once a minute; here more often."""
    patience = {"consumer_timeout": 1000, "channel_tick_interval": 500}
    for name, milliseconds in patience.items():
        broker.ask(f"application:set_env(rabbit, {name}, {milliseconds}).")
    try:
        tasks = [waits.poll(number) for number in range(2)]
        await asyncio.sleep(0.3)
        broker.send("a")
        done, [other] = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=15)
        event = done.pop().result()
        hub = InHand.of_loop().hubs[id_of(event)]
        first = hub.in_hand[id_of(event)]
        await nothing(other, 8)  # it is the first one's yet, however often it is delivered
        assert hub.in_hand[id_of(event)] is not first
    finally:
        broker.ask("application:set_env(rabbit, consumer_timeout, 1800000).")
        broker.ask("application:set_env(rabbit, channel_tick_interval, 60000).")
    broker.send("b")
    assert (await soon(other, 30))["value"] == "b"
    with suppress(AtRedelivery):
        await waits.commit(event)
    assert broker.unacknowledged() in (1, 2)


async def test_no_more_is_received_than_waits_want(broker, waits):
    tasks = [waits.poll(number) for number in range(3)]
    await asyncio.sleep(0.5)
    await ended(tasks.pop())
    await asyncio.sleep(0.5)
    broker.send(*range(5))
    for number, task in enumerate(tasks):
        event = await soon(task)
        if number == 0:
            await waits.commit(event)
    await asyncio.sleep(1)
    left = broker.look(broker.queue)
    assert len(left) == 3
    assert not any(message.delivery.redelivered for message in left)


async def test_who_does_not_wait_any_more_receives_nothing(broker, waits):
    task = waits.poll()
    await asyncio.sleep(0.5)
    await ended(task)
    await asyncio.sleep(0.5)
    broker.send("a")
    await asyncio.sleep(0.5)
    [message] = broker.look(broker.queue)
    assert message.delivery.redelivered is False


async def test_a_message_without_a_decodable_body_counts_up_to_the_limit_of_a_quorum_queue(broker, waits):
    """By a limit the queue itself gets rid of what no wait can read."""
    if not isinstance(broker, Quorum):
        pytest.skip("other queues have no limit")
    broker.queue = f"{broker.queue}.limited"
    broker.declare(f"{broker.queue}.dead")
    broker.make_queue(**{"x-delivery-limit": 2})
    broker.publish(b"{", broker.queue, message_id="bad")
    for number in range(3):
        with pytest.raises(EventUndecodable):
            await soon(waits.poll(number))
        await asyncio.sleep(3)  # the hub gives it back
    until(lambda: broker.dead_letters() == [b"{"], "it is there")


async def test_another_consumer_is_an_exclusive_one(broker, waits, caplog):
    if isinstance(broker, Quorum):
        pytest.skip("quorum queues know none")

    async def consume():
        channel = await broker.channel()
        await channel.basic_consume(broker.queue, print, exclusive=True)
        return channel

    channel = broker.do(consume())
    task = waits.poll()
    await until_told(caplog, "in exclusive use")
    broker.do(channel.close())
    broker.send("a")
    assert (await soon(task, 120))["value"] == "a"


async def test_another_consumer_is_the_single_active_one(broker, waits, caplog, monkeypatch):
    monkeypatch.setattr(consume, "_STALLED", 1.0)
    broker.queue = f"{broker.queue}.single"
    broker.declare(f"{broker.queue}.dead")
    broker.make_queue(**{"x-single-active-consumer": True})

    async def consume_one():
        channel = await broker.channel()
        await channel.basic_qos(prefetch_count=1)
        await channel.basic_consume(broker.queue, lambda message: asyncio.sleep(0))  # it acknowledges nothing
        return channel

    channel = broker.do(consume_one())
    task = waits.poll()
    await asyncio.sleep(0.5)
    for name in ("held", "ready"):
        broker.publish(json.dumps(name).encode(), broker.queue, message_id=name)
    await until_told(caplog, "has 1 messages ready, and none is delivered here")
    before = caplog.text.count("none is delivered here")
    await asyncio.sleep(2.5)
    assert caplog.text.count("none is delivered here") == before
    broker.do(channel.close())
    assert (await soon(task, 120))["value"] == "held"


async def test_a_queue_that_is_deleted_while_waits_wait_is_waited_for(broker, waits, caplog):
    broker.queue = f"{broker.queue}.deleted"
    broker.make_queue()
    task = waits.poll()
    await nothing(task)

    async def delete():
        channel = await broker.channel()
        await channel.queue_delete(broker.queue)
        await channel.close()

    broker.do(delete())
    await until_told(caplog, "is not there, and is not made")
    broker.make_queue()
    await asyncio.to_thread(broker.publish, b"1", broker.queue, message_id="x")
    assert (await soon(task, 120))["value"] == 1


async def test_an_event_of_the_first_edition():
    event = {"queue": "orders", "id": "8c2f", "claim": "51d0", "message_id": None, "rabbitmq_conn_id": "source"}
    assert json.loads(id_of(event)) == ["", "", "orders", None, "8c2f"]
    with pytest.raises(AtRedelivery):
        await rabbitmq.RabbitMQListener().event_checkpointed(event)


async def test_a_queue_that_is_not_there_is_refused_and_not_made(broker, waits):
    broker.queue = "nowhere"
    with pytest.raises(SourceMisconfigured, match="'nowhere' of the connection 'source' is not there"):
        await soon(waits.poll())
    with pytest.raises(SourceMisconfigured, match="is not there"):
        await soon(waits._start(broker.listener, 1, ["nowhere"], {"rabbitmq_conn_id": "source"}))
    assert "nowhere" not in broker.queues()


async def test_a_queue_that_is_not_durable_is_refused_unless_by_choice(broker, waits):
    broker.queue = f"{broker.queue}.passing"
    broker.declare(broker.queue, durable=False)
    with pytest.raises(SourceMisconfigured, match=r"is not durable.*require_durable=False"):
        await soon(waits.poll())
    broker.publish(b"1", broker.queue, message_id="m")
    event = await soon(waits.poll(require_durable=False))
    await waits.commit(event)


@pytest.mark.parametrize("durable", [True, False])
async def test_a_queue_that_deletes_itself_is_refused(broker, waits, durable):
    broker.queue = f"{broker.queue}.{durable}"
    broker.declare(broker.queue, durable=durable, auto_delete=True)
    with pytest.raises(SourceMisconfigured, match="deletes itself"):
        await soon(waits.poll(require_durable=durable))


async def test_a_queue_that_is_exclusive_to_another_is_refused(broker, waits):
    broker.queue = f"{broker.queue}.exclusive"
    broker.declare(broker.queue, durable=False, exclusive=True)
    with pytest.raises(SourceMisconfigured, match="is exclusive to another connection"):
        await soon(waits.poll(require_durable=False))


async def test_a_stream_is_watched_and_not_consumed_and_a_queue_the_other_way_round(broker, waits):
    stream = f"{broker.queue}.log"
    broker.declare(stream, {"x-queue-type": "stream"})
    with pytest.raises(SourceMisconfigured, match="is a stream; RabbitMQWatchListener"):
        await soon(waits._start(rabbitmq.RabbitMQListener, 1, [stream], {"rabbitmq_conn_id": "source"}))
    broker.send(1)
    arguments = {"since": datetime.now(timezone.utc), "rabbitmq_conn_id": "source"}
    with pytest.raises(SourceMisconfigured, match=r"is no stream; RabbitMQListener"):
        await soon(waits._start(rabbitmq.RabbitMQWatchListener, 1, [broker.queue], arguments))
    assert (await soon(waits.poll()))["value"] == 1


@pytest.fixture
def user(broker, monkeypatch):
    """Make a user who may configure, write and read what these patterns say, and its connection."""

    def make(configure, write, read):
        broker.ask('catch rabbit_auth_backend_internal:delete_user(<<"other">>, <<"tests">>).')
        broker.ask('rabbit_auth_backend_internal:add_user(<<"other">>, <<"secret-word">>, <<"tests">>).')
        rights = ", ".join(f'<<"{pattern}">>' for pattern in (configure, write, read))
        broker.ask(f'rabbit_auth_backend_internal:set_permissions(<<"other">>, <<"/">>, {rights}, <<"tests">>).')
        conn = broker.connection(login="other", password="secret-word")
        monkeypatch.setenv("AIRFLOW_CONN_OTHER", json.dumps(conn))

    return make


@pytest.mark.parametrize("rights", [(".*", ".*", "^other$"), (".*", ".*", "^$")])
async def test_a_user_who_may_not_read_is_refused(broker, waits, user, rights):
    user(*rights)
    broker.send(1)
    with pytest.raises(SourceMisconfigured, match="'other': the connection's user may not") as refused:
        await soon(waits.poll(rabbitmq_conn_id="other"))
    assert "secret-word" not in str(refused.value)
    assert broker.unacknowledged() == 1


async def test_a_user_who_may_do_just_what_is_needed(broker, waits, user):
    user("^$", "^$", f"^{broker.queue}$")
    broker.send(1)
    event = await soon(waits.poll(rabbitmq_conn_id="other"))
    await waits.release(event, rabbitmq_conn_id="other")
    event = await soon(waits.poll(rabbitmq_conn_id="other"))
    await waits.commit(event)
    broker.publish(b"{", broker.queue, message_id="bad")
    last = waits.poll(1, rabbitmq_conn_id="other", on_undecodable="dead_letter")
    broker.send(2)
    await waits.commit(await soon(last), 1)
    assert broker.unacknowledged() == 0
    until(lambda: broker.dead_letters() == [b"{"], "it is there")


async def test_a_login_that_is_refused(broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_OTHER", json.dumps(broker.connection(password="wrong-word")))
    with pytest.raises(SourceMisconfigured, match="refused the login") as refused:
        await soon(waits.poll(rabbitmq_conn_id="other"))
    assert "wrong-word" not in str(refused.value)


async def test_a_virtual_host_that_is_not_there(broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_OTHER", json.dumps(broker.connection(schema="nowhere")))
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
    with pytest.raises(SourceUnreachable, match="virtual host 'nowhere'"):
        await soon(waits.poll(rabbitmq_conn_id="other"))


async def test_another_virtual_host_and_heartbeat_and_type(broker, waits, monkeypatch):
    broker.ask('catch rabbit_vhost:add(<<"of/airflow">>, <<"tests">>).')
    broker.ask(
        'rabbit_auth_backend_internal:set_permissions(<<"guest">>, <<"of/airflow">>, <<".*">>, <<".*">>, '
        '<<".*">>, <<"tests">>).'
    )
    extra = {"heartbeat": 7}
    conn = broker.connection(conn_type="generic", schema="of/airflow", extra=extra)
    monkeypatch.setenv("AIRFLOW_CONN_OTHER", json.dumps(conn))

    async def make():
        url = f"amqp://guest:guest@127.0.0.1:{broker.server.port}/of%2Fairflow"
        client = await aiormq.connect(url)
        channel = await client.channel()
        await channel.queue_declare(broker.queue, durable=True)
        properties = Basic.Properties(delivery_mode=2, message_id="m")
        await channel.basic_publish(b"1", routing_key=broker.queue, properties=properties)
        await client.close()

    await make()
    event = await soon(waits.poll(rabbitmq_conn_id="other"))
    assert json.loads(id_of(event))[1:] == ["of/airflow", broker.queue, "m"]
    await waits.commit(event)
    idle = waits.poll(1, rabbitmq_conn_id="other")
    await nothing(idle)
    assert "{timeout, 7}" in broker.ask("rabbit_networking:connection_info_all([timeout]).")


async def test_a_watch_finds_by_milliseconds_and_by_whole_seconds(broker, waits):
    if broker.watcher is None:
        pytest.skip("the source cannot be watched")
    now = datetime.now(timezone.utc).replace(microsecond=500_000)
    milliseconds = {"timestamp_in_ms": round(now.timestamp() * 1000)}
    broker.publish(b'"exact"', broker.stream, headers=milliseconds)
    broker.publish(b'"second"', broker.stream, timestamp=now.replace(microsecond=0))
    exact = await soon(waits.watch(1, since=now - timedelta(milliseconds=1)))
    assert (exact["value"], exact["timestamp"]) == ("exact", now)
    second = await soon(waits.watch(2, since=now + timedelta(milliseconds=1)))
    assert (second["value"], second["timestamp"]) == ("second", now.replace(microsecond=0))
    assert (exact["offset"], second["offset"]) == (0, 1)
    await nothing(waits.watch(3, since=now + timedelta(seconds=1)))


async def test_a_watch_of_messages_whose_metadata_is_odd(broker, waits):
    if broker.watcher is None:
        pytest.skip("the source cannot be watched")
    since = datetime.now(timezone.utc) - timedelta(minutes=1)
    first, second = (waits.watch(number, match={"id": number}, since=since) for number in (1, 2))
    await nothing(first)
    broker.publish(b'{"id": 1}', broker.stream, headers={"timestamp_in_ms": 2**62, "nul": "a\0b"})
    broker.publish(b'{"id": 2}', broker.stream, headers={"timestamp_in_ms": -(2**62)})
    found = await soon(first)
    assert (found["timestamp"], found["headers"]) == (None, {"timestamp_in_ms": 2**62, "nul": "YQBi"})
    assert (await soon(second))["timestamp"] is None


async def test_a_stream_that_is_made_anew_while_it_is_watched(broker, waits, caplog):
    if broker.watcher is None:
        pytest.skip("the source cannot be watched")
    for number in range(20):
        broker.publish(b"%d" % number, broker.stream)
    task = waits.watch(match={"id": "new"}, since=datetime.now(timezone.utc) - timedelta(seconds=1))
    await nothing(task)

    async def make_anew():
        channel = await broker.channel()
        await channel.queue_delete(broker.stream)
        await channel.queue_declare(broker.stream, durable=True, arguments={"x-queue-type": "stream"})

    broker.do(make_anew())
    broker.publish(b'{"id": "new"}', broker.stream)
    event = await soon(task, 30)
    assert (event["value"], event["offset"]) == ({"id": "new"}, 0)
    assert "deleted and recreated" in caplog.text


def certificates(folder):
    """Make an authority, and a certificate for the server and one for a client."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def make(name, issuer=None, issuer_key=None):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(timezone.utc)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject).issuer_name(issuer or subject).public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(issuer_key or key, hashes.SHA256())
        )  # fmt: skip
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return subject, key

    subject, key = make("authority")
    make("server", subject, key)
    make("client", subject, key)


async def test_tls_with_a_certificate_of_the_client(tmp_path, monkeypatch):
    from deployment import free_port

    certificates(tmp_path)
    port = free_port()
    server = servers.rabbitmq(
        f"listeners.ssl.1 = 127.0.0.1:{port}",
        f"ssl_options.cacertfile = {tmp_path}/authority.pem",
        f"ssl_options.certfile = {tmp_path}/server.pem",
        f"ssl_options.keyfile = {tmp_path}/server.key",
        "ssl_options.verify = verify_peer",
        "ssl_options.fail_if_no_peer_cert = true",
    )
    if server is None:
        pytest.skip(RabbitMQ.missing)
    broker = RabbitMQ()
    broker.server = server
    try:
        server.start()
        broker.declare("orders")
        broker.publish(b"1", "orders", message_id="m")
        extra = {
            "ssl": True, "cafile": f"{tmp_path}/authority.pem", "certfile": f"{tmp_path}/client.pem",
            "keyfile": f"{tmp_path}/client.key",
        }  # fmt: skip
        secure = broker.connection(host="localhost", port=port)
        monkeypatch.setenv("AIRFLOW_CONN_TLS", json.dumps({**secure, "extra": extra}))
        monkeypatch.setenv(
            "AIRFLOW_CONN_STRANGER", json.dumps({**secure, "extra": {"ssl": True, "cafile": extra["cafile"]}})
        )
        monkeypatch.setenv("AIRFLOW_CONN_DOUBTFUL", json.dumps({**secure, "extra": {"ssl": "true"}}))
        pem = {"ssl_ca_cert_pem": "authority.pem", "ssl_cert_pem": "client.pem", "ssl_key_pem": "client.key"}
        told = {name: (tmp_path / file).read_text() for name, file in pem.items()}
        by_address = {**secure, "host": f"127.0.0.1:1,127.0.0.1:{port}", "conn_type": "amqps"}
        monkeypatch.setenv(
            "AIRFLOW_CONN_WITHIN",
            json.dumps({**by_address, "extra": {**told, "ssl_server_hostname": "localhost"}}),
        )
        monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "0.5")
        with working_for(Wait("dag", "run0", "task")):
            for refused in ("stranger", "doubtful"):
                with pytest.raises(ConnectionError, match=f"'{refused}' could not be reached"):
                    await rabbitmq.RabbitMQListener().poll_for_event("orders", rabbitmq_conn_id=refused)
            monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "300")
            event = await rabbitmq.RabbitMQListener().poll_for_event("orders", rabbitmq_conn_id="tls")
            assert event["value"] == 1
            await rabbitmq.RabbitMQListener().event_checkpointed(event)
            broker.publish(b"2", "orders", message_id="n")
            event = await rabbitmq.RabbitMQListener().poll_for_event("orders", rabbitmq_conn_id="within")
            assert event["value"] == 2
    finally:
        broker.stop()


async def test_a_host_that_says_nothing_keeps_none_from_the_next(broker, waits, monkeypatch):
    """As one that is switched off: its packets are dropped, and nothing refuses."""
    monkeypatch.setattr(client, "STEP", 6.0)
    silent = await asyncio.start_server(lambda *_: asyncio.sleep(60), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    two = {**broker.connection(), "host": f"127.0.0.1:{port},127.0.0.1:{broker.server.port}"}
    monkeypatch.setenv("AIRFLOW_CONN_TWO", json.dumps(two))
    broker.send(1)
    event = await soon(waits.poll(rabbitmq_conn_id="two"), 30)
    assert event["value"] == 1
    await waits.commit(event)
    silent.close()


@pytest.mark.parametrize("how", ["another format", "another connection"])
async def test_what_another_hub_of_the_queue_has_is_not_acknowledged_in_its_place(broker, waits, monkeypatch, how):
    """A sender gives an id twice, with other bodies, and two waits of a triggerer read the queue by two hubs."""
    monkeypatch.setenv("AIRFLOW_CONN_SECOND", json.dumps(broker.connection()))
    other = {"values": "text"} if how == "another format" else {"rabbitmq_conn_id": "second"}
    broker.publish(b'"A"', broker.queue, message_id="x")
    first = await soon(waits.poll())
    waiting = waits.poll(1, **other)
    await asyncio.sleep(1)
    await asyncio.to_thread(broker.publish, b'"B"', broker.queue, message_id="x")
    await nothing(waiting)  # it stands behind the first
    await waits.commit(first)
    second = await soon(waiting)
    assert second["digest"] != first["digest"]
    await waits.release(second, 1, **other)
    await waits.end()
    await asyncio.to_thread(
        until, lambda: [bytes(m.body) for m in broker.look(broker.queue)] == [b'"B"'], "B is left"
    )
