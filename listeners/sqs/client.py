"""SQS's client, made of an Airflow connection; and its refusals, as our errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiobotocore.session
import botocore.session
from aiobotocore.credentials import AioCredentials
from airflow.configuration import conf
from airflow.providers.amazon.aws.hooks.base_aws import AwsBaseHook
from airflow.providers.amazon.aws.utils.connection_wrapper import AwsConnectionWrapper
from airflow.sdk.exceptions import AirflowNotFoundException
from airflow_events.errors import SourceMisconfigured, SourceMissing
from airflow_events.listeners.support.connections import connection, known_extras
from airflow_events.listeners.support.hub import LoginRefused
from botocore import UNSIGNED, exceptions
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from botocore.loaders import Loader

if TYPE_CHECKING:
    from airflow.sdk import Connection

log = logging.getLogger(__name__)

# Seconds for which a receive waits on the server, if the one before brought nothing. It returns as soon as there
# is a message. The last wait to leave has to sit it out.
LONG_POLL = 5
AWAY = (
    exceptions.ConnectionError,
    exceptions.HTTPClientError,
    exceptions.CredentialRetrievalError,
    exceptions.MetadataRetrievalError,
    OSError,
)
# What passes by itself: what SQS says, and what botocore tries again, of the services that give credentials, too.
_BUSY = frozenset({
    "OverLimit", "RequestLimitExceeded", "ServiceUnavailable", "InternalError", "InternalFailure",
    "RequestTimeout", "RequestTimeoutException", "PriorRequestNotComplete", "TooManyRequestsException",
    "LimitExceededException", "ProvisionedThroughputExceededException", "TransactionInProgressException",
    "BandwidthLimitExceeded", "SlowDown", "IDPCommunicationError",
})  # fmt: skip
# Said of a token that is wrong, and with these words while its issuer cannot be reached.
_NO_ISSUER = "InvalidIdentityToken", "retrieve verification key"
_ARN = re.compile(r"arn:[\w-]+:sqs:(?P<region>[\w-]+):(?P<account>\d+):(?P<name>[\w.-]+)")
# The extras that the Amazon provider reads; and those that it did once.
_EXTRAS = frozenset({
    "aws_access_key_id", "aws_secret_access_key", "aws_session_token", "session_kwargs", "profile_name",
    "region_name", "endpoint_url", "service_config", "verify", "config_kwargs", "role_arn",
    "assume_role_method", "assume_role_kwargs", "assume_role_with_saml",
    "assume_role_with_web_identity_federation", "assume_role_with_web_identity_token_file",
    "assume_role_with_web_identity_federation_audience",
})  # fmt: skip
_NO_MORE = {
    "aws_account_id": "the Amazon provider does not read it; give 'role_arn'",
    "aws_iam_role": "the Amazon provider does not read it; give 'role_arn'",
    "external_id": "the Amazon provider does not read it; give 'assume_role_kwargs' with 'ExternalId'",
    "host": "the Amazon provider does not read it; give 'endpoint_url'",
    "profile": "the Amazon provider does not read it; give 'profile_name'",
    "s3_config_file": "the Amazon provider does not read it; give 'profile_name', or keys",
    "s3_config_format": "the Amazon provider does not read it; give 'profile_name', or keys",
}
_DEFAULT = "aws_default"
# The connections that were there in this process.
_found: set[str] = set()
# How often a session is asked for credentials, and seconds between two attempts.
_ATTEMPTS, _PAUSE = 3, 1.0
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


def coordinates(queue_arn: str, message_id: str) -> str:
    """
    Return what tells a message of a queue from every other. Its form is frozen.

    SQS makes an id for each message that is sent. It is the same at each delivery, and another one where a redrive
    moves the message from a dead-letter queue back to its queue.
    """
    return json.dumps([queue_arn, message_id], ensure_ascii=False)


def region_of(queue: str) -> str | None:
    """Return the region that a queue's ARN names, or its URL, if it is one of AWS's."""
    if (by_name := _ARN.fullmatch(queue)) is not None:
        return by_name["region"]
    found = re.match(r"https?://(?:[^/]*\.)?sqs(?:-fips)?\.([a-z]+-[a-z0-9-]+)\.", queue)
    # As AWS's URLs were at first.
    found = found or re.match(r"https?://(?:([a-z]+-[a-z0-9-]+)\.)?queue\.amazonaws\.com(?:\.cn)?/", queue)
    return (found[1] or "us-east-1") if found else None


async def tried(request: Any) -> None:
    """Make a request about a message that is not there, to see whether it is allowed."""
    try:
        await request
    except exceptions.ClientError as error:
        if not refuses_receipt(error.response.get("Error", {})):
            raise


def refuses_receipt(error: Mapping[str, Any]) -> bool:
    """Whether SQS says that it has no message in flight by a receipt."""
    code = error.get("Code")
    # Not each InvalidParameterValue: a visibility timeout that is refused says nothing about the message.
    return code in ("ReceiptHandleIsInvalid", "MessageNotInflight") or (
        code == "InvalidParameterValue" and "parameter ReceiptHandle" in error.get("Message", "")
    )


async def url_of(client: Any, queue: str) -> str:
    """Return the URL of a queue, which is given by its name, its ARN, or its URL."""
    if "://" in queue:
        return queue
    by_name = _ARN.fullmatch(queue)
    of_whom = {"QueueOwnerAWSAccountId": by_name["account"]} if by_name else {}
    return str(
        (await client.get_queue_url(QueueName=by_name["name"] if by_name else queue, **of_whom))["QueueUrl"]
    )


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
            raise SourceMissing(
                f"{source}: there is no such queue; create it, as it is not created automatically"
            ) from error
        no_issuer = code == _NO_ISSUER[0] and _NO_ISSUER[1] in str(error)
        if status >= 500 or status == 429 or code in _BUSY or "throttl" in code.lower() or no_issuer:
            raise _Busy(str(error)) from error
        if status in (401, 403) or "AccessDenied" in code or "ExpiredToken" in code:
            raise LoginRefused(f"{source}: the connection's user may not use it: {error}") from error
        raise
    except exceptions.BotoCoreError as error:
        raise SourceMisconfigured(f"{source}: the connection cannot be used: {error}") from error


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
    found = await _connection(source)
    by_name = _ARN.fullmatch(source.queue)
    if by_name and source.region not in (None, by_name["region"]):
        raise SourceMisconfigured(f"{source}: the queue is of another region than region_name says")
    session, options = await asyncio.to_thread(_prepare, source, found)
    return await session.create_client("sqs", **options).__aenter__()


async def _connection(source: Source) -> Connection | None:
    """Return the Airflow connection; None if there is to be none, or no default one, as `SqsHook` has it."""
    if source.conn_id is None:
        return None
    try:
        found = await connection(source.conn_id, "aws")
    except AirflowNotFoundException:
        # What was there may be out of reach: without it, events would be taken from another account's queue.
        if source.conn_id != _DEFAULT or source.conn_id in _found:
            raise
        log.info("There is no connection %r; the credentials are those that boto3 finds", _DEFAULT)
        return None
    _found.add(source.conn_id)
    if not conf.get("aws", "session_factory", fallback=""):  # which may read extras of its own
        known_extras(found, _EXTRAS, _NO_MORE)
    return found


def _credentials_of(session: Any) -> Any:
    """Return the session's credentials, None if there are none; an instance's metadata may take a few attempts."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE)
        if (credentials := session.get_credentials()) is not None:
            return credentials
    return None


def _prepare(source: Source, found: Connection | None) -> tuple[Any, dict[str, Any]]:
    """Do what blocks of making a client: read files, assume the role, ask the instance for credentials."""
    hook: Any = AwsBaseHook(aws_conn_id=source.conn_id, region_name=source.region, client_type="sqs")
    hook.conn_config = AwsConnectionWrapper(conn=found, region_name=source.region)
    provided = hook.get_session(region_name=hook.region_name)
    region = hook.region_name or provided.region_name
    if region is None:
        raise SourceMisconfigured(
            f"{source}: there is no region; give region_name, or put it into the connection's extra"
        )
    session = aiobotocore.session.get_session()
    session.register_component("data_loader", _loader)
    if provided.profile_name != "default":  # for what it says besides credentials, such as an endpoint
        session.set_config_variable("profile", provided.profile_name)
    if hook.config.signature_version is not UNSIGNED:
        if (credentials := _credentials_of(provided)) is None:
            raise SourceMissing(f"{source}: the connection has no credentials, and boto3 finds none")
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
        max_pool_connections=20,
        user_agent_extra="airflow-events",
    )
    return session, {
        "region_name": region,
        "endpoint_url": hook.conn_config.get_service_endpoint_url("sqs"),
        "verify": hook.verify,
        "config": hook.config.merge(config),
    }
