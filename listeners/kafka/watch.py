"""Watching a topic: the first message that matches, and nothing taken from others."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import ClassVar, cast

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.kafka.client import (
    PATIENCE,
    Away,
    Clients,
    Source,
    Worker,
    event_of,
    moment,
    partitions_of,
)
from airflow_events.listeners.kafka.schemas import Decoder, Formats
from airflow_events.listeners.log import LogHub, Message
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as Sent

# Seconds for which a read waits for messages, after which new waits are seen.
_BLOCK = 0.5

# Milliseconds for which a broker lets a fetch wait for messages.
_FETCH_WAIT = 50

# Seconds between two looks for partitions that were added.
_LISTING = 30

# Offsets by partition.
_Position = dict[int, int]


class TopicHub(LogHub[_Position]):
    """Reads one topic, without a group, for those who watch it."""

    lost: ClassVar[tuple[type[BaseException], ...]] = (Away,)

    def __init__(self, source: Source, formats: Formats) -> None:
        self._source = source
        self._decoder = Decoder(formats)
        self._worker = Worker(f"kafka watch {source.topic}")
        self._consumer: Consumer | None = None
        self._clients: Clients | None = None
        self._read_to: _Position | None = None
        self._listed_at = 0.0
        super().__init__(str(source))

    async def connect(self) -> None:
        self._clients = await Clients.of(self._source)
        await self._decoder.open()
        self._consumer = await self._worker.do(self._open, self._clients)
        self._read_to = None

    async def disconnect(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await self._worker.do(consumer.close)

    async def close(self) -> None:
        await super().close()
        self._worker.end()
        await self._decoder.close()

    async def position(self, since: datetime) -> _Position:
        return await self._worker.do(self._position_at, since)

    async def read(self, position: _Position) -> tuple[_Position, list[Message]]:
        position, sent = await self._worker.do(self._read, position)
        messages = await self._decoder.patiently(
            lambda: [self._message(message) for message in sent], self._tell_all
        )
        self._read_to = position
        return position, messages

    async def dropped_until(self) -> datetime | None:
        return await self._worker.do(self._oldest)

    # What follows runs in the hub's thread.

    def _open(self, clients: Clients) -> Consumer:
        partitions_of(clients, clients.admin())
        # A broker answers what is asked over a connection in turn: what a new wait asks about each partition would
        # wait for a fetch that waits for messages.
        return clients.consumer(**{"fetch.wait.max.ms": _FETCH_WAIT})

    def _known(self) -> tuple[Clients, Consumer]:
        assert self._clients is not None and self._consumer is not None
        return self._clients, self._consumer

    def _partitions(self) -> list[int]:
        _, consumer = self._known()
        topic = consumer.list_topics(self._source.topic, timeout=PATIENCE).topics[self._source.topic]
        if topic.error is not None:
            raise KafkaException(topic.error)
        self._listed_at = time.monotonic()
        return sorted(topic.partitions)

    def _position_at(self, since: datetime) -> _Position:
        clients, consumer = self._known()
        # Cut: a message's timestamp is in milliseconds.
        asked = max(int(since.timestamp() * 1000), 0)
        position = {}
        with clients.refusals():
            # The ends first: what is sent meanwhile is not to be missed.
            ends = {number: self._bounds(number)[1] for number in self._partitions()}
            places = [TopicPartition(self._source.topic, number, asked) for number in ends]
            for place in consumer.offsets_for_times(places, timeout=PATIENCE):
                if place.error is not None:
                    raise KafkaException(place.error)
                # Negative: nothing is that young.
                position[place.partition] = place.offset if place.offset >= 0 else ends[place.partition]
        return position

    def _bounds(self, partition: int) -> tuple[int, int]:
        _, consumer = self._known()
        found = consumer.get_watermark_offsets(TopicPartition(self._source.topic, partition), timeout=PATIENCE)
        if found is None:
            raise Away("the broker does not say how far the topic goes")
        return found

    def _read(self, position: _Position) -> tuple[_Position, list[Sent]]:
        clients, consumer = self._known()
        with clients.refusals():
            if time.monotonic() - self._listed_at > _LISTING:
                # A partition that came later is read from its beginning.
                position = {**dict.fromkeys(self._partitions(), 0), **position}
            if position != self._read_to:
                consumer.assign([TopicPartition(self._source.topic, *place) for place in position.items()])
            found = consumer.consume(1, _BLOCK)
            if found:
                found += consumer.consume(499, 0)
            clients.check()
            messages = []
            position = dict(position)
            for message in found:
                error = message.error()
                if error is None:
                    messages.append(message)
                    position[cast("int", message.partition())] = cast("int", message.offset()) + 1
                elif error.code() not in (KafkaError._PARTITION_EOF, KafkaError.GROUP_AUTHORIZATION_FAILED):
                    raise KafkaException(error)
        return position, messages

    def _oldest(self) -> datetime | None:
        """Return the timestamp of the first message that is there, if there were others before it."""
        clients, consumer = self._known()
        oldest = None
        with clients.refusals():
            for number in self._partitions():
                low, high = self._bounds(number)
                if low == 0:
                    continue
                if low == high:
                    return datetime.now(timezone.utc)
                consumer.assign([TopicPartition(self._source.topic, number, low)])
                self._read_to = None
                message = consumer.poll(PATIENCE)
                if message is not None and message.error() is None:
                    oldest = max(oldest or moment(message), moment(message))
        return oldest

    def _message(self, sent: Sent) -> Message:
        try:
            return Message(moment(sent), event_of(self._source, sent, self._decoder.value))
        except EventUndecodable as error:
            return Message(moment(sent), {}, error)
