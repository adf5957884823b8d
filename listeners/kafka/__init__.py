"""
Apache Kafka: a topic as a queue with an acknowledgement for each message, and a topic as a log.

`state` is what is known of a queue, as a value; `ledger` keeps it on the broker by transactions; `consume` hands
messages out by it; `watch` reads a topic without a group; `client` makes Kafka's clients of an Airflow connection.
Why there is a ledger: ``docs/decisions/kafka-acknowledgement.md``.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.clients import needs
from airflow_events.listeners.log import first_match
from airflow_events.listeners.shared import shared
from airflow_events.listeners.values import OnUndecodable, check_choices

if TYPE_CHECKING:
    from airflow_events.listeners.kafka.consume import Start
    from airflow_events.listeners.kafka.schemas import KafkaFormat

needs("a Kafka listener", "kafka", "confluent_kafka")

log = logging.getLogger(__name__)

DEFAULT = "kafka_default"


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
        from airflow_events.listeners.kafka.client import Source, event_of
        from airflow_events.listeners.kafka.consume import QueueHub, Taker
        from airflow_events.listeners.kafka.ledger import ledger_of
        from airflow_events.listeners.kafka.schemas import Decoder, Formats

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
                async with shared(("kafka", source, start), lambda: QueueHub(source, start)) as hub:
                    message, mark = await hub.take(Taker(wait, lapse))
                try:
                    event = await decoder.patiently(lambda: event_of(source, message, decoder.value))  # noqa: B023
                except EventUndecodable as error:
                    async with ledger_of(source) as there:
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
        from airflow_events.listeners.kafka.client import Source
        from airflow_events.listeners.kafka.ledger import ledger_of

        source = Source(event["kafka_config_id"], event["topic"], event["group"], event["ledger"])
        async with ledger_of(source) as ledger:
            await ledger.commit(event["partition"], event["offset"], current_wait().id, event["mark"])

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Let another wait have the message at once."""
        from airflow_events.listeners.kafka.client import Source
        from airflow_events.listeners.kafka.ledger import ledger_of

        source = Source(
            kwargs.get("kafka_config_id", DEFAULT),
            args[0] if args else kwargs["topic"],
            kwargs.get("group", "airflow"),
            kwargs.get("ledger", "airflow-events"),
        )
        wait = current_wait().id
        async with ledger_of(source) as ledger:
            await ledger.refresh()
            # To write would overtake others, and most that is released holds nothing.
            if ledger.state is not None and any(claim.wait == wait for _, _, claim in ledger.state.claims()):
                await ledger.change(lambda state: state.release(wait))


class KafkaWatchListener(EventListener):
    """
    Wait for the first message of a topic that matches, and take nothing.

    The event is as of `KafkaListener`, without what it needs for a commit.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
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
    ) -> dict[str, Any]:
        """
        Return the first message that matches, of a timestamp of ``since`` or later.

        :param match: see `airflow_events.listeners.values.Match`.
        :param since: a moment, or a timedelta from the start of the run; None is the start of the run.

        The other parameters and errors are as of `KafkaListener.poll_for_event`; here an undecodable message is
        passed over, with a warning in the triggerer's log, unless ``on_undecodable`` is ``fail``.
        """
        from airflow_events.listeners.kafka.client import Source
        from airflow_events.listeners.kafka.schemas import Formats
        from airflow_events.listeners.kafka.watch import TopicHub

        check_choices("json", on_undecodable)
        formats = Formats(values, keys, registry_conn_id)
        source = Source(kafka_config_id, topic)
        key = ("kafka watch", source, formats)
        return await first_match(key, lambda: TopicHub(source, formats), match, since, on_undecodable)
