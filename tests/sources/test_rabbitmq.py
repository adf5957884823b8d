"""What is peculiar to RabbitMQ: refusals, what becomes of a message's properties, and every gap in a move."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import suppress
from datetime import datetime, timedelta, timezone

import aiormq
import pytest
import servers
from airflow_events.errors import EventLost, SourceUnfit, SourceUnreachable
from airflow_events.listeners import rabbitmq
from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.rabbitmq import claims, consume
from of_rabbitmq import Quorum, RabbitMQ
from pamqp.commands import Basic

from deployment import until


@pytest.fixture(scope="module", params=(RabbitMQ, Quorum), ids=lambda broker: broker.name)
def server(request):
    broker = request.param.make()
    if broker is None:
        pytest.skip(f"{request.param.name}: {request.param.missing}")
    yield broker
    broker.stop()


async def soon(task, seconds=20):
    return await asyncio.wait_for(asyncio.shield(task), seconds)


async def nothing(task, seconds=1.0):
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(task), seconds)


async def ended(*tasks):
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def give_out_again(broker):
    """Get the queue's first message and give it back, as a client does that dies."""

    async def get():
        channel = await broker.channel()
        await channel.basic_get(broker.queue)
        await channel.close()

    broker.do(get())


class Died(ConnectionError):
    pass


def dying(monkeypatch, owner, name, at, before=True):
    """Let the connection end before, or after, the call of that number; return who says whether it did."""
    calls, real = [], getattr(owner, name)

    async def method(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == at and before:
            raise Died(name)
        result = await real(self, *args, **kwargs)
        if len(calls) == at:
            raise Died(name)
        return result

    monkeypatch.setattr(owner, name, method)
    return lambda: len(calls) >= at


# In `_connect` the hub tries what a claim needs, which takes two commits.
GAPS = [
    pytest.param(3, True, id="before the copy"),
    pytest.param(3, False, id="after the copy"),
    pytest.param(4, True, id="before the move"),
    pytest.param(4, False, id="after the move"),
]


@pytest.mark.parametrize(("at", "before"), GAPS)
async def test_a_move_that_ends_anywhere_leaves_one_message(broker, waits, monkeypatch, at, before):
    """Without an id by which a double could be told: there is none."""
    broker.publish(b"1")
    with monkeypatch.context() as patch:
        died = dying(patch, aiormq.channel.Channel, "tx_commit", at, before)
        task = waits.poll(claim_timeout=3)
        while not died():
            await asyncio.sleep(0.005)
        await ended(task)
    tasks = [waits.poll(number, claim_timeout=3) for number in (1, 2)]
    done, _ = await asyncio.wait(tasks, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    [first] = done
    assert first.result()["value"] == 1
    await waits.commit(first.result(), 1 + tasks.index(first))
    await nothing(tasks[1 - tasks.index(first)], 5)
    assert broker.unacknowledged() == 0


@pytest.mark.parametrize(("at", "before"), GAPS)
async def test_a_wait_whose_move_ended_anywhere_polls_its_message(broker, waits, monkeypatch, at, before):
    broker.publish(b"1")
    with monkeypatch.context() as patch:
        died = dying(patch, aiormq.channel.Channel, "tx_commit", at, before)
        task = waits.poll()
        while not died():
            await asyncio.sleep(0.005)
        await ended(task)
    event = await soon(waits.poll())
    assert event["value"] == 1
    await waits.commit(event)
    assert broker.unacknowledged() == 0


async def test_a_commit_that_ends_after_its_note_has_committed(broker, waits, monkeypatch):
    broker.publish(b"1")
    event = await soon(waits.poll(claim_timeout=2))
    with monkeypatch.context() as patch:
        dying(patch, claims.Held, "drop", 2)  # the first drops what is left of other claims: nothing
        with pytest.raises(Died):
            await waits.commit(event)
    assert broker.unacknowledged() == 1
    # Not put back when the claim lapses, and not by a release.
    await nothing(waits.poll(1), 6)
    await waits.release(event)
    await waits.commit(event)
    with pytest.raises(EventLost, match="was committed by dag/run0/task/-1"):
        await waits.commit(event, 1)
    assert broker.unacknowledged() == 0


async def test_a_release_that_ends_after_the_message_is_back_makes_a_double_that_one_wait_commits(
    broker, waits, monkeypatch
):
    broker.publish(b"1")
    event = await soon(waits.poll())
    with monkeypatch.context() as patch:
        died = dying(patch, claims, "_return", 1, before=False)
        with suppress(Died):
            await waits.release(event)
        assert died()
    assert broker.unacknowledged() == 2
    other = await soon(waits.poll(1))
    assert (other["id"], other["value"]) == (event["id"], 1)
    await waits.commit(other, 1)
    with pytest.raises(EventLost, match="was committed by dag/run1/task/-1"):
        await waits.commit(event)
    assert broker.unacknowledged() == 0


async def test_the_first_may_commit_before_the_double(broker, waits, monkeypatch):
    broker.publish(b"1")
    event = await soon(waits.poll())
    with monkeypatch.context() as patch:
        dying(patch, claims, "_return", 1, before=False)
        with suppress(Died):
            await waits.release(event)
    other = await soon(waits.poll(1))
    await waits.commit(event)
    with pytest.raises(EventLost, match="was committed by dag/run0/task/-1"):
        await waits.commit(other, 1)
    assert broker.unacknowledged() == 0


async def test_a_message_that_is_given_out_again_is_the_one_with_its_id(broker, waits):
    """As after a SIGKILL of the broker, which forgets the last acknowledgements."""
    broker.publish(b"1", message_id="one")
    event = await soon(waits.poll())
    broker.publish(b"1", message_id="one")
    give_out_again(broker)
    other = await soon(waits.poll(1))
    await waits.commit(event)
    with pytest.raises(EventLost, match="was committed by dag/run0/task/-1"):
        await waits.commit(other, 1)
    assert broker.unacknowledged() == 0


async def test_what_is_sent_twice_is_two_messages(broker, waits):
    broker.publish(b"1", message_id="one")
    broker.publish(b"1", message_id="one")
    events = [await soon(waits.poll(number)) for number in range(2)]
    for number, event in enumerate(events):
        await waits.commit(event, number)
    assert broker.unacknowledged() == 0


async def test_a_message_that_is_sent_again_after_its_double_is_another(broker, waits, monkeypatch):
    monkeypatch.setattr(claims, "_SKEW", 0.0)
    broker.publish(b"1", message_id="one")
    give_out_again(broker)
    await waits.commit(await soon(waits.poll()))
    broker.publish(b"1", message_id="one")
    await waits.commit(await soon(waits.poll(1)), 1)
    assert broker.unacknowledged() == 0


async def test_ids_that_are_not_unique_by_choice(broker, waits):
    for number in range(2):
        broker.publish(b"1", message_id="one")
        give_out_again(broker)
        await waits.commit(await soon(waits.poll(number, unique_message_ids=False)), number)
    assert broker.unacknowledged() == 0


async def test_a_server_that_is_killed_at_once_loses_nothing(broker, waits):
    broker.publish(b"1", message_id="one")
    event = await soon(waits.poll())
    broker.server.kill(pause=0)
    broker.server.start()
    again = await soon(waits.poll(), 90)
    assert {**again, "claim": ""} == {**event, "claim": ""}
    if again != event:  # killed before it had written down what it had acknowledged, it gives the message out anew
        with pytest.raises(EventLost, match="is not claimed by"):
            await waits.commit(event)
    await waits.commit(again)
    other = waits.poll(1)
    with suppress(asyncio.TimeoutError):
        double = await soon(other, 3)
        with pytest.raises(EventLost):
            await waits.commit(double, 1)
    await ended(other)
    assert broker.unacknowledged() == 0


@pytest.mark.parametrize("pause", [0.3, 0.45])
async def test_a_server_that_is_killed_with_queues_just_made_loses_nothing(broker, waits, pause):
    """The source has written down by then that it is rid of the message."""
    task = waits.poll()
    broker.send("a", "b")
    event = await soon(task)
    broker.server.kill(pause=pause)
    broker.server.start()
    assert (await soon(waits.poll(), 90))["value"] == "a"
    await waits.commit(event)
    broker.server.kill(pause=pause)
    broker.server.start()
    await waits.commit(event)
    assert broker.unacknowledged() == 1


async def test_a_copy_that_may_be_all_that_there_is_is_kept(broker, waits, monkeypatch):
    """A broker that is killed in the middle of a transaction may have acknowledged and not noted it."""
    broker.publish(b"1")
    with monkeypatch.context() as patch:
        died = dying(patch, aiormq.channel.Channel, "tx_commit", 4)
        task = waits.poll()
        while not died():
            await asyncio.sleep(0.005)
        await ended(task)

    async def take():
        channel = await broker.channel()
        message = await channel.basic_get(broker.queue, no_ack=True)
        await channel.close()
        return message.body

    assert broker.do(take()) == b"1"
    broker.server.kill()
    broker.server.start()
    event = await soon(waits.poll(), 90)
    assert event["value"] == 1
    await waits.commit(event)
    assert broker.unacknowledged() == 0


async def test_polls_of_one_wait_in_several_processes_have_one_claim(broker, waits):
    """Event loops of their own have hubs and connections of their own, as processes have."""
    found, began = [], threading.Barrier(4)
    args, kwargs = broker.arguments()

    async def poll():
        with working_for(Wait("dag", "run0", "task")):
            found.append(await asyncio.wait_for(broker.listener().poll_for_event(*args, **kwargs), 30))

    def triggerer():
        began.wait()
        asyncio.run(poll())

    for _ in range(3):
        threads = [threading.Thread(target=triggerer) for _ in range(3)]
        broker.send(*range(4))
        for thread in threads:
            thread.start()
        began.wait()
        await asyncio.to_thread(lambda threads=threads: [thread.join(40) for thread in threads])
        assert len(found) == 3
        assert found[1:] == found[:-1]
        assert broker.unacknowledged() == 4
        await waits.commit(found[0])
        for number in range(1, 4):
            await waits.commit(await soon(waits.poll(number)), number)
        assert broker.unacknowledged() == 0
        found.clear()


async def test_no_queues_pile_up(broker, waits, monkeypatch):
    monkeypatch.setattr(consume, "_LOOK", 0.1)
    monkeypatch.setattr(consume, "_FINISHED", 0.1)
    broker.send(*range(5))
    for number in range(5):
        event = await soon(waits.poll(number))
        await (waits.commit(event, number) if number else waits.release(event, number))
    await waits.commit(await soon(waits.poll(5)), 5)
    assert broker.claims() == []
    idle = waits.poll(6)
    listed = next(name for name in broker.queues() if name.startswith(f"airflow-events.claims.{broker.queue}."))
    deadline = asyncio.get_running_loop().time() + 10
    while broker.queues()[listed]:
        assert asyncio.get_running_loop().time() < deadline, "finished claims are forgotten"
        await asyncio.sleep(0.2)
    assert not idle.done()


async def test_commits_are_forgotten_in_time(broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__COMMIT_MEMORY", "1")
    broker.send(1)
    event = await soon(waits.poll())
    await waits.commit(event)
    await waits.commit(event)
    notes = [name for name in broker.queues() if name.startswith(f"airflow-events.commits.{broker.queue}.")]
    assert len(notes) == 1
    until(lambda: notes[0] not in broker.queues(), "the queue of the notes has expired", 15)


async def test_properties_are_kept_over_claims_and_releases(broker, waits):
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    headers = {
        "text": "ä", "number": 2**40, "bytes": bytearray(b"\xff\x00"), "time": moment, "none": None,
        "nested": {"list": [1, 2.5, True]},
    }  # fmt: skip
    broker.publish(
        b"1", headers=headers, content_type="application/json", correlation_id="c", reply_to="r", priority=3,
        message_type="t", app_id="a", timestamp=moment, message_id="m", expiration="600000", user_id="guest",
        delivery_mode=1,
    )  # fmt: skip
    event = await soon(waits.poll())
    assert event["headers"] == {**headers, "bytes": "/wA="}
    assert (event["timestamp"], event["message_id"], event["content_type"]) == (moment, "m", "application/json")
    assert (event["exchange"], event["routing_key"]) == ("", broker.queue)
    assert event["properties"] == {
        "correlation_id": "c", "reply_to": "r", "priority": 3, "message_type": "t", "app_id": "a",
        "expiration": "600000", "user_id": "guest",
    }  # fmt: skip
    await waits.release(event)

    async def get():
        channel = await broker.channel()
        message = await channel.basic_get(broker.queue)
        await channel.close()
        return message.header.properties

    back = broker.do(get())
    assert {name: value for name, value in back.headers.items() if name in headers} == headers
    assert (back.delivery_mode, back.expiration, back.message_id, back.timestamp) == (2, "600000", "m", moment)
    again = await soon(waits.poll(1))
    kept = {name: value for name, value in event.items() if name not in ("claim", "properties")}
    assert {name: value for name, value in again.items() if name in kept} == kept
    await waits.commit(again, 1)


async def test_what_the_broker_would_act_on_is_left_to_the_event(broker, waits):
    """A copy to the queues in CC would be another message; one that died in this queue could be dropped."""
    broker.declare(f"{broker.queue}.cc")
    deaths = [{"queue": broker.queue, "reason": "expired", "count": 1, "exchange": "", "routing-keys": ["x"]}]
    broker.publish(b"1", broker.queue, headers={"CC": [f"{broker.queue}.cc"], "x-death": deaths})
    event = await soon(waits.poll())
    assert event["headers"]["CC"] == [f"{broker.queue}.cc"]
    assert event["headers"]["x-death"] == deaths
    await waits.release(event)
    again = await soon(waits.poll(1))
    assert again["headers"] == event["headers"]
    await waits.commit(again, 1)
    assert broker.queues()[f"{broker.queue}.cc"] == 1


async def test_a_message_without_a_body_or_properties(broker, waits):
    broker.publish(b"", headers=None, delivery_mode=None)
    event = await soon(waits.poll(values="text"))
    assert (event["value"], event["timestamp"], event["message_id"], event["headers"]) == ("", None, None, {})


async def test_a_lapsed_claim_whose_queue_is_gone_is_kept(broker, waits, monkeypatch):
    queue = f"{broker.queue}.deleted"
    arguments = {"x-queue-type": "classic"}
    broker.declare(queue, arguments)
    broker.publish(b"1", queue)
    with working_for(Wait("dag", "run0", "task")):
        listener = broker.listener()
        event = await listener.poll_for_event(queue, rabbitmq_conn_id="source")

        async def delete():
            channel = await broker.channel()
            await channel.queue_delete(queue)
            await channel.close()

        broker.do(delete())
        with pytest.raises(SourceUnfit, match="does not take a message back"):
            await listener.event_released(event, queue, rabbitmq_conn_id="source")
        assert any(name.startswith(f"airflow-events.claim.{queue}.") for name in broker.queues())
        await listener.event_checkpointed(event)


async def test_a_queue_that_is_not_there_is_refused_and_not_made(broker, waits):
    broker.queue = "nowhere"
    with pytest.raises(SourceUnfit, match="'nowhere' of the connection 'source' is not there"):
        await soon(waits.poll())
    with pytest.raises(SourceUnfit, match="is not there"):
        await soon(waits._start(broker.listener, 1, ["nowhere"], {"rabbitmq_conn_id": "source"}))
    assert "nowhere" not in broker.queues()


@pytest.mark.parametrize(
    ("options", "text"), [({"durable": False}, "is not durable"), ({"auto_delete": True}, "deletes itself")]
)
async def test_a_queue_that_loses_messages_is_refused_unless_by_choice(broker, waits, options, text):
    broker.queue = f"{broker.queue}.{next(iter(options))}"
    broker.declare(broker.queue, **options)
    with pytest.raises(SourceUnfit, match=f"{text}.*require_durable=False"):
        await soon(waits.poll())
    broker.publish(b"1", broker.queue)
    event = await soon(waits.poll(require_durable=False))
    await waits.commit(event)


async def test_a_queue_that_is_exclusive_to_another_is_refused(broker, waits):
    broker.queue = f"{broker.queue}.exclusive"
    broker.declare(broker.queue, durable=False, exclusive=True)
    with pytest.raises(SourceUnfit, match="is exclusive to another connection"):
        await soon(waits.poll(require_durable=False))


async def test_a_stream_is_watched_and_not_consumed_and_a_queue_the_other_way_round(broker, waits):
    stream = f"{broker.queue}.log"
    broker.declare(stream, {"x-queue-type": "stream"})
    with pytest.raises(SourceUnfit, match="is a stream; RabbitMQWatchListener"):
        await soon(waits._start(rabbitmq.RabbitMQListener, 1, [stream], {"rabbitmq_conn_id": "source"}))
    broker.send(1)
    arguments = {"since": datetime.now(timezone.utc), "rabbitmq_conn_id": "source"}
    with pytest.raises(SourceUnfit, match=r"is no stream; RabbitMQListener"):
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


@pytest.mark.parametrize(
    "rights",
    [(".*", ".*", "^airflow-events.*"), ("^$", ".*", ".*"), (".*", "^airflow-events.*", ".*")],
    ids=["read", "configure", "write"],
)
async def test_a_user_who_may_not_is_refused_at_the_start(broker, waits, user, rights):
    user(*rights)
    broker.send(1)
    with pytest.raises(SourceUnfit, match="'other': the connection's user may not") as refused:
        await soon(waits.poll(rabbitmq_conn_id="other"))
    assert "secret-word" not in str(refused.value)
    assert broker.unacknowledged() == 1


async def test_a_user_who_may_do_just_what_is_needed(broker, waits, user):
    # The default exchange, which is all that is written to, goes by the name amq.default.
    user("^airflow-events[.]", "^amq[.]default$", f"^(airflow-events[.].*|{broker.queue})$")
    broker.send(1)
    event = await soon(waits.poll(rabbitmq_conn_id="other"))
    await waits.commit(event)
    assert broker.unacknowledged() == 0


async def test_messages_of_other_users_can_be_moved(broker, waits, user):
    """The broker takes a user_id from nobody but that user, so it is left to the event."""
    user(".*", ".*", ".*")
    broker.publish(b"1", user_id="guest")
    event = await soon(waits.poll(rabbitmq_conn_id="other"))
    assert event["properties"]["user_id"] == "guest"
    await waits.release(event, rabbitmq_conn_id="other")
    again = await soon(waits.poll(1, rabbitmq_conn_id="other"))
    assert again["properties"]["user_id"] == "guest"
    await waits.commit(again, 1)


async def test_a_login_that_is_refused(broker, waits, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_OTHER", json.dumps(broker.connection(password="wrong-word")))
    with pytest.raises(SourceUnfit, match="refused the login") as refused:
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
        await channel.basic_publish(b"1", routing_key=broker.queue, properties=Basic.Properties(delivery_mode=2))
        await client.close()

    await make()
    event = await soon(waits.poll(rabbitmq_conn_id="other"))
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
        broker.publish(b"1", "orders")
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
        monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "0.5")
        with working_for(Wait("dag", "run0", "task")):
            for refused in ("stranger", "doubtful"):
                with pytest.raises(ConnectionError, match=f"'{refused}' could not be reached"):
                    await rabbitmq.RabbitMQListener().poll_for_event("orders", rabbitmq_conn_id=refused)
            event = await rabbitmq.RabbitMQListener().poll_for_event("orders", rabbitmq_conn_id="tls")
            assert event["value"] == 1
            await rabbitmq.RabbitMQListener().event_checkpointed(event)
    finally:
        broker.stop()
