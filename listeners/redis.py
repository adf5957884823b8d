"""Redis Streams, and Valkey's: a consumer group as a queue, and a stream as a log."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, ClassVar

from airflow_events import settings
from airflow_events.errors import EventLost, EventUndecodable, SourceUnfit
from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.connections import connection
from airflow_events.listeners.hub import Hub, Seeker
from airflow_events.listeners.log import LogHub, Message, Watcher, since_of
from airflow_events.listeners.shared import connected, shared
from airflow_events.listeners.values import Format, Match, OnUndecodable, check_choices, decode

try:
    from redis import exceptions
    from redis.asyncio import Redis
    from redis.asyncio.connection import BlockingConnectionPool, Connection, SSLConnection
except ImportError as error:
    raise ImportError("a Redis listener needs: pip install airflow-provider-events[redis]") from error

log = logging.getLogger(__name__)

DEFAULT = "redis_default"

# Milliseconds for which a hub's read blocks on the server, after which it sees new waits.
_BLOCK = 500
# What a released claim is held by: its idle time is such that it has lapsed for whoever asks.
_RELEASED = "=released"
_LAPSED = 2**40
_LOST = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.BusyLoadingError, OSError)
_TLS = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_keyfile", "ssl_certfile", "ssl_check_hostname")

# Each script is one step on the server, so that two triggerers which poll for the same wait get one claim.
# None of them makes a consumer for a wait that gets nothing.
_CLAIM = """
if redis.replicate_commands then pcall(redis.replicate_commands) end
local stream, group, wait, lapse = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
while true do
    local entry = nil
    local held = redis.call('XPENDING', stream, group, '-', '+', 1, wait)
    if #held > 0 then
        entry = held[1][1]
    else
        local lapsed = redis.call('XPENDING', stream, group, 'IDLE', lapse, '-', '+', 1)
        if #lapsed > 0 then
            redis.call('XCLAIM', stream, group, wait, lapse, lapsed[1][1], 'JUSTID')
            entry = lapsed[1][1]
        else
            local groups = redis.call('XINFO', 'GROUPS', stream)
            local last = nil
            for _, fields in ipairs(groups) do
                local about = {}
                for i = 1, #fields, 2 do about[fields[i]] = fields[i + 1] end
                if about['name'] == group then last = about['last-delivered-id'] end
            end
            if #redis.call('XRANGE', stream, '(' .. last, '+', 'COUNT', 1) == 0 then return false end
            local read = redis.call('XREADGROUP', 'GROUP', group, wait, 'COUNT', 1, 'STREAMS', stream, '>')
            if not read then return false end
            return read[1][2][1]
        end
    end
    local there = redis.call('XRANGE', stream, entry, entry)
    if #there > 0 then return there[1] end
    -- Trimmed away while it was claimed: there is nothing to deliver.
    redis.call('XACK', stream, group, entry)
end
"""

_COMMIT = """
if redis.replicate_commands then pcall(redis.replicate_commands) end
local stream, owner = KEYS[1], KEYS[2]
local group, wait, entry, memory = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local who = redis.call('GET', owner)
if who then return who end
local held = redis.call('XPENDING', stream, group, entry, entry, 1)
if #held == 0 then return '' end
if held[1][2] ~= wait then return held[1][2] end
redis.call('SET', owner, wait, 'PX', memory)
redis.call('XACK', stream, group, entry)
if #redis.call('XPENDING', stream, group, '-', '+', 1, wait) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, wait)
end
return wait
"""

_RELEASE = f"""
if redis.replicate_commands then pcall(redis.replicate_commands) end
local stream, group, wait = KEYS[1], ARGV[1], ARGV[2]
for _, held in ipairs(redis.call('XPENDING', stream, group, '-', '+', 1000, wait)) do
    redis.call('XCLAIM', stream, group, '{_RELEASED}', 0, held[1], 'IDLE', '{_LAPSED}', 'JUSTID')
end
if #redis.call('XPENDING', stream, group, '-', '+', 1, wait) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, wait)
end
return 1
"""


class RedisListener(EventListener):
    """
    Take an entry of a stream as a member of a consumer group: each entry goes to one wait, exactly once.

    The claim is Redis's own list of pending entries, with the wait's id as the consumer. The event is

    ``{"stream", "group", "id", "timestamp", "value", "redis_conn_id"}``, ``timestamp`` a datetime in UTC, from the
    entry's id.

    Entries are acknowledged and not deleted: how long a stream is, ``XADD ... MAXLEN`` or ``XTRIM`` decides. An
    entry that is trimmed away before a wait had it is gone.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        stream: str,
        *,
        group: str = "airflow",
        field: str | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "fail",
        start: str = "0",
        claim_timeout: float | timedelta = 3600.0,
        require_persistence: bool = True,
        redis_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return when there is an entry that no other wait of the group has, the oldest first.

        :param stream: its key. It is made, with the group, if it is not there.
        :param group: the consumer group.
        :param field: which of the entry's fields is the value; None makes a dict of all of them, as text.
        :param values: of what format ``field`` is; see `airflow_events.listeners.values.decode`.
        :param on_undecodable: what to do with an entry that is not: ``fail`` fails the wait and leaves the entry
            to others, ``skip`` acknowledges it, with a warning, and waits on.
        :param start: where a group that is not there yet begins: ``0`` at the first entry, ``$`` at the next one.
        :param claim_timeout: after how many seconds an entry that a wait has claimed and not committed goes to
            another. A wait that still lives loses nothing by it: its commit is refused, and it waits on.
        :param require_persistence: refuse a server that keeps nothing on disk.
        :param redis_conn_id: an Airflow connection of type ``redis``, as the Redis provider has it: ``db``,
            ``ssl`` and ``ssl_...`` among the extras.
        :raises SourceUnfit: the connection is of another type, or is a cluster's; the server keeps nothing on
            disk; the key is no stream; the user may not use it.
        :raises SourceUnreachable: the server was away for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        check_choices(values, on_undecodable)
        source = _Source(redis_conn_id, stream, group)
        wait = current_wait().id
        lapse = claim_timeout.total_seconds() if isinstance(claim_timeout, timedelta) else claim_timeout
        key = ("redis", source, start, require_persistence)
        while True:
            async with shared(key, lambda: _QueueHub(source, start, require_persistence)) as hub:
                entry, fields = await hub.take(_Consumer(wait, round(lapse * 1000)))
            try:
                event = _event(source, entry, fields, field, values)
            except EventUndecodable as error:
                async with _client(redis_conn_id) as client:
                    if on_undecodable == "fail":
                        await client.eval(_RELEASE, 1, stream, group, wait)
                        raise
                    await source.commit(client, wait, entry)
                log.warning("Passed over, and acknowledged: %s", error)
            else:
                return {**event, "redis_conn_id": redis_conn_id}

    async def event_checkpointed(self, event: Any) -> None:
        """Acknowledge the entry, and note for ``[events] commit_memory`` seconds who did."""
        source = _Source(event["redis_conn_id"], event["stream"], event["group"])
        async with _client(source.conn_id) as client:
            await source.commit(client, current_wait().id, event["id"])

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Let another wait have the entry at once."""
        stream = args[0] if args else kwargs["stream"]
        async with _client(kwargs.get("redis_conn_id", DEFAULT)) as client:
            await client.eval(_RELEASE, 1, stream, kwargs.get("group", "airflow"), current_wait().id)


class RedisWatchListener(EventListener):
    """
    Wait for the first entry of a stream that matches, and take nothing away.

    The event is as of `RedisListener`, without ``group``.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        stream: str,
        *,
        match: dict[str, Any] | str | None = None,
        since: datetime | str | timedelta | None = None,
        field: str | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "skip",
        redis_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return the first entry that matches, added at ``since`` or later.

        :param match: see `airflow_events.listeners.values.Match`.
        :param since: a moment, or a timedelta from the start of the run; None is the start of the run.

        The other parameters and errors are as of `RedisListener.poll_for_event`; here an undecodable entry is
        passed over, with a warning in the triggerer's log, unless ``on_undecodable`` is ``fail``.
        """
        check_choices(values, on_undecodable)
        watcher = Watcher(Match(match), since_of(since, current_wait()), on_undecodable)
        source = _Source(redis_conn_id, stream)
        key = ("redis watch", source, field, values)
        async with shared(key, lambda: _StreamHub(source, field, values)) as hub:
            return dict(await hub.take(watcher))


@dataclass(frozen=True)
class _Source:
    conn_id: str
    stream: str
    group: str = ""

    def __str__(self) -> str:
        group = f" (group {self.group!r})" if self.group else ""
        return f"the stream {self.stream!r}{group} of the connection {self.conn_id!r}"

    async def commit(self, client: Redis, wait: str, entry: str) -> None:
        """
        Acknowledge an entry that ``wait`` has claimed.

        :raises EventLost: another wait has it, or had it acknowledged, or somebody else did.
        """
        # The braces keep both keys on one node of a cluster.
        tag = self.stream if "{" in self.stream else f"{{{self.stream}}}"
        owner = f"airflow-events:{tag}:{self.group}:{entry}"
        memory = round(settings.commit_memory() * 1000)
        who = _text(await client.eval(_COMMIT, 2, self.stream, owner, self.group, wait, entry, memory))
        if who != wait:
            holder = who or "nobody (it was acknowledged by others, or trimmed)"
            raise EventLost(f"the entry {entry} of {self} is held by {holder}")


class _Consumer(Seeker):
    def __init__(self, wait: str, lapse: int) -> None:
        super().__init__()
        self.wait = wait
        self.lapse = lapse
        self.asked = False


class _QueueHub(Hub[_Consumer]):
    """Claims entries for the waits of one group."""

    lost: ClassVar[tuple[type[BaseException], ...]] = _LOST

    def __init__(self, source: _Source, start: str, require_persistence: bool) -> None:
        self._source = source
        self._start = start
        self._require_persistence = require_persistence
        self._client: Redis | None = None
        super().__init__(str(source))

    async def connect(self) -> None:
        self._client = await _connect(self._source.conn_id, 1)
        with _refusals(self._source):
            if self._require_persistence:
                await _check_persistence(self._client, self._source)
            try:
                await self._client.xgroup_create(
                    self._source.stream, self._source.group, self._start, mkstream=True
                )
            except exceptions.ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    async def disconnect(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def serve(self) -> None:
        client, stream = self._client, self._source.stream
        assert client is not None
        with _refusals(self._source):
            newest = await client.xrevrange(stream, count=1)
            last = _text(newest[0][0]) if newest else "0"
            there_may_be_more = True
            for seeker in [seeker for seeker in self.seekers if not seeker.done]:
                if not there_may_be_more and seeker.asked:
                    continue
                seeker.asked = True
                entry = await client.eval(_CLAIM, 1, stream, self._source.group, seeker.wait, seeker.lapse)
                if entry:
                    seeker.give((_text(entry[0]), _pairs(entry[1])))
                else:
                    there_may_be_more = False
            if not there_may_be_more:
                await client.xread({stream: last}, count=1, block=_BLOCK)


class _StreamHub(LogHub[str]):
    """Reads one stream for those who watch it."""

    lost: ClassVar[tuple[type[BaseException], ...]] = _LOST

    def __init__(self, source: _Source, field: str | None, values: Format) -> None:
        self._source = source
        self._field = field
        self._values = values
        self._client: Redis | None = None
        super().__init__(str(source))

    async def connect(self) -> None:
        self._client = await _connect(self._source.conn_id, 1)
        with _refusals(self._source):
            await self._client.xlen(self._source.stream)

    async def disconnect(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def position(self, since: datetime) -> str:
        return f"{max(round(since.timestamp() * 1000) - 1, 0)}-{2**64 - 1}"

    async def read(self, position: str) -> tuple[str, list[Message]]:
        assert self._client is not None
        with _refusals(self._source):
            found = await self._client.xread({self._source.stream: position}, count=500, block=_BLOCK)
        entries = [(_text(entry), fields) for _, entries in _streams(found) for entry, fields in entries]
        return (entries[-1][0] if entries else position), [self._message(*entry) for entry in entries]

    async def dropped_until(self) -> datetime | None:
        assert self._client is not None
        with contextlib.suppress(exceptions.ResponseError):  # there is no such stream yet
            about = await self._client.xinfo_stream(self._source.stream)
            added = about.get("entries-added")  # since Redis 7
            if added is not None and added > about["length"]:
                first = about["first-entry"]
                return _moment(_text(first[0] if first else about["last-generated-id"]))
        return None

    def _message(self, entry: str, fields: dict[bytes, bytes]) -> Message:
        try:
            event = _event(self._source, entry, fields, self._field, self._values)
        except EventUndecodable as error:
            return Message(_moment(entry), {}, error)
        return Message(event["timestamp"], event)


def _event(
    source: _Source, entry: str, fields: dict[bytes, bytes], field: str | None, values: Format
) -> dict[str, Any]:
    where = f"the entry {entry} of {source}"
    value: Any
    if field is None:
        value = {_decoded(name, where): _decoded(content, where) for name, content in fields.items()}
    elif field.encode() not in fields:
        there = ", ".join(repr(name) for name in fields)
        raise EventUndecodable(where, values, f"it has no field {field!r}, only {there}", b"")
    else:
        value = decode(fields[field.encode()], values, f"the field {field!r} of {where}")
    event = {"stream": source.stream, "id": entry, "timestamp": _moment(entry), "value": value}
    return event if not source.group else {**event, "group": source.group}


def _decoded(raw: bytes, where: str) -> str:
    return str(decode(raw, "text", where))


def _moment(entry: str) -> datetime:
    return datetime.fromtimestamp(int(entry.partition("-")[0]) / 1000, timezone.utc)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _pairs(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _streams(found: Any) -> Any:
    return found.items() if isinstance(found, dict) else found or []


@contextlib.contextmanager
def _refusals(source: _Source) -> Any:
    """Say what the server refused, and where."""
    try:
        yield
    except (exceptions.AuthenticationError, exceptions.AuthorizationError) as error:
        raise SourceUnfit(f"{source}: the server refuses the connection's login: {error}") from error
    except exceptions.NoPermissionError as error:
        raise SourceUnfit(f"{source}: the connection's user may not use it: {error}") from error
    except exceptions.ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
        raise SourceUnfit(f"{source}: there is a key of that name, and it is no stream") from error


async def _check_persistence(client: Redis, source: _Source) -> None:
    try:
        on_disk = (await client.info("persistence")).get("aof_enabled")
        on_disk = on_disk or (await client.config_get("save")).get("save")
    except exceptions.AuthenticationError:
        raise
    except exceptions.ResponseError:  # a managed server may not tell
        return
    if not on_disk:
        raise SourceUnfit(
            f"{source}: the server keeps nothing on disk (appendonly is 'no', save is ''), so a restart loses "
            "what no wait has had yet; set appendonly to 'yes', or give require_persistence=False"
        )


def _client(conn_id: str) -> contextlib.AbstractAsyncContextManager[Redis]:
    """Use the client by which the waits of this process commit and release."""
    return connected(("redis client", conn_id), lambda: _connect(conn_id, 4), Redis.aclose)


async def _connect(conn_id: str, connections: int) -> Redis:
    """Make a client of an Airflow connection, which it reads as the Redis provider's hook does."""
    found = await connection(conn_id, "redis")
    extra = found.extra_dejson
    if extra.get("cluster"):
        raise SourceUnfit(f"the connection {conn_id!r} is of a cluster, which is not supported yet")
    secure = str(extra.get("ssl", False)).lower() in ("true", "1")
    tls = {name: extra[name] for name in _TLS if name in extra} if secure else {}
    password = None if str(found.password).lower() in ("none", "false", "") else found.password
    pool = BlockingConnectionPool(
        connection_class=SSLConnection if secure else Connection,
        max_connections=connections,
        host=found.host or "localhost",
        port=found.port or 6379,
        username=found.login or None,
        password=password,
        db=int(extra.get("db") or 0),
        client_name="airflow-events",
        health_check_interval=30,
        **tls,
    )
    return Redis.from_pool(pool)
