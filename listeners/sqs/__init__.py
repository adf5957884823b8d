"""
Amazon SQS: a queue, standard or FIFO.

`consume` receives and deletes messages; `messages` says what a message becomes; `client` makes SQS's client of an
Airflow connection.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, ClassVar

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.support.clients import needs
from airflow_events.listeners.support.queue import Delivery, FinalIdListener, receive, skip
from airflow_events.listeners.support.values import Format, OnUndecodable, check_choices, check_names

needs("an SQS listener", "sqs", "aiobotocore", "airflow.providers.amazon")

log = logging.getLogger(__name__)

DEFAULT = "aws_default"


class SqsListener(FinalIdListener):
    """
    Take a message of a queue, standard or FIFO: each message goes to one wait.

    The event is

    ``{"queue", "queue_arn", "message_id", "timestamp", "value", "attributes", "message_group_id",
    "deduplication_id", "sequence_number"}``,

    ``queue`` the queue's name, ``timestamp`` the moment in which the message was sent, a datetime in UTC, and
    ``attributes`` the message's own, as text (Base64 for binary ones). The queue's ARN and the message's id are
    what tells the event from every other. With ``unwrap`` it has ``topic_arn`` and ``subject``, too.

    A message stays in flight until the wait's event is recorded, and is deleted then. One that a process had in
    hand as it died is visible again after ``lease``. Only the process that received a message can delete it. So
    what one recorded before it died is deleted when it is received again.

    The user needs ``sqs:ReceiveMessage``, ``sqs:DeleteMessage``, ``sqs:ChangeMessageVisibility``,
    ``sqs:GetQueueAttributes``, and ``sqs:GetQueueUrl`` for a queue that is not given by its URL.
    """

    not_taken: ClassVar[Mapping[str, str]] = {
        "match": (
            "each message that is given back counts against the queue's maxReceiveCount. Let a filter policy "
            "of SNS or EventBridge fill a queue of its own; start_on.override(match=...) passes over what "
            "does not match"
        )
    }

    async def poll_for_event(
        self,
        queue: str,
        *,
        region_name: str | None = None,
        values: Format = "json",
        unwrap: str | None = None,
        on_undecodable: OnUndecodable = "fail",
        dead_letter: str | None = None,
        lease: float | timedelta = 60.0,
        aws_conn_id: str | None = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return when there is a message for this wait: those that have waited longest are served first.

        The test message that S3 sends as its notifications are set up (``s3:TestEvent``) is deleted, and goes to
        no wait, where ``values`` is ``json``.

        :param queue: its name, ARN or URL. It is never made.
        :param region_name: None is that of its URL or ARN, else the connection's, else what boto3 finds.
        :param values: of what format the body is; see `airflow_events.listeners.support.values.decode`.
        :param unwrap: ``sns`` for a queue that an SNS topic sends to without raw message delivery: value and
            attributes are then the notification's. None takes the body as it is.
        :param on_undecodable: what to do with a message that is not, or that Airflow cannot store: ``fail`` fails
            one wait for it, and it comes again after each ``lease``, for no other wait, until the queue's redrive
            policy takes it; ``skip`` deletes it, with a warning, and waits on; ``dead_letter`` sends it to the
            queue ``dead_letter``, and then deletes it.
        :param dead_letter: the name, ARN or URL of a queue of the same region, for messages that cannot be read;
            this needs ``sqs:SendMessage`` on it. What is sent has the message's body, its first eight attributes,
            ``airflow-events-reason`` and ``airflow-events-source``. After a crash between the two steps a standard
            queue has a message twice.
        :param lease: the visibility timeout, in whole seconds, 12 hours at most: after how long a message that a
            process had in hand as it died goes to another wait. A process that lives keeps what it has, for the 12
            hours that SQS lets it.
        :param aws_conn_id: an Airflow connection of type ``aws``, as the Amazon provider has it; None is boto3's
            own way to find credentials.
        :raises SourceMisconfigured: the connection is of another type, or has no region or no credentials; there
            is no such queue; its user may not receive, delete, hide or describe.
        :raises SourceUnreachable: SQS was unreachable for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        from airflow_events.listeners.sqs.client import Source, region_of
        from airflow_events.listeners.sqs.consume import SqsHub, bury, visibility
        from airflow_events.listeners.sqs.messages import Message, NoEvent, event_of

        check_choices(values, on_undecodable, dead_letter=dead_letter)
        check_names(queue=queue)
        if unwrap not in (None, "sns"):
            raise ValueError(f"unwrap is 'sns' or None, not {unwrap!r}")
        source = Source(aws_conn_id, region_name or region_of(queue), queue)

        def read(message: Message) -> dict[str, Any]:
            return event_of(source, message, values, unwrap)

        async def unreadable(hub: SqsHub, delivery: Delivery, error: EventUndecodable) -> None:
            if isinstance(error, NoEvent):
                log.info("Passed over, and deleted: %s", error.reason)
            elif on_undecodable == "skip":
                await skip(hub, delivery, error)
            elif dead_letter is not None:
                await bury(hub, delivery.message, dead_letter, error)
            else:
                hub.set_aside(delivery)
                raise error

        hidden = visibility(lease)
        return await receive(
            ("sqs", source, hidden, values, unwrap), lambda: SqsHub(source, hidden), read, unreadable
        )

    def event_id(self, event: Any) -> str:
        """Return the queue's ARN and the message's id, as JSON."""
        from airflow_events.listeners.sqs.client import coordinates

        # Events of the first edition do not say the ARN: they were held by claims.
        return coordinates(event.get("queue_arn", ""), event["message_id"])
