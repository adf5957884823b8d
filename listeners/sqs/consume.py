"""Receiving messages, and telling SQS what became of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar

from airflow_events.errors import EventUndecodable, SourceMisconfigured
from airflow_events.listeners.sqs.client import (
    AWAY,
    LONG_POLL,
    Source,
    connect,
    coordinates,
    refusals,
    refuses_receipt,
    tried,
    url_of,
)
from airflow_events.listeners.sqs.messages import Message
from airflow_events.listeners.support.hub import Seeker
from airflow_events.listeners.support.queue import REASON, SOURCE, Delivery, QueueHub
from airflow_events.listeners.support.values import seconds
from botocore import exceptions

log = logging.getLogger(__name__)

# SQS's longest visibility timeout, in seconds.
_LONGEST = 12 * 3600
# How many messages a request is about, at most.
_BATCH = 10
# How many requests receive at the same time, while there is much to receive.
_RECEIVES = 8
# Below how many receptions a redrive policy is warned of.
_FEW = 5
# How many attributes a message has at most, and how many characters those that we add.
_ATTRIBUTES, _LENGTH = 10, 500
# What SQS takes in no text.
_REFUSED = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def visibility(lease: float | timedelta) -> int:
    """
    Return a lease in whole seconds.

    :raises ValueError: SQS hides no message for so long.
    """
    found = math.ceil(seconds(lease, "lease"))
    if found > _LONGEST:
        raise ValueError(f"lease is at most {_LONGEST} s, for which SQS hides a message, and not {lease!r}")
    return found


class SqsHub(QueueHub):
    """
    Receives messages for the waits on one queue.

    What is set aside is not kept: it comes again after each lease, until the queue's redrive policy takes it.

    :param lease: the visibility timeout, in seconds.
    """

    lost: ClassVar[tuple[type[BaseException], ...]] = AWAY

    def __init__(self, source: Source, lease: int) -> None:
        self.source = source
        self._lease = lease
        self.keep_every = lease / 4
        self._client: Any = None
        self._url = self._arn = ""
        self._is_busy = False
        super().__init__(str(source))

    @property
    def client(self) -> Any:
        """SQS's client, of a hub that is connected."""
        assert self._client is not None
        return self._client

    @property
    def url(self) -> str:
        """The queue's."""
        return self._url

    async def connect(self) -> None:
        with refusals(self.source):
            self._client = await connect(self.source)
            self._url = await url_of(self._client, self.source.queue)
            wanted = ["QueueArn", "RedrivePolicy"]
            answer = await self._client.get_queue_attributes(QueueUrl=self._url, AttributeNames=wanted)
            # Refused now rather than when there is a message in hand.
            of_none = {"QueueUrl": self._url, "ReceiptHandle": "none"}
            await tried(self._client.change_message_visibility(**of_none, VisibilityTimeout=0))
            await tried(self._client.delete_message(**of_none))
        self._arn = answer["Attributes"]["QueueArn"]
        self._check_redrive(json.loads(answer["Attributes"].get("RedrivePolicy") or "{}"))

    async def disconnect(self) -> None:
        if self._client is not None:
            await self._client.close()

    def _check_redrive(self, policy: dict[str, Any]) -> None:
        receptions = int(policy.get("maxReceiveCount", _FEW))
        if receptions < _FEW:
            message = (
                "%s has a redrive policy with maxReceiveCount %d: a message goes to the dead-letter queue after "
                "so many waits that ended, or processes that died, with it in hand; %d or more is better"
            )
            self._tell_all(logging.WARNING, message, self.source, receptions, _FEW)

    async def serve(self) -> None:
        if not self.wanted:
            return
        # One of a FIFO queue at a time: SQS would give several of one group, whose order would be lost if one of
        # them were given back. While a message is in flight, it gives no other one of its group.
        most = 1 if self.source.is_fifo else _BATCH
        count = min(math.ceil(self.wanted / most), _RECEIVES) if self._is_busy else 1
        wanted = [min(most, self.wanted - most * number) for number in range(count)]
        receives = [asyncio.ensure_future(self._receive(number, wait=count == 1)) for number in wanted]
        try:
            await asyncio.wait(receives)
        except asyncio.CancelledError:
            # A receive that is given up may take messages all the same, and hide them from everybody.
            await asyncio.wait(receives)
            with contextlib.suppress(Exception):
                await self.give_back({one.id: Delivery(one.id, one) for one in _received(receives)})
            raise
        found = _received(receives)
        self._is_busy = bool(found)
        for message in found:
            self.offer(coordinates(message.queue_arn, message.id), message)
        for receive in receives:
            receive.result()

    async def _receive(self, most: int, *, wait: bool) -> list[Message]:
        with refusals(self.source):
            answer = await self.client.receive_message(
                QueueUrl=self._url,
                MaxNumberOfMessages=most,
                VisibilityTimeout=self._lease,
                WaitTimeSeconds=LONG_POLL if wait else 0,
                AttributeNames=["All"],
                MessageAttributeNames=["All"],
            )
        until = time.monotonic() + self._lease
        return [Message(self._arn, message, until) for message in answer.get("Messages") or ()]

    async def lag(self, seeker: Seeker) -> int | None:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        with refusals(self.source):
            answer = await self.client.get_queue_attributes(QueueUrl=self._url, AttributeNames=names)
        return sum(int(answer["Attributes"][name]) for name in names)

    async def acknowledge(self, deliveries: Mapping[str, Delivery]) -> None:
        told = list(deliveries.values())
        failures = await self._tell(self.client.delete_message_batch, told)
        for delivery in told:
            failure = failures.get(delivery, {})
            if failure and not refuses_receipt(failure):
                raise OSError(f"{self.name} could not delete a message: {failure}")
            # Of a message that was visible meanwhile, SQS may confirm the deletion and have it still.
            delivery.is_stale = bool(failure) or not _is_hidden(delivery)

    async def give_back(self, deliveries: Mapping[str, Delivery]) -> None:
        # What is not hidden any more may be hidden for another, whom a standard queue would let us disturb.
        hidden = filter(_is_hidden, deliveries.values())
        await self._tell(self.client.change_message_visibility_batch, hidden, VisibilityTimeout=0)

    async def keep(self, deliveries: Mapping[str, Delivery]) -> None:
        for id, delivery in list(self.aside.items()):
            if not _is_hidden(delivery):
                del self.aside[id]
        kept = [one for id, one in deliveries.items() if id in self.in_hand and _is_hidden(one)]
        until = time.monotonic() + self._lease
        change = self.client.change_message_visibility_batch
        failures = await self._tell(change, kept, VisibilityTimeout=self._lease)
        for delivery in kept:
            if delivery in failures:  # it is deleted meanwhile, or comes again
                log.debug("%s is not kept: %s", self.source.message(delivery.message.id), failures[delivery])
            elif _is_hidden(delivery):  # if not, another may have received it meanwhile
                delivery.message.hidden_until = until

    async def _tell(self, request: Any, deliveries: Iterable[Delivery], **each: Any) -> dict[Delivery, Any]:
        """Make a request about messages, in batches; return what SQS says of those of which it failed."""
        told = list(deliveries)

        async def tell(batch: list[Delivery]) -> dict[Delivery, Any]:
            entries = [
                {"Id": str(number), "ReceiptHandle": delivery.message.received["ReceiptHandle"], **each}
                for number, delivery in enumerate(batch)
            ]
            with refusals(self.source):
                answer = await request(QueueUrl=self._url, Entries=entries)
            return {batch[int(failure["Id"])]: failure for failure in answer.get("Failed") or ()}

        batches = [told[start : start + _BATCH] for start in range(0, len(told), _BATCH)]
        answers = await asyncio.gather(*map(tell, batches))
        return {delivery: failure for answer in answers for delivery, failure in answer.items()}


def _received(receives: Sequence[asyncio.Future[list[Message]]]) -> list[Message]:
    """Return what those brought that did not fail."""
    return [message for one in receives if one.exception() is None for message in one.result()]


def _is_hidden(delivery: Delivery) -> bool:
    """Whether nobody else can have received it."""
    hidden: bool = time.monotonic() < delivery.message.hidden_until
    return hidden


async def bury(hub: SqsHub, message: Message, queue: str, error: EventUndecodable) -> None:
    """Send a message that cannot be read to a queue for such, with the reason."""
    source = replace(hub.source, queue=queue)
    group = message.received["Attributes"].get("MessageGroupId", "airflow-events")
    of_fifo = {"MessageGroupId": group, "MessageDeduplicationId": message.id} if source.is_fifo else {}
    why = _texts((REASON, error.reason), (SOURCE, error.where))
    own = dict(list(message.attributes.items())[: _ATTRIBUTES - len(why)])
    with refusals(source):
        url = await url_of(hub.client, queue)
        if url == hub.url:
            raise SourceMisconfigured(f"{source}: the dead letters of a queue must not go to the queue itself")
        send = {"QueueUrl": url, "MessageBody": message.received["Body"], **of_fifo}
        try:
            await hub.client.send_message(**send, MessageAttributes={**own, **why})
        except exceptions.ClientError as refused:
            if refused.response["Error"]["Code"] != "InvalidParameterValue":
                raise
            # With what was added it is too long.
            await hub.client.send_message(**send, MessageAttributes=message.attributes)
    log.warning("Sent to the dead letters in %r: %s", queue, error)


def _texts(*attributes: tuple[str, str]) -> dict[str, dict[str, str]]:
    """Return attributes as SQS takes them."""
    return {
        name: {"DataType": "String", "StringValue": _REFUSED.sub("?", text)[:_LENGTH]} for name, text in attributes
    }
