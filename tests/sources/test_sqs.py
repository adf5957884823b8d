"""What is peculiar to SQS: leases by its own clock, receipts, FIFO groups, dead letters, and AWS connections."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import time_machine
from airflow_events.errors import EventLost, EventUndecodable, SourceUnfit, SourceUnreachable
from airflow_events.listeners import serde
from airflow_events.listeners.hub import Seeker
from airflow_events.listeners.sqs import client
from botocore.exceptions import ClientError
from of_sqs import REGION, Sqs, SqsFifo, moto

from conftest import Waits
from deployment import until


@pytest.fixture(scope="module")
def server():
    broker = Sqs.make()
    if broker is None:
        pytest.skip(f"{Sqs.name}: {Sqs.missing}")
    yield broker
    broker.stop()


@pytest.fixture
async def fifo(broker):
    fifo = SqsFifo()
    fifo.server = broker.server
    fifo.queue = "group" + broker.queue
    fifo.fresh()
    waits = Waits(fifo)
    yield waits
    await waits.end()


async def soon(task, seconds=15):
    return await asyncio.wait_for(asyncio.shield(task), seconds)


async def nothing(task, seconds=1.0):
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(task), seconds)


def later(event, **times):
    """The event as it is when these moments, of its own, were so many seconds ago."""
    now = datetime.now(timezone.utc)
    return {**event, **{name: now - timedelta(seconds=ago) for name, ago in times.items()}}


async def test_the_event_says_what_sqs_says_of_the_message(broker, waits):
    before = datetime.now(timezone.utc) - timedelta(seconds=1)
    sent = broker.client.send_message(
        QueueUrl=broker.url,
        MessageBody='{"id": 1}',
        MessageAttributes={
            "kind": {"DataType": "String", "StringValue": "order"},
            "weight": {"DataType": "Number.kg", "StringValue": "4.2"},
            "seal": {"DataType": "Binary", "BinaryValue": b"\x00\xff"},
        },
    )
    event = await soon(waits.poll())
    serde.check(event)
    assert event["value"] == {"id": 1}
    assert event["message_id"] == sent["MessageId"]
    assert event["attributes"] == {"kind": "order", "weight": "4.2", "seal": "AP8="}
    assert before < event["timestamp"] < datetime.now(timezone.utc)
    assert event["receive_count"] == 1
    assert event["claimed_by"] == "dag/run0/task/-1"
    await waits.release(event)
    assert (await soon(waits.poll(1)))["receive_count"] == 2


async def test_the_event_of_a_fifo_queue_has_its_group_and_is_given_out_in_order_within_it(fifo):
    broker = fifo.broker
    for group, number in (("a", 1), ("a", 2), ("b", 3)):
        about = {"MessageGroupId": group, "MessageDeduplicationId": f"once-{number}"}
        broker.client.send_message(QueueUrl=broker.url, MessageBody=str(number), **about)
    tasks = [fifo.poll(number) for number in range(3)]
    await asyncio.sleep(2)
    events = {number: task.result() for number, task in enumerate(tasks) if task.done()}
    assert sorted(event["value"] for event in events.values()) == [1, 3]
    first = next(number for number, event in events.items() if event["value"] == 1)
    assert (events[first]["message_group_id"], events[first]["deduplication_id"]) == ("a", "once-1")
    assert events[first]["sequence_number"]
    await fifo.commit(events[first], first)
    [last] = [task for number, task in enumerate(tasks) if number not in events]
    assert (await soon(last))["value"] == 2


async def test_bytes_are_of_the_text(broker, waits):
    broker.send_raw(b"{no json")
    assert (await soon(waits.poll(values="bytes")))["value"] == "e25vIGpzb24="


async def test_a_queue_by_its_url(broker, waits, monkeypatch):
    monkeypatch.setattr(broker, "queue", broker.url)
    broker.client.send_message(QueueUrl=broker.queue, MessageBody="1")
    event = await soon(waits.poll())
    assert (event["queue"], event["value"]) == (broker.queue, 1)
    await waits.commit(event)


@pytest.mark.parametrize(
    ("url", "region"),
    [
        ("https://sqs.eu-west-1.amazonaws.com/123/orders", "eu-west-1"),
        ("https://sqs-fips.us-gov-west-1.amazonaws.com/123/orders", "us-gov-west-1"),
        ("https://vpce-1a-2b.sqs.us-east-2.vpce.amazonaws.com/123/orders", "us-east-2"),
        ("http://127.0.0.1:5000/123/orders", None),
        ("sqs.eu-west-1.orders", None),
    ],
)
def test_a_url_names_its_region(url, region):
    assert client.region_of(url) == region


async def test_a_commit_after_the_deletion_is_recognised_while_the_message_would_be_hidden(broker, waits):
    task = waits.poll()
    broker.send(1)
    event = await soon(task)
    broker.client.delete_message(QueueUrl=broker.url, ReceiptHandle=event["receipt_handle"])  # and the worker died
    await waits.commit(event)
    await waits.commit(later(event, claimed_until=1))
    with pytest.raises(EventLost, match="has ended"):
        await waits.commit(later(event, claimed_until=2, hidden_until=1))


async def test_a_commit_that_begins_late_is_refused_and_deletes_nothing(broker, waits):
    task = waits.poll()
    broker.send(1)
    event = await soon(task)
    with pytest.raises(EventLost, match="came after"):
        await waits.commit(later(event, claimed_until=1))
    assert broker.counts() == (0, 1)
    with pytest.raises(EventLost, match="has ended"):  # the server itself would delete it
        await waits.commit(later(event, claimed_until=2, hidden_until=1))
    assert broker.counts() == (0, 1)
    await waits.commit(event)
    assert broker.counts() == (0, 0)


async def test_a_claim_that_has_ended_is_not_released_since_it_may_be_anothers(broker, waits):
    task = waits.poll()
    broker.send(1)
    event = await soon(task)
    await waits.release(later(event, hidden_until=1))
    await waits.release(event, 1)
    await waits.release(None)
    assert broker.counts() == (0, 1)
    await waits.release(event)
    assert broker.counts() == (1, 0)


async def test_what_was_claimed_is_hidden_beyond_the_claim(broker, waits):
    broker.send(1)
    asked = datetime.now(timezone.utc)
    event = await soon(waits.poll(claim_timeout=timedelta(minutes=20)))
    assert timedelta(minutes=20) < event["claimed_until"] - asked < timedelta(minutes=21)
    assert timedelta(minutes=29) < event["hidden_until"] - asked < timedelta(minutes=30)


@pytest.mark.parametrize("hours", [-10, 10])
async def test_a_clock_that_is_wrong_changes_nothing(broker, waits, hours):
    broker.send(1)
    event = await soon(waits.poll())
    with time_machine.travel(datetime.now(timezone.utc) + timedelta(hours=hours), tick=True):
        with pytest.raises(EventLost, match="has ended"):
            await waits.commit(later(event, hidden_until=hours * 3600 + 5))
        await waits.commit(event)
    assert broker.counts() == (0, 0)


async def test_claims_that_cannot_be_had(broker, waits):
    with pytest.raises(SourceUnfit, match="at most 42600 s"):
        await soon(waits.poll(claim_timeout=timedelta(hours=12)))
    with pytest.raises(ValueError, match="more than 0 seconds"):
        await soon(waits.poll(claim_timeout=0))
    broker.send(1)
    assert (await soon(waits.poll(claim_timeout=42600)))["value"] == 1


async def test_a_wait_that_is_cancelled_as_it_is_given_a_message_puts_it_back(broker, waits, monkeypatch):
    task = waits.poll()
    await asyncio.sleep(0.5)
    given = []

    def give_and_cancel(seeker, event):
        given.append(event)
        seeker.found.set_result(event)
        task.cancel()

    with monkeypatch.context() as patched:
        patched.setattr(Seeker, "give", give_and_cancel)
        broker.send(1)
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(given) == 1
    assert broker.counts() == (1, 0)


async def test_a_receive_whose_waits_have_gone_puts_back_what_it_brings(broker, waits):
    task = waits.poll()
    await asyncio.sleep(0.7)
    task.cancel()
    await asyncio.sleep(0)
    await asyncio.to_thread(broker.send, 1)
    await asyncio.gather(task, return_exceptions=True)
    assert broker.counts() == (1, 0)
    assert (await soon(waits.poll(1)))["value"] == 1


async def test_messages_are_asked_for_in_number_and_the_surplus_goes_back_at_once(broker, waits):
    tasks = [waits.poll(number) for number in range(3)]
    await asyncio.sleep(0.7)
    for task in tasks[:2]:
        task.cancel()
    await asyncio.gather(*tasks[:2], return_exceptions=True)
    entries = [{"Id": str(number), "MessageBody": str(number)} for number in range(3)]
    await asyncio.to_thread(broker.client.send_message_batch, QueueUrl=broker.url, Entries=entries)
    assert (await soon(tasks[2]))["value"] in range(3)
    await asyncio.to_thread(until, lambda: broker.counts() == (2, 1), "the surplus is visible", 5)
    assert (await soon(waits.poll(3)))["receive_count"] == 2


async def test_a_wait_that_comes_during_a_receive_is_served_with_it(broker, waits):
    first = waits.poll()
    await asyncio.sleep(0.7)
    second = waits.poll(1)
    await asyncio.sleep(0.1)
    broker.send(1, 2)
    assert {(await soon(first, 2))["value"], (await soon(second, 2))["value"]} == {1, 2}


async def test_what_cannot_be_decoded_ends_in_the_dead_letter_queue(broker, waits):
    dead = broker.client.create_queue(QueueName=f"{broker.queue}-dead")["QueueUrl"]
    policy = {
        "deadLetterTargetArn": f"arn:aws:sqs:{REGION}:123456789012:{broker.queue}-dead",
        "maxReceiveCount": 2,
    }
    broker.client.set_queue_attributes(QueueUrl=broker.url, Attributes={"RedrivePolicy": json.dumps(policy)})
    broker.send_raw(b"{no json")
    for _ in range(2):
        with pytest.raises(EventUndecodable):
            await soon(waits.poll())
    await nothing(waits.poll())
    assert (broker.counts(), broker.counts(dead)) == ((0, 0), (1, 0))


async def test_a_queue_that_is_not_there_is_not_made(broker, waits, monkeypatch):
    monkeypatch.setattr(broker, "queue", "nowhere")
    with pytest.raises(SourceUnfit, match=r"'nowhere'.*'source': there is no such queue"):
        await soon(waits.poll())
    monkeypatch.setattr(broker, "queue", f"http://127.0.0.1:{broker.server.port}/123456789012/nowhere")
    with pytest.raises(SourceUnfit, match="there is no such queue"):
        await soon(waits.poll())
    assert not broker.client.list_queues(QueueNamePrefix="nowhere").get("QueueUrls")


async def test_a_queue_that_is_deleted_while_a_wait_waits(broker, waits):
    task = waits.poll()
    await nothing(task, 0.7)
    broker.client.delete_queue(QueueUrl=broker.url)
    with pytest.raises(SourceUnfit, match="there is no such queue"):
        await soon(task)


@contextmanager
def enforced(broker):
    """Let the server look at who may do what."""

    def enforce_after(requests):
        url = f"http://127.0.0.1:{broker.server.port}/moto-api/reset-auth"
        post = urllib.request.Request(url, data=requests.encode(), headers={"Content-Type": "text/plain"})
        urllib.request.urlopen(post).close()

    enforce_after("0")
    try:
        yield
    finally:
        enforce_after("inf")


NEEDED = ("GetQueueUrl", "GetQueueAttributes", "ReceiveMessage", "DeleteMessage", "ChangeMessageVisibility")


@pytest.mark.parametrize("missing", [*NEEDED, None])
async def test_a_user_who_may_not_do_all_that_is_needed_is_refused_before_anything_is_taken(
    broker, waits, monkeypatch, missing
):
    iam, name = broker.aws("iam"), f"{broker.queue}-{missing}"
    iam.create_user(UserName=name)
    actions = [f"sqs:{action}" for action in NEEDED if action != missing]
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}]}
    iam.put_user_policy(UserName=name, PolicyName="sqs", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    found = broker.connection(login=key["AccessKeyId"], password=key["SecretAccessKey"])
    monkeypatch.setenv("AIRFLOW_CONN_SOURCE", json.dumps(found))
    broker.send(1)
    with enforced(broker):
        if missing:
            with pytest.raises(SourceUnfit, match=f"(?s)may not use it: .*sqs:{missing}"):
                await soon(waits.poll())
        else:
            await waits.commit(await soon(waits.poll()))
    assert broker.counts() == ((1, 0) if missing else (0, 0))


async def test_a_key_that_is_not_known(broker, waits):
    with enforced(broker), pytest.raises(SourceUnfit, match="'source': the connection's user may not use it"):
        await soon(waits.poll())


async def test_a_connection_without_a_region(broker, waits, monkeypatch, tmp_path):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    found = broker.connection()
    del found["extra"]["region_name"]
    monkeypatch.setenv("AIRFLOW_CONN_SOURCE", json.dumps(found))
    with pytest.raises(SourceUnfit, match="no region"):
        await soon(waits.poll())
    broker.send(1)
    event = await soon(waits.poll(region_name=REGION))
    assert event["region_name"] == REGION
    await waits.commit(event)
    assert broker.counts() == (0, 0)


async def test_a_connection_without_credentials(broker, waits, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    found = {**broker.connection(), "login": None, "password": None}
    monkeypatch.setenv("AIRFLOW_CONN_SOURCE", json.dumps(found))
    with pytest.raises(SourceUnfit, match="no credentials"):
        await soon(waits.poll())


async def test_no_connection_is_botos_own_way(broker, waits, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", f"http://127.0.0.1:{broker.server.port}")
    broker.send(1)
    event = await soon(waits.poll(aws_conn_id=None))
    assert event["aws_conn_id"] is None
    await waits.commit(event)
    assert broker.counts() == (0, 0)


async def test_the_endpoint_may_be_the_services_own(broker, waits, monkeypatch):
    of_sqs = {"sqs": {"endpoint_url": f"http://127.0.0.1:{broker.server.port}"}}
    extra = {"endpoint_url": "http://127.0.0.1:1", "service_config": of_sqs}
    monkeypatch.setenv("AIRFLOW_CONN_SOURCE", json.dumps(broker.connection(extra=extra)))
    broker.send(1)
    assert (await soon(waits.poll()))["value"] == 1


class _SlowSts(BaseHTTPRequestHandler):
    """Gives out credentials of a role, after a while, which are to be renewed at once."""

    asked = 0

    def do_POST(self):
        type(self).asked += 1
        time.sleep(1.5)
        soon = (datetime.now(timezone.utc) + timedelta(minutes=12)).isoformat()
        answer = f"""<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult>
            <Credentials><AccessKeyId>ASIAROLE</AccessKeyId><SecretAccessKey>s</SecretAccessKey>
            <SessionToken>t</SessionToken><Expiration>{soon}</Expiration></Credentials>
            </AssumeRoleResult></AssumeRoleResponse>""".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


async def test_a_role_is_assumed_and_renewed_without_blocking_the_loop(broker, waits, monkeypatch):
    sts = ThreadingHTTPServer(("127.0.0.1", 0), _SlowSts)
    Thread(target=sts.serve_forever, daemon=True).start()
    extra = {
        "role_arn": "arn:aws:iam::123456789012:role/reader",
        "service_config": {"sts": {"endpoint_url": f"http://127.0.0.1:{sts.server_port}"}},
    }
    monkeypatch.setenv("AIRFLOW_CONN_SOURCE", json.dumps(broker.connection(extra=extra)))
    longest = 0.0

    async def watch():
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)

    watching = asyncio.create_task(watch())
    try:
        broker.send(1)
        event = await soon(waits.poll(), 60)
        await asyncio.wait_for(waits.commit(event), 60)
    finally:
        watching.cancel()
        sts.shutdown()
    assert _SlowSts.asked > 2  # assumed for the poll and for the commit, and renewed
    assert longest < 1.2
    assert broker.counts() == (0, 0)


@pytest.fixture
def secure(tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    broker = Sqs()
    broker.server = moto(str(certificate), str(key))
    broker.queue = "secure"
    (broker.server.folder / "queues.json").write_text('{"secure": {}}')
    with broker.server:
        yield broker, str(certificate)


async def test_tls(server, secure, monkeypatch):
    broker, certificate = secure
    waits = Waits(broker)
    endpoint = f"https://127.0.0.1:{broker.server.port}"

    def verify(how):
        found = broker.connection(extra={"endpoint_url": endpoint, **how})
        monkeypatch.setenv("AIRFLOW_CONN_SOURCE", json.dumps(found))

    async def wait_until_it_is_cancelled(**how):
        verify(how)
        task = waits.poll()
        try:
            await nothing(task, 2)
        finally:
            await waits.end()

    await wait_until_it_is_cancelled(verify=certificate)
    await wait_until_it_is_cancelled(verify=False)
    verify({})
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
    with pytest.raises(SourceUnreachable, match="certificate"):
        await soon(waits.poll())


@pytest.mark.parametrize(
    ("code", "status", "becomes"),
    [
        ("InternalError", 500, OSError),
        ("ServiceUnavailable", 503, OSError),
        ("RequestThrottled", 403, OSError),
        ("ThrottlingException", 400, OSError),
        ("KMS.ThrottlingException", 400, OSError),
        ("OverLimit", 403, OSError),
        ("KMS.AccessDeniedException", 400, SourceUnfit),
        ("ExpiredToken", 403, SourceUnfit),
        ("InvalidParameterValue", 400, ClientError),
    ],
)
def test_what_goes_away_by_itself_is_told_from_what_does_not(code, status, becomes):
    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(becomes), client.refusals(client.Source("source", None, "orders")):
        raise ClientError(answer, "ReceiveMessage")


@pytest.mark.parametrize(
    ("code", "message", "there"),
    [
        (
            "InvalidParameterValue",
            "Value x for parameter ReceiptHandle is invalid.",
            False,
        ),
        ("ReceiptHandleIsInvalid", "The input receipt handle is invalid.", False),
        ("MessageNotInflight", "The specified message isn't in flight.", True),
        ("InvalidParameterValue", "Value 9 for parameter VisibilityTimeout is invalid. Reason: Total", None),
    ],
)
async def test_what_sqs_says_of_a_receipt(code, message, there):
    async def request():
        raise ClientError({"Error": {"Code": code, "Message": message}}, "ChangeMessageVisibility")

    if there is None:
        with pytest.raises(ClientError):
            await client.is_there(request())
    else:
        assert await client.is_there(request()) is there


async def test_secrets_are_in_no_log_and_no_event(broker, waits, caplog, capfd):
    caplog.set_level("INFO")
    broker.send_raw(b"{no json")
    broker.send(1)
    event = await soon(waits.poll(on_undecodable="skip"))
    await waits.commit(event)
    written = capfd.readouterr()
    assert "Passed over" in caplog.text
    assert "not-for-logs" not in caplog.text + written.out + written.err + json.dumps(event, default=str)
