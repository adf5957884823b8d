"""
Apache Kafka: a topic as a queue with an acknowledgement for each message, and a topic as a log.

`consume` reads topics for a group and keeps how far it has come; `reader` is its consumer; `watch` reads a topic
without a group; `client` makes Kafka's clients of an Airflow connection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, Literal

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.support.clients import needs
from airflow_events.listeners.support.queue import Delivery, FinalIdListener, receive, skip
from airflow_events.listeners.support.values import OnUndecodable, check_choices, check_names
from airflow_events.listeners.support.watch_listener import LogWatchListener
from airflow_events.listeners.support.watching import Watch, watches

needs("a Kafka listener", "kafka", "confluent_kafka")

DEFAULT = "kafka_default"
KafkaFormat = Literal["json", "text", "bytes", "avro", "json_schema"]
Start = Literal["earliest", "latest"]


class KafkaListener(FinalIdListener):
    """
    Take a message of a topic for a group: each message goes to one wait, whatever the order of acknowledgements.

    The event is

    ``{"topic", "partition", "offset", "timestamp", "key", "headers", "value", "group", "cluster", "topic_id",
    "kafka_config_id"}``, ``timestamp`` a datetime in UTC, or None if the message has none that is a time;
    ``headers`` a dict of texts, Base64 where they are none. Cluster, topic id, topic, partition, offset and group
    are what tells it from every other.

    Every triggerer with waits reads all partitions, and the inbox decides. It knows, too, which messages are
    settled; the group's committed offset follows it, and is the lowest one that is not. A group belongs to one
    Airflow, and has no members. The connection's user needs ``Read`` on topic and group.
    """

    not_taken: ClassVar[Mapping[str, str]] = {
        "match": (
            "an offset that is left open holds up the group's, for good. KafkaWatchListener has match, and "
            "takes nothing away; start_on.override(match=...) passes over what does not match"
        )
    }

    async def poll_for_event(
        self,
        topic: str | Sequence[str],
        *,
        group: str = "airflow",
        values: KafkaFormat = "json",
        keys: KafkaFormat = "text",
        on_undecodable: OnUndecodable = "fail",
        dead_letter: str | None = None,
        start: Start = "earliest",
        kafka_config_id: str = DEFAULT,
        registry_conn_id: str | None = None,
    ) -> dict[str, Any]:
        """
        Return when there is a message for this wait: those that have waited longest are served first.

        :param topic: its name, or several. It is never made here; one that is not there yet is waited for as a
            broker is.
        :param group: the consumer group.
        :param values: of what format the value is: ``json``, ``text``, ``bytes`` (as Base64 text), or ``avro`` or
            ``json_schema`` by a schema registry. A message without a value has None.
        :param keys: of what format the key is. With ``text`` a key that is none is Base64 text.
        :param on_undecodable: what to do with a message that is not, or that Airflow cannot store: ``fail`` fails
            one wait for it, and it stays unsettled, for no other wait that reads it the same way; ``skip`` settles
            it, with a warning, and waits on; ``dead_letter`` sends it to the topic ``dead_letter``, and then
            settles it.
        :param dead_letter: a topic of the same brokers for messages that cannot be read, with the headers
            ``airflow-events-reason`` and ``airflow-events-source``; the user needs ``Write`` on it. After a crash
            between the two steps it has a message twice.
        :param start: where a new group starts: ``earliest`` at the first message, ``latest`` at
            the next one. It is decided once, before anything is read.
        :param kafka_config_id: an Airflow connection of type ``kafka``, as the Kafka provider has it:
            librdkafka's settings among the extras.
        :param registry_conn_id: an Airflow connection of type ``http`` to the schema registry; the settings of
            ``confluent_kafka.schema_registry.SchemaRegistryClient`` among the extras. While it does not answer,
            messages are neither skipped nor settled.
        :raises SourceMisconfigured: the connection is of another type or would lose events; the user may not use
            the topic or the group; the group has members, or is another Airflow's.
        :raises SourceUnreachable: the brokers were unreachable, or the topic not there, for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        from airflow_events.listeners.kafka.client import Source
        from airflow_events.listeners.kafka.consume import GroupHub, Record
        from airflow_events.listeners.kafka.schemas import Formats

        check_choices("json", on_undecodable, dead_letter=dead_letter)
        formats = Formats(values, keys, registry_conn_id)
        if start not in ("earliest", "latest"):
            raise ValueError(f"start is 'earliest' or 'latest', not {start!r}")
        topics = (topic,) if isinstance(topic, str) else tuple(sorted(set(topic)))
        if not topics:
            raise ValueError("topic is the name of a topic, or several of them")
        for name in topics:
            check_names(topic=name, group=group)
        if dead_letter in topics:
            raise ValueError(f"dead_letter is another topic than those that are read, not {dead_letter!r}")
        source = Source(kafka_config_id, topics, group)

        def read(record: Record) -> dict[str, Any]:
            return {**record.read(), "group": group, "kafka_config_id": kafka_config_id}

        async def to_dead_letters(hub: GroupHub, delivery: Delivery, error: EventUndecodable) -> None:
            assert dead_letter is not None
            await hub.bury(delivery.message, dead_letter, error)

        return await receive(
            ("kafka", source, start, formats),
            lambda: GroupHub(source, start, formats),
            read,
            {"skip": skip, "dead_letter": to_dead_letters}.get(on_undecodable),
        )

    def event_id(self, event: Any) -> str:
        """Return cluster, topic id, topic, partition, offset and group, as JSON."""
        from airflow_events.listeners.kafka.client import coordinates

        # Events of the first edition do not say cluster and topic id: they were held by claims.
        return coordinates(
            event.get("cluster", ""),
            event.get("topic_id", ""),
            event["topic"],
            event["partition"],
            event["offset"],
            event["group"],
        )

    async def acknowledge(self, event: Any) -> None:
        """Settle the message by its offset."""
        from airflow_events.listeners.kafka.client import Source
        from airflow_events.listeners.kafka.consume import settle

        await settle(Source(event["kafka_config_id"], (event["topic"],), event["group"]), event)


class KafkaWatchListener(LogWatchListener):
    """
    Wait for the first message of a topic that matches, and take nothing.

    The event is as of `KafkaListener`, without what it needs for a commit.
    """

    @classmethod
    def check_arguments(cls, topic: Any = "", *args: Any, **others: Any) -> None:
        super().check_arguments(topic, *args, **others)
        _check_one(topic)

    @watches
    def poll_for_event(
        self,
        topic: str,
        *,
        match: dict[str, Any] | str | None = None,
        since: datetime | str | timedelta | None = None,
        values: KafkaFormat = "json",
        keys: KafkaFormat = "text",
        on_undecodable: OnUndecodable = "skip",
        kafka_config_id: str = DEFAULT,
        registry_conn_id: str | None = None,
    ) -> Watch:
        """
        Return the first message that matches, of a timestamp of ``since`` or later.

        :param match: see `airflow_events.listeners.support.values.Match`.
        :param since: a moment, or a timedelta from the creation of the run; None is its creation.

        The other parameters and errors are as of `KafkaListener.poll_for_event`; here an undecodable message is
        skipped, with a warning in the triggerer's log, unless ``on_undecodable`` is ``fail``.
        """
        from airflow_events.listeners.kafka.client import Source
        from airflow_events.listeners.kafka.schemas import Formats
        from airflow_events.listeners.kafka.watch import TopicHub

        check_choices("json", on_undecodable)
        _check_one(topic)
        check_names(topic=topic)
        formats = Formats(values, keys, registry_conn_id)
        source = Source(kafka_config_id, (topic,))
        key = ("kafka watch", source, formats)
        return Watch(key, lambda: TopicHub(source, formats), match, since, on_undecodable)


def _check_one(topic: Any) -> None:
    if isinstance(topic, (list, tuple, set, frozenset)):
        raise ValueError(
            f"topic is the name of one topic for a watch, not {topic!r}: give each topic a watch of its own"
        )
