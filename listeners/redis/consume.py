"""Receiving entries as a member of a consumer group, and telling Redis what became of them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from airflow_events.errors import EventUndecodable, SourceMisconfigured
from airflow_events.listeners.redis.client import (
    BLOCK,
    LOST,
    Source,
    coordinates,
    named,
    refusals,
    text,
)
from airflow_events.listeners.support.hub import Seeker
from airflow_events.listeners.support.queue import REASON, SOURCE, Delivery, QueueHub
from redis import exceptions
from redis.asyncio import Redis

log = logging.getLogger(__name__)

# The consumer in whose name all of a deployment read: which process has an entry, no other need know.
_CONSUMER = "airflow"
# Seconds between two looks for entries that nobody has acknowledged or kept for a while.
_LOOK_EVERY = 5.0


class Entry(NamedTuple):
    """An entry, and where it came from: see `named`."""

    server: str
    id: str
    fields: dict[bytes, bytes]


class GroupHub(QueueHub):
    """Receives entries for the waits on one group."""

    lost: ClassVar[tuple[type[BaseException], ...]] = LOST

    def __init__(self, source: Source, start: str, require_persistence: bool, lease: float) -> None:
        self._source = source
        self._start = start
        self._require_persistence = require_persistence
        self._lease = round(lease * 1000)  # milliseconds
        self._look_every = min(lease, _LOOK_EVERY)
        self.keep_every = lease / 4
        self._looked = 0.0
        self._client: Redis | None = None
        self._server = ""
        super().__init__(str(source))

    @property
    def client(self) -> Redis:
        """Redis's client, of a hub that is connected."""
        assert self._client is not None
        return self._client

    async def connect(self) -> None:
        self._client, self._server = await named(self._source.conn_id, 4)
        self._looked = 0.0
        with refusals(self._source):
            if self._require_persistence:
                await _check_persistence(self._client, self._source)
            # If it is there, nothing need be made; and a server without memory lets what is there be read.
            with contextlib.suppress(exceptions.NoPermissionError, exceptions.OutOfMemoryError):
                await self._make_group()

    async def disconnect(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def serve(self) -> None:
        stream, group = self._source.stream, self._source.group
        with refusals(self._source):
            try:
                if time.monotonic() - self._looked >= self._look_every:
                    await self._claim_left_over()
                if not self.wanted:
                    return
                found: Any = await self.client.xreadgroup(
                    group, _CONSUMER, {stream: ">"}, count=self.wanted, block=BLOCK
                )
                self._start = "0"  # the group is there, and whatever is added while it is gone is new
            except exceptions.ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                # Stream or group were deleted: what has been added since is all new. Or none could be made before.
                await self._make_group()
                return
        for _, entries in found or ():
            for entry, fields in entries:
                self._offer(text(entry), fields)

    async def _claim_left_over(self) -> None:
        """Claim entries that were delivered, and that nobody has acknowledged or kept for a while."""
        place = "0-0"
        while self.wanted:
            found: Any = await self.client.xautoclaim(
                self._source.stream, self._source.group, _CONSUMER, self._lease, place, count=self.wanted
            )
            place, entries, *_ = found
            for entry, fields in entries:
                if entry is not None and fields:  # Redis 6.2 says nothing of what was trimmed away
                    self._offer(text(entry), fields)
            if text(place) == "0-0":
                self._looked = time.monotonic()
                return

    def _offer(self, entry: str, fields: dict[bytes, bytes]) -> None:
        id = coordinates(self._server, self._source.stream, self._source.group, entry)
        self.offer(id, Entry(self._server, entry, fields))

    async def lag(self, seeker: Seeker) -> int | None:
        for group in await self.client.xinfo_groups(self._source.stream):
            if text(group["name"]) == self._source.group and group.get("lag") is not None:  # from Redis 7 on
                return int(group["lag"]) + int(group["pending"])
        return None

    async def acknowledge(self, deliveries: Mapping[str, Delivery]) -> None:
        if deliveries:
            await acknowledge(self.client, self._source, _entries(deliveries))

    async def give_back(self, deliveries: Mapping[str, Delivery]) -> None:
        await self._claim(deliveries, idle=self._lease)

    async def keep(self, deliveries: Mapping[str, Delivery]) -> None:
        await self._claim(deliveries, idle=0)

    async def _claim(self, deliveries: Mapping[str, Delivery], *, idle: int) -> None:
        """Let entries have been delivered so many milliseconds ago; that does not count as a delivery."""
        if entries := _entries(deliveries):
            await self.client.xclaim(
                self._source.stream, self._source.group, _CONSUMER, 0, entries, idle=idle, justid=True
            )

    async def _make_group(self) -> None:
        try:
            await self.client.xgroup_create(self._source.stream, self._source.group, self._start, mkstream=True)
        except exceptions.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        self._start = "0"


def _entries(deliveries: Mapping[str, Delivery]) -> list[Any]:
    return [delivery.message.id for delivery in deliveries.values()]


async def acknowledge(client: Redis, source: Source, entries: Iterable[str]) -> None:
    """Acknowledge entries; of those that are acknowledged already it changes nothing."""
    with refusals(source):
        await client.xack(source.stream, source.group, *entries)


async def bury(client: Redis, source: Source, entry: Entry, stream: str, error: EventUndecodable) -> None:
    """Add an entry that cannot be read to a stream for such, with the reason."""
    fields: dict[Any, Any] = {**entry.fields, REASON: error.reason}
    fields[SOURCE] = f"the entry {entry.id} of {source}"
    with refusals(source):
        await client.xadd(stream, fields)
    log.warning("Added to the dead letters in %r: %s", stream, error)


async def _check_persistence(client: Redis, source: Source) -> None:
    try:
        on_disk = (await client.info("persistence")).get("aof_enabled")
        on_disk = on_disk or (await client.config_get("save")).get("save")
    except exceptions.AuthenticationError:
        raise
    except exceptions.ResponseError:  # a managed server may not tell
        return
    if not on_disk:
        raise SourceMisconfigured(
            f"{source}: the server keeps nothing on disk (appendonly is 'no', save is ''), so a restart loses "
            "what no wait has had yet; set appendonly to 'yes', or give require_persistence=False"
        )
