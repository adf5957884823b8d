"""SQS's client, made of an Airflow connection; its clock; and its refusals, as our errors."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import aiobotocore.session
import botocore.session
from aiobotocore.credentials import AioCredentials
from airflow.providers.amazon.aws.hooks.base_aws import AwsBaseHook
from airflow.providers.amazon.aws.utils.connection_wrapper import AwsConnectionWrapper
from airflow_events.errors import SourceUnfit
from airflow_events.listeners.connections import connection
from airflow_events.listeners.shared import connected
from botocore import UNSIGNED, exceptions
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from botocore.loaders import Loader

if TYPE_CHECKING:
    from airflow.sdk import Connection

# Seconds for which a receive waits on the server. One receive serves all waits, also those that come while it
# waits, and it returns as soon as there is a message. The last wait to leave has to sit it out.
LONG_POLL = 5
AWAY = (
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


@dataclass(frozen=True)
class Source:
    """A queue of a connection; the region is None if the connection, or boto3, says it."""

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


def region_of(queue: str) -> str | None:
    """Return the region that a queue's URL names, if it is one of AWS's."""
    found = re.match(r"https?://(?:[^/]*\.)?sqs(?:-fips)?\.([a-z]+-[a-z0-9-]+)\.", queue)
    return found[1] if found else None


async def is_there(request: Any) -> bool:
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


async def clock(client: Any, url: str) -> datetime:
    """Ask SQS what time it is."""
    return date_of(await client.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"]))


def date_of(answer: dict[str, Any]) -> datetime:
    """Return when SQS answered, to the second; by the own clock if something between took the header away."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        date = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return date.astimezone(timezone.utc)
    return datetime.now(timezone.utc)


async def url_of(client: Any, queue: str) -> str:
    """Return a queue's URL; of a URL, itself."""
    if "://" in queue:
        return queue
    return str((await client.get_queue_url(QueueName=queue))["QueueUrl"])


class _Busy(OSError):
    """SQS has answered that it cannot for the moment."""


def _code(error: exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def refusals(source: Source) -> Iterator[None]:
    """Say what SQS refused, and where; what goes away by itself becomes one of `AWAY`."""
    try:
        yield
    except AWAY:
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


def client_of(source: Source) -> contextlib.AbstractAsyncContextManager[Any]:
    """Use the client by which the waits of this process commit and release."""

    async def made() -> Any:
        with refusals(source):
            return await connect(source)

    return connected(("sqs client", source.conn_id, source.region), made, lambda client: client.close())


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


async def connect(source: Source) -> Any:
    """Make a client of an Airflow connection, which the Amazon provider's own hook reads."""
    found = None if source.conn_id is None else await connection(source.conn_id, "aws")
    session, options = await asyncio.to_thread(_prepare, source, found)
    return await session.create_client("sqs", **options).__aenter__()


def _prepare(source: Source, found: Connection | None) -> tuple[Any, dict[str, Any]]:
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
        read_timeout=LONG_POLL + 10,
        retries={"total_max_attempts": 1},
        user_agent_extra="airflow-events",
    )
    return session, {
        "region_name": region,
        "endpoint_url": hook.conn_config.get_service_endpoint_url("sqs"),
        "verify": hook.verify,
        "config": hook.config.merge(config),
    }
