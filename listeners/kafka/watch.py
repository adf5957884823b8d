"""Watching a topic: the first message that matches, and nothing taken from others."""

from __future__ import annotations

import logging
import time
from datetime import datetime, timezone
from typing import Any, ClassVar, cast

from airflow_events.listeners.kafka.client import (
    PATIENCE,
    BrokerUnavailable,
    Clients,
    Source,
    Worker,
    event_of,
    moment,
    place_of,
    published,
    topic_of,
)
from airflow_events.listeners.kafka.schemas import Decoder, Formats
from airflow_events.listeners.support.watching import MILLISECOND, READ_BYTES, LogHub, Message, Reader, message_of
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as Sent

# Milliseconds for which a broker lets a fetch wait for messages.
_FETCH_WAIT = 50

# Seconds between two looks for partitions that were added, and whether the topic is still the same.
_LISTING = 30
# Likewise, while a partition has no leader and cannot be read.
_LISTING_SOON = 5

# How many messages are read at once, at most.
_AT_ONCE = 500

# Offsets by partition.
_Position = dict[int, int]


class TopicHub(LogHub[_Position]):
    """Reads one topic, without a group, for those who watch it."""

    lost: ClassVar[tuple[type[BaseException], ...]] = (BrokerUnavailable,)

    def __init__(self, source: Source, formats: Formats) -> None:
        self._source = source
        self._decoder = Decoder(formats)
        self.worker = Worker(f"kafka watch {source.topic}")
        self._clients: Clients | None = None
        self.readers: set[_TopicReader] = set()
        self._topic: str | None = None
        self._listed_at = 0.0
        self._leaderless: set[int] = set()  # as was told
        super().__init__(str(source))

    async def connect(self) -> None:
        self._clients = await Clients.of(self._source)
        await self._decoder.open()
        topic = await self.worker.do(topic_of, self._clients)
        if self._topic not in (None, topic):
            self.start_over("was recreated, and counts from zero again")
        self._topic, self._listed_at = topic, time.monotonic()

    async def disconnect(self) -> None:
        for reader in list(self.readers):
            await reader.close()

    async def close(self) -> None:
        await super().close()
        self.worker.end()
        await self._decoder.close()

    async def serve(self) -> None:
        assert self._clients is not None
        if time.monotonic() - self._listed_at > _LISTING:
            if await self.worker.do(topic_of, self._clients) != self._topic:
                raise BrokerUnavailable("the topic was recreated")
            self._listed_at = time.monotonic()
        await super().serve()
        self._tell_of_leaders()

    def _tell_of_leaders(self) -> None:
        now = {number for reader in self.readers for number in reader.leaderless}
        for number in sorted(now - self._leaderless):
            what = "%s: no broker leads partition %s now; the others are read"
            self._tell_all(logging.WARNING, what, self.name, number)
        for number in sorted(self._leaderless - now):
            self._tell_all(logging.INFO, "%s: partition %s has a leader again, and is read", self.name, number)
        self._leaderless = now

    def earliest(self) -> datetime:
        """Return from when on somebody wants messages."""
        return min((watcher.since for watcher in self.seekers), default=datetime.now(timezone.utc))

    async def reader(self, since: datetime, position: _Position | None) -> Reader[_Position]:
        assert self._clients is not None
        reader = await self.worker.do(_TopicReader, self, self._clients)
        self.readers.add(reader)
        await self.worker.do(reader.begin, since, position, self.earliest())
        return reader

    def reached(self, position: _Position, other: _Position) -> bool:
        return all(position.get(number, 0) >= offset for number, offset in other.items())

    async def dropped_until(self) -> datetime | None:
        assert self._clients is not None
        reader = await self.worker.do(_TopicReader, self, self._clients)
        try:
            return await self.worker.do(reader.oldest)
        finally:
            await reader.close()

    async def messages(self, sent: list[Sent]) -> list[Message]:
        return await self.elsewhere(
            self._decoder.patiently(lambda: [self._message(message) for message in sent], self._tell_all)
        )

    def _message(self, sent: Sent) -> Message:
        return message_of(
            published(sent),
            len(sent.value() or b"") + len(sent.key() or b"") + _of_headers(sent),
            place_of(sent, self._source),
            lambda: event_of(self._source, sent, self._decoder.value),
            within=MILLISECOND,
        )


def _of_headers(sent: Sent) -> int:
    headers: list[Any] = list(sent.headers() or ())
    return sum(len(name) + len(content or b"") for name, content in headers)


class _TopicReader(Reader[_Position]):
    """Reads by a consumer of its own, in the hub's thread."""

    def __init__(self, hub: TopicHub, clients: Clients) -> None:
        self.position: _Position = {}
        self._hub = hub
        self._clients = clients
        self._topic = clients.source.topic
        self._listed_at = 0.0
        self.leaderless: set[int] = set()
        self._since = datetime.now(timezone.utc)
        # A broker answers what is asked over a connection in turn: a question would wait for a fetch that waits
        # for messages.
        kilobytes = READ_BYTES // 1024
        settings = {"queued.max.messages.kbytes": kilobytes, "fetch.max.bytes": READ_BYTES}
        self._consumer = clients.consumer(**{"fetch.wait.max.ms": _FETCH_WAIT, **settings})

    async def read(self, seconds: float) -> list[Message]:
        listing = _LISTING_SOON if self.leaderless else _LISTING
        earliest = self._hub.earliest() if time.monotonic() - self._listed_at > listing else None
        position, sent = await self._hub.worker.do(self._read, seconds, earliest)
        messages = await self._hub.messages(sent)
        self.position = position
        return messages

    async def close(self) -> None:
        self._hub.readers.discard(self)
        await self._hub.worker.do(self._consumer.close)

    # What follows runs in the hub's thread.

    def begin(self, since: datetime, position: _Position | None, earliest: datetime) -> None:
        """Read from ``position`` on, or if it is None such that nothing of ``since`` or later is missed."""
        self._since = since
        with self._clients.refusals():
            self._assign(self._position_at(since, self._partitions()) if position is None else position)
            self._list(earliest)

    def oldest(self) -> datetime | None:
        """Return the timestamp of the first message that is there, if there were others before it."""
        oldest = None
        with self._clients.refusals():
            for number in self._partitions():
                low, high = self._bounds(number)
                if low == 0:
                    continue
                if low == high:
                    return datetime.now(timezone.utc)
                self._consumer.assign([TopicPartition(self._topic, number, low)])
                message = self._consumer.poll(PATIENCE)
                if message is not None and message.error() is None:
                    oldest = max(oldest or moment(message), moment(message))
        return oldest

    def _assign(self, position: _Position) -> None:
        self._consumer.assign([TopicPartition(self._topic, *place) for place in position.items()])
        self.position = position

    def _list(self, earliest: datetime) -> None:
        """Read what can be read since, such as a partition that was added, from where somebody may want it."""
        if new := [number for number in self._partitions() if number not in self.position]:
            # Those who join later may look from as far back as all else was read from.
            self._assign({**self._position_at(min(earliest, self._since), new), **self.position})

    def _partitions(self) -> list[int]:
        """Return the partitions that can be read: those that have a leader."""
        topic = self._consumer.list_topics(self._topic, timeout=PATIENCE).topics[self._topic]
        if topic.error is not None:
            raise KafkaException(topic.error)
        self._listed_at = time.monotonic()
        self.leaderless = {number for number, partition in topic.partitions.items() if partition.leader < 0}
        if not (there := sorted(topic.partitions.keys() - self.leaderless)):
            raise BrokerUnavailable(f"no broker leads a partition of {self._topic!r}")
        return there

    def _position_at(self, since: datetime, partitions: list[int]) -> _Position:
        # Cut: a message's timestamp is in milliseconds.
        asked = max(int(since.timestamp() * 1000), 0)
        position = {}
        # The ends first: what is sent meanwhile is not to be missed.
        ends = {number: self._bounds(number)[1] for number in partitions}
        places = [TopicPartition(self._topic, number, asked) for number in ends]
        for place in self._consumer.offsets_for_times(places, timeout=PATIENCE):
            if place.error is not None:
                raise KafkaException(place.error)
            # Negative: nothing is that young.
            position[place.partition] = place.offset if place.offset >= 0 else ends[place.partition]
        return position

    def _bounds(self, partition: int) -> tuple[int, int]:
        found = self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), timeout=PATIENCE)
        if found is None:
            raise BrokerUnavailable("the broker does not say how far the topic goes")
        return found

    def _read(self, seconds: float, earliest: datetime | None) -> tuple[_Position, list[Sent]]:
        """
        Read for so many seconds at most.

        :param earliest: look for partitions to be read, too, from then on; None not to look.
        """
        with self._clients.refusals():
            if earliest is not None:
                self._list(earliest)
            found = self._consumer.consume(1, seconds)
            if found:
                found += self._consumer.consume(_AT_ONCE - 1, 0)
            self._clients.check()
            messages = []
            position = dict(self.position)
            for message in found:
                error = message.error()
                if error is None:
                    messages.append(message)
                    position[cast("int", message.partition())] = cast("int", message.offset()) + 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    # Behind what was aborted, and what a transaction ends with: no message has these offsets.
                    end = cast("int", message.partition())
                    position[end] = max(position[end], cast("int", message.offset()))
                elif error.code() != KafkaError.GROUP_AUTHORIZATION_FAILED:
                    raise KafkaException(error)
        return position, messages
