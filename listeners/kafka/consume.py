"""Taking messages: each goes to one wait of its group."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar, Literal, cast

from airflow_events.errors import EventUndecodable, SourceUnfit
from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.hub import Hub, Seeker
from airflow_events.listeners.kafka.client import (
    DEFAULT,
    PATIENCE,
    Away,
    Clients,
    Source,
    Worker,
    event_of,
    moment,
)
from airflow_events.listeners.kafka.ledger import Ledger
from airflow_events.listeners.kafka.schemas import Decoder, Formats, KafkaFormat
from airflow_events.listeners.kafka.state import RELEASED, Claim, State
from airflow_events.listeners.shared import shared
from airflow_events.listeners.values import OnUndecodable, check_choices
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

log = logging.getLogger(__name__)

# Seconds for which a hub waits for messages, after which it sees new waits.
_BLOCK = 0.5
# Seconds between two looks at what other processes did, while waits wait.
_LOOK = 1.0
# Seconds between two warnings of one kind.
_TELL = 300
# Messages, and their bytes, that are kept for waits to come.
_MOST = 1000
_MOST_BYTES = 2**25

Start = Literal["earliest", "latest"]


class KafkaListener(EventListener):
    """
    Take a message of a topic for a group: each message goes to one wait, exactly once, in any order of commits.

    Claims and commits are kept in a ledger on the broker, by transactions; see ``docs/sources/kafka.md``. The
    group's committed offset is the lowest one that is not committed, as other consumers expect it. The event is

    ``{"topic", "partition", "offset", "timestamp", "key", "headers", "value", "group", "ledger", "mark",
    "kafka_config_id"}``, ``timestamp`` a datetime in UTC, ``headers`` a dict of texts.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        topic: str,
        *,
        group: str = "airflow",
        values: KafkaFormat = "json",
        keys: KafkaFormat = "text",
        on_undecodable: OnUndecodable = "fail",
        start: Start = "earliest",
        claim_timeout: float | timedelta = 3600.0,
        ledger: str = "airflow-events",
        kafka_config_id: str = DEFAULT,
        registry_conn_id: str | None = None,
    ) -> dict[str, Any]:
        """
        Return when there is a message that no other wait of the group has, the oldest first.

        :param topic: its name. It is never made here; one that is not there yet is waited for as a broker is.
        :param group: the consumer group. It should have no members besides.
        :param values: of what format the value is: ``json``, ``text``, ``bytes`` (as Base64 text), or ``avro`` or
            ``json_schema`` by a schema registry. A message without a value has None.
        :param keys: of what format the key is.
        :param on_undecodable: what to do with a message that is not: ``fail`` fails the wait and leaves the
            message to others, ``skip`` commits it, with a warning, and waits on.
        :param start: where a group that is not there yet begins: ``earliest`` at the first message, ``latest`` at
            the next one.
        :param claim_timeout: after how many seconds a message that a wait has claimed and not committed goes to
            another. A wait that still lives loses nothing by it: its commit is refused, and it waits on.
        :param ledger: what the topics of claims (``<ledger>.state``) and commits (``<ledger>.commits``) are named
            by. They are made if they are not there. All waits of a group must say the same.
        :param kafka_config_id: an Airflow connection of type ``kafka``, as the Kafka provider has it:
            librdkafka's settings among the extras.
        :param registry_conn_id: an Airflow connection of type ``http`` to the schema registry; the settings of
            ``confluent_kafka.schema_registry.SchemaRegistryClient`` among the extras. While it does not answer,
            the message stays claimed and is neither skipped nor committed.
        :raises SourceUnfit: the connection is of another type or would lose events; the user may not use the
            topic, the group, the transactional id or the ledger; the ledger's topics would lose what is written.
        :raises SourceUnreachable: the brokers were away, or the topic not there, for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        check_choices("json", on_undecodable)
        formats = Formats(values, keys, registry_conn_id)
        if start not in ("earliest", "latest"):
            raise ValueError(f"start is 'earliest' or 'latest', not {start!r}")
        source = Source(kafka_config_id, topic, group, ledger)
        wait = current_wait().id
        lapse = claim_timeout.total_seconds() if isinstance(claim_timeout, timedelta) else claim_timeout
        async with shared(("kafka schemas", formats), lambda: Decoder(formats)) as decoder:
            await decoder.open()
            while True:
                async with shared(("kafka", source, start), lambda: _QueueHub(source, start)) as hub:
                    message, mark = await hub.take(_Taker(wait, lapse))
                try:
                    event = await decoder.patiently(lambda: event_of(source, message, decoder.value))  # noqa: B023
                except EventUndecodable as error:
                    async with _ledger(source) as there:
                        if on_undecodable == "fail":
                            await there.change(lambda state: state.release(wait))
                            raise
                        await there.commit(message.partition(), message.offset(), wait, mark)
                    log.warning("Passed over, and committed: %s", error)
                else:
                    return {
                        **event,
                        "group": group,
                        "ledger": ledger,
                        "mark": mark,
                        "kafka_config_id": kafka_config_id,
                    }

    async def event_checkpointed(self, event: Any) -> None:
        """Commit the message, and note for ``[events] commit_memory`` seconds who did."""
        source = Source(event["kafka_config_id"], event["topic"], event["group"], event["ledger"])
        async with _ledger(source) as ledger:
            await ledger.commit(event["partition"], event["offset"], current_wait().id, event["mark"])

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Let another wait have the message at once."""
        source = Source(
            kwargs.get("kafka_config_id", DEFAULT),
            args[0] if args else kwargs["topic"],
            kwargs.get("group", "airflow"),
            kwargs.get("ledger", "airflow-events"),
        )
        wait = current_wait().id
        async with _ledger(source) as ledger:
            await ledger.refresh()
            # To write would overtake others, and most that is released holds nothing.
            if ledger.state is not None and any(claim.wait == wait for _, _, claim in ledger.state.claims()):
                await ledger.change(lambda state: state.release(wait))


def _ledger(source: Source) -> contextlib.AbstractAsyncContextManager[Ledger]:
    """Use the ledger that all of this process use."""
    return shared(("kafka ledger", source), lambda: Ledger(source))


class _Taker(Seeker):
    def __init__(self, wait: str, lapse: float) -> None:
        super().__init__()
        self.wait = wait
        self.lapse = lapse
        self.seen = False


@dataclass
class _Window:
    """
    What has been read of a partition and is free, as far as is known.

    :param start: from there on nothing is left out.
    """

    start: int
    messages: deque[Message] = field(default_factory=deque)


class _QueueHub(Hub[_Taker]):
    """Claims messages for the waits of one group."""

    lost: ClassVar[tuple[type[BaseException], ...]] = (Away,)

    def __init__(self, source: Source, start: Start) -> None:
        self._source = source
        self._start = start
        self._stack = contextlib.AsyncExitStack()
        self._worker = Worker(f"kafka read {source.topic}")
        self._consumer: Consumer | None = None
        self._clients: Clients | None = None
        self._windows: dict[int, _Window] = {}
        self._looked = 0.0
        self._told = float("-inf")
        super().__init__(str(source))

    async def connect(self) -> None:
        self._clients = await Clients.of(self._source)
        self._ledger = await self._stack.enter_async_context(_ledger(self._source))
        await self._ledger.open(self._start)
        if self._ledger.members:
            self._tell_all(
                logging.WARNING,
                "%s: the group has members besides (%s); they get the same messages, and what they commit is "
                "followed: give the waits a group of their own",
                self.name, ", ".join(self._ledger.members),
            )  # fmt: skip
        self._looked = time.monotonic()
        self._consumer = await self._worker.do(self._clients.consumer)
        await self._follow()

    async def disconnect(self) -> None:
        consumer, self._consumer = self._consumer, None
        try:
            if consumer is not None:
                await self._worker.do(consumer.close)
        finally:
            await self._stack.aclose()

    async def close(self) -> None:
        await super().close()
        self._worker.end()

    async def serve(self) -> None:
        takers = [seeker for seeker in self.seekers if not seeker.done]
        # What a new wait has, another process may have changed until this moment.
        if time.monotonic() - self._looked > _LOOK or not all(taker.seen for taker in takers):
            await self._ledger.refresh()
            self._looked = time.monotonic()
            for taker in takers:
                taker.seen = True
        await self._follow()
        await self._hand_out(takers)
        waiting = sum(not taker.done for taker in takers)
        kept = [message for window in self._windows.values() for message in window.messages]
        if len(kept) > _MOST or sum(len(cast("Any", message)) for message in kept) > _MOST_BYTES:
            await self.pause(_BLOCK)  # there is no room for more claims
        elif waiting:
            for message in await self._worker.do(self._read, min(waiting, 500)):
                self._keep(message)

    async def _follow(self) -> None:
        """Read on from where the group is, should that be before what is read already."""
        assert self._ledger.state is not None and self._consumer is not None
        anew = []
        for number, partition in self._ledger.state.partitions.items():
            window = self._windows.get(number)
            if window is None or partition.next < window.start:
                self._windows[number] = _Window(partition.next)
                anew.append(number)
            else:
                while window.messages and _offset(window.messages[0]) < partition.next:
                    window.messages.popleft()
                window.start = max(window.start, partition.next)
        if anew:
            await self._worker.do(self._assign, self._consumer, anew)

    def _assign(self, consumer: Consumer, anew: list[int]) -> None:
        assert self._clients is not None
        with self._clients.refusals():
            for number in anew:
                self._check_bounds(consumer, number)
            consumer.incremental_unassign([place for place in consumer.assignment() if place.partition in anew])
            consumer.incremental_assign(
                [TopicPartition(self._source.topic, number, self._windows[number].start) for number in anew]
            )

    def _check_bounds(self, consumer: Consumer, partition: int) -> None:
        """Tell if the topic has lost what no wait has had, at its one end or the other."""
        start = self._windows[partition].start
        bounds = consumer.get_watermark_offsets(TopicPartition(self._source.topic, partition), timeout=PATIENCE)
        if bounds is None:
            raise Away("the broker does not say how far the topic goes")
        low, high = bounds
        if low > start:
            self._tell_all(
                logging.WARNING,
                "%s: the messages from offset %d until before %d of partition %d were deleted before any wait had "
                "them, by the topic's retention or by hand",
                self.name, start, low, partition,
            )  # fmt: skip
        if high < start:
            raise SourceUnfit(
                f"{self.name}: partition {partition} ends at offset {high}, and its group is at {start}: the "
                "topic was made anew, or has lost messages; set the group's offsets, as by kafka-consumer-groups "
                "--reset-offsets"
            )

    def _read(self, most: int) -> list[Message]:
        assert self._clients is not None and self._consumer is not None
        with self._clients.refusals():
            messages = self._consumer.consume(1, _BLOCK)
            if messages and most > 1:
                messages += self._consumer.consume(most - 1, 0)
            self._clients.check()
            for message in messages:
                error = message.error()
                if error is not None and error.code() != KafkaError._PARTITION_EOF:
                    raise KafkaException(error)
        return [message for message in messages if message.error() is None]

    def _keep(self, message: Message) -> None:
        window = self._windows[cast("int", message.partition())]
        last = _offset(window.messages[-1]) if window.messages else window.start - 1
        if _offset(message) <= last:
            return  # read before the position was changed
        window.messages.append(message)

    async def _hand_out(self, takers: list[_Taker]) -> None:
        """Give to each of the waits what it has, or what is free."""
        state = self._ledger.state
        assert state is not None
        wanted = {taker.wait: taker.lapse for taker in takers if not taker.done}
        heads = self._heads(len(wanted))
        now = time.time()

        def work(state: State) -> dict[str, tuple[int, int, Claim]]:
            return _claim(state, wanted, heads, starts, now, self._ledger.mark)

        starts = {number: window.start for number, window in self._windows.items()}
        attempt = state.copy()
        found = work(attempt)
        if attempt.full and time.monotonic() - self._told > _TELL:
            self._told = time.monotonic()
            claims = sum(1 for _ in attempt.claims())
            message = "%s: there is no room for more than its %d open claims; waits wait until some are committed"
            self._tell_all(logging.WARNING, message, self.name, claims)
        if not found:
            return
        if attempt.changed:
            found = await self._ledger.change(work)
        messages = {(number, _offset(message)): message
                    for number, window in self._windows.items() for message in window.messages}  # fmt: skip
        elsewhere = [(number, offset) for number, offset, _ in found.values() if (number, offset) not in messages]
        if elsewhere:
            messages |= await self._ledger.messages(elsewhere)
        for taker in takers:
            if taker.wait not in found:
                continue
            number, offset, claim = found[taker.wait]
            if (number, offset) in messages:
                taker.give((messages[number, offset], claim.mark))
            else:
                taker.tell(
                    logging.WARNING,
                    "%s: the message at offset %d of partition %d was deleted while it was claimed: passed over",
                    self.name, offset, number,
                )  # fmt: skip
                await self._ledger.change(lambda state, at=(number, offset): state.forget(*at))  # type: ignore[misc]

    def _heads(self, most: int) -> list[tuple[int, int]]:
        """Return partition and offset of what may be claimed next, the oldest first."""
        heads: list[tuple[int, int]] = []
        rest = {number: deque(window.messages) for number, window in self._windows.items() if window.messages}
        while rest and len(heads) < most:
            oldest = min(rest, key=lambda number: (moment(rest[number][0]), number))
            heads.append((oldest, _offset(rest[oldest].popleft())))
            if not rest[oldest]:
                del rest[oldest]
        return heads


def _claim(
    state: State,
    wanted: dict[str, float],
    heads: list[tuple[int, int]],
    starts: dict[int, int],
    now: float,
    mark: int,
) -> dict[str, tuple[int, int, Claim]]:
    """
    Let each wait have the message that it has already, one whose claim has lapsed, or the next one.

    :param wanted: for each wait how many seconds its claim is to last.
    :param starts: from where on ``heads`` leave nothing out; where that is not soon enough, they are no use.
    """
    found: dict[str, tuple[int, int, Claim]] = {}
    free = []
    for number, offset, claim in sorted(state.claims(), key=lambda each: each[:2]):
        if claim.wait in wanted and claim.wait not in found:
            if claim.until < now:  # or others would have it as soon as they look
                claim = Claim(claim.wait, now + wanted[claim.wait], claim.mark)
                state.claim(number, offset, claim)
            found[claim.wait] = number, offset, claim
        elif claim.wait == RELEASED or claim.until < now:
            free.append((number, offset))
    free += [(number, offset) for number, offset in heads
             if starts[number] <= state.partitions[number].next <= offset]  # fmt: skip
    for wait, lapse in wanted.items():
        if wait not in found and free:
            number, offset = free[0]
            claim = Claim(wait, now + lapse, mark)
            if not state.claim(number, offset, claim):
                break
            found[wait] = number, offset, claim
            del free[0]
    return found


def _offset(message: Message) -> int:
    return cast("int", message.offset())
