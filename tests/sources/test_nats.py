"""What is peculiar to NATS JetStream: what is acknowledged and when, what is refused, who is let in."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import itertools
import json
import shutil
import socket

import of_nats
import pytest
from airflow_events.errors import AtRedelivery, EventUndecodable, SourceMisconfigured, SourceUnreachable
from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.nats import NatsListener, NatsWatchListener, client, consume
from airflow_events.listeners.support import connections, queue
from broker import hubs, nothing, soon, until_told
from nats import errors
from nats.aio.client import Client
from nats.js.api import StreamConfig, StreamSource
from test_watch import ago

from deployment import until


@pytest.fixture(scope="module", params=[of_nats.Nats], ids=["nats"])
def server(request):
    broker = request.param.make()
    if broker is None:
        pytest.skip(request.param.missing)
    yield broker
    broker.stop()


@pytest.fixture
def consumer(broker):
    """Make the consumer beforehand, as an administrator would."""

    def make(durable="airflow", **config):
        config = {"ack_policy": "explicit", "ack_wait": 1, "max_deliver": -1, **config}
        js = lambda client: client.jetstream()  # noqa: E731
        broker.ask(lambda client: js(client).add_consumer(broker.queue, durable_name=durable, **config))

    return make


@pytest.fixture
def started():
    """Start servers of a test's own, with settings of their own."""
    servers = []

    def start(monkeypatch, connection=None, **settings):
        server = of_nats.server(**settings)
        if server is None:
            pytest.skip(of_nats.Nats.missing)
        servers.append(server)
        server.start()
        about = {"conn_type": "nats", "host": "127.0.0.1", "port": server.port, **(connection or {})}
        monkeypatch.setenv("AIRFLOW_CONN_OWN", json.dumps(about))
        monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
        return server

    yield start
    for server in servers:
        server.stop()


def wait(number=0):
    return Wait("dag", f"run{number}", "task")


async def elsewhere(*args, **arguments):
    """Poll as `own` does, in another process as it were, which gives back what it has as it ends."""
    return await asyncio.to_thread(asyncio.run, own(*args, **arguments))


async def own(stream="orders", listener=NatsListener, conn_id="own", **arguments):
    """Poll a server of the test's own."""
    with working_for(wait()):
        poll = listener().poll_for_event(stream, nats_conn_id=conn_id, **arguments)
        return await asyncio.wait_for(poll, 60)


async def end(task):
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def pending(broker):
    about = broker.ask(lambda client: client.jetstream().consumer_info(broker.queue, "airflow"))
    return about.num_ack_pending


def id_of(event):
    return NatsListener().event_id(event)


# What is received, and what is acknowledged


async def test_no_more_is_received_than_waits_want(broker, waits):
    broker.send(*range(10))
    tasks = [waits.poll(number) for number in range(2)]
    for task in tasks:
        await soon(task)
    await asyncio.sleep(1)
    assert (pending(broker), broker.unacknowledged()) == (2, 10)


async def test_many_are_acknowledged_at_once(broker, waits):
    tasks = [waits.poll(number) for number in range(300)]
    await nothing(tasks[0], 0.5)
    broker.send(*range(300))
    events = [await soon(task, 120) for task in tasks]
    await asyncio.gather(*(waits.commit(event, number) for number, event in enumerate(events)))
    assert {event["value"] for event in events} == set(range(300))
    assert broker.unacknowledged() == 0


async def test_a_consumer_that_gives_out_few_at_once(broker, waits):
    config = {"durable_name": "airflow", "ack_policy": "explicit", "max_batch": 2}
    request = json.dumps({"stream_name": broker.queue, "config": config}).encode()
    path = f"$JS.API.CONSUMER.DURABLE.CREATE.{broker.queue}.airflow"
    assert b"error" not in broker.ask(lambda client: client.request(path, request)).data
    broker.send(*range(5))
    events = [await soon(task) for task in [waits.poll(number) for number in range(5)]]
    assert {event["value"] for event in events} == set(range(5))


async def test_a_process_acknowledges_what_another_received_whatever_was_delivered_since(broker, waits, consumer):
    consumer()
    broker.send("a", "b")
    there = await elsewhere(broker.queue, conn_id="source")
    assert there["value"] == "a"
    here = await soon(waits.poll())  # what the other process gave back as it ended, delivered again
    await waits.release(here)
    await waits.commit(there, 1)
    await waits.commit(there, 1)
    assert broker.unacknowledged() == 1
    assert (await soon(waits.poll(2)))["value"] == "b"


async def test_what_the_consumer_does_not_know_it_has_delivered_is_acknowledged_at_its_redelivery(broker, waits):
    """As after a server was killed that had not written it down; JetStream answers no such acknowledgement."""
    broker.send("a")
    first = await soon(waits.poll())
    broker.send("b")
    with pytest.raises(AtRedelivery):
        await waits.commit({**first, "sequence": 2})
    second = await soon(waits.poll(1))
    assert second["value"] == "b"
    await waits.commit(first)
    await waits.commit(second, 1)
    assert broker.unacknowledged() == 0


async def test_a_consumer_that_is_deleted_is_made_again_and_delivers_the_same(broker, waits):
    broker.send("a")
    event = await soon(waits.poll())
    broker.ask(lambda client: client.jetstream().delete_consumer(broker.queue, "airflow"))
    with pytest.raises(AtRedelivery):
        await waits.commit(event)
    again = await soon(waits.poll(1))
    assert again == event
    await waits.commit(again, 1)
    assert broker.unacknowledged() == 0


async def test_a_consumer_that_is_deleted_while_a_wait_waits(broker, waits):
    task = waits.poll()
    await nothing(task, 0.7)
    broker.ask(lambda client: client.jetstream().delete_consumer(broker.queue, "airflow"))
    broker.send("a")
    await waits.commit(await soon(task))
    assert broker.unacknowledged() == 0


async def test_an_event_of_the_first_edition_is_acknowledged(broker, waits):
    broker.send("a")
    event = await elsewhere(broker.queue, conn_id="source")
    del event["created"]
    await waits.commit({**event, "id": "1-1764061200123456", "bucket": "airflow-events"})
    assert broker.unacknowledged() == 0


async def test_a_lease_is_that_of_a_consumer_that_is_made(broker, waits, consumer):
    consumer("there", ack_wait=9)
    for durable in ("there", "new"):
        await nothing(waits.poll(durable=durable, lease=dt.timedelta(seconds=5)), 0.5)
    ask = lambda name: broker.ask(lambda client: client.jetstream().consumer_info(broker.queue, name))  # noqa: E731
    assert [ask(name).config.ack_wait for name in ("there", "new")] == [9, 5]


async def test_what_is_in_hand_is_kept_where_the_consumer_has_a_backoff(broker, waits, consumer):
    consumer(ack_wait=None, backoff=[1, 60])
    broker.send("a")
    event = await soon(waits.poll())
    await nothing(waits.poll(1, values="text"), 4)  # which is another hub
    await waits.commit(event)
    assert broker.unacknowledged() == 0


async def test_a_message_that_is_pulled_for_waits_that_end_at_that_moment_goes_to_others(
    broker, waits, monkeypatch
):
    ended = [waits.poll(number) for number in range(3)]
    stays = waits.poll(3)
    await nothing(stays, 1)
    pull = client.Server.pull

    async def meanwhile(server, *args):
        found = await pull(server, *args)
        for task in ended if found else ():
            await end(task)
        return found

    monkeypatch.setattr(client.Server, "pull", meanwhile)
    await asyncio.sleep(0.7)  # the pull before this has ended
    broker.send("a")
    assert (await soon(stays))["value"] == "a"


# What is in the stream


async def test_headers_and_coordinates_are_in_the_event(broker, waits):
    broker.publish(f"{broker.queue}.eu.new", b"{}", headers={"Nats-Msg-Id": "7", "Trace": "a:b c"})
    event = await soon(waits.poll())
    assert event["subject"] == f"{broker.queue}.eu.new"
    assert event["headers"] == {"Nats-Msg-Id": "7", "Trace": "a:b c"}
    assert (event["stream"], event["durable"], event["sequence"]) == (broker.queue, "airflow", 1)
    assert abs(event["timestamp"] - ago()) < dt.timedelta(seconds=30)
    seen = await soon(waits.watch(since=ago(minutes=1)))
    assert seen == {key: event[key] for key in seen}


async def test_headers_count_as_bytes_of_what_is_kept(broker, waits):
    await nothing(waits.watch(since=ago(minutes=1), match={"id": "never"}))
    broker.publish(f"{broker.queue}.new", b"{}", headers={"Trace": "a" * 1000})
    assert (await soon(waits.watch(1, since=ago(minutes=1))))["value"] == {}
    assert sum(hub._end._bytes for hub in hubs()) == len("{}") + len("Trace") + 1000


async def test_a_header_that_is_not_ascii(broker, waits):
    broker.publish(f"{broker.queue}.new", b"{}", headers={"Name": "Zoë"})
    assert (await soon(waits.poll()))["headers"] == {"Name": "Zoë"}


def send_as_it_is(broker, line, *parts):
    """Send what no client would, such as a subject that is no text."""
    with socket.create_connection(("127.0.0.1", broker.server.port)) as connection:
        wire = connection.makefile("rwb")
        wire.readline()
        wire.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
        wire.write(b"%b %b\r\n%b\r\n" % (line, b" ".join(b"%d" % n for n in _lengths(parts)), b"".join(parts)))
        wire.write(b"PING\r\n")
        wire.flush()
        assert wire.readline() == b"PONG\r\n"


def _lengths(parts):
    return itertools.accumulate(map(len, parts))


@pytest.mark.parametrize(
    ("verb", "name", "headers", "found"),
    [
        (b"PUB", b"\xff\xfe", None, {}),
        (
            b"HPUB",
            b"some",
            b"NATS/1.0\r\n\xff: x\r\nA b: c\r\n: d\r\nT: \xff\r\nno colon\r\nE:\r\nT:2\r\n\r\n",
            {"\ufffd": "x", "A b": "c", "E": "", "T": "2"},
        ),
        (b"HPUB", b"some", b"NATS/1.0 9 \xff\r\nX: y\r\n\r\n", {"X": "y"}),
        (b"HPUB", b"some", b"NATS/1.0 408 Request Timeout\r\n\r\n", {}),
        (b"HPUB", b"some", b"NATS", {}),
    ],
    ids=["subject", "names", "status", "408", "none"],
)
async def test_what_is_no_text_stops_nothing(broker, waits, verb, name, headers, found):
    parts = [b"{}"] if headers is None else [headers, b"{}"]
    send_as_it_is(broker, verb + f" {broker.queue}.".encode() + name, *parts)
    broker.send("good")
    events = [await soon(task) for task in [waits.poll(number) for number in range(2)]]
    assert [event["value"] for event in events] == [{}, "good"]
    assert events[0]["headers"].items() >= found.items()
    assert events[0]["subject"] == f"{broker.queue}.{name.decode(errors='backslashreplace')}"
    for number, event in enumerate(events):
        await waits.commit(event, number)
    assert broker.unacknowledged() == 0


async def test_a_consumer_of_some_subjects(broker, waits):
    some = waits.poll(subject=f"{broker.queue}.eu.*", durable="eu")
    seen = waits.watch(1, subject=f"{broker.queue}.us.*", since=ago(minutes=1))
    await nothing(some, 0.5)

    async def send(client):
        for where in ("us", "eu"):
            await client.jetstream().publish(f"{broker.queue}.{where}.new", json.dumps(where).encode())

    broker.ask(send)
    assert (await soon(some))["value"] == "eu"
    assert (await soon(seen))["value"] == "us"
    with pytest.raises(SourceMisconfigured, match=r"filter_subject is .*eu.*; needed: .*us"):
        await soon(waits.poll(2, subject=f"{broker.queue}.us.*", durable="eu"))


async def test_a_consumer_that_begins_at_the_next_message(broker, waits):
    broker.send("before")
    task = waits.poll(deliver_policy="new")
    await nothing(task, 0.7)
    broker.send("after")
    assert (await soon(task))["value"] == "after"


@pytest.mark.parametrize("here", [True, False], ids=["in hand", "received elsewhere"])
async def test_a_stream_that_is_made_anew_counts_from_one_and_loses_nothing_by_it(broker, waits, here):
    broker.send("old")
    if here:
        event = await soon(waits.poll())
    else:
        event = await elsewhere(broker.queue, conn_id="source")
    broker.ask(lambda client: client.jetstream().delete_stream(broker.queue))
    broker.make_stream()
    broker.send("new")
    again = await soon(waits.poll(1))
    assert (again["value"], again["sequence"]) == ("new", event["sequence"])
    assert id_of(again) != id_of(event)
    try:
        await waits.commit(event)
    except AtRedelivery:
        assert here
    assert broker.unacknowledged() == 1
    await waits.commit(again, 1)
    assert broker.unacknowledged() == 0


async def test_a_stream_that_is_made_anew_between_two_pulls(broker, waits, consumer):
    task = waits.poll()
    broker.send("old")
    event = await soon(task)
    await waits.commit(event)
    broker.ask(lambda client: client.jetstream().delete_stream(broker.queue))
    broker.make_stream()
    consumer()
    broker.send("new")
    again = await soon(waits.poll(1))
    assert again["value"] == "new"
    assert again["created"] > event["created"]


async def test_a_message_that_the_stream_drops_while_it_is_in_hand(broker, waits):
    broker.send("dropped")
    event = await soon(waits.poll())
    broker.ask(lambda client: client.jetstream().purge_stream(broker.queue))
    task = waits.poll(1)
    await nothing(task, 1)
    broker.send("next")
    assert (await soon(task))["value"] == "next"
    await waits.commit(event)  # the record has it


async def test_a_work_queue(broker, waits):
    broker.ask(lambda client: client.jetstream().delete_stream(broker.queue))
    broker.make_stream(retention="workqueue")
    broker.send("a", "b")
    event = await soon(waits.poll())
    await waits.commit(event)
    about = broker.ask(lambda client: client.jetstream().stream_info(broker.queue))
    assert about.state.messages == 1
    await waits.commit(event, 1)
    assert (await soon(waits.poll(1)))["value"] == "b"
    with pytest.raises(SourceMisconfigured, match="workqueue"):
        await soon(waits.watch(since=ago(minutes=1)))


async def test_more_in_hand_than_the_consumer_may_have_pending(broker, waits, consumer, monkeypatch, caplog):
    monkeypatch.setattr(consume, "_LOOK_EVERY", 0.5)
    consumer(max_ack_pending=2)
    broker.send(*range(3))
    tasks = [waits.poll(number) for number in range(3)]
    await until_told(caplog, "delivers nothing, since 2 messages are unacknowledged, its max_ack_pending")
    [held_up] = [number for number, task in enumerate(tasks) if not task.done()]
    committed = (held_up + 1) % 3
    await waits.commit(tasks[committed].result(), committed)
    assert (await soon(tasks[held_up]))["value"] == 2


# What goes to the dead letters


def dead_letters(broker, **changes):
    return {"on_undecodable": "dead_letter", "dead_letter": broker.dead_letter, **changes}


async def test_a_dead_letter_has_the_messages_headers_but_for_the_streams_orders(broker, waits):
    broker.publish(broker.dead_letter, b"there already")
    broker.ask(lambda client: client.jetstream().delete_stream(broker.queue))
    broker.make_stream(allow_rollup_hdrs=True)
    headers = {"Nats-Rollup": "all", "Nats-Msg-Id": "7", "Trace": "a: b"}
    broker.publish(f"{broker.queue}.new", b"{no json", headers=headers)
    await nothing(waits.poll(**dead_letters(broker)), 2)
    dead = broker.ask(lambda client: client.jetstream().get_last_msg("dead", broker.dead_letter))
    assert dead.data == b"{no json"
    reason, id = (dead.headers.pop(name) for name in ("airflow-events-reason", "Nats-Msg-Id"))
    assert "Expecting property name" in reason
    assert json.loads(id)[0::2] == [broker.queue, "airflow"]
    where = f"the message 1 of the stream '{broker.queue}' (consumer 'airflow') of the connection 'source'"
    assert dead.headers == {"airflow-events-source": where, "Trace": "a: b"}
    assert broker.unacknowledged() == 0


async def test_a_dead_letter_is_there_once_though_its_acknowledgement_failed_at_first(broker, waits, monkeypatch):
    confirmed, failures = consume._confirmed, [ConnectionError("as if the server had gone")]

    async def fails_once(server, replies):
        if failures:
            raise failures.pop()
        await confirmed(server, replies)

    monkeypatch.setattr(consume, "_confirmed", fails_once)
    monkeypatch.setattr(queue, "_POSTPONED", 0.5)
    broker.send_raw(b"{no json")
    task = waits.poll(**dead_letters(broker))
    await asyncio.to_thread(until, lambda: not failures, "it has failed")
    broker.send("good")
    assert (await soon(task))["value"] == "good"
    waits.poll(1, **dead_letters(broker))
    await asyncio.to_thread(until, lambda: broker.unacknowledged() == 1, "it is acknowledged")
    assert broker.dead_letters() == [b"{no json"]


async def test_a_dead_letter_as_large_as_the_server_takes_has_no_headers(broker, waits):
    large = b"{" * 2**20
    broker.send_raw(large)
    task = waits.poll(**dead_letters(broker))
    broker.send("good")
    assert (await soon(task))["value"] == "good"
    [dead] = [message for message in broker.stored("dead") if message.subject == broker.dead_letter]
    assert (dead.data, dead.headers) == (large, None)


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        ("nowhere", "no stream has the subject of its dead letters, 'nowhere'"),
        ("own", r"would deliver its own dead letters, as it has '.*\.dead'"),
    ],
)
async def test_dead_letters_that_would_be_lost_or_come_again(broker, waits, subject, message, monkeypatch):
    monkeypatch.setattr(queue, "_POSTPONED", 0.5)
    broker.send_raw(b"{no json")
    subject = f"{broker.queue}.dead" if subject == "own" else subject
    with pytest.raises(SourceMisconfigured, match=message):
        await soon(waits.poll(**dead_letters(broker, dead_letter=subject)))
    assert broker.unacknowledged() == 1
    broker.send("good")
    assert (await soon(waits.poll(1, **dead_letters(broker, dead_letter=subject))))["value"] == "good"
    with pytest.raises(EventUndecodable):
        await soon(waits.poll(2))


@pytest.mark.parametrize("how", ["mirror", "sources"])
async def test_a_dead_letter_that_leads_back_to_the_stream_is_not_sent_again(broker, waits, how):
    origin, broker.queue = broker.queue, f"{broker.queue}-{how}"
    of = StreamSource(name=origin)
    config = StreamConfig(name=broker.queue, **{how: of if how == "mirror" else [of]})
    broker.ask(lambda client: client.jetstream().add_stream(config))
    changes = dead_letters(broker, dead_letter=f"{origin}.dead")
    tasks = [waits.poll(number, **changes) for number in range(2)]
    await asyncio.sleep(0.3)
    broker.publish(f"{origin}.sent", b"{no json")
    done, _ = await asyncio.wait(tasks, timeout=15, return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(SourceMisconfigured, match="is a dead letter itself, of the message 1 of"):
        done.pop().result()
    assert broker.ask(lambda client: client.jetstream().stream_info(origin)).state.messages == 2


async def test_metadata_and_an_empty_body_fail_no_wait(broker, waits):
    broker.publish(f"{broker.queue}.sent", b"", headers={"__type": "a", "Odd": "x\0y"})
    event = await soon(waits.poll())
    assert (event["value"], event["headers"]) == (None, {"___type": "a", "Odd": "eAB5"})


async def test_a_login_that_took_too_long_is_tried_again(broker, waits, monkeypatch):
    """The server lets two seconds pass, and a loop or a network may be busy for longer."""
    connect, failures = Client.connect, []

    async def connect_late(self, *args, **kwargs):
        if not failures:
            failures.append(1)
            raise errors.Error("nats: 'Authentication Timeout'")
        await connect(self, *args, **kwargs)

    broker.send("a")
    monkeypatch.setattr(Client, "connect", connect_late)
    assert (await soon(waits.poll()))["value"] == "a" and failures


async def test_dead_letters_in_the_same_stream_of_which_the_consumer_has_other_subjects(broker, waits):
    broker.send_raw(b"{no json")
    changes = dead_letters(broker, dead_letter=f"{broker.queue}.dead", subject=f"{broker.queue}.sent")
    await nothing(waits.poll(**changes), 2)
    dead = broker.ask(lambda client: client.jetstream().get_last_msg(broker.queue, f"{broker.queue}.dead"))
    assert (dead.data, broker.unacknowledged()) == (b"{no json", 0)


async def test_a_watch_that_looks_from_before_what_the_stream_has_says_so(broker, waits, caplog):
    broker.send(1, 2)
    broker.ask(lambda client: client.jetstream().purge_stream(broker.queue, seq=2))
    assert (await soon(waits.watch(since=ago(minutes=1))))["value"] == 2
    assert "has dropped messages until" in caplog.text


async def test_a_stream_that_is_made_anew_while_it_is_watched(broker, waits, caplog):
    broker.send(*range(20))
    task = waits.watch(match={"id": "new"}, since=ago())
    await nothing(task, 1)

    async def make_anew(client):
        await client.jetstream().delete_stream(broker.queue)
        await client.jetstream().add_stream(name=broker.queue, subjects=[f"{broker.queue}.>"])
        for value in ({"id": "new"}, *range(50)):
            await client.jetstream().publish(f"{broker.queue}.sent", json.dumps(value).encode())

    broker.ask(make_anew)
    event = await soon(task, 30)
    assert (event["value"], event["sequence"]) == ({"id": "new"}, 1)
    assert "was recreated" in caplog.text


async def test_a_watch_of_large_messages(broker, waits):
    broker.send(*({"id": number, "pad": "x" * 500_000} for number in range(20)))
    events = [waits.watch(number, match={"id": number}, since=ago(minutes=1)) for number in range(20)]
    assert [(await soon(event, 30))["sequence"] for event in events] == list(range(1, 21))


async def test_a_stream_that_is_deleted_while_a_wait_waits_is_waited_for(broker, waits, caplog):
    task = waits.poll(deliver_policy="new")
    await nothing(task)
    broker.ask(lambda client: client.jetstream().delete_stream(broker.queue))
    await until_told(caplog, "there is no such stream")
    broker.make_stream()
    broker.send("of the new one")
    event = await soon(task, 120)
    assert event["value"] == "of the new one"
    await waits.commit(event)


async def test_a_consumer_that_is_deleted_goes_on_where_all_was_acknowledged(broker, waits):
    """And not at what comes next, nor with what had been there before it."""
    broker.send("before it was made")
    task = waits.poll(deliver_policy="new")
    await nothing(task)
    broker.send("a")
    await waits.commit(await soon(task))
    task = waits.poll(1, deliver_policy="new")
    await nothing(task)

    async def replaced(client):
        await client.jetstream().delete_consumer(broker.queue, "airflow")
        for value in ("b", "c"):
            await client.jetstream().publish(f"{broker.queue}.sent", json.dumps(value).encode())

    broker.ask(replaced)
    values = [(await soon(task, 120))["value"]]
    for number in (2, 3):
        values.append((await soon(waits.poll(number, deliver_policy="new"), 120))["value"])
    # As far as it was known: what was acknowledged just before comes again, and the inbox knows it.
    assert values == ["a", "b", "c"]


async def test_a_server_that_allows_less_to_be_in_hand(started, monkeypatch):
    server = started(monkeypatch, jetstream={"limits": {"max_ack_pending": 500}})

    async def make(client):
        await client.jetstream().add_stream(name="orders", subjects=["orders.>"])
        await client.jetstream().publish("orders.sent", b"1")

    of_nats.asked(server.port, make)
    assert (await soon(own("orders"), 20))["value"] == 1


async def test_a_watch_of_an_interest_stream(broker, waits):
    """Of which a consumer has as many replicas as the stream, or the server refuses it."""
    broker.queue += "-interest"
    broker.make_stream(retention="interest")
    task = waits.watch(match={"order": 1}, since=ago(minutes=1))
    await nothing(task)
    broker.send({"order": 1})
    assert (await soon(task))["value"] == {"order": 1}


# What is refused


async def test_a_stream_that_is_not_there(broker, waits):
    broker.queue = "elsewhere"
    for task in (waits.poll(), waits.watch(1, since=ago(minutes=1))):
        with pytest.raises(
            SourceMisconfigured, match=r"'elsewhere'.* of the connection 'source': there is no such stream"
        ):
            await soon(task)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ack_policy": "none"}, "ack_policy is 'none'; needed: 'explicit'"),
        ({"ack_policy": "all"}, "ack_policy is 'all'; needed: 'explicit'"),
        ({"max_deliver": 5}, "max_deliver is '5'; needed: -1"),
        ({"ack_wait": 0.5}, "ack_wait is '0:00:00.500000'; needed: 1 s or more"),
        ({"ack_wait": None, "backoff": [0.5, 9]}, "backoff is '0:00:00.500000'; needed: 1 s or more"),
        ({"max_ack_pending": 1}, "max_ack_pending is '1'; needed: more"),
        ({"headers_only": True}, "headers_only is 'True'; needed: false"),
        ({"deliver_subject": "there"}, "deliver_subject is 'there'; needed: none"),
        ({"inactive_threshold": 60}, "inactive_threshold is '60000000000'; needed: none"),
        ({"mem_storage": True}, "storage is 'memory'; needed: 'file'"),
    ],
)
async def test_a_consumer_that_would_lose_events(broker, waits, consumer, config, message):
    consumer(**config)
    with pytest.raises(
        SourceMisconfigured, match=f"consumer 'airflow'.* of the connection 'source': the consumer .*{message}"
    ):
        await soon(waits.poll())


async def test_a_consumer_that_is_edited_while_waits_are_open_is_checked_again(broker, waits, consumer):
    consumer(ack_wait=30)
    first, second = waits.poll(1), waits.poll(2)
    await asyncio.sleep(1)
    consumer(ack_wait=30, max_deliver=2)
    broker.send("a")
    event = await soon(first)
    with pytest.raises(SourceMisconfigured, match="max_deliver is '2'; needed: -1"):
        await soon(second)
    consumer(ack_wait=30)
    await waits.commit(event, 1)
    broker.send("b")
    assert (await soon(waits.poll(3)))["value"] == "b"


async def test_what_is_in_hand_is_kept_for_as_long_as_the_consumer_says_now(broker, waits, consumer):
    consumer(ack_wait=30)
    first, second = waits.poll(1), waits.poll(2)
    await asyncio.sleep(1)
    consumer(ack_wait=2)
    broker.send("a")
    event = await soon(first)
    await asyncio.sleep(5)
    assert (
        broker.ask(lambda client: client.jetstream().consumer_info(broker.queue, "airflow")).num_redelivered == 0
    )
    await waits.commit(event, 1)
    broker.send("b")
    assert (await soon(second))["value"] == "b"


async def test_a_paused_consumer_is_told(broker, waits, consumer, caplog, monkeypatch):
    monkeypatch.setattr(consume, "_LOOK_EVERY", 0.5)
    consumer(ack_wait=30)
    task = waits.poll()
    await asyncio.sleep(1)
    pause = lambda until: broker.ask(  # noqa: E731
        lambda client: client.jetstream().pause_consumer(broker.queue, "airflow", until)
    )
    pause("2999-01-01T00:00:00Z")
    await until_told(caplog, "delivers nothing: it is paused until 2999-01-01T00:00:00Z")
    broker.send("a")
    await nothing(task)
    broker.ask(lambda client: client.jetstream().resume_consumer(broker.queue, "airflow"))
    assert (await soon(task))["value"] == "a"


async def test_a_stream_in_memory_is_a_matter_of_choice(broker, waits):
    broker.ask(lambda client: client.jetstream().delete_stream(broker.queue))
    broker.make_stream(storage="memory")
    with pytest.raises(
        SourceMisconfigured, match="the stream would lose or hold up events: storage is 'memory'; needed: 'file'"
    ):
        await soon(waits.poll())
    broker.send("a")
    assert (await soon(waits.poll(require_persistence=False)))["value"] == "a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"durable": "a.b"}, "durable is a name .*, not 'a.b'"),
        ({"deliver_policy": "last"}, "not 'last'"),
        ({"lease": 0.5}, "lease is at least 1 s, not 0.5"),
        ({"on_undecodable": "dead_letter"}, "go together"),
        (
            {"on_undecodable": "dead_letter", "dead_letter": "dead.>"},
            r"a subject without wildcards, not 'dead\.>'",
        ),
    ],
)
async def test_arguments_that_are_none(broker, waits, changes, message):
    with pytest.raises(ValueError, match=message):
        await soon(waits.poll(**changes))


async def test_a_server_without_jetstream(started, monkeypatch):
    started(monkeypatch, jetstream=False)
    with pytest.raises(SourceUnreachable, match="JetStream: is it enabled"):
        await asyncio.wait_for(own(), 15)


# Who is let in


def make_stream(server, **options):
    of_nats.asked(
        server.port, lambda client: client.jetstream().add_stream(name="orders", subjects=["o"]), **options
    )
    of_nats.asked(server.port, lambda client: client.jetstream().publish("o", b"1"), **options)


@pytest.mark.parametrize("kind", ["nats", "generic"])
async def test_a_password(started, monkeypatch, kind):
    users = {"users": [{"user": "me", "password": "secret-word"}]}
    login = {"conn_type": kind, "login": "me", "password": "secret-word"}
    server = started(monkeypatch, login, authorization=users)
    make_stream(server, user="me", password="secret-word")
    assert (await elsewhere())["value"] == 1
    monkeypatch.setenv("AIRFLOW_CONN_OWN", json.dumps({**login, "port": server.port, "password": "other-word"}))
    with pytest.raises(
        SourceMisconfigured, match=r"'own' is refused: authentication failed: .*Authorization"
    ) as refused:
        await soon(asyncio.create_task(own()))
    assert "word" not in str(refused.value)


async def test_a_token(started, monkeypatch):
    server = started(monkeypatch, {"extra": {"token": "secret-word"}}, authorization={"token": "secret-word"})
    make_stream(server, token="secret-word")
    assert (await soon(asyncio.create_task(own())))["value"] == 1


async def test_an_nkey(started, monkeypatch):
    nkeys = pytest.importorskip("nkeys")
    seed = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER).decode()
    public = nkeys.from_seed(bytearray(seed.encode())).public_key.decode()
    server = started(monkeypatch, {"extra": {"nkey_seed": seed}}, authorization={"users": [{"nkey": public}]})
    make_stream(server, nkeys_seed_str=seed)
    assert (await soon(asyncio.create_task(own())))["value"] == 1


async def test_a_credentials_file_that_is_not_there(started, monkeypatch):
    started(monkeypatch, {"extra": {"credentials": "/nowhere/user.creds"}})
    with pytest.raises(SourceMisconfigured, match=r"'own': a file that it names .*/nowhere/user\.creds"):
        await soon(asyncio.create_task(own()))


async def test_a_user_who_lacks_a_permission(started, monkeypatch):
    monkeypatch.setattr(client, "_PATIENCE", 1.0)
    may = {"publish": {"deny": ["$JS.API.CONSUMER.>"]}}
    users = {"users": [{"user": "me", "password": "x", "permissions": may}, {"user": "admin", "password": "x"}]}
    server = started(monkeypatch, {"login": "me", "password": "x"}, authorization=users)
    make_stream(server, user="admin", password="x")
    with pytest.raises(SourceMisconfigured, match=r"'own' may not use it: .*consumer\.info"):
        await soon(asyncio.create_task(own()))


# As docs/sources/nats.md lists them.
TO_CONSUME = (
    "$JS.API.STREAM.INFO.orders",
    "$JS.API.CONSUMER.INFO.orders.airflow",
    "$JS.API.CONSUMER.MSG.NEXT.orders.airflow",
    "$JS.ACK.orders.airflow.>",
)
TO_MAKE = ("$JS.API.CONSUMER.DURABLE.CREATE.orders.airflow",)
TO_WATCH = ("$JS.API.STREAM.INFO.orders", "$JS.API.CONSUMER.CREATE.orders", "$JS.API.CONSUMER.MSG.NEXT.orders.>")


@pytest.fixture
def allowed(started, monkeypatch):
    """Start a server with the stream ``orders`` on which a user may publish to these subjects, for `own`."""

    def start(*subjects):
        may = {"publish": {"allow": list(subjects)}, "subscribe": {"allow": ["_INBOX.>"]}}
        users = [{"user": "me", "password": "x", "permissions": may}, {"user": "admin", "password": "x"}]
        server = started(monkeypatch, {"login": "me", "password": "x"}, authorization={"users": users})
        make_stream(server, user="admin", password="x")
        return lambda question: of_nats.asked(server.port, question, user="admin", password="x")

    return start


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_user_with_what_a_consumer_needs(allowed, is_there):
    ask = allowed(*TO_CONSUME, "dead.orders", *(() if is_there else TO_MAKE))
    if is_there:
        ask(lambda client: client.jetstream().add_consumer("orders", durable_name="airflow", ack_wait=1))
    there = await elsewhere(lease=1)
    with working_for(wait()):
        event = await soon(asyncio.create_task(own()))
        assert event == there
        await asyncio.sleep(2)  # in which it is kept
        await NatsListener().event_released(event)
        await NatsListener().event_checkpointed(event)
    ask(lambda client: client.jetstream().add_stream(name="dead", subjects=["dead.>"]))
    for body in (b"{no json", b"2"):
        ask(lambda client, body=body: client.jetstream().publish("o", body))
    assert (await elsewhere(on_undecodable="dead_letter", dead_letter="dead.orders"))["value"] == 2
    about = ask(lambda client: client.jetstream().consumer_info("orders", "airflow"))
    assert (about.num_pending + about.num_ack_pending, about.ack_floor.stream_seq) == (1, 2)


async def test_a_user_with_what_a_watch_needs(allowed):
    allowed(*TO_WATCH)
    seen = own(listener=NatsWatchListener, since=ago(minutes=1))
    assert (await soon(asyncio.create_task(seen)))["value"] == 1


async def test_the_first_of_several_hosts_is_down(started, monkeypatch):
    server = started(monkeypatch)
    make_stream(server)
    for host in (f"127.0.0.1:1, 127.0.0.1:{server.port}", f"nats://127.0.0.1:1,nats://127.0.0.1:{server.port}/"):
        monkeypatch.setenv("AIRFLOW_CONN_OWN", json.dumps({"conn_type": "nats", "host": host}))
        assert (await elsewhere())["value"] == 1


def certificates(folder):
    """Make an authority, and a certificate of its for 127.0.0.1 that server and client may use."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def made(name, signer, key, authority):
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(ago(days=1))
            .not_valid_after(ago(days=-1))
            .add_extension(x509.SubjectAlternativeName([address, x509.DNSName(name)]), False)
            .add_extension(x509.BasicConstraints(authority, None), True)
            .sign(signer, hashes.SHA256())
        )

    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(made("authority", keys[0], keys[0], True).public_bytes(pem))
    (folder / "cert.pem").write_bytes(made("nats.test", keys[0], keys[1], False).public_bytes(pem))
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(keys[1].private_bytes(pem, *form))
    return {name: str(folder / f"{name}.pem") for name in ("ca", "cert", "key")}


async def test_tls_with_a_certificate_of_the_clients_own(started, monkeypatch, tmp_path):
    files = certificates(tmp_path)
    tls = {"cert_file": files["cert"], "key_file": files["key"], "ca_file": files["ca"], "verify": True}
    extra = {f"tls_{name}": file for name, file in files.items()}
    server = started(monkeypatch, {"extra": {**extra, "tls_hostname": "nats.test"}}, tls=tls)
    context = connections.tls(files["ca"], files["cert"], files["key"])
    make_stream(server, tls=context)
    assert (await elsewhere())["value"] == 1

    connection = {"conn_type": "nats", "host": f"tls://127.0.0.1:{server.port}"}
    for less in ({"tls_ca": files["ca"]}, {}, {**extra, "tls_hostname": "other.test"}):
        monkeypatch.setenv("AIRFLOW_CONN_OWN", json.dumps({**connection, "extra": less}))
        with pytest.raises(SourceUnreachable):
            await asyncio.wait_for(own(), 20)


async def test_a_password_alone_is_a_token_also_by_tls(started, monkeypatch, tmp_path):
    files = certificates(tmp_path)
    tls = {"cert_file": files["cert"], "key_file": files["key"]}
    server = started(monkeypatch, {}, tls=tls, authorization={"token": "secret-word"})
    make_stream(server, tls=connections.tls(files["ca"], None, None), token="secret-word")
    there = {"host": "127.0.0.1", "port": server.port, "password": "secret-word", "extra": {"tls_ca": files["ca"]}}
    for kind, host in (("tls", "127.0.0.1"), ("nats", "tls://127.0.0.1")):
        monkeypatch.setenv("AIRFLOW_CONN_OWN", json.dumps({**there, "conn_type": kind, "host": host}))
        watching = own(listener=NatsWatchListener, since=ago(minutes=1))
        assert (await soon(asyncio.create_task(watching)))["value"] == 1
    monkeypatch.setenv("AIRFLOW_CONN_OWN", json.dumps({**there, "conn_type": "tls", "password": "wrong-word"}))
    with pytest.raises(SourceMisconfigured, match="'own' is refused: authentication failed") as refused:
        await soon(asyncio.create_task(own()))
    assert "wrong-word" not in str(refused.value)


async def test_tls_that_the_server_does_not_speak(started, monkeypatch):
    started(monkeypatch, {"extra": {"tls": True}})
    with pytest.raises(SourceMisconfigured, match="'own' wants TLS, and the server asks for none"):
        await soon(asyncio.create_task(own()))


async def test_a_watch_uses_the_same_connection_settings(started, monkeypatch):
    server = started(monkeypatch, {"extra": {"token": "secret-word"}}, authorization={"token": "secret-word"})
    make_stream(server, token="secret-word")
    seen = own(listener=NatsWatchListener, since=ago(minutes=1))
    event = await soon(asyncio.create_task(seen))
    assert event["value"] == 1
    assert "secret-word" not in json.dumps(event, default=str)


@pytest.fixture
def restored(broker):
    """The server comes back with the files that it had when this was made."""
    store, backup = broker.server.folder / "store", broker.server.folder / "backup"

    def keep():
        broker.server.kill()
        shutil.copytree(store, backup)
        broker.server.start()

    def restore():
        broker.server.kill()
        shutil.rmtree(store)
        shutil.move(backup, store)
        broker.server.start()

    return keep, restore


async def test_a_sequence_that_the_stream_gives_again_is_another_message(broker, waits, restored):
    keep, restore = restored
    keep()
    broker.send("lost by the restore")
    event = await soon(waits.poll())
    await waits.commit(event)
    await waits.end()
    await asyncio.sleep(3)
    restore()
    broker.send("another")
    other = await soon(waits.poll(1))
    assert other["value"] == "another"
    listener = NatsListener()
    assert listener.event_id(event) == listener.event_id(other)
    assert listener.event_content(event) != listener.event_content(other)


async def test_a_consumer_that_was_further_than_the_restored_stream_skips_nothing(broker, waits, restored):
    keep, restore = restored
    broker.send("before")
    await asyncio.sleep(1)
    keep()
    broker.send("b", "c", "d")
    for number in range(4):
        await waits.commit(await soon(waits.poll(number)), number)
    waiting = waits.poll(9)
    await asyncio.sleep(1)
    restore()
    await asyncio.sleep(3)  # the hub has made its consumer again
    broker.send("new 1", "new 2")
    found, number = set(), 9
    while not {"new 1", "new 2"} <= found:  # "before" may come once more, and is known by its id
        event = await soon(waiting, 30)
        found.add(event["value"])
        await waits.commit(event, number)
        number += 1
        waiting = waits.poll(number)


async def test_a_watch_of_a_quiet_subject_is_served_though_the_stream_goes_on(broker, waits):
    broker.publish(f"{broker.queue}.a", b'{"id": "it"}')
    broker.publish(f"{broker.queue}.b", b'{"id": "x"}')
    await asyncio.sleep(1)
    of_a = {"since": ago(minutes=5), "subject": f"{broker.queue}.a"}
    await nothing(waits.watch(1, match={"id": "never"}, **of_a), 2)
    assert (await soon(waits.watch(2, match={"id": "it"}, **of_a)))["value"] == {"id": "it"}
