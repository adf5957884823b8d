"""
Values and keys that only a schema registry can tell: Avro and JSON Schema, by the client's own deserializers.

They ask the registry by HTTP and block meanwhile, so all is done in a thread of its own. What the registry does
not answer is no fault of the message: it is asked again, and the message is neither skipped nor committed.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from datetime import time as time_of_day
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from airflow_events import settings
from airflow_events.errors import EventUndecodable, SourceMisconfigured, SourceUnreachable
from airflow_events.listeners.kafka import KafkaFormat
from airflow_events.listeners.kafka.client import PATIENCE, BrokerUnavailable, Worker
from airflow_events.listeners.support.connections import connection, known_extras, misconfigured
from airflow_events.listeners.support.values import FORMATS, check_choices, decode, json_of, text_of
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay
from tenacity.wait import wait_exponential, wait_random

if TYPE_CHECKING:
    from airflow.sdk import Connection

log = logging.getLogger(__name__)

_BY_REGISTRY = ("avro", "json_schema")

# What of the client's settings is ours unless the connection says otherwise. It would wait for ever.
_OURS = {"timeout": PATIENCE, "max.retries": 0}

_EXTRAS = frozenset({
    "url", "timeout", "max.retries", "retries.wait.ms", "retries.max.wait.ms", "cache.capacity",
    "cache.latest.ttl.sec", "proxy", "ssl.ca.location", "ssl.certificate.location", "ssl.key.location",
    "ssl.key.password", "basic.auth.user.info", "bearer.auth.client.id", "bearer.auth.client.secret",
    "bearer.auth.credentials.source", "bearer.auth.identity.pool.id", "bearer.auth.issuer.endpoint.query",
    "bearer.auth.issuer.endpoint.url", "bearer.auth.logical.cluster", "bearer.auth.scope", "bearer.auth.token",
})  # fmt: skip

_NUMBERS = frozenset({
    "timeout", "max.retries", "retries.wait.ms", "retries.max.wait.ms", "cache.capacity", "cache.latest.ttl.sec",
})  # fmt: skip

# A registry's own words for a subject, version or schema that it does not have. Any other 404 may be of a wrong
# address.
_UNKNOWN = (40401, 40402, 40403)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Formats:
    """
    What values and keys are.

    :param registry: the Airflow connection of the schema registry, where one is needed.
    :raises ValueError: a format that is none, or one that needs a registry.
    """

    values: KafkaFormat
    keys: KafkaFormat
    registry: str | None

    def __post_init__(self) -> None:
        for name, value in (("values", self.values), ("keys", self.keys)):
            check_choices(value, formats=(*FORMATS, *_BY_REGISTRY), name=name)
            if value in _BY_REGISTRY and self.registry is None:
                raise ValueError(
                    f"{name}={value!r} needs registry_conn_id, an Airflow connection of type 'http' to a schema "
                    "registry"
                )


class Decoder:
    """
    Makes values and keys of bytes, for all waits that say the same `Formats`.

    Without a registry it does so at once; with one in its thread.
    """

    def __init__(self, formats: Formats) -> None:
        self._formats = formats
        self._worker: Worker | None = None
        self._settings: dict[str, Any] | None = None
        self._deserializers: dict[str, Callable[..., Any]] = {}
        self._name = f"the schema registry of the connection {formats.registry!r}"

    async def open(self) -> None:
        """
        Read the registry's connection.

        :raises SourceMisconfigured: it is of another type, or has no host.
        """
        formats = self._formats
        if self._settings is None and {formats.values, formats.keys} & set(_BY_REGISTRY):
            assert formats.registry is not None
            self._settings = await _settings(formats.registry)
            self._worker = self._worker or Worker(f"kafka schemas {formats.registry}")

    async def do(self, work: Callable[[], _T]) -> _T:
        """
        Return what ``work`` returns, which may call `value`, where that may be called.

        :raises BrokerUnavailable: the registry does not answer.
        :raises SourceMisconfigured: it does not let the user in, or the connection has a setting that is none.
        """
        await self.open()
        return work() if self._worker is None else await self._worker.do(work)

    async def patiently(self, work: Callable[[], _T], tell: Callable[..., None] = log.log) -> _T:
        """
        Do it, however long it takes until the registry answers.

        :param tell: logs that it does not: with a level, a message and its arguments.
        :raises SourceUnreachable: longer than ``[events] unreachable_timeout``.
        """
        patience = settings.unreachable_timeout()
        began = time.monotonic()

        def failed(state: RetryCallState) -> None:
            if state.attempt_number == 1:
                assert state.outcome is not None
                message = "%s; trying again for up to %.0f s"
                tell(logging.WARNING, message, state.outcome.exception(), patience)

        def gave_up(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            raise SourceUnreachable(self._name, time.monotonic() - began, error or BrokerUnavailable()) from error

        attempts = AsyncRetrying(
            retry=retry_if_exception_type(BrokerUnavailable),
            stop=stop_after_delay(patience),
            wait=wait_exponential(multiplier=0.2, max=15) + wait_random(0, 0.3),
            before_sleep=failed,
            retry_error_callback=gave_up,
        )
        return await attempts(self.do, work)

    def value(self, raw: bytes | None, message: Any, where: str, *, key: bool = False) -> Any:
        """
        Return a message's value, or its key, of `raw`.

        A key that is ``text`` and no text becomes Base64: it often is none, and few look at it.

        :raises EventUndecodable: it is not of the format.
        """
        form = self._formats.keys if key else self._formats.values
        if key and raw is not None and form == "text":
            return text_of(raw)
        if raw is None or form not in _BY_REGISTRY:
            return decode(raw, form, where)  # type: ignore[arg-type]
        from confluent_kafka.serialization import MessageField, SerializationContext

        field = MessageField.KEY if key else MessageField.VALUE
        context = SerializationContext(message.topic(), field, message.headers() or [])
        deserializer = self._deserializer(form)
        try:
            return _storable(deserializer(raw, context))
        except (BrokerUnavailable, SourceMisconfigured):
            raise
        except Exception as error:  # there is no common class of what a deserializer finds wrong
            raise EventUndecodable(where, form, str(error) or repr(error), raw[:200]) from error

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.end()

    def _deserializer(self, form: str) -> Callable[..., Any]:
        if form not in self._deserializers:
            assert self._settings is not None
            try:
                from confluent_kafka.schema_registry.avro import AvroDeserializer
                from confluent_kafka.schema_registry.json_schema import JSONDeserializer
            except ImportError as error:
                raise ImportError(
                    f"the format {form!r} needs: pip install airflow-provider-events[kafka-registry]"
                ) from error
            client = _client(self._name, self._settings)
            # The client's own default asks the registry for more than older ones know.
            conf = {"subject.name.strategy.type": "TOPIC"}
            self._deserializers |= {
                "avro": AvroDeserializer(client, conf=conf),
                "json_schema": JSONDeserializer(
                    None, schema_registry_client=client, conf=conf, json_decode=json_of
                ),
            }
        return self._deserializers[form]


async def _settings(conn_id: str) -> dict[str, Any]:
    """Return the registry client's settings."""
    found = await connection(conn_id, "http", "https")
    told = known_extras(found, _EXTRAS)
    conf = {**_OURS, **told, **{name: _number(found, told, name) for name in _NUMBERS & told.keys()}}
    if "url" not in conf:
        if not found.host:
            raise SourceMisconfigured(f"the connection {conn_id!r} has no host, where a schema registry is needed")
        scheme = "https" if found.conn_type == "https" else found.schema
        conf["url"] = ",".join(_url(conn_id, host.strip(), scheme, found.port) for host in found.host.split(","))
    if not str(conf["url"]).startswith(("http://", "https://")):
        raise SourceMisconfigured(
            f"the connection {conn_id!r} has a URL that begins neither with 'http://' nor 'https://'"
        )
    if found.login:
        conf.setdefault("basic.auth.user.info", f"{found.login}:{found.password or ''}")
    return conf


def _number(found: Connection, told: Mapping[str, Any], name: str) -> int | float:
    """
    Return an extra that is a number; in a connection's URI it is text.

    :raises SourceMisconfigured: it is not a number.
    """
    value = told[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    with contextlib.suppress(ValueError, TypeError):
        return int(value)
    with contextlib.suppress(ValueError, TypeError):
        return float(value)
    raise misconfigured(found, f"has the extra {name}={value!r}, where a number is needed")


def _url(conn_id: str, host: str, scheme: str | None, port: int | None) -> str:
    """Return the address of one registry; ``host`` may be one already, or of IPv6, in brackets or not."""
    if "://" not in host:
        bare_ipv6 = host.count(":") > 1 and not host.startswith("[")
        host = f"{scheme or 'http'}://{f'[{host}]' if bare_ipv6 else host}"
    try:
        parts = urlsplit(host)
        if parts.port is None and port:
            parts = parts._replace(netloc=f"{parts.netloc}:{port}")
        return urlunsplit(parts)
    except ValueError as error:
        raise SourceMisconfigured(f"the connection {conn_id!r} has a host that is no address: {error}") from error


def _client(name: str, conf: dict[str, Any]) -> Any:
    """Make a registry client that tells what the registry does not answer from what a message has wrong."""
    from confluent_kafka.schema_registry import SchemaRegistryClient, SchemaRegistryError

    def asked(question: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        try:
            return question(*args, **kwargs)
        except SchemaRegistryError as error:
            if error.http_status_code in (401, 403):
                raise SourceMisconfigured(f"{name} refuses its user: authentication failed: {error}") from error
            # Of an invalid id, or a kind of ids that it does not know, a registry may say a bare 404, too.
            if error.error_code in _UNKNOWN or (error.http_status_code == 404 and is_there()):
                raise
            raise BrokerUnavailable(f"{name} does not answer as it should: {error}") from error
        except Exception as error:
            raise BrokerUnavailable(
                f"{name} does not answer: {error or type(error).__name__} ({type(error).__name__})"
            ) from error

    def is_there() -> bool:
        """Whether the address is a registry's."""
        try:
            client.get_subjects()
        except Exception:
            return False
        return True

    class Client(SchemaRegistryClient):
        def get_schema(self, *args: Any, **kwargs: Any) -> Any:
            return asked(super().get_schema, *args, **kwargs)

        def get_schema_by_guid(self, *args: Any, **kwargs: Any) -> Any:
            return asked(super().get_schema_by_guid, *args, **kwargs)

        def get_version(self, *args: Any, **kwargs: Any) -> Any:
            return asked(super().get_version, *args, **kwargs)

    try:
        client = Client(conf)
    except (ValueError, TypeError, OSError) as error:  # it names a setting or a file, and no value
        raise SourceMisconfigured(f"{name}: its settings are refused: {error}") from error
    return client


def _storable(value: Any) -> Any:
    """Return ``value`` without what Airflow does not store, or not exactly: as text."""
    if isinstance(value, dict):
        return {name: _storable(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(each) for each in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, time_of_day) or (isinstance(value, datetime) and value.tzinfo is None):
        return value.isoformat()
    return value
