"""What the brokers know of a group and of its topics, asked and told beside reading. All of it blocks."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

from airflow_events.errors import SourceMisconfigured
from airflow_events.listeners.kafka.client import PATIENCE, BrokerUnavailable, Clients, Place, described
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

log = logging.getLogger(__name__)

# What a broker says to a commit of a group that has members.
_REFUSED = (KafkaError.UNKNOWN_MEMBER_ID, KafkaError.REBALANCE_IN_PROGRESS, KafkaError.ILLEGAL_GENERATION)

_Offset = tuple[int, str]
"""Of a group, negative if there is none, and its metadata."""


@dataclass(frozen=True)
class About:
    """
    What the brokers know of a topic.

    :param id: Kafka's own, which a topic that is deleted and made again has no more.
    :param committed: by partition; nothing if the group's coordinator does not answer.
    """

    cluster: str
    topic: str
    id: str
    partitions: tuple[int, ...]
    committed: Mapping[int, _Offset]


@dataclass(frozen=True)
class Look:
    """
    What the brokers know of the topics and the group.

    :param topics: those that are there.
    :param silent: why the group's coordinator does not answer; None if it does.
    :param leaderless: partitions of which no broker is the leader now, so that nobody can read them.
    """

    topics: list[About]
    silent: BrokerUnavailable | None
    leaderless: set[Place]


def source_of(cluster: str, topic: str, group: str) -> str:
    """Return what tells a topic of a group from every other, for `Positions`. Its form is frozen."""
    return json.dumps([cluster, topic, group], ensure_ascii=False)


def partition_of(topic_id: str, partition: int) -> str:
    """Return the place that a partition is, for `Positions`. Its form is frozen."""
    return f"{topic_id}/{partition}"


class Group:
    """
    A group without members, asked and told beside reading: whatever its coordinator does, reading goes on.

    librdkafka ends the process if a request of an admin client to a coordinator has timed out, and the coordinator
    answers that client later (its issue 3663), or if it answers ``list_consumer_group_offsets`` that it is not the
    coordinator (5040). So a consumer asks first, which bears all that, and without an answer the admin client is
    closed at once; it would also ask on where the coordinator, or the controller, was.

    :ivar consumer: of somebody else, who closes it after this.
    :ivar is_overtaken: whether somebody else has set the group's offsets, or joined it, since `look` asked.
    """

    def __init__(self, clients: Clients, consumer: Consumer) -> None:
        self.is_overtaken = False
        self._seen: dict[Place, _Offset] = {}
        self._clients = clients
        self._source = clients.source
        self.consumer = consumer
        self._admin: AdminClient | None = None
        self._cluster = ""
        self._brokers: list[str] = []

    def look(self) -> Look:
        """
        Ask about the topics and the group.

        :raises BrokerUnavailable: no broker answers, or no topic is there.
        :raises SourceMisconfigured: the user may not use them, or the group has members.
        """
        topics = self._described()
        partitions = [(name, one) for name, topic in topics.items() for one in topic.partitions]
        places = [(name, one.id) for name, one in partitions]
        leaderless = {(name, one.id) for name, one in partitions if one.leader is None}
        committed, silent = self._coordinator(places)
        return Look(
            [
                About(
                    self._cluster_id(),
                    name,
                    str(topic.topic_id),
                    tuple(number for of, number in places if of == name),
                    {number: offset for (of, number), offset in committed.items() if of == name},
                )
                for name, topic in topics.items()
            ],
            silent,
            leaderless,
        )

    def bounds(self, places: Iterable[Place]) -> dict[Place, tuple[int, int]]:
        """
        Return the offsets of the first message that is there, and of the next one that will be.

        Over the admin client, in one request to each broker: asking the consumer would hold up what it reads.

        :raises BrokerUnavailable: a broker does not answer.
        """
        found = {}
        with self._clients.refusals():
            specs = OffsetSpec.earliest(), OffsetSpec.latest()  # type: ignore[no-untyped-call]
            first, last = (self._offsets_at(places, spec) for spec in specs)
            for place, asked in last.items():
                found[place] = first[place].result(PATIENCE + 5).offset, asked.result(PATIENCE + 5).offset
        return found

    def _offsets_at(self, places: Iterable[Place], spec: OffsetSpec) -> dict[Place, Any]:
        wanted = {TopicPartition(*place): spec for place in places}
        asked = self._asks().list_offsets(wanted, request_timeout=PATIENCE)
        return {(place.topic, place.partition): future for place, future in asked.items()}

    def topic_id(self) -> str:
        """
        Return Kafka's own id of the topic, if the group has one topic alone.

        :raises BrokerUnavailable: no broker answers, or it is not there.
        """
        return self.topic_ids()[self._source.topic]

    def topic_ids(self) -> dict[str, str]:
        """
        Return Kafka's own ids of the topics that are there.

        :raises BrokerUnavailable: no broker answers, or none is there.
        """
        return {name: str(topic.topic_id) for name, topic in self._described().items()}

    def _described(self) -> dict[str, Any]:
        try:
            return described(self._clients, self._asks())
        except BrokerUnavailable:
            self.close()
            raise

    def _asks(self) -> AdminClient:
        if self._admin is None:  # those that the connection names may be the ones that are unreachable
            self._admin = self._clients.admin(*self._brokers)
        return self._admin

    def _cluster_id(self) -> str:
        if not self._cluster:
            with self._clients.refusals():
                found = self.consumer.list_topics(self._source.topic, timeout=PATIENCE)
            self._cluster = found.cluster_id or ""
            self._brokers = [f"{broker.host}:{broker.port}" for broker in found.brokers.values()]
        return self._cluster

    def _coordinator(self, places: Iterable[Place]) -> tuple[dict[Place, _Offset], BrokerUnavailable | None]:
        """Return the committed offsets; or nothing, and why the coordinator does not answer."""
        try:
            with self._clients.refusals():
                committed = self._offsets(places)
                self._check_members()
        except BrokerUnavailable as unavailable:
            self.close()
            return {}, unavailable
        self._seen, self.is_overtaken = committed, False
        return committed, None

    def _offsets(self, places: Iterable[Place]) -> dict[Place, _Offset]:
        found = {}
        for place in self.consumer.committed([TopicPartition(*place) for place in places], timeout=PATIENCE):
            if place.error is not None:
                raise KafkaException(place.error)
            found[place.topic, place.partition] = place.offset, place.metadata or ""
        return found

    def _check_members(self) -> None:
        group = self._source.group
        [asked] = self._asks().describe_consumer_groups([group], request_timeout=PATIENCE).values()
        try:
            found = asked.result(PATIENCE + 5).members
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return
            raise
        if members := [f"{member.client_id!r} at {member.host}" for member in found]:
            raise SourceMisconfigured(
                f"{self._source}: the group has members, {', '.join(members)}: they get the same messages, and "
                "while they are there nobody else can commit. Give the waits a group of their own"
            )

    def commit(self, offsets: Mapping[Place, _Offset]) -> bool:
        """Set the group's offsets, unless somebody else has set one; return whether it was done."""
        errors: list[Any]
        try:
            for place, found in self._offsets(offsets).items():
                if found[0] >= 0 and found[1] != offsets[place][1] and found != self._seen.get(place):
                    self.is_overtaken = True
                    return False
            # Not by the consumer, which cannot be closed while brokers that are unreachable have to commit.
            places = [TopicPartition(*place, offset, metadata=data) for place, (offset, data) in offsets.items()]
            wanted = [ConsumerGroupTopicPartitions(self._source.group, places)]
            [asked] = self._asks().alter_consumer_group_offsets(wanted, request_timeout=PATIENCE).values()
            errors = [
                place.error for place in asked.result(PATIENCE + 5).topic_partitions if place.error is not None
            ]
        except KafkaException as failed:
            errors = [failed.args[0]]
        except FutureTimeout:
            errors = [KafkaError(KafkaError._TIMED_OUT)]
        if errors:
            self.close()
        for error in errors:
            log.info("%s: the offsets are not committed, for now: %s", self._source, error)
            self.is_overtaken |= error.code() in _REFUSED
        return not errors

    def close(self) -> None:
        """Close the admin client, and not the consumer; another is opened when it is needed."""
        self._admin = None
