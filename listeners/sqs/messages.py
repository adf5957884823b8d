"""What a message of SQS becomes."""

from __future__ import annotations

import base64
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.support.values import Format, decode, json_of, named

if TYPE_CHECKING:
    from airflow_events.listeners.sqs.client import Source


class Message:
    """
    A message as it was received.

    :param queue_arn: of which queue.
    :param received: as SQS gave it.
    :param hidden_until: until when nobody else receives it, as `time.monotonic` counts.
    """

    __slots__ = ("hidden_until", "queue_arn", "received")

    def __init__(self, queue_arn: str, received: dict[str, Any], hidden_until: float) -> None:
        self.queue_arn, self.received, self.hidden_until = queue_arn, received, hidden_until

    @property
    def id(self) -> str:
        return str(self.received["MessageId"])

    @property
    def attributes(self) -> dict[str, Any]:
        """Return its own attributes, which its sender gave it."""
        return self.received.get("MessageAttributes") or {}


class NoEvent(EventUndecodable):
    """What S3 sends to try a queue, or SNS to have a subscription confirmed: nobody waits for it."""


def event_of(source: Source, message: Message, values: Format, unwrap: str | None) -> dict[str, Any]:
    """
    Return the event that a message becomes. It is the same at each delivery.

    :raises EventUndecodable: its body is not of that format, or no notification of SNS where it is to be one.
    """
    where, body = source.message(message.id), message.received["Body"]
    attributes = {named(name): _text(value) for name, value in message.attributes.items()}
    about_topic: dict[str, Any] = {}
    if unwrap == "sns":
        body, attributes, about_topic = _notification(body, where)
    value = decode(body.encode(), values, where)
    if isinstance(value, dict) and value.get("Event") == "s3:TestEvent" and value.get("Service") == "Amazon S3":
        raise NoEvent(
            where, "an event", f"{where} is the test message of S3's bucket {value.get('Bucket')!r}", b""
        )
    about = message.received.get("Attributes") or {}
    return {
        "queue": message.queue_arn.rpartition(":")[2],
        "queue_arn": message.queue_arn,
        "message_id": message.id,
        "timestamp": _moment(about.get("SentTimestamp")),
        "value": value,
        "attributes": attributes,
        "message_group_id": about.get("MessageGroupId"),
        "deduplication_id": about.get("MessageDeduplicationId"),
        "sequence_number": about.get("SequenceNumber"),
        **about_topic,
    }


def _notification(body: str, where: str) -> tuple[str, dict[str, str], dict[str, Any]]:
    """Return message, attributes, and what there is to say of the topic, of what SNS sent."""
    try:
        envelope = json_of(body)
        if envelope["Type"] in ("SubscriptionConfirmation", "UnsubscribeConfirmation"):
            raise NoEvent(where, "an event", f"{where} is a {envelope['Type']} of SNS", b"")
        text = envelope["Message"]
        if envelope["Type"] != "Notification" or not isinstance(text, str):
            raise ValueError(f"its Type is {envelope['Type']!r}")
        of_message = envelope.get("MessageAttributes", {}).items()
        attributes = {named(name): str(one["Value"]) for name, one in of_message}
    except NoEvent:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise EventUndecodable(where, "a notification of SNS", repr(error), body.encode()[:200]) from error
    return text, attributes, {"topic_arn": envelope.get("TopicArn"), "subject": envelope.get("Subject")}


def _moment(milliseconds: Any) -> datetime | None:
    """Return when a message was sent; None where that cannot be read."""
    try:
        return datetime.fromtimestamp(int(milliseconds) / 1000, timezone.utc)
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _text(attribute: dict[str, Any]) -> str:
    if "BinaryValue" in attribute:
        return base64.b64encode(attribute["BinaryValue"]).decode()
    return str(attribute.get("StringValue", ""))
