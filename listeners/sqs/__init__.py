"""
Amazon SQS: a message's visibility timeout as a claim, and its deletion as the commit.

SQS keeps neither whose claim a message is nor who deleted it, and on a standard queue it obeys a receipt
handle also after somebody else has received the message. What it has is time: while a message is hidden,
nobody else receives it. So a claim here is a lease, counted by SQS's own clock (the ``Date`` of its answers,
so that no other clock matters), and the message stays hidden for a while beyond it:

=========================== ==================== ==================================================
a commit comes              the message is there the message is gone
=========================== ==================== ==================================================
until ``claimed_until``     it is deleted        this wait has deleted it: nothing changes
from then on, while hidden  `EventLost`          this wait has deleted it: nothing changes
after ``hidden_until``      `EventLost`: nobody can tell, and nothing is touched
=========================== ==================== ==================================================

No message is deleted in the second row, so that whoever dies between a deletion and its note in Airflow has
all of that time left to come again and be recognised.

`consume` receives for the waits on a queue; `client` makes SQS's client of an Airflow connection.
"""

from __future__ import annotations

import asyncio
import logging
import math
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_events.errors import EventLost, EventUndecodable
from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.clients import needs
from airflow_events.listeners.hub import Seeker
from airflow_events.listeners.shared import shared
from airflow_events.listeners.values import Format, OnUndecodable, check_choices

if TYPE_CHECKING:
    from airflow_events.listeners.sqs.consume import Claim

needs("an SQS listener", "sqs", "aiobotocore", "airflow.providers.amazon")

log = logging.getLogger(__name__)

DEFAULT = "aws_default"


class SqsListener(EventListener):
    """
    Take a message of a queue, standard or FIFO: each message goes to one wait.

    The claim is the message's visibility timeout, and the commit deletes it. The event is

    ``{"queue", "message_id", "timestamp", "value", "attributes", "message_group_id", "deduplication_id",
    "sequence_number", "receive_count", "queue_url", "receipt_handle", "claimed_by", "claimed_until",
    "hidden_until", "aws_conn_id", "region_name"}``,

    ``timestamp`` the moment in which it was sent, a datetime in UTC, and ``attributes`` the message's own, as text
    (Base64 for binary ones). The receipt handle, which the commit needs, is no credential: it is of use only to
    who may use the queue.

    The claim cannot be in the wait's name, since SQS keeps none, so these waits end on a worker.
    ``docs/sources/sqs.md`` says what SQS does not promise.
    """

    repeatable_poll: ClassVar[bool] = False

    async def poll_for_event(
        self,
        queue: str,
        *,
        region_name: str | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "fail",
        claim_timeout: float | timedelta = 900.0,
        aws_conn_id: str | None = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return when a message was received.

        :param queue: its name or its URL. It is never made.
        :param region_name: None is the URL's, else the connection's, else what boto3 finds.
        :param values: of what format the body is; see `airflow_events.listeners.values.decode`.
        :param on_undecodable: what to do with a message that is not: ``fail`` fails the wait and makes the message
            visible again, ``skip`` deletes it, with a warning, and waits on.
        :param claim_timeout: within how many seconds, or what timedelta, a worker must have begun to commit; part
            of a second counts as one. A wait that comes later loses nothing by it: its commit is refused, and it
            waits on. The message is hidden for as long again, at most ten minutes, before others receive it.
        :param aws_conn_id: an Airflow connection of type ``aws``, as the Amazon provider has it; None is boto3's
            own way to find credentials.
        :raises SourceUnfit: the connection is of another type, or has no region or no credentials; there is no
            such queue; its user may not receive, delete, hide or describe; ``claim_timeout`` is longer than SQS
            hides a message.
        :raises SourceUnreachable: SQS was away for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        from airflow_events.listeners.sqs.client import Source, region_of
        from airflow_events.listeners.sqs.consume import QueueHub, event_of, lease_of, let_go

        check_choices(values, on_undecodable)
        source = Source(aws_conn_id, region_name or region_of(queue), queue)
        lease = lease_of(claim_timeout, source)
        while True:
            seeker = Seeker()
            try:
                async with shared(("sqs", source, lease), lambda: QueueHub(source, lease)) as hub:
                    claim: Claim = await hub.take(seeker)
            except asyncio.CancelledError:
                # It may have been given a message in this very moment, which nobody else would get for long.
                if seeker.done and not seeker.found.cancelled() and seeker.found.exception() is None:
                    await asyncio.shield(let_go(source, seeker.found.result()))
                raise
            try:
                return event_of(source, claim, lease, values)
            except EventUndecodable as error:
                if on_undecodable == "fail":
                    await let_go(source, claim)
                    raise
                await let_go(source, claim, delete=True)
                log.warning("Passed over, and deleted: %s", error)

    async def event_checkpointed(self, event: Any) -> None:
        """Delete the message, if the claim on it is known to be this wait's still; see this module's beginning."""
        from airflow_events.listeners.sqs.client import Source, client_of, clock, is_there, refusals
        from airflow_events.listeners.sqs.consume import SLACK

        source = Source(event["aws_conn_id"], event["region_name"], event["queue"])
        where = source.message(event["message_id"])
        if event["claimed_by"] != current_wait().id:
            raise EventLost(f"{where} was received for {event['claimed_by']}")
        handle = {"QueueUrl": event["queue_url"], "ReceiptHandle": event["receipt_handle"]}
        async with client_of(source) as client:
            with refusals(source):
                now = await clock(client, event["queue_url"])
                if now > event["hidden_until"]:
                    raise EventLost(f"the claim on {where} has ended; others may have received it since")
                if now <= event["claimed_until"]:
                    # Nobody else can have received it. So if SQS does not know the receipt, this wait has deleted
                    # the message before.
                    await is_there(client.delete_message(**handle))
                    return
                # Asks whether the message is there, by hiding it for as long as it is hidden; less a second, since
                # in all it may not be more than SQS's longest.
                left = (event["hidden_until"] + SLACK - now).total_seconds() - 1
                if await is_there(client.change_message_visibility(**handle, VisibilityTimeout=math.ceil(left))):
                    raise EventLost(f"the commit of {where} came after {event['claimed_until'].isoformat()}")

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Make the message visible at once. Without an event nothing is known to be claimed."""
        from airflow_events.listeners.sqs.client import Source, client_of, clock, is_there, refusals

        if event is None or event["claimed_by"] != current_wait().id:
            return
        source = Source(event["aws_conn_id"], event["region_name"], event["queue"])
        handle = {"QueueUrl": event["queue_url"], "ReceiptHandle": event["receipt_handle"]}
        async with client_of(source) as client:
            with refusals(source):
                # Later it would be another's claim that ends, since standard queues obey an old handle.
                if await clock(client, event["queue_url"]) <= event["hidden_until"]:
                    await is_there(client.change_message_visibility(**handle, VisibilityTimeout=0))
