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
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import math
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_events.errors import EventLost, EventUndecodable, SourceUnfit
from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.connections import connection
from airflow_events.listeners.hub import Hub, Seeker
from airflow_events.listeners.shared import connected, shared
from airflow_events.listeners.values import Format, OnUndecodable, check_choices, decode

try:
    import aiobotocore.session
    import botocore.session
    from aiobotocore.credentials import AioCredentials
    from airflow.providers.amazon.aws.hooks.base_aws import AwsBaseHook
    from airflow.providers.amazon.aws.utils.connection_wrapper import AwsConnectionWrapper
    from botocore import UNSIGNED, exceptions
    from botocore.config import Config
    from botocore.credentials import RefreshableCredentials
    from botocore.loaders import Loader
except ImportError as error:
    raise ImportError("an SQS listener needs: pip install airflow-provider-events[sqs]") from error

if TYPE_CHECKING:
    from airflow.sdk import Connection

log = logging.getLogger(__name__)

DEFAULT = "aws_default"

# Seconds for which a receive waits on the server. One receive serves all waits, also those that come while it
# waits, and it returns as soon as there is a message. The last wait to leave has to sit it out.
_LONG_POLL = 5
# SQS's longest visibility timeout, in seconds.
_LONGEST = 12 * 3600
# Seconds that a message stays hidden beyond its claim: as long as the claim, within these bounds.
_SHORTEST_MEMORY, _LONGEST_MEMORY = 10, 600
# Seconds by which moments of SQS's clock may be apart: a Date has whole seconds, and a request takes a while.
_SLACK = timedelta(seconds=3)

_AWAY = (
    exceptions.ConnectionError,
    exceptions.HTTPClientError,
    exceptions.CredentialRetrievalError,
    exceptions.MetadataRetrievalError,
    OSError,
)
_BUSY = frozenset({"OverLimit", "RequestLimitExceeded", "ServiceUnavailable", "InternalError", "InternalFailure"})
_NO_QUEUE = frozenset({"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"})

# The descriptions of AWS's services, which are read from disk in a thread, once for all clients.
_loader = Loader()


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
        check_choices(values, on_undecodable)
        source = _Source(aws_conn_id, region_name or _region_of(queue), queue)
        lease = _lease(claim_timeout, source)
        while True:
            seeker = Seeker()
            try:
                async with shared(("sqs", source, lease), lambda: _QueueHub(source, lease)) as hub:
                    claim: _Claim = await hub.take(seeker)
            except asyncio.CancelledError:
                # It may have been given a message in this very moment, which nobody else would get for long.
                if seeker.done and not seeker.found.cancelled() and seeker.found.exception() is None:
                    await asyncio.shield(_let_go(source, seeker.found.result()))
                raise
            try:
                return _event(source, claim, lease, values)
            except EventUndecodable as error:
                if on_undecodable == "fail":
                    await _let_go(source, claim)
                    raise
                await _let_go(source, claim, delete=True)
                log.warning("Passed over, and deleted: %s", error)

    async def event_checkpointed(self, event: Any) -> None:
        """Delete the message, if the claim on it is known to be this wait's still; see this module's beginning."""
        source = _Source(event["aws_conn_id"], event["region_name"], event["queue"])
        where = source.message(event["message_id"])
        if event["claimed_by"] != current_wait().id:
            raise EventLost(f"{where} was received for {event['claimed_by']}")
        handle = {"QueueUrl": event["queue_url"], "ReceiptHandle": event["receipt_handle"]}
        async with _client(source) as client:
            with _refusals(source):
                now = await _now(client, event["queue_url"])
                if now > event["hidden_until"]:
                    raise EventLost(f"the claim on {where} has ended; others may have received it since")
                if now <= event["claimed_until"]:
                    # Nobody else can have received it. So if SQS does not know the receipt, this wait has deleted
                    # the message before.
                    await _is_there(client.delete_message(**handle))
                    return
                # Asks whether the message is there, by hiding it for as long as it is hidden; less a second, since
                # in all it may not be more than SQS's longest.
                left = (event["hidden_until"] + _SLACK - now).total_seconds() - 1
                if await _is_there(client.change_message_visibility(**handle, VisibilityTimeout=math.ceil(left))):
                    raise EventLost(f"the commit of {where} came after {event['claimed_until'].isoformat()}")

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Make the message visible at once. Without an event nothing is known to be claimed."""
        if event is None or event["claimed_by"] != current_wait().id:
            return
        source = _Source(event["aws_conn_id"], event["region_name"], event["queue"])
        handle = {"QueueUrl": event["queue_url"], "ReceiptHandle": event["receipt_handle"]}
        async with _client(source) as client:
            with _refusals(source):
                # Later it would be another's claim that ends, since standard queues obey an old handle.
                if await _now(client, event["queue_url"]) <= event["hidden_until"]:
                    await _is_there(client.change_message_visibility(**handle, VisibilityTimeout=0))


@dataclass(frozen=True)
class _Source:
    conn_id: str | None
    region: str | None
    queue: str

    def __str__(self) -> str:
        region = f" in {self.region}" if self.region else ""
        return f"the queue {self.queue!r}{region} of the connection {self.conn_id!r}"

    @property
    def is_fifo(self) -> bool:
        return self.queue.endswith(".fifo")

    def message(self, message_id: str) -> str:
        return f"the message {message_id} of {self}"


@dataclass(frozen=True)
class _Lease:
    """How long a message is one wait's, and how long it is hidden; in seconds."""

    claimed: int
    hidden: int


@dataclass(frozen=True)
class _Claim:
    """A message as SQS gave it, from which queue, and when, by SQS's clock."""

    url: str
    message: dict[str, Any]
    at: datetime

    @property
    def handle(self) -> dict[str, str]:
        return {"QueueUrl": self.url, "ReceiptHandle": self.message["ReceiptHandle"]}

    def show(self, client: Any) -> Any:
        return client.change_message_visibility(**self.handle, VisibilityTimeout=0)


class _QueueHub(Hub[Seeker]):
    """Receives messages of one queue for the waits on it."""

    lost: ClassVar[tuple[type[BaseException], ...]] = _AWAY

    def __init__(self, source: _Source, lease: _Lease) -> None:
        self._source = source
        self._lease = lease
        self._client: Any = None
        self._url = ""
        self._attempt = _attempt()
        super().__init__(str(source))

    async def connect(self) -> None:
        await self.disconnect()
        with _refusals(self._source):
            self._client = await _connect(self._source)
            self._url = await _url(self._client, self._source.queue)
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
        with _refusals(self._source):
            answer = await self._client.receive_message(
                QueueUrl=self._url,
                VisibilityTimeout=self._lease.hidden,
                WaitTimeSeconds=_LONG_POLL,
                AttributeNames=["All"],
                MessageAttributeNames=["All"],
                **options,
            )
        self._attempt = _attempt()
        claims = [_Claim(self._url, message, _date(answer)) for message in answer.get("Messages", ())]
        waiting = [seeker for seeker in self.seekers if not seeker.done]
        for seeker, claim in zip(waiting, claims, strict=False):
            seeker.give(claim)
        for claim in claims[len(waiting) :]:  # whose waits have gone meanwhile
            with _refusals(self._source):
                await _is_there(claim.show(self._client))


def _attempt() -> str:
    return str(uuid.uuid4())


def _lease(claim_timeout: float | timedelta, source: _Source) -> _Lease:
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
    return _Lease(claimed, claimed + max(_SHORTEST_MEMORY, min(claimed, _LONGEST_MEMORY)))


def _event(source: _Source, claim: _Claim, lease: _Lease, values: Format) -> dict[str, Any]:
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
        "claimed_until": claim.at + timedelta(seconds=lease.claimed) + _SLACK,
        "hidden_until": claim.at + timedelta(seconds=lease.hidden) - _SLACK,
        "aws_conn_id": source.conn_id,
        "region_name": source.region,
    }


def _text(attribute: dict[str, Any]) -> str:
    if "BinaryValue" in attribute:
        return base64.b64encode(attribute["BinaryValue"]).decode()
    return str(attribute["StringValue"])


async def _let_go(source: _Source, claim: _Claim, *, delete: bool = False) -> None:
    """Make a message visible that was received just now, or delete it; if that fails, it lapses by itself."""
    try:
        async with _client(source) as client:
            await _is_there(client.delete_message(**claim.handle) if delete else claim.show(client))
    except Exception:
        where = source.message(claim.message["MessageId"])
        log.warning("%s could not be given back; its claim will have to lapse", where, exc_info=True)


async def _is_there(request: Any) -> bool:
    """Make a request about a message by its receipt handle; False if SQS has none for that handle."""
    try:
        await request
    except exceptions.ClientError as error:
        about = error.response.get("Error", {}).get("Message", "")
        if _code(error) == "MessageNotInflight":
            return True
        # Not each InvalidParameterValue: a visibility timeout that is refused says nothing about the message.
        if _code(error) == "ReceiptHandleIsInvalid" or (
            _code(error) == "InvalidParameterValue" and "parameter ReceiptHandle" in about
        ):
            return False
        raise
    return True


async def _now(client: Any, url: str) -> datetime:
    """Ask SQS what time it is."""
    return _date(await client.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"]))


def _date(answer: dict[str, Any]) -> datetime:
    """Return when SQS answered, to the second; by the own clock if something between took the header away."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        date = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return date.astimezone(timezone.utc)
    return datetime.now(timezone.utc)


async def _url(client: Any, queue: str) -> str:
    if "://" in queue:
        return queue
    return str((await client.get_queue_url(QueueName=queue))["QueueUrl"])


async def _check_permissions(client: Any, url: str) -> None:
    """Let SQS refuse now what the commit will need, on a message that does not exist."""
    await _now(client, url)
    none = {"QueueUrl": url, "ReceiptHandle": "none"}
    await _is_there(client.change_message_visibility(**none, VisibilityTimeout=0))
    await _is_there(client.delete_message(**none))


def _region_of(queue: str) -> str | None:
    """Return the region that a queue's URL names, if it is one of AWS's."""
    found = re.match(r"https?://(?:[^/]*\.)?sqs(?:-fips)?\.([a-z]+-[a-z0-9-]+)\.", queue)
    return found[1] if found else None


class _Busy(OSError):
    """SQS has answered that it cannot for the moment."""


def _code(error: exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def _refusals(source: _Source) -> Iterator[None]:
    """Say what SQS refused, and where; what goes away by itself becomes one of `_AWAY`."""
    try:
        yield
    except _AWAY:
        raise
    except exceptions.ClientError as error:
        code, status = _code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _NO_QUEUE:
            raise SourceUnfit(f"{source}: there is no such queue, and none is made") from error
        if status >= 500 or status == 429 or code in _BUSY or "throttl" in code.lower():
            raise _Busy(str(error)) from error
        if status in (401, 403) or "AccessDenied" in code:
            raise SourceUnfit(f"{source}: the connection's user may not use it: {error}") from error
        raise
    except exceptions.BotoCoreError as error:
        raise SourceUnfit(f"{source}: the connection cannot be used: {error}") from error


def _client(source: _Source) -> contextlib.AbstractAsyncContextManager[Any]:
    """Use the client by which the waits of this process commit and release."""

    async def connect() -> Any:
        with _refusals(source):
            return await _connect(source)

    return connected(("sqs client", source.conn_id, source.region), connect, lambda client: client.close())


class _Credentials(AioCredentials):  # type: ignore[misc]
    """
    The credentials of the Amazon provider's own session, as an asynchronous client wants them.

    What has to be renewed (a role's, a web identity's, an instance's) the session renews by blocking calls, so
    that is done in a thread.
    """

    def __init__(self, credentials: Any) -> None:
        now = credentials.get_frozen_credentials()
        super().__init__(now.access_key, now.secret_key, now.token, method=credentials.method)
        self._credentials = credentials

    async def load_credentials(self) -> _Credentials:
        return self

    async def get_frozen_credentials(self) -> Any:
        if isinstance(self._credentials, RefreshableCredentials):
            return await asyncio.to_thread(self._credentials.get_frozen_credentials)
        return self._credentials.get_frozen_credentials()


async def _connect(source: _Source) -> Any:
    """Make a client of an Airflow connection, which the Amazon provider's own hook reads."""
    found = None if source.conn_id is None else await connection(source.conn_id, "aws")
    session, options = await asyncio.to_thread(_prepare, source, found)
    return await session.create_client("sqs", **options).__aenter__()


def _prepare(source: _Source, found: Connection | None) -> tuple[Any, dict[str, Any]]:
    """Do what blocks of making a client: read files, assume the role, ask the instance for credentials."""
    hook: Any = AwsBaseHook(aws_conn_id=source.conn_id, region_name=source.region, client_type="sqs")
    hook.conn_config = AwsConnectionWrapper(conn=found, region_name=source.region)
    provided = hook.get_session(region_name=hook.region_name)
    region = hook.region_name or provided.region_name
    if region is None:
        raise SourceUnfit(f"{source}: there is no region; give region_name, or put it into the connection's extra")
    session = aiobotocore.session.get_session()
    session.register_component("data_loader", _loader)
    if hook.config.signature_version is not UNSIGNED:
        credentials = provided.get_credentials()
        if credentials is None:
            raise SourceUnfit(f"{source}: the connection has no credentials, and boto3 finds none")
        session.register_component("credential_provider", _Credentials(credentials))
    # A client made in the loop finds the descriptions of the service read.
    reader = botocore.session.Session()
    reader.register_component("data_loader", _loader)
    reader.create_client("sqs", region_name=region, aws_access_key_id="-", aws_secret_access_key="-")
    # Without retries of its own: the hub and the commit try again, and say so.
    config = Config(
        connect_timeout=10,
        read_timeout=_LONG_POLL + 10,
        retries={"total_max_attempts": 1},
        user_agent_extra="airflow-events",
    )
    return session, {
        "region_name": region,
        "endpoint_url": hook.conn_config.get_service_endpoint_url("sqs"),
        "verify": hook.verify,
        "config": hook.config.merge(config),
    }
