"""
Reading topics for a group, and keeping how far it has come.

Every triggerer reads everything, and the inbox decides which wait has a message. What is settled, and is never to
be delivered again, the inbox knows by partition (`airflow_events.listeners.support.positions`), since Kafka
forgets the offsets of a group without members after some days. The committed offset follows: all before it is
settled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from airflow_events.errors import EventUndecodable, SourceMisconfigured
from airflow_events.listeners.kafka import Start
from airflow_events.listeners.kafka.client import (
    PATIENCE,
    BrokerUnavailable,
    Clients,
    Place,
    Source,
    Worker,
    coordinates,
    event_of,
    place_of,
)
from airflow_events.listeners.kafka.group import About, Group, Look, partition_of, source_of
from airflow_events.listeners.kafka.reader import Reader
from airflow_events.listeners.kafka.schemas import Decoder, Formats
from airflow_events.listeners.support.hub import Seeker
from airflow_events.listeners.support.positions import Known, Positions, Ranges, after, covered, union
from airflow_events.listeners.support.queue import REASON, SOURCE, Delivery, QueueHub
from airflow_events.listeners.support.shared import background, connected
from confluent_kafka import KafkaError, KafkaException, Message, Producer

log = logging.getLogger(__name__)

# Seconds between two looks at what others did: partitions, members, offsets, and what is settled.
_LOOK_EVERY = 10.0
# Seconds for which reading waits for such a look.
_LONGEST_LOOK = 1.0
# Seconds for which reading goes on though no broker says what topics and partitions there are.
_BLIND = 30.0
# Seconds between two attempts to commit, and after a look that had no answer.
_PAUSE = 2.0
# Seconds that a commit may hold up the end of a hub.
_LONGEST_COMMIT = 3.0
# Over how many settled messages it is quicker to jump than to read them.
_FAR = 1000
# Bytes of why a dead letter could not be read, in its header.
_LONGEST_REASON = 1000
# With it begins the metadata of the offsets that we commit.
_MARK = "airflow-events"


class Record(NamedTuple):
    """A message, of which incarnation of its topic it is, and its event, or why it has none."""

    cluster: str
    topic_id: str
    message: Any
    event: dict[str, Any] | EventUndecodable | None = None

    @property
    def place(self) -> Place:
        """Topic and partition."""
        return self.message.topic(), self.message.partition()

    def read(self) -> dict[str, Any]:
        """
        Return its event.

        :raises EventUndecodable: it has none.
        """
        if isinstance(self.event, dict):
            return {**self.event, "cluster": self.cluster, "topic_id": self.topic_id}
        assert self.event is not None
        raise self.event


@dataclass
class _Partition:
    """
    How far a partition has come.

    :param next: the offset from which on nothing is read yet.
    :param settled: what is never to be delivered again, as far as is known.
    :param told: the offset that Kafka has for the group, if it is ours; None if it is not.
    """

    next: int
    settled: Ranges
    told: int | None = None


@dataclass
class _Topic:
    """A topic, as it was when it was looked at last: ``id`` and ``cluster`` are as of `About`."""

    cluster: str
    id: str
    owner: str
    partitions: dict[int, _Partition] = field(default_factory=dict)


class GroupHub(QueueHub):
    """Reads topics for the waits of a group."""

    lost: ClassVar[tuple[type[BaseException], ...]] = (BrokerUnavailable,)

    def __init__(self, source: Source, start: Start, formats: Formats) -> None:
        self._source = source
        self._start = start
        self._worker = Worker(f"kafka read {source.topic}")
        self._asker = Worker(f"kafka group {source.group}")
        self._decoder = Decoder(formats)
        self._clients: Clients | None = None
        self._reader: Reader | None = None
        self._group: Group | None = None
        self._producer: Producer | None = None
        self._topics: dict[str, _Topic] = {}
        self._assigned: dict[Place, str] | None = None  # the topics' ids; None if it is to be assigned again
        self._free: dict[str, Record] = {}  # what is read, or was given back, and no wait has
        self._gaps: dict[str, dict[str, Ranges]] = defaultdict(lambda: defaultdict(list))
        self._committing: asyncio.Task[None] | None = None
        self._looking: asyncio.Future[Look] | None = None
        self._looked = 0.0  # when the topics were seen last
        self._next_look = 0.0
        self._is_silent = False  # of the group's coordinator
        self._unreadable_places: set[Place] = set()  # of topics that are not there, or without a leader
        self._told_of: set[str] = set()  # what cannot be read now
        super().__init__(str(source))

    @property
    def reader(self) -> Reader:
        """Of a hub that is connected."""
        assert self._reader is not None
        return self._reader

    async def connect(self) -> None:
        self._clients = await Clients.of(self._source)
        await self._decoder.open()
        self._reader = await self._worker.do(Reader, self._clients)
        self._group = Group(self._clients.apart(), self._reader.consumer)
        self._assigned = None
        look = await self._asker.do(self._group.look)
        if look.silent is not None:
            await self._worker.do(self._reader.read, 1)  # a refusal is told to who reads; nothing is assigned yet
        await self._see(look)

    async def can_tell(self) -> None:
        """Return at once: what is acknowledged the inbox is told, over no connection to Kafka."""

    async def disconnect(self) -> None:
        if self._committing is not None:
            await asyncio.wait({self._committing}, timeout=_LONGEST_COMMIT)
        reader, group, looking = self._reader, self._group, self._looking
        self._reader = self._group = self._producer = self._looking = None
        if looking is not None and not looking.cancel() and not looking.cancelled():
            looking.exception()  # it is looked at, so that asyncio does not complain
        if group is not None:
            await self._asker.do(group.close)  # after what it does now, which may need the reader's consumer
        if reader is not None:
            await self._worker.do(reader.close)

    async def close(self) -> None:
        await super().close()
        self._worker.end()
        self._asker.end()
        await self._decoder.close()

    async def serve(self) -> None:
        await self._look()
        if self._assigned is None:
            await self._assign()
        if not self._ready():
            messages = await self._worker.do(self.reader.read, self.wanted)
            await self._see_whether_they_are_the_same(messages)
            self._take_in(messages)
        await self._offer()

    async def _see_whether_they_are_the_same(self, messages: list[Message]) -> None:
        """
        See that what was read is of the topics that were looked at: of one that was recreated the client reads on.

        :raises BrokerUnavailable: it is not. When the hub connects again, it is read from its beginning.
        """
        assert self._group is not None
        names = {str(message.topic()) for message in messages if message.error() is None}
        if not names:
            return
        try:  # not by the thread that asks the coordinator, which may be silent for long
            ids = await self._worker.do(self._group.topic_ids)
        except BrokerUnavailable:  # the next look says what there is
            return
        for name in names:
            if ids.get(name, self._topics[name].id) != self._topics[name].id:
                raise BrokerUnavailable(f"the topic {name!r} was recreated")

    # What is settled.

    async def acknowledge(self, deliveries: Mapping[str, Delivery]) -> None:
        settled: dict[str, dict[str, Ranges]] = defaultdict(lambda: defaultdict(list))
        for delivery in deliveries.values():
            record: Record = delivery.message
            topic, partition = record.place
            offset = record.message.offset()
            settled[topic][partition_of(record.topic_id, partition)].append((offset, offset + 1))
        for name, places in settled.items():
            await self._exchange(name, places)
        committing = self._commit()
        if not all(topic.owner for topic in self._topics.values()):
            await asyncio.wait({committing})  # without an inbox nothing else outlives the process

    async def lag(self, seeker: Seeker) -> int | None:
        assert self._group is not None
        partitions = self._places()
        bounds = await self._asker.do(self._group.bounds, list(partitions))
        return sum(
            high - low - covered(partitions[place].settled, low, high) for place, (low, high) in bounds.items()
        )

    async def give_back(self, deliveries: Mapping[str, Delivery]) -> None:
        self._free.update({id: delivery.message for id, delivery in deliveries.items()})

    async def _exchange(self, name: str, settled: Mapping[str, Ranges]) -> None:
        """Tell the inbox what is settled of a topic, and learn what others have told it."""
        topic = self._topics[name]
        gaps: Mapping[str, Ranges] = self._gaps.pop(name, {})
        both = {place: [*settled.get(place, ()), *gaps.get(place, ())] for place in {**settled, **gaps}}
        source = source_of(topic.cluster, name, self._source.group)
        known = await self._inbox(source, both)
        for number, partition in topic.partitions.items():
            # Answers may come in another order than they were given.
            partition.settled = union([*partition.settled, *known.settled.get(partition_of(topic.id, number), ())])

    async def _inbox(self, *asked: Any) -> Known:
        """Ask the inbox. That it does not answer is no silence of Kafka's, and is waited for without an end."""
        return await self.elsewhere(
            Positions.of_loop().exchange(*asked),
            "Airflow's inbox does not answer, and is asked until it does; nothing is read meanwhile",
        )

    def _commit(self) -> asyncio.Task[None]:
        """Let the group's offsets follow, some while after."""
        if self._committing is None or self._committing.done():
            self._committing = background(self._follow_up(), f"offsets of {self.name}")
        return self._committing

    async def _follow_up(self) -> None:
        while (group := self._group) is not None and (offsets := self._behind()):
            if await self._asker.do(group.commit, offsets):
                # Another triggerer's may have come before, and been further on: whoever is last learns of it.
                for name in {name for name, _ in offsets}:
                    await self._exchange(name, {})
                continue
            for name, number in offsets:
                self._topics[name].partitions[number].told = None
            if group.is_overtaken:
                return
            await asyncio.sleep(_PAUSE)

    def _behind(self) -> dict[Place, tuple[int, str]]:
        """Return where Kafka is not told yet how far all is settled."""
        offsets = {}
        for (name, number), partition in self._places().items():
            if (floor := after(partition.settled, 0)) != partition.told:
                partition.told = floor
                offsets[name, number] = floor, _mark(self._topics[name].owner)
        return offsets

    async def _look(self) -> None:
        """See from time to time what others did, and where a partition begins that is new."""
        assert self._group is not None
        if self._looking is None:
            if time.monotonic() < self._next_look and (self._is_silent or not self._group.is_overtaken):
                return
            self._looking = asyncio.ensure_future(self._asker.do(self._group.look))
            await asyncio.wait({self._looking}, timeout=_LONGEST_LOOK)
        if not self._looking.done():
            return
        looking, self._looking = self._looking, None
        try:
            look = looking.result()
        except BrokerUnavailable:
            if time.monotonic() - self._looked > _BLIND:
                raise
            self._next_look = time.monotonic() + _PAUSE
        else:
            await self._see(look)

    async def _see(self, look: Look) -> None:
        self._see_what_cannot_be_read(look)
        for about in look.topics:
            await self._follow(about, look.silent)
        self._tell_silence(look.silent)
        self._looked = time.monotonic()
        self._next_look = self._looked + (_LOOK_EVERY if look.silent is None else _PAUSE)
        if {place: self._topics[place[0]].id for place in self._places()} != self._assigned:
            await self._assign()
        self._commit()

    def _see_what_cannot_be_read(self, look: Look) -> None:
        """Note what is left out until it can be read; with what is read already, the client goes on by itself."""
        missing = {*self._source.topics} - {about.topic for about in look.topics}
        assigned = self._assigned or {}
        self._unreadable_places = {place for place in look.leaderless if place not in assigned}
        self._unreadable_places |= {
            (name, number) for name in missing & self._topics.keys() for number in self._topics[name].partitions
        }
        now = {f"there is no topic {name!r}" for name in missing}
        now |= {f"no broker leads partition {number} of {name!r}" for name, number in look.leaderless}
        for what in sorted(now - self._told_of):
            self._warn(f"{what} now; the others are read")
        for what in sorted(self._told_of - now):
            self._tell_all(logging.INFO, "%s: resolved: %s", self.name, what)
        self._told_of = now

    def _places(self) -> dict[Place, _Partition]:
        """Return the partitions that can be read."""
        return {
            (name, number): partition
            for name, topic in self._topics.items()
            for number, partition in topic.partitions.items()
            if (name, number) not in self._unreadable_places
        }

    def _tell_silence(self, silent: BrokerUnavailable | None) -> None:
        if silent is not None and not self._is_silent:
            self._tell_all(
                logging.INFO,
                "%s: the group's coordinator does not answer, and is asked again; messages are read meanwhile: %s",
                self.name, silent,
            )  # fmt: skip
        elif silent is None and self._is_silent:
            self._tell_all(logging.INFO, "%s: the group's coordinator answers again", self.name)
        self._is_silent = silent is not None

    async def _follow(self, about: About, silent: BrokerUnavailable | None) -> None:
        """
        Follow what a topic has become.

        :param silent: why it is not known what is committed; None if it is.
        :raises BrokerUnavailable: for that reason it is not known where to begin.
        """
        source = source_of(about.cluster, about.topic, self._source.group)
        known = await self._inbox(source, self._gaps.pop(about.topic, {}))
        if silent is not None and not known.settled:
            raise silent
        self._check_owner(about, known)
        begins = await self._begins(about, known)
        settled = self._set_by_others(about, known)
        if begins or settled:
            known = await self._inbox(source, settled, begins)
        topic = self._topics.get(about.topic)
        if topic is None or topic.id != about.id:
            topic = self._topics[about.topic] = _Topic(about.cluster, about.id, known.owner)
            stale = [id for id, one in self._free.items() if one.place[0] == about.topic]
            self._free = {id: one for id, one in self._free.items() if id not in stale}
        for number in about.partitions:
            place = partition_of(about.id, number)
            if place not in known.settled:  # nobody knows yet where it begins
                continue
            ranges = known.settled[place]
            partition = topic.partitions.setdefault(number, _Partition(after(ranges, 0), ranges))
            partition.settled = ranges
            if number in about.committed:
                offset, metadata = about.committed[number]
                partition.told = offset if offset >= 0 and metadata == _mark(known.owner) else None

    def _warn(self, message: str) -> None:
        self._tell_all(logging.WARNING, "%s: %s", self.name, message)

    def _check_owner(self, about: About, known: Known) -> None:
        for number, (_, metadata) in about.committed.items():
            if metadata.startswith(f"{_MARK} ") and metadata != _mark(known.owner):
                raise SourceMisconfigured(
                    f"{self.name}: the offset of partition {number} of {about.topic!r} was committed by another "
                    "Airflow, or by this one with another database, which has had messages that this one does not "
                    "know of. Give the waits a group of their own; or, if that Airflow is gone, set the group's "
                    "offsets to where to go on"
                )

    async def _begins(self, about: About, known: Known) -> dict[str, int]:
        """Return where partitions begin that nobody has read yet."""
        places = {number: partition_of(about.id, number) for number in about.partitions}
        new = [number for number, place in places.items() if place not in known.settled]
        is_first = not known.settled
        closed = [number for number in new if (about.topic, number) in self._unreadable_places]
        if closed and is_first and self._start == "latest":  # or it would not be known later what was before
            raise BrokerUnavailable(f"no broker leads partition {closed[0]} of {about.topic!r}")
        if not (new := [number for number in new if number not in closed]):
            return {}
        if not is_first and len(new) == len(places):
            self._warn(f"the topic {about.topic!r} was deleted and recreated; it is read from its beginning")
        bounds = await self._worker.do(self.reader.bounds, [(about.topic, number) for number in new])
        begins = {}
        for number in new:
            low, high = bounds[about.topic, number]
            begins[places[number]] = low
            offset, metadata = about.committed.get(number, (-1, ""))
            # What this deployment commits, the inbox knows; of a place that it does not know, it was the topic's
            # that went by this name before.
            if offset >= 0 and (is_first or metadata != _mark(known.owner)):
                begins[places[number]] = min(offset, high)
            elif is_first and self._start == "latest":
                begins[places[number]] = high
        return begins

    def _set_by_others(self, about: About, known: Known) -> dict[str, Ranges]:
        """Return what is settled since somebody has set the group's offsets further on."""
        settled = {}
        for number, (offset, metadata) in about.committed.items():
            place = partition_of(about.id, number)
            if offset < 0 or place not in known.settled:
                continue
            floor = after(known.settled[place], 0)
            was_set = (
                f"the committed offset of partition {number} of {about.topic!r} was set from {floor} to {offset}"
            )
            if metadata == _mark(known.owner):
                if offset > floor and known.owner:
                    self._warn(
                        f"{was_set} by this Airflow; it is read again from where the inbox knows it: was "
                        "Airflow's database restored?"
                    )
            elif offset > floor:
                settled[place] = [(0, offset)]
                self._warn(f"{was_set} by others; accepted")
            elif offset < floor:
                self._warn(
                    f"{was_set} by others; reset to the inbox's position: what waits have had is not delivered "
                    "again. To read it again, use another group"
                )
        return settled

    # What is read.

    async def _assign(self) -> None:
        partitions = self._places()
        if not partitions:
            raise BrokerUnavailable("there is no partition that can be read")
        for place, (low, high) in (await self._worker.do(self.reader.bounds, list(partitions))).items():
            name, number = place
            partition = partitions[place]
            if low > partition.next:
                self._warn(
                    f"the messages from offset {partition.next} until before {low} of partition {number} of "
                    f"{name!r} were deleted before any wait had them, by the topic's retention or by hand"
                )
                self._pass(place, low)
            if high < partition.next:
                raise BrokerUnavailable(
                    f"partition {number} of {name!r} ends at offset {high}, and was read until {partition.next}: "
                    "the brokers do not have all of it yet, or have lost messages. If so, use another group"
                )
        await self._worker.do(self.reader.assign, {place: one.next for place, one in partitions.items()})
        self._assigned = {(name, number): self._topics[name].id for name, number in partitions}

    def _pass(self, place: Place, offset: int) -> None:
        """Note that there is nothing in a partition from what was read last until before ``offset``."""
        name, number = place
        partition = self._topics[name].partitions[number]
        if offset > partition.next:
            self._gaps[name][partition_of(self._topics[name].id, number)].append((partition.next, offset))
            partition.next = offset

    def _take_in(self, messages: list[Message]) -> None:
        for message in messages:
            one: Any = message
            name, number, offset = one.topic(), one.partition(), one.offset()
            topic = self._topics[name]
            partition = topic.partitions[number]
            # What never comes is a marker of a transaction, or was aborted, or compacted away.
            self._pass((name, number), offset)
            if message.error() is not None or offset < partition.next:
                continue  # it ends here; or was settled by others meanwhile
            id = coordinates(topic.cluster, topic.id, name, number, offset, self._source.group)
            self._free[id] = Record(topic.cluster, topic.id, message)
            partition.next = after(partition.settled, offset + 1)
            if partition.next > offset + _FAR:
                self._assigned = None

    def _ready(self) -> list[str]:
        """Return the ids of what may be given to waits, as many as want one."""
        return [id for id in self._free if id not in self.in_hand][: self.wanted]

    async def _offer(self) -> None:
        for id, record in list(self._free.items()):
            name, number = record.place
            offset = record.message.offset()
            if after(self._topics[name].partitions[number].settled, offset) > offset:
                del self._free[id]  # another triggerer was faster
        ready = self._ready()
        events = await self.elsewhere(
            self._decoder.patiently(lambda: [self._event(self._free[id]) for id in ready], self._tell_all)
        )
        for id, event in zip(ready, events, strict=True):
            self.offer(id, self._free.pop(id)._replace(event=event))

    def _event(self, record: Record) -> dict[str, Any] | EventUndecodable:
        try:
            return event_of(self._source, record.message, self._decoder.value)
        except EventUndecodable as error:
            return error

    async def bury(self, record: Record, topic: str, error: EventUndecodable) -> None:
        """Send a message that cannot be read to a topic for such, with the reason."""
        await self._worker.do(self._bury, record.message, topic, error)
        log.warning("Sent to the dead letters in %r: %s", topic, error)

    def _bury(self, message: Message, topic: str, error: EventUndecodable) -> None:
        assert self._clients is not None
        if self._producer is None:
            self._producer = self._clients.producer()
        try:
            headers: list[Any] = list(message.headers() or ())
        except ValueError:  # names that are no text
            headers = []
        ours = [
            (REASON, error.reason.encode()[:_LONGEST_REASON]),
            (SOURCE, place_of(message, self._source).encode()),
        ]
        with self._clients.refusals():
            try:
                self._send(topic, message, [*headers, *ours])
            except KafkaException as refused:
                if refused.args[0].code() != KafkaError.MSG_SIZE_TOO_LARGE:
                    raise
                self._send(topic, message, headers)  # the topic takes what it was, and no more

    def _send(self, topic: str, message: Message, headers: list[Any]) -> None:
        assert self._producer is not None
        said: list[Any] = []
        self._producer.produce(
            topic, message.value(), message.key(), headers=headers, on_delivery=lambda *told: said.append(told)
        )
        self._producer.flush(PATIENCE + 5)
        if not said:
            raise BrokerUnavailable(f"no broker has taken a dead letter for {topic!r}")
        if said[0][0] is not None:
            raise KafkaException(said[0][0])


def _mark(owner: str) -> str:
    return f"{_MARK} {owner}" if owner else _MARK


async def settle(source: Source, event: Mapping[str, Any]) -> None:
    """Note that a message is settled which this process does not have, and let the group's offset follow."""
    number, offset = event["partition"], event["offset"]
    place = partition_of(event["topic_id"], number)
    about = source_of(event["cluster"], source.topic, source.group)
    known = await Positions.of_loop().exchange(about, {place: [(offset, offset + 1)]})
    # The offset is for whoever measures the lag: a hub puts it right, if this cannot.
    try:
        async with connected(("kafka offsets", source), lambda: _open(source), _close) as group:
            offset = after(known.settled[place], 0)
            if await asyncio.to_thread(group.topic_id) == event["topic_id"]:
                await asyncio.to_thread(group.commit, {(source.topic, number): (offset, _mark(known.owner))})
    except (BrokerUnavailable, SourceMisconfigured) as error:
        log.info("%s: the group's offset is not committed, for now: %s", source, error)


async def _open(source: Source) -> Group:
    clients = await Clients.of(source)
    return Group(clients, clients.consumer())


async def _close(group: Group) -> None:
    group.close()
    await asyncio.to_thread(group.consumer.close)
