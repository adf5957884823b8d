"""Taking messages: each goes to one wait of its group."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

from airflow_events.errors import SourceUnfit
from airflow_events.listeners.hub import Hub, Seeker
from airflow_events.listeners.kafka.client import (
    PATIENCE,
    Away,
    Clients,
    Source,
    Worker,
    moment,
)
from airflow_events.listeners.kafka.ledger import ledger_of
from airflow_events.listeners.kafka.state import RELEASED, Claim, State
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


class Taker(Seeker):
    """A wait for a message, and after how many seconds its claim lapses."""

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


class QueueHub(Hub[Taker]):
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
        self._ledger = await self._stack.enter_async_context(ledger_of(self._source))
        await self._ledger.open(self._start)
        if self._ledger.members:
            self._tell_all(
                logging.WARNING,
                "%s: the group has members besides (%s); they get the same messages, and what they commit is "
                "followed: give the waits a group of their own",
                self.name, ", ".join(self._ledger.members),
            )  # fmt: skip
        self._looked = time.monotonic()
        self._windows.clear()  # a consumer of an earlier connection had read them, and this one is to go on
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

    async def _hand_out(self, takers: list[Taker]) -> None:
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
