"""Taking messages: each goes to one wait on its consumer."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Coroutine, Iterable, Iterator
from datetime import timedelta
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_events import settings
from airflow_events.errors import SourceUnfit
from airflow_events.listeners.hub import Hub, Seeker
from airflow_events.listeners.nats.claims import Claims
from airflow_events.listeners.nats.client import BATCH, BLOCK, LOST, SECOND, Server, about_of, connect, refusals
from airflow_events.listeners.nats.messages import MICROSECOND, Source, Stored, id_of, stored_as
from nats.aio.msg import Msg
from nats.js.errors import NotFoundError

if TYPE_CHECKING:
    from airflow_events.listeners.nats import Start

# Seconds within which every wait is looked up anew: another triggerer may have claimed for it.
_ROUND = 30.0
# Of a consumer that is made here. Each claim is a pending acknowledgement; the server's own limit is 1000.
_MAX_ACK_PENDING = 10_000
# Seconds. After these JetStream gives out again what a triggerer pulled and, having died, claimed for nobody.
_ACK_WAIT = 30


class Taker(Seeker):
    """A wait for a message that no other has."""

    def __init__(self, wait: str, lapse: timedelta) -> None:
        super().__init__()
        self.wait = wait
        self.lapse = lapse
        self.looked_up = 0.0  # by the monotonic clock; 0 is never


class QueueHub(Hub[Taker]):
    """Claims messages for the waits on one consumer."""

    lost: ClassVar[tuple[type[BaseException], ...]] = LOST

    def __init__(self, source: Source, subject: str | None, deliver_policy: Start, persistent: bool) -> None:
        self._source = source
        self._subject = subject
        self._deliver_policy = deliver_policy
        self._persistent = persistent
        self._server: Server | None = None
        self._keeps = timedelta.max
        super().__init__(str(source))

    async def connect(self) -> None:
        await self.disconnect()
        self._server = server = await connect(self._source.conn_id)
        with refusals(self._source):
            config = (await about_of(server, self._source))["config"]
            self._check_storage("the stream", config["storage"])
            await self._connect_bucket(server, config)
            await self._connect_consumer(server, config)
            await server.listen()
        for seeker in self.seekers:
            seeker.looked_up = 0.0

    async def disconnect(self) -> None:
        if self._server is not None:
            await self._server.close()

    async def serve(self) -> None:
        assert self._server is not None
        claims = Claims(self._server, self._source)
        with refusals(self._source):
            waiting = [seeker for seeker in self.seekers if not seeker.done]
            fresh = [seeker for seeker in waiting if not seeker.looked_up]
            # The others one after the other, all within a round.
            turn = max(10, round(len(waiting) * BLOCK / _ROUND))
            for batch in _batches(fresh or heapq.nsmallest(turn, waiting, key=lambda seeker: seeker.looked_up)):
                await _all(self._look_up(claims, seeker) for seeker in batch)
            if wanting := self._wanting():
                most = min(BATCH, len(wanting))
                pulled = await self._server.pull(self._source.stream, self._source.durable, most)
                # Some may have gone meanwhile.
                offers = zip_longest(pulled, list(self._wanting().items())[: len(pulled)], fillvalue=None)
                await _all(self._offer(claims, message, wait) for message, wait in offers if message is not None)

    def _wanting(self) -> dict[str, timedelta]:
        return {seeker.wait: seeker.lapse for seeker in self.seekers if not seeker.done}

    async def _look_up(self, claims: Claims, seeker: Taker) -> None:
        if seeker.lapse > self._keeps:
            seeker.fail(self._unfit("the bucket", "max_age", f"{self._keeps}", f"claim_timeout, {seeker.lapse}"))
            return
        found, _ = await claims.held(seeker.wait, seeker.lapse)
        seeker.looked_up = time.monotonic()
        if found is not None:
            seeker.give(found)

    async def _offer(self, claims: Claims, pulled: Msg, to: tuple[str, timedelta] | None) -> None:
        """Let a wait have a message, unless the message has been given already or the wait has another."""
        message = id_of(*stored_as(pulled.reply))
        mark = await claims.message(message)
        if mark.committed:
            await claims.server.publish(pulled.reply, b"+ACK")
        elif mark.left > 0:
            await claims.server.later(pulled.reply, mark.left)
        else:
            found = await claims.choose(*to, message, pulled.reply) if to is not None else None
            if found is None or found.id != message:
                await claims.server.later(pulled.reply, 0)
            if found is not None and to is not None:
                await self._give(claims, to[0], found)

    async def _give(self, claims: Claims, wait: str, found: Stored) -> None:
        seekers = [seeker for seeker in self.seekers if seeker.wait == wait]
        for seeker in seekers:
            seeker.give(found)
        if not seekers:  # it was ended while the message was claimed for it
            await claims.release(found.id, wait)

    async def _connect_bucket(self, server: Server, stream: dict[str, Any]) -> None:
        """Make the bucket if it is not there, and check it."""
        name, needed = f"KV_{self._source.bucket}", timedelta(seconds=settings.commit_memory())
        try:
            about = await server.api(f"STREAM.INFO.{name}")
        except NotFoundError:
            age = _nanoseconds(max([needed, *(seeker.lapse for seeker in self.seekers)]))
            await server.make(
                f"STREAM.CREATE.{name}",
                name=name,
                description="Claims and commits of airflow-provider-events",
                subjects=[f"$KV.{self._source.bucket}.>"],
                max_msgs_per_subject=1,
                max_age=age,
                discard="new",
                storage="file",
                num_replicas=stream["num_replicas"],
                duplicate_window=min(age, 120 * SECOND),
                allow_rollup_hdrs=True,
                deny_delete=True,
            )
            about = await server.api(f"STREAM.INFO.{name}")
        config = about["config"]
        self._check_storage("the bucket", config["storage"])
        if max(config.get("max_msgs", -1), config.get("max_bytes", -1)) > 0 and config.get("discard") != "new":
            raise self._unfit("the bucket", "discard", "old", "'new', as it has a limit (max_msgs or max_bytes)")
        self._keeps = timedelta(microseconds=config["max_age"] // 1000) if config.get("max_age") else timedelta.max
        if self._keeps < needed:
            raise self._unfit("the bucket", "max_age", f"{self._keeps}", f"[events] commit_memory, {needed}")

    async def _connect_consumer(self, server: Server, stream: dict[str, Any]) -> None:
        """Make the consumer if it is not there, and check it."""
        path = f"{self._source.stream}.{self._source.durable}"
        try:
            about = await server.api(f"CONSUMER.INFO.{path}")
        except NotFoundError:
            limit = (stream.get("consumer_limits") or {}).get("max_ack_pending") or _MAX_ACK_PENDING
            config = {
                "durable_name": self._source.durable,
                "description": "Waits of airflow-provider-events",
                "deliver_policy": self._deliver_policy,
                "ack_policy": "explicit",
                "ack_wait": _ACK_WAIT * SECOND,
                "max_deliver": -1,
                "max_ack_pending": limit,
            }
            if self._subject is not None:
                config["filter_subject"] = self._subject
            request = {"stream_name": self._source.stream, "config": config, "action": "create"}
            await server.make(f"CONSUMER.DURABLE.CREATE.{path}", **request)
            about = await server.api(f"CONSUMER.INFO.{path}")
        config = about["config"]
        self._check_storage("the consumer", "memory" if config.get("mem_storage") else "file")
        filters = config.get("filter_subjects") or [config.get("filter_subject") or ">"]
        needed = {
            "ack_policy": (config["ack_policy"] == "explicit", "'explicit'"),
            "deliver_subject": (not config.get("deliver_subject"), "none: a consumer that is pulled from"),
            "max_deliver": (config.get("max_deliver", -1) <= 0, "-1: it may give up no message"),
            "inactive_threshold": (not config.get("inactive_threshold"), "none: it stays while no wait waits"),
            "filter_subject": (self._subject is None or filters == [self._subject], f"{self._subject!r}"),
        }
        for key, (fits, value) in needed.items():
            if not fits:
                raise self._unfit("the consumer", key, str(config.get(key) or filters), value)

    def _check_storage(self, what: str, storage: str) -> None:
        if self._persistent and storage != "file":
            raise self._unfit(what, "storage", storage, "'file', or require_persistence=False")

    def _unfit(self, what: str, key: str, found: str, needed: str) -> SourceUnfit:
        name = f" {self._source.bucket!r}" if what == "the bucket" else ""
        return SourceUnfit(f"{self._source}: {what}{name} would lose events: {key} is {found!r}; needed: {needed}")


def _nanoseconds(span: timedelta) -> int:
    return span // MICROSECOND * 1000


def _batches(seekers: list[Taker]) -> Iterator[list[Taker]]:
    for start in range(0, len(seekers), BATCH):
        yield seekers[start : start + BATCH]


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it at once, and raise what one of them raised after all have ended."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
