"""What is peculiar to SQS: receipts, FIFO groups, redrive policies, envelopes, and AWS connections."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import urllib.request
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from airflow.sdk.exceptions import AirflowNotFoundException
from airflow_events.errors import AtRedelivery, EventUndecodable, SourceMisconfigured, SourceUnreachable
from airflow_events.listeners.sqs import client
from airflow_events.listeners.support import serde
from botocore.exceptions import ClientError
from broker import nothing, soon, until_told
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
    fifo._count = broker._count  # a queue of this test's own
    fifo.fresh()
    waits = Waits(fifo)
    yield waits
    await waits.end()


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
    assert (event["queue"], event["queue_arn"]) == (
        broker.queue,
        f"arn:aws:sqs:{REGION}:123456789012:{broker.queue}",
    )
    await waits.release(event)
    assert await soon(waits.poll(1)) == event


async def test_of_a_fifo_queue_one_message_of_a_group_is_in_hand_at_a_time(fifo):
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
    [last] = [task for number, task in enumerate(tasks) if number not in events]
    await fifo.release(events[first])
    assert (await soon(last))["value"] == 1  # again, and not the one behind it
    await fifo.commit(events[first])
    assert (await soon(fifo.poll(3)))["value"] == 2


async def test_a_message_that_cannot_be_read_holds_up_its_group_until_the_redrive_policy_takes_it(fifo):
    broker = fifo.broker
    broker.redrive(2)
    for number, body in enumerate(["{no json", "2"]):
        about = {"MessageGroupId": "a", "MessageDeduplicationId": f"once-{number}"}
        broker.client.send_message(QueueUrl=broker.url, MessageBody=body, **about)
    first, second = fifo.poll(0, lease=1), fifo.poll(1, lease=1)
    done, [other] = await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED, timeout=15)
    with pytest.raises(EventUndecodable):
        [task.result() for task in done]
    assert (await soon(other))["value"] == 2
    assert broker.counts(broker.url_of(broker.dead_letter)) == (1, 0)


async def test_bytes_are_of_the_text(broker, waits):
    broker.send_raw(b"{no json")
    assert (await soon(waits.poll(values="bytes")))["value"] == "e25vIGpzb24="


async def test_a_queue_by_its_url(broker, waits, monkeypatch):
    monkeypatch.setattr(broker, "queue", broker.url)
    broker.client.send_message(QueueUrl=broker.queue, MessageBody="1")
    by_url = await soon(waits.poll())
    monkeypatch.undo()
    monkeypatch.setenv("AIRFLOW_CONN_SOURCE", json.dumps(broker.connection()))
    await waits.release(by_url)
    by_name = await soon(waits.poll(1))
    assert by_name == by_url
    await waits.commit(by_name)


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


async def test_a_receipt_that_held_until_lately_confirms_nothing(broker, waits):
    tasks = [waits.poll(number, lease=1) for number in range(2)]
    await asyncio.sleep(0.5)
    broker.send(1, 2)
    event, other = [await soon(task) for task in tasks]
    broker.server.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(1.5)
    broker.server.process.send_signal(signal.SIGCONT)
    with pytest.raises(AtRedelivery, match="is gone"):
        await waits.commit(event)
    with pytest.raises(AtRedelivery, match="another process"):
        await waits.commit(event)
    await waits.release(other)  # it is not touched: it may be another's
    again = await soon(waits.poll(2))
    assert again == other
    await waits.commit(again)


async def test_a_message_that_another_deleted_meanwhile(broker, waits):
    task = waits.poll()
    broker.send(1)
    event = await soon(task)
    broker.client.purge_queue(QueueUrl=broker.url)
    with pytest.raises(AtRedelivery):  # SQS does not say whether it is deleted
        await waits.commit(event)


@pytest.mark.parametrize("lease", [timedelta(hours=13), 0])
async def test_leases_that_cannot_be_had(broker, waits, lease):
    with pytest.raises(ValueError, match="lease is "):
        await soon(waits.poll(lease=lease))


async def test_a_wait_that_is_cancelled_leaves_nothing_hidden(broker, waits):
    task = waits.poll()
    await asyncio.sleep(0.5)
    broker.send(1)
    await asyncio.sleep(0.02)
    task.cancel()
    [result] = await asyncio.gather(task, return_exceptions=True)
    if not isinstance(result, BaseException):
        await waits.release(result)
    await asyncio.to_thread(until, lambda: broker.counts() == (1, 0), "it is visible")


async def test_a_receive_whose_waits_have_gone_gives_back_what_it_brings(broker, waits):
    task = waits.poll()
    await asyncio.sleep(0.7)
    task.cancel()
    await asyncio.sleep(0)
    await asyncio.to_thread(broker.send, 1)
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.to_thread(until, lambda: broker.counts() == (1, 0), "it is visible")
    assert (await soon(waits.poll(1)))["value"] == 1


async def test_no_more_is_received_than_is_waited_for(broker, waits):
    entries = [{"Id": str(number), "MessageBody": str(number)} for number in range(10)]
    for _ in range(12):
        broker.client.send_message_batch(QueueUrl=broker.url, Entries=entries)
    tasks = [waits.poll(number) for number in range(107)]
    events = [await soon(task, 120) for task in tasks]
    await asyncio.sleep(0.5)
    assert broker.counts() == (13, 107)
    await asyncio.gather(*(waits.commit(event) for event in events))
    assert broker.counts() == (13, 0)


async def test_what_cannot_be_decoded_is_taken_by_the_redrive_policy(broker, waits, caplog):
    broker.redrive(2)
    broker.send_raw(b"{no json")
    with pytest.raises(EventUndecodable):
        await soon(waits.poll(lease=1))
    assert "maxReceiveCount 2" in caplog.text
    await nothing(waits.poll(1, lease=1), 4)
    assert (broker.counts(), broker.counts(broker.url_of(broker.dead_letter))) == ((0, 0), (1, 0))


async def test_keeping_a_message_does_not_count_for_the_redrive_policy(broker, waits, caplog):
    broker.redrive(5)
    task = waits.poll(lease=1)
    broker.send("a")
    event = await soon(task)
    await asyncio.sleep(4)
    await waits.release(event)
    # A request that keeps it may have been under way, and reach the server after that which gives it back.
    await asyncio.to_thread(until, lambda: broker.counts() == (1, 0), "it is visible")
    [message] = broker.messages(broker.queue)
    assert message["Attributes"]["ApproximateReceiveCount"] == "2"
    assert "maxReceiveCount" not in caplog.text


async def test_a_dead_letter_has_what_the_message_had(broker, waits):
    sent = {f"a{number}": {"DataType": "Number", "StringValue": str(number)} for number in range(10)}
    broker.client.send_message(QueueUrl=broker.url, MessageBody="{no json", MessageAttributes=sent)
    task = waits.poll(on_undecodable="dead_letter", dead_letter=broker.dead_letter)
    await asyncio.to_thread(until, lambda: broker.dead_letters() == [b"{no json"], "it is there")
    [message] = broker.messages(broker.dead_letter)
    assert len(message["MessageAttributes"]) == 10
    assert message["MessageAttributes"]["a7"] == {"DataType": "Number", "StringValue": "7"}
    await nothing(task)
    assert broker.counts() == (0, 0)


async def test_a_dead_letter_that_is_too_long_for_its_reason(broker, waits):
    body = "{" + "x" * (256 * 1024 - 1)
    broker.client.send_message(QueueUrl=broker.url, MessageBody=body)
    task = waits.poll(on_undecodable="dead_letter", dead_letter=broker.dead_letter)
    dead = broker.url_of(broker.dead_letter)
    await asyncio.to_thread(until, lambda: broker.counts(dead) == (1, 0), "it is there")
    await nothing(task)
    assert broker.counts() == (0, 0)


async def test_a_dead_letter_queue_that_is_not_there(broker, waits):
    broker.send_raw(b"{no json")
    with pytest.raises(SourceMisconfigured, match=r"'nowhere'.*there is no such queue"):
        await soon(waits.poll(on_undecodable="dead_letter", dead_letter="nowhere"))
    assert broker.unacknowledged() == 1


async def test_what_sns_sends_is_unwrapped(broker, waits):
    sns = broker.aws("sns")
    topic = sns.create_topic(Name=broker.queue)["TopicArn"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=f"arn:aws:sqs:{REGION}:123456789012:{broker.queue}")
    task = waits.poll(unwrap="sns")
    await asyncio.sleep(0.3)
    attributes = {"__type": {"DataType": "String", "StringValue": "order"}}
    broker.send({"Type": "SubscriptionConfirmation", "Message": "You have chosen", "Token": "x"})
    sns.publish(TopicArn=topic, Message='{"id": 1}', Subject="news", MessageAttributes=attributes)
    event = await soon(task)
    assert (event["value"], event["attributes"]) == ({"id": 1}, {"___type": "order"})
    assert (event["topic_arn"], event["subject"]) == (topic, "news")
    await waits.commit(event)


@pytest.mark.parametrize("body", ["no envelope", "[]", '{"Type": "Other", "Message": "{}"}', '{"Message": 1}'])
async def test_what_sns_did_not_send(broker, waits, body):
    broker.send_raw(body.encode())
    with pytest.raises(EventUndecodable, match="is not a notification of SNS"):
        await soon(waits.poll(unwrap="sns"))


async def test_an_envelope_that_is_none(broker, waits):
    with pytest.raises(ValueError, match="unwrap is 'sns' or None, not 's3'"):
        await soon(waits.poll(unwrap="s3"))


async def test_the_test_message_of_s3_goes_to_nobody(broker, waits):
    task = waits.poll()
    await nothing(task, 0.3)
    broker.send({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "drops"})
    broker.send({"Records": []})
    assert (await soon(task))["value"] == {"Records": []}
    assert broker.counts() == (0, 1)


async def test_a_queue_that_is_not_there_is_not_made(broker, waits, monkeypatch):
    monkeypatch.setattr(broker, "queue", "nowhere")
    with pytest.raises(SourceMisconfigured, match=r"'nowhere'.*'source': there is no such queue"):
        await soon(waits.poll())
    monkeypatch.setattr(broker, "queue", f"http://127.0.0.1:{broker.server.port}/123456789012/nowhere")
    with pytest.raises(SourceMisconfigured, match="there is no such queue"):
        await soon(waits.poll())
    assert not broker.client.list_queues(QueueNamePrefix="nowhere").get("QueueUrls")


async def test_a_queue_that_is_deleted_while_a_wait_waits_is_waited_for(broker, waits, caplog):
    task = waits.poll()
    await nothing(task, 0.7)
    broker.client.delete_queue(QueueUrl=broker.url)
    await until_told(caplog, "there is no such queue")
    broker.client.create_queue(QueueName=broker.queue)
    broker.send({"order": 1})
    assert (await soon(task, 120))["value"] == {"order": 1}


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
    # Of AWS, a right holds for the batches, too; the emulator has it by their own names.
    batches = ("DeleteMessageBatch", "ChangeMessageVisibilityBatch")
    actions = [f"sqs:{action}" for action in (*NEEDED, *batches) if action != missing]
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}]}
    iam.put_user_policy(UserName=name, PolicyName="sqs", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    found = broker.connection(login=key["AccessKeyId"], password=key["SecretAccessKey"])
    monkeypatch.setenv("AIRFLOW_CONN_SOURCE", json.dumps(found))
    broker.send(1)
    with enforced(broker):
        if missing:
            with pytest.raises(SourceMisconfigured, match=f"(?s)may not use it: .*sqs:{missing}"):
                await soon(waits.poll())
        else:
            event = await soon(waits.poll(lease=1))
            await asyncio.sleep(2)
            await waits.release(event)
            await waits.commit(await soon(waits.poll(1, lease=1)))
    assert broker.counts() == ((1, 0) if missing else (0, 0))


async def test_a_key_that_is_not_known(broker, waits):
    with (
        enforced(broker),
        pytest.raises(SourceMisconfigured, match="'source': the connection's user may not use it"),
    ):
        await soon(waits.poll())


async def test_a_connection_without_a_region(broker, waits, monkeypatch, tmp_path):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    found = broker.connection()
    del found["extra"]["region_name"]
    monkeypatch.setenv("AIRFLOW_CONN_SOURCE", json.dumps(found))
    with pytest.raises(SourceMisconfigured, match="no region"):
        await soon(waits.poll())
    broker.send(1)
    event = await soon(waits.poll(region_name=REGION))
    await waits.commit(event)
    assert broker.counts() == (0, 0)


async def test_a_connection_without_credentials(broker, waits, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    found = {**broker.connection(), "login": None, "password": None}
    monkeypatch.setenv("AIRFLOW_CONN_SOURCE", json.dumps(found))
    with pytest.raises(SourceMisconfigured, match="no credentials"):
        await soon(waits.poll())


@pytest.fixture
def environment(broker, monkeypatch):
    """Let boto3 find the server and a login in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", f"http://127.0.0.1:{broker.server.port}")


@pytest.mark.usefixtures("environment")
async def test_no_connection_is_botos_own_way(broker, waits):
    broker.send(1)
    event = await soon(waits.poll(aws_conn_id=None))
    await waits.commit(event)
    assert broker.counts() == (0, 0)


@pytest.mark.usefixtures("environment")
async def test_without_the_default_connection_it_is_botos_own_way_too(broker, waits):
    broker.send(1)
    event = await soon(waits.poll(aws_conn_id="aws_default"))
    await waits.commit(event)
    assert broker.counts() == (0, 0)
    with pytest.raises(AirflowNotFoundException, match="aws_defualt"):  # no other account than the one meant
        await soon(waits.poll(aws_conn_id="aws_defualt"))


async def test_a_queue_by_its_arn(broker, waits):
    arn = broker.client.get_queue_attributes(QueueUrl=broker.url, AttributeNames=["QueueArn"])["Attributes"][
        "QueueArn"
    ]
    broker.send(1)
    broker.queue = arn
    event = await soon(waits.poll())
    assert (event["queue"], event["value"]) == (arn.rpartition(":")[2], 1)
    await waits.commit(event)
    broker.queue = arn.rpartition(":")[2]
    assert broker.counts() == (0, 0)


async def test_the_endpoint_may_be_the_services_own(broker, waits, monkeypatch):
    of_sqs = {"sqs": {"endpoint_url": f"http://127.0.0.1:{broker.server.port}"}}
    extra = {"endpoint_url": "http://127.0.0.1:1", "service_config": of_sqs}
    monkeypatch.setenv("AIRFLOW_CONN_SOURCE", json.dumps(broker.connection(extra=extra)))
    broker.send(1)
    assert (await soon(waits.poll()))["value"] == 1


class _SlowSts(BaseHTTPRequestHandler):
    """Gives out credentials of a role, which are to be renewed at once, once the loop of the waits has turned."""

    asked = turns = 0
    has_waited_in_vain = False

    def do_POST(self):
        of_class = type(self)
        of_class.asked += 1
        try:
            until(lambda turns=of_class.turns: of_class.turns > turns + 20, "the loop turns meanwhile", 30)
        except TimeoutError:
            of_class.has_waited_in_vain = True
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

    async def turn():
        while True:
            _SlowSts.turns += 1
            await asyncio.sleep(0.01)

    turning = asyncio.create_task(turn())
    try:
        broker.send(1)
        event = await soon(waits.poll(), 120)
        await asyncio.wait_for(waits.commit(event), 120)
    finally:
        turning.cancel()
        sts.shutdown()
    assert _SlowSts.asked > 1  # assumed, and renewed
    assert not _SlowSts.has_waited_in_vain
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

    async def wait_until_it_is_cancelled(lease, **how):  # another lease is another connection
        verify(how)
        task = waits.poll(lease=lease)
        try:
            await nothing(task, 2)
        finally:
            await waits.end()

    await wait_until_it_is_cancelled(61, verify=certificate)
    await wait_until_it_is_cancelled(62, verify=False)
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
        ("KMS.AccessDeniedException", 400, SourceMisconfigured),
        ("ExpiredToken", 403, SourceMisconfigured),
        ("InvalidParameterValue", 400, ClientError),
    ],
)
def test_what_goes_away_by_itself_is_told_from_what_does_not(code, status, becomes):
    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(becomes), client.refusals(client.Source("source", None, "orders")):
        raise ClientError(answer, "ReceiveMessage")


@pytest.mark.parametrize(
    ("code", "message", "refuses"),
    [
        ("InvalidParameterValue", "Value x for parameter ReceiptHandle is invalid.", True),
        ("ReceiptHandleIsInvalid", "The input receipt handle is invalid.", True),
        ("MessageNotInflight", "The specified message isn't in flight.", True),
        ("InvalidParameterValue", "Value 9 for parameter VisibilityTimeout is invalid. Reason: Total", False),
        ("InternalError", "", False),
    ],
)
def test_what_sqs_says_of_a_receipt(code, message, refuses):
    assert client.refuses_receipt({"Code": code, "Message": message}) is refuses


async def test_secrets_are_in_no_log_and_no_event(broker, waits, caplog, capfd):
    caplog.set_level("INFO")
    broker.send_raw(b"{no json")
    broker.send(1)
    event = await soon(waits.poll(on_undecodable="skip"))
    await waits.commit(event)
    written = capfd.readouterr()
    assert "Passed over" in caplog.text
    assert "not-for-logs" not in caplog.text + written.out + written.err + json.dumps(event, default=str)


async def test_dead_letters_do_not_go_to_the_queue_itself(broker, waits):
    broker.send_raw(b"{no json")
    with pytest.raises(SourceMisconfigured, match="must not go to the queue itself"):
        await soon(waits.poll(on_undecodable="dead_letter", dead_letter=broker.url))
    assert broker.unacknowledged() == 1
