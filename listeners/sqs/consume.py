"""Receiving messages, and for how long each is one wait's."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, ClassVar

from airflow_events.errors import SourceUnfit
from airflow_events.listeners.base import current_wait
from airflow_events.listeners.hub import Hub, Seeker
from airflow_events.listeners.sqs.client import (
    AWAY,
    LONG_POLL,
    Source,
    client_of,
    clock,
    connect,
    date_of,
    is_there,
    refusals,
    url_of,
)
from airflow_events.listeners.values import Format, decode

log = logging.getLogger(__name__)

# SQS's longest visibility timeout, in seconds.
_LONGEST = 12 * 3600
# Seconds that a message stays hidden beyond its claim: as long as the claim, within these bounds.
_SHORTEST_MEMORY, _LONGEST_MEMORY = 10, 600
# Seconds by which moments of SQS's clock may be apart: a Date has whole seconds, and a request takes a while.
SLACK = timedelta(seconds=3)


@dataclass(frozen=True)
class Lease:
    """How long a message is one wait's, and how long it is hidden; in seconds."""

    claimed: int
    hidden: int


@dataclass(frozen=True)
class Claim:
    """A message as SQS gave it, from which queue, and when, by SQS's clock."""

    url: str
    message: dict[str, Any]
    at: datetime

    @property
    def handle(self) -> dict[str, str]:
        return {"QueueUrl": self.url, "ReceiptHandle": self.message["ReceiptHandle"]}

    def show(self, client: Any) -> Any:
        return client.change_message_visibility(**self.handle, VisibilityTimeout=0)


class QueueHub(Hub[Seeker]):
    """Receives messages of one queue for the waits on it."""

    lost: ClassVar[tuple[type[BaseException], ...]] = AWAY

    def __init__(self, source: Source, lease: Lease) -> None:
        self._source = source
        self._lease = lease
        self._client: Any = None
        self._url = ""
        self._attempt = _attempt()
        super().__init__(str(source))

    async def connect(self) -> None:
        await self.disconnect()
        with refusals(self._source):
            self._client = await connect(self._source)
            self._url = await url_of(self._client, self._source.queue)
            await _check_permissions(self._client, self._url)

    async def disconnect(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def serve(self) -> None:
        waiting = sum(not seeker.done for seeker in self.seekers)
        receive = asyncio.ensure_future(self._receive(waiting))
        try:
            await asyncio.shield(receive)
        except asyncio.CancelledError:
            # A receive that is given up may take a message all the same, and hide it from everybody.
            await asyncio.gather(receive, return_exceptions=True)
            raise

    async def _receive(self, most: int) -> None:
        options: dict[str, Any] = {"MaxNumberOfMessages": min(most, 10)}
        if self._source.is_fifo:
            # One at a time, so that no message is given out while one of its group before it is not committed.
            # If an answer is lost, asking under the same id gets the same message again.
            options = {"MaxNumberOfMessages": 1, "ReceiveRequestAttemptId": self._attempt}
        with refusals(self._source):
            answer = await self._client.receive_message(
                QueueUrl=self._url,
                VisibilityTimeout=self._lease.hidden,
                WaitTimeSeconds=LONG_POLL,
                AttributeNames=["All"],
                MessageAttributeNames=["All"],
                **options,
            )
        self._attempt = _attempt()
        claims = [Claim(self._url, message, date_of(answer)) for message in answer.get("Messages", ())]
        waiting = [seeker for seeker in self.seekers if not seeker.done]
        for seeker, claim in zip(waiting, claims, strict=False):
            seeker.give(claim)
        for claim in claims[len(waiting) :]:  # whose waits have gone meanwhile
            with refusals(self._source):
                await is_there(claim.show(self._client))


def _attempt() -> str:
    return str(uuid.uuid4())


def lease_of(claim_timeout: float | timedelta, source: Source) -> Lease:
    """
    Return for how long messages are claimed and hidden.

    :raises SourceUnfit: SQS hides none for so long.
    """
    seconds = claim_timeout.total_seconds() if isinstance(claim_timeout, timedelta) else claim_timeout
    if not seconds > 0:
        raise ValueError(f"claim_timeout is more than 0 seconds, not {claim_timeout!r}")
    if seconds > _LONGEST - _LONGEST_MEMORY:
        raise SourceUnfit(
            f"{source}: claim_timeout is {seconds:.0f} s, and at most {_LONGEST - _LONGEST_MEMORY} s can be had: "
            f"SQS hides a message for {_LONGEST} s at most, of which {_LONGEST_MEMORY} s are for commits that "
            "come again"
        )
    claimed = math.ceil(seconds)
    return Lease(claimed, claimed + max(_SHORTEST_MEMORY, min(claimed, _LONGEST_MEMORY)))


def event_of(source: Source, claim: Claim, lease: Lease, values: Format) -> dict[str, Any]:
    """
    Return the event that a message becomes, for the current wait.

    :raises EventUndecodable: its body is not of that format.
    """
    message = claim.message
    about = message["Attributes"]
    return {
        "queue": source.queue,
        "message_id": message["MessageId"],
        "timestamp": datetime.fromtimestamp(int(about["SentTimestamp"]) / 1000, timezone.utc),
        "value": decode(message["Body"].encode(), values, source.message(message["MessageId"])),
        "attributes": {name: _text(value) for name, value in message.get("MessageAttributes", {}).items()},
        "message_group_id": about.get("MessageGroupId"),
        "deduplication_id": about.get("MessageDeduplicationId"),
        "sequence_number": about.get("SequenceNumber"),
        "receive_count": int(about["ApproximateReceiveCount"]),
        "queue_url": claim.url,
        "receipt_handle": message["ReceiptHandle"],
        "claimed_by": current_wait().id,
        "claimed_until": claim.at + timedelta(seconds=lease.claimed) + SLACK,
        "hidden_until": claim.at + timedelta(seconds=lease.hidden) - SLACK,
        "aws_conn_id": source.conn_id,
        "region_name": source.region,
    }


def _text(attribute: dict[str, Any]) -> str:
    if "BinaryValue" in attribute:
        return base64.b64encode(attribute["BinaryValue"]).decode()
    return str(attribute["StringValue"])


async def let_go(source: Source, claim: Claim, *, delete: bool = False) -> None:
    """Make a message visible that was received just now, or delete it; if that fails, it lapses by itself."""
    try:
        async with client_of(source) as client:
            await is_there(client.delete_message(**claim.handle) if delete else claim.show(client))
    except Exception:
        where = source.message(claim.message["MessageId"])
        log.warning("%s could not be given back; its claim will have to lapse", where, exc_info=True)


async def _check_permissions(client: Any, url: str) -> None:
    """Let SQS refuse now what the commit will need, on a message that does not exist."""
    await clock(client, url)
    none = {"QueueUrl": url, "ReceiptHandle": "none"}
    await is_there(client.change_message_visibility(**none, VisibilityTimeout=0))
    await is_there(client.delete_message(**none))
