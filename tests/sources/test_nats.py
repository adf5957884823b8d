"""What is peculiar to NATS JetStream: what is refused, who is let in, what a death between two steps leaves."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import json
from concurrent.futures import ThreadPoolExecutor

import of_nats
import pytest
from airflow_events.errors import EventLost, SourceUnfit, SourceUnreachable
from airflow_events.listeners import connections
from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.nats import BUCKET, NatsListener, NatsWatchListener, claims, client
from test_consume import nothing, soon
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


async def own(stream="orders", listener=NatsListener, conn_id="own", **arguments):
    """Poll a server of the test's own, or in an event loop of one's own."""
    with working_for(wait()):
        poll = listener().poll_for_event(stream, nats_conn_id=conn_id, **arguments)
        return await asyncio.wait_for(poll, 60)


# What a death leaves


class Death:
    """Hangs, as a process that is gone, at the n-th step towards the server that a poll or a commit makes."""

    def __init__(self, monkeypatch, then=None):
        self.left = 0
        self.met = asyncio.Event()
        self._then = then
        for name in ("request", "publish", "pull"):
            monkeypatch.setattr(client.Server, name, self._dying(getattr(client.Server, name)))

    def _dying(self, step):
        async def dying(server, subject, *args, **kwargs):
            if subject.startswith(("$JS.API.STREAM.INFO", "$JS.API.CONSUMER.INFO")):
                return await step(server, subject, *args, **kwargs)
            self.left -= 1
            if self.left == 0:
                self.met.set()
                if self._then is None:
                    await asyncio.Event().wait()
                self._then()
            return await step(server, subject, *args, **kwargs)

        return dying

    async def meets(self, step, task):
        """Let ``task`` die at a step; return whether it came so far."""
        self.left = step
        self.met.clear()
        met = asyncio.create_task(self.met.wait())
        await asyncio.wait([task, met], timeout=30, return_when=asyncio.FIRST_COMPLETED)
        met.cancel()
        return self.met.is_set()


async def end(task):
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("back", [True, False], ids=["the wait comes back", "the wait never comes back"])
async def test_a_triggerer_dies_at_each_step_of_a_poll(broker, waits, consumer, monkeypatch, back):
    death = Death(monkeypatch)
    for step in range(1, 100):
        broker.fresh()
        consumer()
        broker.send("a", "b")
        dying = waits.poll(0, claim_timeout=2)
        if not await death.meets(step, dying):
            break
        await end(dying)
        death.left = 0
        numbers = (0, 1) if back else (1, 2)
        tasks = [waits.poll(number, claim_timeout=2) for number in numbers]
        events = [await soon(task) for task in tasks]
        assert {event["value"] for event in events} == {"a", "b"}, step
        for number, event in zip(numbers, events, strict=True):
            await waits.commit(event, number)
        assert broker.unacknowledged() == 0, step
    assert 10 < step < 100, "the steps between the pull and the event have been met"


async def test_a_claim_that_was_half_made_is_found_by_the_same_wait_at_once(broker, waits, consumer, monkeypatch):
    consumer(ack_wait=600)
    steps = []
    put = claims.Claims._put

    async def dying(claims, key, *rest):
        steps.append(key)
        if len(steps) == 2:  # the wait has chosen, and its message is not marked
            await asyncio.Event().wait()
        return await put(claims, key, *rest)

    monkeypatch.setattr(claims.Claims, "_put", dying)
    broker.send("a")
    dead = waits.poll()
    await nothing(dead, 1)
    assert [key.split(".")[-2] for key in steps] == ["wait", "message"]
    await end(dead)
    assert (await soon(waits.poll()))["value"] == "a"
    await nothing(waits.poll(1))


async def test_a_worker_dies_at_each_step_of_a_commit(broker, waits, consumer, monkeypatch):
    death = Death(monkeypatch)
    for step in range(1, 20):
        broker.fresh()
        consumer()
        broker.send("a")
        event = await soon(waits.poll(claim_timeout=1))
        commit = asyncio.create_task(waits.commit(event))
        if not await death.meets(step, commit):
            break
        await end(commit)
        death.left = 0
        await waits.commit(event)
        with pytest.raises(EventLost):
            await waits.commit(event, 1)
        assert broker.unacknowledged() == 0, step
    assert 3 < step < 20


async def test_a_commit_that_was_not_acknowledged_is_when_jetstream_gives_the_message_out_again(
    broker, waits, consumer, monkeypatch
):
    consumer()
    broker.send("a")
    event = await soon(waits.poll(claim_timeout=1))
    death = Death(monkeypatch)
    commit = asyncio.create_task(waits.commit(event))
    assert await death.meets(3, commit)  # look at the mark, write it, acknowledge
    await end(commit)
    assert broker.unacknowledged() == 1
    other = waits.poll(1)
    await nothing(other, 3)
    assert broker.unacknowledged() == 0
    with pytest.raises(EventLost):
        await waits.commit(event, 1)


async def test_the_server_is_killed_at_each_step_of_a_poll(broker, waits, consumer, monkeypatch):
    monkeypatch.setattr(client, "_PATIENCE", 1.0)

    def killed():
        broker.server.kill()
        broker.server.start()

    death = Death(monkeypatch, killed)
    for step in range(1, 100):
        broker.fresh()
        consumer()
        broker.send("a", "b")
        task = waits.poll(0)
        if not await death.meets(step, task):
            break
        events = [await soon(task, 30), await soon(waits.poll(1), 30)]
        assert {event["value"] for event in events} == {"a", "b"}, step
        assert await soon(waits.poll(0), 30) == events[0]
        for number, event in enumerate(events):
            await waits.commit(event, number)
        assert broker.unacknowledged() == 0, step
    assert 10 < step < 100


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


async def test_a_message_that_is_claimed_for_a_wait_that_ends_at_that_moment_goes_to_others(
    broker, waits, monkeypatch
):
    ended, stays = waits.poll(0), waits.poll(1)
    await nothing(stays, 1)
    choose = claims.Claims.choose

    async def meanwhile(claims, chooser, *args):
        found = await choose(claims, chooser, *args)
        if chooser == wait(0).id:
            await end(ended)
        return found

    monkeypatch.setattr(claims.Claims, "choose", meanwhile)
    broker.send("a")
    assert (await soon(stays))["value"] == "a"


async def test_triggerers_that_poll_for_the_same_waits_at_once_have_one_claim_for_each(broker, waits):
    first = waits.poll(99)
    await nothing(first, 0.5)
    await end(first)

    def triggerer():
        async def poll(number):
            args, kwargs = broker.arguments()
            with working_for(wait(number)):
                return await NatsListener().poll_for_event(*args, **kwargs)

        async def all_of_them():
            return await asyncio.wait_for(asyncio.gather(*map(poll, range(15))), 90)

        return asyncio.run(all_of_them())

    with ThreadPoolExecutor(4) as pool:
        polls = [asyncio.get_running_loop().run_in_executor(pool, triggerer) for _ in range(4)]
        await asyncio.sleep(1)
        await asyncio.to_thread(broker.send, *range(25))
        found = await asyncio.gather(*polls)
    assert all(events == found[0] for events in found)
    assert len({event["value"] for event in found[0]}) == 15
    for number, event in enumerate(found[0]):
        await waits.commit(event, number)
    assert broker.unacknowledged() == 10
    others = [await soon(waits.poll(number)) for number in range(15, 25)]
    assert {event["value"] for event in [*found[0], *others]} == set(range(25))


async def test_one_message_for_one_wait_reaches_all_who_poll_for_it(broker, waits):
    others = [waits.poll(number) for number in range(1, 60)]  # which look for claims of theirs in turns
    here = waits.poll(0)
    await nothing(here, 0.7)
    polls = [asyncio.to_thread(asyncio.run, own(broker.queue, conn_id="source")) for _ in range(3)]
    there = [asyncio.create_task(poll) for poll in polls]
    await asyncio.sleep(0.7)
    for task in others:
        await end(task)
    await asyncio.to_thread(broker.send, "a")
    events = [await soon(task, 30) for task in (here, *there)]
    assert all(event == events[0] for event in events)
    await waits.commit(events[0])
    assert broker.unacknowledged() == 0


# What is in the stream


async def test_headers_and_coordinates_are_in_the_event(broker, waits):
    async def send(client):
        headers = {"Nats-Msg-Id": "7", "Trace": "a:b c"}
        await client.jetstream().publish(f"{broker.queue}.eu.new", b"{}", headers=headers)

    broker.ask(send)
    event = await soon(waits.poll())
    assert event["subject"] == f"{broker.queue}.eu.new"
    assert event["headers"] == {"Nats-Msg-Id": "7", "Trace": "a:b c"}
    assert (event["stream"], event["durable"], event["sequence"]) == (broker.queue, "airflow", 1)
    assert abs(event["timestamp"] - ago()) < dt.timedelta(seconds=30)
    seen = await soon(waits.watch(since=ago(minutes=1)))
    assert seen == {key: event[key] for key in seen}


async def test_a_header_that_is_not_ascii(broker, waits):
    async def send(client):
        await client.jetstream().publish(f"{broker.queue}.new", b"{}", headers={"Name": "Zoë"})

    broker.ask(send)
    assert (await soon(waits.poll()))["headers"] == {"Name": "Zoë"}


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
    with pytest.raises(SourceUnfit, match=r"filter_subject is .*eu.*; needed: .*us"):
        await soon(waits.poll(2, subject=f"{broker.queue}.us.*", durable="eu"))


async def test_a_consumer_that_begins_at_the_next_message(broker, waits):
    broker.send("before")
    task = waits.poll(deliver_policy="new")
    await nothing(task, 0.7)
    broker.send("after")
    assert (await soon(task))["value"] == "after"


async def test_a_stream_that_was_made_anew_counts_from_one_and_loses_nothing_by_it(broker, waits):
    broker.send("old")
    event = await soon(waits.poll())
    await waits.commit(event)
    broker.ask(lambda client: client.jetstream().delete_stream(broker.queue))
    broker.make_stream()
    broker.send("new")
    again = await soon(waits.poll(1))
    assert (again["value"], again["sequence"]) == ("new", event["sequence"])
    await waits.commit(event)
    await waits.commit(again, 1)


async def test_a_message_that_the_stream_drops_while_it_is_claimed(broker, waits):
    broker.send("dropped")
    event = await soon(waits.poll())
    broker.ask(lambda client: client.jetstream().purge_stream(broker.queue))
    task = waits.poll()
    await nothing(task, 1)
    broker.send("next")
    assert (await soon(task))["value"] == "next"
    await waits.commit(event)  # which may be recorded already: it is not lost by that
    with pytest.raises(EventLost):
        await waits.commit(event, 1)


async def test_a_work_queue(broker, waits):
    broker.ask(lambda client: client.jetstream().delete_stream(broker.queue))
    broker.make_stream(retention="workqueue")
    broker.send("a", "b")
    event = await soon(waits.poll())
    assert await soon(waits.poll()) == event
    await waits.commit(event)
    about = broker.ask(lambda client: client.jetstream().stream_info(broker.queue))
    assert about.state.messages == 1
    with pytest.raises(EventLost):
        await waits.commit(event, 1)
    with pytest.raises(SourceUnfit, match="workqueue"):
        await soon(waits.watch(since=ago(minutes=1)))


async def test_a_bucket_that_is_deleted_loses_no_message(broker, waits, consumer):
    consumer()
    broker.send("a", "b")
    event = await soon(waits.poll(bucket="mine", claim_timeout=1))
    broker.ask(lambda client: client.jetstream().delete_key_value("mine"))
    with pytest.raises(EventLost, match="nobody"):
        await waits.commit(event)
    tasks = [waits.poll(number, bucket="mine") for number in range(2)]
    assert {(await soon(task))["value"] for task in tasks} == {"a", "b"}


async def test_an_administrator_lets_a_claim_lapse_and_deletes_keys(broker, waits, consumer):
    async def clear(client):
        bucket = await client.jetstream().key_value(BUCKET)
        for key in await bucket.keys():
            if f"{broker.queue}.airflow.wait" in key:
                await bucket.delete(key)
            elif f"{broker.queue}.airflow.message" in key:
                await bucket.put(key, b"{}")

    consumer()
    broker.send("a")
    event = await soon(waits.poll(claim_timeout=3))
    broker.ask(clear)
    with pytest.raises(EventLost, match="nobody"):
        await waits.commit(event)
    again = await soon(waits.poll())
    assert again == event
    await waits.commit(again)
    assert broker.unacknowledged() == 0


async def test_more_claims_than_the_consumer_may_have_pending(broker, waits, consumer):
    consumer(max_ack_pending=2)
    broker.send(*range(3))
    tasks = [waits.poll(number) for number in range(3)]
    await asyncio.sleep(2)
    [held_up] = [number for number, task in enumerate(tasks) if not task.done()]
    committed = (held_up + 1) % 3
    await waits.commit(tasks[committed].result(), committed)
    assert (await soon(tasks[held_up]))["value"] == 2


async def test_a_watch_that_looks_from_before_what_the_stream_has_says_so(broker, waits, caplog):
    broker.send(1, 2)
    broker.ask(lambda client: client.jetstream().purge_stream(broker.queue, seq=2))
    assert (await soon(waits.watch(since=ago(minutes=1))))["value"] == 2
    assert "has dropped messages until" in caplog.text


# What is refused


async def test_a_stream_that_is_not_there(broker, waits):
    broker.queue = "elsewhere"
    for task in (waits.poll(), waits.watch(1, since=ago(minutes=1))):
        with pytest.raises(
            SourceUnfit, match=r"'elsewhere'.* of the connection 'source': there is no such stream"
        ):
            await soon(task)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ack_policy": "none"}, "ack_policy is 'none'; needed: 'explicit'"),
        ({"ack_policy": "all"}, "ack_policy is 'all'; needed: 'explicit'"),
        ({"max_deliver": 5}, "max_deliver is '5'; needed: -1"),
        ({"deliver_subject": "there"}, "deliver_subject is 'there'; needed: none"),
        ({"inactive_threshold": 60}, "inactive_threshold is '60000000000'; needed: none"),
        ({"mem_storage": True}, "storage is 'memory'; needed: 'file'"),
    ],
)
async def test_a_consumer_that_would_lose_events(broker, waits, consumer, config, message):
    consumer(**config)
    with pytest.raises(
        SourceUnfit, match=f"consumer 'airflow'.* of the connection 'source': the consumer .*{message}"
    ):
        await soon(waits.poll())


async def test_a_stream_in_memory_is_a_matter_of_choice(broker, waits):
    broker.ask(lambda client: client.jetstream().delete_stream(broker.queue))
    broker.make_stream(storage="memory")
    with pytest.raises(SourceUnfit, match="the stream would lose events: storage is 'memory'; needed: 'file'"):
        await soon(waits.poll())
    broker.send("a")
    assert (await soon(waits.poll(require_persistence=False)))["value"] == "a"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"storage": "memory"}, "storage is 'memory'"),
        ({"max_age": 60}, r"max_age is '0:01:00'; needed: \[events\] commit_memory, 7 days"),
        ({"max_bytes": 10**6, "discard": "old"}, "discard is 'old'; needed: 'new'"),
    ],
)
async def test_a_bucket_that_would_forget(broker, waits, config, message):
    name = f"KV_{broker.queue}"
    stream = {"name": name, "subjects": [f"$KV.{broker.queue}.>"], "max_msgs_per_subject": 1, **config}
    broker.ask(lambda client: client.jetstream().add_stream(**stream))
    with pytest.raises(SourceUnfit, match=f"the bucket '{broker.queue}' would lose events: {message}"):
        await soon(waits.poll(bucket=broker.queue))


async def test_a_claim_that_would_outlive_the_bucket(broker, waits):
    patient = waits.poll()
    await nothing(patient, 0.5)
    with pytest.raises(SourceUnfit, match=r"max_age is '7 days.*claim_timeout, 9 days"):
        await soon(waits.poll(1, claim_timeout=dt.timedelta(days=9)))
    assert not patient.done()


async def test_names_that_are_none(broker, waits):
    for changes in ({"durable": "a.b"}, {"bucket": "a.b"}, {"deliver_policy": "last"}):
        with pytest.raises(ValueError, match=r"not '(a\.b|last)'"):
            await soon(waits.poll(**changes))


async def test_a_server_without_jetstream(started, monkeypatch):
    started(monkeypatch, jetstream=False)
    with pytest.raises(SourceUnreachable, match="JetStream: is it enabled"):
        await asyncio.wait_for(own(), 15)


async def test_a_consumer_that_is_deleted_is_made_again(broker, waits):
    task = waits.poll()
    await nothing(task, 0.7)
    broker.ask(lambda client: client.jetstream().delete_consumer(broker.queue, "airflow"))
    broker.send("a")
    event = await soon(task)
    await waits.commit(event)
    assert broker.unacknowledged() == 0


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
    assert (await soon(asyncio.create_task(own())))["value"] == 1
    monkeypatch.setenv("AIRFLOW_CONN_OWN", json.dumps({**login, "port": server.port, "password": "other-word"}))
    with pytest.raises(SourceUnfit, match=r"'own' is not let in: .*Authorization") as refused:
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
    with pytest.raises(SourceUnfit, match=r"'own': a file that it names .*/nowhere/user\.creds"):
        await soon(asyncio.create_task(own()))


async def test_a_user_who_lacks_a_permission(started, monkeypatch):
    monkeypatch.setattr(client, "_PATIENCE", 1.0)
    may = {"publish": {"deny": ["$JS.API.CONSUMER.>"]}}
    users = {"users": [{"user": "me", "password": "x", "permissions": may}, {"user": "admin", "password": "x"}]}
    server = started(monkeypatch, {"login": "me", "password": "x"}, authorization=users)
    make_stream(server, user="admin", password="x")
    with pytest.raises(SourceUnfit, match=r"'own' may not use it: .*consumer\.info"):
        await soon(asyncio.create_task(own()))


async def test_the_first_of_several_hosts_is_down(started, monkeypatch):
    server = started(monkeypatch)
    make_stream(server)
    for host in (f"127.0.0.1:1, 127.0.0.1:{server.port}", f"nats://127.0.0.1:1,nats://127.0.0.1:{server.port}/"):
        monkeypatch.setenv("AIRFLOW_CONN_OWN", json.dumps({"conn_type": "nats", "host": host}))
        assert (await soon(asyncio.create_task(own())))["value"] == 1


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
    assert (await soon(asyncio.create_task(own())))["value"] == 1

    connection = {"conn_type": "nats", "host": f"tls://127.0.0.1:{server.port}"}
    for less in ({"tls_ca": files["ca"]}, {}, {**extra, "tls_hostname": "other.test"}):
        monkeypatch.setenv("AIRFLOW_CONN_OWN", json.dumps({**connection, "extra": less}))
        with pytest.raises(SourceUnreachable):
            await asyncio.wait_for(own(), 20)


async def test_tls_that_the_server_does_not_speak(started, monkeypatch):
    started(monkeypatch, {"extra": {"tls": True}})
    with pytest.raises(SourceUnfit, match="'own' wants TLS, and the server asks for none"):
        await soon(asyncio.create_task(own()))


async def test_a_watch_uses_the_same_connection_settings(started, monkeypatch):
    server = started(monkeypatch, {"extra": {"token": "secret-word"}}, authorization={"token": "secret-word"})
    make_stream(server, token="secret-word")
    seen = own(listener=NatsWatchListener, since=ago(minutes=1))
    event = await soon(asyncio.create_task(seen))
    assert event["value"] == 1
    assert "secret-word" not in json.dumps(event, default=str)


async def test_the_connection_ends_though_the_client_swallows_the_first_cancellation(broker, waits, monkeypatch):
    pull = client.Server.pull

    async def swallowing(server, *args):
        try:
            return await pull(server, *args)
        except asyncio.CancelledError:
            monkeypatch.setattr(client.Server, "pull", pull)
            return []

    monkeypatch.setattr(client.Server, "pull", swallowing)
    task = waits.poll()
    await nothing(task, 0.7)
    await asyncio.wait_for(end(task), 10)
    until(lambda: broker.clients() == 0, "the connection has ended", 10)
