"""SQS, standard and FIFO queues, on moto's emulator."""

from __future__ import annotations

import http.client
import importlib.util
import json
import ssl
import sys
import uuid
from pathlib import Path
from typing import Any, ClassVar

import psutil
import servers
from airflow_events.listeners.sqs import SqsListener
from broker import Broker

REGION = "eu-central-1"


def moto(*certificate_and_key: str) -> servers.Server | None:
    """moto's server, over TLS if it has a certificate; None if it is not installed."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask_cors") is None:
        return None
    program = str(Path(__file__).parent / "sqs_server.py")

    def command(server: servers.Server) -> list[str]:
        return [sys.executable, program, str(server.port), str(server.folder), *certificate_and_key]

    def answers(server: servers.Server) -> bool:
        if not certificate_and_key:
            return servers.says(server, b"GET /moto-api/ HTTP/1.0\r\n\r\n", b"HTTP/1")
        unverified = ssl._create_unverified_context()
        link = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=1, context=unverified)
        link.request("GET", "/moto-api/")
        return link.getresponse().status == 200

    return servers.Server(command, answers)


class Sqs(Broker):
    name = "sqs"
    missing = "pip install moto[sqs] flask flask-cors"
    listener = SqsListener
    connection_type = "aws"
    acknowledges_anywhere = False
    has_order = False  # a standard queue promises none, and a FIFO queue one within a group, of which test_sqs.py
    has_binary = False
    survives_kill = False

    suffix = ""
    attributes: ClassVar[dict[str, str]] = {}

    @classmethod
    def make(cls) -> Sqs | None:
        server = moto()
        if server is None:
            return None
        broker = cls()
        broker.server = server
        server.start()
        return broker

    def fresh(self) -> None:
        super().fresh()
        self.queue += self.suffix
        queues = {self.queue: self.attributes, self.dead_letter: self.attributes}
        # For the server's next start: it forgets its queues with everything else.
        (self.server.folder / "queues.json").write_text(json.dumps(queues))
        if self.server.process.poll() is None:
            for name, attributes in queues.items():
                self.client.create_queue(QueueName=name, Attributes=attributes)

    @property
    def dead_letter(self) -> str:
        return f"{self.queue.removesuffix(self.suffix)}-dead{self.suffix}"

    @property
    def client(self) -> Any:
        return self.aws("sqs")

    def aws(self, service: str) -> Any:
        import boto3

        return boto3.client(
            service,
            region_name=REGION,
            endpoint_url=f"http://127.0.0.1:{self.server.port}",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    @property
    def url(self) -> str:
        return self.url_of(self.queue)

    def url_of(self, queue: str) -> str:
        return str(self.client.get_queue_url(QueueName=queue)["QueueUrl"])

    def connection(self, port: int | None = None, **changes: Any) -> dict[str, Any]:
        extra = {"region_name": REGION, "endpoint_url": f"http://127.0.0.1:{port or self.server.port}"}
        return {
            "conn_type": "aws",
            "login": "test",
            "password": "not-for-logs",
            "extra": {**extra, **changes.pop("extra", {})},
            **changes,
        }

    def arguments(self, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
        return [self.queue], {"aws_conn_id": "source", **changes}

    def send_raw(self, raw: bytes) -> None:
        self.client.send_message(QueueUrl=self.url, MessageBody=raw.decode(), **self.sending())

    def sending(self) -> dict[str, Any]:
        return {}

    def unacknowledged(self) -> int:
        return sum(self.counts())

    def redrive(self, count: int) -> None:
        """Have what was received so often moved to the dead letters."""
        arn = f"arn:aws:sqs:{REGION}:123456789012:{self.dead_letter}"
        policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": count})
        self.client.set_queue_attributes(QueueUrl=self.url, Attributes={"RedrivePolicy": policy})

    def counts(self, url: str | None = None) -> tuple[int, int]:
        """Say how many messages are visible, and how many are hidden."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        answer = self.client.get_queue_attributes(QueueUrl=url or self.url, AttributeNames=names)
        visible, hidden = (int(answer["Attributes"][name]) for name in names)
        return visible, hidden

    def dead_letters(self) -> list[bytes]:
        found = self.messages(self.dead_letter)
        for message in found:
            attributes = message["MessageAttributes"]
            assert attributes["airflow-events-reason"]["StringValue"]
            assert self.queue in attributes["airflow-events-source"]["StringValue"]
        return [message["Body"].encode() for message in found]

    def messages(self, queue: str) -> list[dict[str, Any]]:
        """Return what a queue shows, and leave it there."""
        url, found = self.url_of(queue), []
        every: dict[str, Any] = {"MessageAttributeNames": ["All"], "AttributeNames": ["All"]}
        while more := self.client.receive_message(
            QueueUrl=url, MaxNumberOfMessages=10, VisibilityTimeout=30, WaitTimeSeconds=0, **every
        ).get("Messages"):
            found += more
        for message in found:
            about = {"QueueUrl": url, "ReceiptHandle": message["ReceiptHandle"]}
            self.client.change_message_visibility(**about, VisibilityTimeout=0)
        return found

    def deleted(self) -> list[str]:
        """Return the body of each message that was deleted; see ``sqs_server.py``."""
        notes = self.server.folder / "deleted.jsonl"
        lines = map(json.loads, notes.read_text().splitlines() if notes.exists() else ())
        return [line["body"] for line in lines if line["queue"] == self.queue]

    def clients(self) -> int:
        # The server cannot say, but the operating system can say of the server.
        return sum(
            open_one.status == psutil.CONN_ESTABLISHED and open_one.laddr.port == self.server.port
            for open_one in psutil.Process(self.server.process.pid).net_connections("tcp")
        )


class SqsFifo(Sqs):
    name = "sqs fifo"
    suffix = ".fifo"
    attributes: ClassVar[dict[str, str]] = {"FifoQueue": "true"}

    def sending(self) -> dict[str, Any]:
        return {"MessageGroupId": str(uuid.uuid4()), "MessageDeduplicationId": str(uuid.uuid4())}
