"""
A group's state on the broker, changed by compare-and-set from any process.

Whoever wants to write makes a producer of the group's one transactional id, which fences whoever wrote before,
and reads the state only then. It writes with one transaction: the state, into a compacted topic; who committed
what, into a topic that forgets after ``[events] commit_memory``; and the group's committed offsets, whose metadata
says where the state stands. If somebody else has begun to write meanwhile, the transaction fails as a whole, and
all is done again on what they left. As long as nobody does, the producer and what it knows stay good, and a change
is one transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from typing import Any, TypeVar, cast

from airflow_events import settings
from airflow_events.errors import EventLost, SourceUnfit
from airflow_events.listeners.kafka.client import PATIENCE, Away, Clients, Fenced, Source, Worker, partitions_of
from airflow_events.listeners.kafka.state import State
from airflow_events.listeners.shared import background, shared
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType  # type: ignore[attr-defined]

log = logging.getLogger(__name__)

# How often a writer begins anew before it lets others be asked; each time after a longer, random pause.
_ATTEMPTS = 12
# Offsets that are read through rather than jumped over.
_NEAR = 500
# Seconds for which others may keep a transaction open, and the broker's time to end it then.
_UNDECIDED = 40
# Seconds between two looks for partitions that were added.
_LISTING = 30
_OURS = "airflow-events"
_NO_TOPIC = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION)

_R = TypeVar("_R")
_Work = Callable[[State], Any]


class Ledger:
    """
    The state of one group on one topic, for all waits of a process.

    :ivar state: as it was when last written or read here; None before. It is never changed in place.
    :ivar partitions: the topic's.
    :ivar members: consumers that had joined the group when the ledger was opened: none, if all is well.
    :ivar mark: a place in the log of commits; what is not committed yet will be committed at it, or after it.
    """

    def __init__(self, source: Source) -> None:
        self.state: State | None = None
        self.partitions: list[int] = []
        self.members: list[str] = []
        self._source = source
        self._key = f"{source.group}/{source.topic}"
        self._states = f"{source.ledger}.state"
        self._commits = f"{source.ledger}.commits"
        self._worker = Worker(f"kafka {source.topic}")
        self._clients: Clients | None = None
        self._reader: Consumer | None = None
        self._stable: Consumer | None = None
        self._producer: Producer | None = None
        self._place: int | None = None  # of the state in its topic
        self.mark = 0
        self._listed_at = 0.0
        self._start: str | None = None
        self._pending: list[tuple[_Work, asyncio.Future[Any]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def open(self, start: str) -> None:
        """
        See that everything is there that the ledger needs, and make what is not.

        :param start: where a group that is not there yet begins: ``earliest`` or ``latest``.
        :raises Away: no broker answers, or the topic is not there.
        :raises SourceUnfit: something is there, and would lose what is written to it; or may not be used.
        """
        await self._read_connection()
        await self._worker.do(self._prepare)
        self._start = start
        await self._worker.do(self._guarded, self._refresh)

    async def refresh(self) -> None:
        """Let `state` be what was decided when this was called, or later."""
        await self._read_connection()
        await self._worker.do(self._guarded, self._refresh)

    async def change(self, work: Callable[[State], _R]) -> _R:
        """
        Return what ``work`` returns, once what it changed is written.

        :param work: changes the state in place; it raises before it changes anything. It may be called several
            times, in another thread, on newer states. What it returned or raised last is true of the group.
        """
        await self._read_connection()
        outcome: asyncio.Future[_R] = asyncio.get_running_loop().create_future()
        self._pending.append((work, outcome))
        if self._writing is None or self._writing.done():
            self._writing = background(self._write_pending(), f"{self._source}: writes")
        return await outcome

    async def commit(self, partition: int, offset: int, wait: str, mark: int) -> None:
        """
        Commit a message for the wait that has it.

        :param mark: as of the claim.
        :raises EventLost: another wait has it, or had it committed, or somebody else did.
        """

        def work(state: State) -> bool:
            holder = state.holder(partition, offset)
            if holder is not None and holder != wait:
                raise EventLost(f"{place} is held by {holder or 'nobody: it was given back'}")
            if holder is not None:
                state.commit(partition, offset)
            return holder is not None

        place = f"the message at offset {offset} in partition {partition} of {self._source}"
        if not await self.change(work):
            who = await self._worker.do(self._guarded, self._who, partition, offset, mark)
            if wait not in who:
                others = "nobody (the group's offsets were set by others, or it was too long ago)"
                raise EventLost(f"{place} was committed by {' and '.join(who) or others}")

    async def messages(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Message]:
        """Return those of the topic's messages that are there, by partition and offset."""
        await self._read_connection()
        return await self._worker.do(self._guarded, self._messages, sorted(wanted))

    async def close(self) -> None:
        """End it; what is being written is written."""
        if self._writing is not None:
            await asyncio.wait({self._writing}, timeout=PATIENCE)
        await self._worker.do(self._close)
        self._worker.end()

    async def _read_connection(self) -> None:
        if self._clients is None:
            self._clients = await Clients.of(self._source)

    async def _write_pending(self) -> None:
        while self._pending:
            batch = [(work, outcome) for work, outcome in self._pending if not outcome.done()]
            self._pending.clear()
            try:
                results = await self._worker.do(self._guarded, self._write, [work for work, _ in batch])
            except Exception as error:
                results = [error] * len(batch)
            for (_, outcome), result in zip(batch, results, strict=True):
                if outcome.done():
                    continue
                if isinstance(result, Exception):
                    outcome.set_exception(result)
                else:
                    outcome.set_result(result)

    # What follows runs in the ledger's thread.

    def _guarded(self, work: Callable[..., _R], *arguments: Any) -> _R:
        """Do it with clients that are open, and leave none behind that may be of no use."""
        clients = self._known_clients()
        try:
            with clients.refusals():
                if self._stable is None:
                    self._stable = clients.consumer()
                    # What an offset's metadata leads to is decided, whatever others have open before it.
                    self._reader = clients.consumer(
                        **{"isolation.level": "read_uncommitted", "fetch.wait.max.ms": 50}
                    )
                return work(*arguments)
        except Exception:
            self._close()
            raise

    def _known_clients(self) -> Clients:
        assert self._clients is not None
        return self._clients

    def _close(self) -> None:
        self._drop_producer()
        for consumer in (self._stable, self._reader):
            if consumer is not None:
                consumer.close()
        self._stable = self._reader = None

    def _drop_producer(self) -> None:
        if self._producer is not None:
            with contextlib.suppress(KafkaException):
                self._producer.purge()
            self._producer = None

    def _prepare(self) -> None:
        clients = self._known_clients()
        admin = clients.admin()
        with clients.refusals():
            partitions_of(clients, admin)
            self.members = self._members(admin)
            memory = settings.commit_memory()
            self._topic(
                admin,
                self._states,
                "cleanup.policy",
                "compact",
                lambda found: found == "compact",
                {"segment.bytes": str(2**26), "min.cleanable.dirty.ratio": "0.1"},
            )
            self._topic(
                admin, self._commits, "retention.ms", str(round(memory * 1000)),
                lambda found: int(found) < 0 or int(found) >= memory * 1000, {"cleanup.policy": "delete"},
            )  # fmt: skip

    def _members(self, admin: AdminClient) -> list[str]:
        [asked] = admin.describe_consumer_groups([self._source.group], request_timeout=PATIENCE).values()
        try:
            members = asked.result(PATIENCE + 5).members
        except KafkaException as error:  # there is no such group, or we may not ask: it is a courtesy
            log.debug("%s: the group's members are not known: %s", self._source, error)
            return []
        return [f"{member.client_id} at {member.host}" for member in members]

    def _topic(
        self,
        admin: AdminClient,
        name: str,
        setting: str,
        wanted: str,
        fits: Callable[[str], bool],
        more: dict[str, str],
    ) -> None:
        """See that a topic of the ledger is there, of one partition, and with a setting that fits."""
        [made] = admin.create_topics(
            [NewTopic(name, 1, config={setting: wanted, **more})], request_timeout=PATIENCE
        ).values()
        denied: KafkaException | None = None
        try:
            made.result(PATIENCE + 5)
            log.info("%s: made the topic %s, with %s=%s", self._source, name, setting, wanted)
            return
        except KafkaException as error:
            if error.args[0].code() in (
                KafkaError.TOPIC_AUTHORIZATION_FAILED,
                KafkaError.CLUSTER_AUTHORIZATION_FAILED,
            ):
                denied = error
            elif error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
        known = admin.list_topics(name, timeout=PATIENCE).topics.get(name) if denied is None else None
        if denied is not None:
            known = admin.list_topics(timeout=PATIENCE).topics.get(name)
            if known is None:
                raise SourceUnfit(
                    f"{self._source}: there is no topic {name!r} for claims and commits, and the connection's "
                    f"user may not make it; it needs one partition and {setting}={wanted}"
                ) from denied
        if known is not None and len(known.partitions) > 1:
            raise SourceUnfit(
                f"{self._source}: the topic {name!r} has {len(known.partitions)} partitions; it needs one"
            )
        try:
            [about] = admin.describe_configs(
                [ConfigResource(ResourceType.TOPIC, name)], request_timeout=PATIENCE
            ).values()
            found = str(about.result(PATIENCE + 5)[setting].value)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_AUTHORIZATION_FAILED:
                raise
            log.info(
                "%s: may not see the settings of the topic %s; it needs %s=%s", self._source, name, setting, wanted
            )
            return
        if not fits(found):
            raise SourceUnfit(
                f"{self._source}: the topic {name!r} has {setting}={found}; it needs {setting}={wanted}"
            )

    def _write(self, works: list[_Work]) -> list[Any]:
        failures = 0
        for attempt in range(_ATTEMPTS):
            known = self._producer is not None
            try:
                with self._known_clients().refusals():
                    if not known:
                        self._take()
                    assert self.state is not None
                    state = self.state.copy()
                    results = [_outcome(work, state) for work in works]
                    if state.changed:
                        self._send(state)
                    elif known and self._moved():  # what was returned is not true of the group any more
                        self._drop_producer()
                        continue
                    return results
            except Fenced as error:
                self._drop_producer()
                log.debug("%s: another process writes as well: %s", self._source, error)
            except Away:  # whether it was written, the next look tells
                failures += 1
                if failures > 1:
                    raise
                self._drop_producer()
            time.sleep(random.uniform(0, min(0.02 * 2**attempt, 2)))
        raise Away(f"{_ATTEMPTS} attempts to write were each overtaken by another process")

    def _take(self) -> None:
        """Let nobody else write, and read what they left."""
        self._drop_producer()
        name = f"{self._source.ledger}/{self._source.group}/{self._source.topic}"
        producer = self._known_clients().producer(name)
        try:
            producer.init_transactions(PATIENCE)
        except KafkaException as error:
            if error.args[0].code() != KafkaError._TIMED_OUT:
                raise
            raise Away(
                f"no transaction can be begun ({error.args[0].str()}); have the brokers what transactions need? "
                "A cluster of fewer than three needs transaction.state.log.replication.factor and "
                "transaction.state.log.min.isr to be as few"
            ) from error
        self._producer = producer
        _, self.mark = self._bounds(self._commits)
        self._read(taken=True)

    def _send(self, state: State) -> None:
        assert self._producer is not None and self.state is not None and self._stable is not None
        producer = self._producer
        reports: dict[str, int] = {}
        refused: list[KafkaError] = []

        def report(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                refused.append(error)
            else:
                reports[cast("str", message.topic())] = cast("int", message.offset())

        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        producer.begin_transaction()
        producer.produce(self._states, state.encode(), self._key, partition=0, on_delivery=report)
        for partition, offset, wait in state.commits:
            value = json.dumps({"wait": wait, "committed": now}).encode()
            producer.produce(
                self._commits, value, f"{self._key}/{partition}/{offset}", partition=0, on_delivery=report
            )
        left = producer.flush(PATIENCE)
        if refused:
            raise KafkaException(refused[0])
        if left or self._states not in reports:
            raise Away("the broker did not confirm what was written")
        place = reports[self._states]
        before = self.state.partitions
        metadata = json.dumps({_OURS: place})
        offsets = [
            TopicPartition(self._source.topic, number, partition.watermark, metadata=metadata)
            for number, partition in state.partitions.items()
            # The first one's metadata is where the state is looked for.
            if number == 0 or number not in before or before[number].watermark != partition.watermark
            or self.state.changed
        ]  # fmt: skip
        producer.send_offsets_to_transaction(offsets, self._stable.consumer_group_metadata(), PATIENCE)
        producer.commit_transaction(PATIENCE)
        self.state = State(state.partitions)
        self._place = place
        self.mark = max(self.mark, reports.get(self._commits, -1) + 1)

    def _refresh(self) -> None:
        try:
            if self._listed_at + _LISTING < time.monotonic():
                self._list_partitions()
            if self.state is not None and not self._moved():
                return
            self._drop_producer()
            self._read(taken=False)
        except KafkaException:
            # Unanswered; perhaps because somebody died within a transaction, which is ended by beginning another.
            self._begin()

    def _begin(self) -> None:
        self._drop_producer()
        self._write([])

    def _moved(self) -> bool:
        """Whether another process has written since."""
        assert self.state is not None
        committed = self._committed()
        return _place_in(committed[0]) != self._place or not _agrees(self.state, committed)

    def _committed(self) -> dict[int, TopicPartition]:
        """Return the group's committed offsets, once no transaction on them is open."""
        assert self._stable is not None
        asked = [TopicPartition(self._source.topic, number) for number in self.partitions]
        found = self._stable.committed(asked, timeout=PATIENCE / 2)
        for each in found:
            if each.error is not None:
                raise KafkaException(each.error)
        return {each.partition: each for each in found}

    def _read(self, taken: bool) -> None:
        if not self._listed_at:
            self._list_partitions()
        committed = self._committed()
        place = _place_in(committed[0])
        state = self._state_at(place) if place is not None else None
        if state is not None and not state.partitions.keys() <= committed.keys():
            self._list_partitions()  # others have seen more of them
            committed = self._committed()
        if state is None or not _agrees(state, committed):
            if not taken:
                self._begin()
                return
            was = place
            place, state = self._last_state()
            if state is None and was is not None:
                raise SourceUnfit(
                    f"{self._source}: the group's offsets say that its state is at offset {was} of a topic, and "
                    f"{self._states!r} has none: was it deleted, or do other waits of the group name another "
                    "ledger? To begin anew without it, set the group's offsets, as by kafka-consumer-groups "
                    "--reset-offsets"
                )
            state = self._adopt(state, committed)
        self.state, self._place = state, place

    def _adopt(self, state: State | None, committed: dict[int, TopicPartition]) -> State:
        """Take over what others wrote: offsets of a group that is older than the ledger, or set since."""
        if state is None and self._start is None:
            raise SourceUnfit(f"{self._source}: the topic {self._states!r} has nothing about it (was it deleted?)")
        known = state or State()
        for number in self.partitions:
            offset = committed[number].offset if committed[number].offset >= 0 else None
            if number not in known.partitions:
                if offset is None:
                    low, high = self._bounds(self._source.topic, number)
                    # A partition that came later is read from its beginning: it was empty then.
                    offset = high if self._start == "latest" and state is None else low
                known.begin(number, offset)
            elif offset is not None and offset != known.partitions[number].watermark:
                log.warning(
                    "%s: the committed offset of partition %d was set from %d to %d by others, which is followed",
                    self._source, number, known.partitions[number].watermark, offset,
                )  # fmt: skip
                known.begin(number, offset)
        return known

    def _list_partitions(self) -> None:
        assert self._stable is not None
        found = self._stable.list_topics(self._source.topic, timeout=PATIENCE).topics[self._source.topic]
        if found.error is not None:
            raise KafkaException(found.error)
        self.partitions = sorted(found.partitions)
        self._listed_at = time.monotonic()

    def _bounds(self, topic: str, partition: int = 0) -> tuple[int, int]:
        assert self._reader is not None
        return _bounds_of(self._reader, topic, partition)

    def _state_at(self, place: int) -> State | None:
        assert self._reader is not None
        for message in _from(self._reader, self._states, place, place + 1, waits=False):
            if message.offset() == place and message.key() == self._key.encode():
                return self._decoded(message)
        return None

    def _last_state(self) -> tuple[int | None, State | None]:
        """Look for the state in the whole of its topic."""
        assert self._stable is not None
        low, high = self._bounds(self._states)
        last = None
        for message in _from(self._stable, self._states, low, high):
            if message.key() == self._key.encode():
                last = message
        if last is None or last.value() is None:  # a tombstone: somebody had the group forgotten
            return None, None
        return last.offset(), self._decoded(last)

    def _decoded(self, message: Message) -> State:
        try:
            return State.decode(message.value() or b"")
        except (ValueError, KeyError, TypeError) as error:
            where = f"offset {message.offset()} of the topic {self._states!r}"
            raise SourceUnfit(f"{self._source}: its state at {where} cannot be read: {error!r}") from error

    def _who(self, partition: int, offset: int, mark: int) -> list[str]:
        """
        Return which waits committed a message, as far as is known.

        They are several where somebody has set the group's offsets back, so that the message came again.
        """
        assert self._stable is not None
        low, high = self._bounds(self._commits)
        key = f"{self._key}/{partition}/{offset}".encode()
        who = []
        for message in _from(self._stable, self._commits, max(low, mark) if mark <= high else low, high):
            if message.key() == key:
                who.append(str(json.loads(message.value() or b"{}").get("wait")))
        return who

    def _messages(self, wanted: list[tuple[int, int]]) -> dict[tuple[int, int], Message]:
        assert self._stable is not None
        found = {}
        while wanted:
            partition, first = wanted[0]
            # Those that are near one another, in one go.
            last = first
            for number, offset in wanted:
                if number == partition and offset - last <= _NEAR:
                    last = offset
            _, high = self._bounds(self._source.topic, partition)
            for message in _from(self._stable, self._source.topic, first, min(last + 1, high), partition):
                found[partition, cast("int", message.offset())] = message
            wanted = [(number, offset) for number, offset in wanted if number != partition or offset > last]
        return found


def _outcome(work: _Work, state: State) -> Any:
    try:
        return work(state)
    except Exception as error:
        return error


def _place_in(committed: TopicPartition) -> int | None:
    """Return where a committed offset's metadata says that the state is; None if others have set the offset."""
    try:
        return int(json.loads(committed.metadata or "")[_OURS])
    except (ValueError, KeyError, TypeError):
        return None


def _agrees(state: State, committed: dict[int, TopicPartition]) -> bool:
    """Whether the state is of the same transaction as the offsets."""
    return state.partitions.keys() == committed.keys() and all(
        partition.watermark == committed[number].offset for number, partition in state.partitions.items()
    )


def _bounds_of(consumer: Consumer, topic: str, partition: int) -> tuple[int, int]:
    """
    Return a partition's first offset, and the one after its last.

    :raises Away: it is not there any more, or the broker does not say.
    """
    try:
        found = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=PATIENCE)
    except KafkaException as error:
        if error.args[0].code() not in _NO_TOPIC:
            raise
        raise Away(f"there is no topic {topic!r} any more: it was deleted") from error
    if found is None:
        raise Away(f"the broker does not say how far {topic} goes")
    return found


def _from(
    consumer: Consumer, topic: str, start: int, end: int, partition: int = 0, *, waits: bool = True
) -> Iterable[Message]:
    """
    Return a partition's messages from ``start`` until before ``end``.

    :param waits: for what is not decided yet: others may have a transaction open.
    :raises Away: they do not come.
    """
    if start >= end:
        return
    # Asked only so that the client knows the partition's leader: to read at once would take it a second more.
    _bounds_of(consumer, topic, partition)
    consumer.assign([TopicPartition(topic, partition, start)])
    try:
        place = start
        while place < end:
            message = consumer.poll(_UNDECIDED)
            if message is None:
                raise Away(f"{topic} is not read: nothing comes after offset {place} of partition {partition}")
            error = message.error()
            if error is not None and error.code() != KafkaError._PARTITION_EOF:
                raise KafkaException(error)
            place = cast("int", message.offset())
            if error is None and place < end:
                yield message
                place += 1
            elif error is not None and not waits:
                return
    finally:
        consumer.unassign()


def ledger_of(source: Source) -> contextlib.AbstractAsyncContextManager[Ledger]:
    """Use the ledger that all of this process use."""
    return shared(("kafka ledger", source), lambda: Ledger(source))
