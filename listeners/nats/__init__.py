"""
NATS JetStream: a durable consumer as a queue, and a stream as a log.

`consume` receives and acknowledges messages through a `consumer`; `watch` reads a stream; `messages` is how a
stream has its messages; `client` makes connections of an Airflow connection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, ClassVar, Literal

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.support.clients import needs
from airflow_events.listeners.support.queue import Delivery, QueueListener, receive, skip
from airflow_events.listeners.support.values import Format, OnUndecodable, check_choices, check_names, seconds
from airflow_events.listeners.support.watch_listener import LogWatchListener
from airflow_events.listeners.support.watching import Watch, watches

needs("a NATS listener", "nats", "nats")

DEFAULT = "nats_default"
Start = Literal["all", "new"]


class NatsListener(QueueListener):
    """
    Take a message of a stream through a durable consumer: each message goes to one wait.

    The event is

    ``{"stream", "created", "durable", "sequence", "subject", "headers", "timestamp", "value", "nats_conn_id"}``,
    ``created`` when the stream was made, as the server writes it; ``timestamp`` a datetime in UTC, of when the
    stream stored the message; ``headers`` a dict of strings. Stream, created, durable and sequence are what tells
    the event from every other.

    A message is pending at its consumer until the wait's event is recorded, and is acknowledged then. One that a
    process had in hand as it died goes to another wait after the consumer's ``ack_wait``. How long a message
    stays, the stream's limits and its retention decide. One that is dropped before a wait had it is gone.

    A consumer belongs to one Airflow.
    """

    not_taken: ClassVar[Mapping[str, str]] = {
        "match": (
            "each message that is given back counts against the consumer's max_deliver. Give the consumer a "
            "filter subject; NatsWatchListener has match, and takes nothing away; "
            "start_on.override(match=...) passes over what does not match"
        )
    }

    async def poll_for_event(
        self,
        stream: str,
        *,
        subject: str | None = None,
        durable: str = "airflow",
        values: Format = "json",
        on_undecodable: OnUndecodable = "fail",
        dead_letter: str | None = None,
        deliver_policy: Start = "all",
        lease: float | timedelta = 60.0,
        require_persistence: bool = True,
        nats_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return when there is a message for this wait: those that have waited longest are served first.

        :param stream: its name. It must be there.
        :param subject: of which subjects, with wildcards; None is all of them, or those of a consumer that is
            there already.
        :param durable: the consumer's name. It is made if it is not there. Each consumer gets every message.
        :param values: of what format the message is; see `airflow_events.listeners.support.values.decode`.
        :param on_undecodable: what to do with a message that is not, or that Airflow cannot store: ``fail`` fails
            one wait for it, and it stays pending, for no other wait; ``skip`` acknowledges it, with a warning, and
            waits on; ``dead_letter`` publishes it to the subject ``dead_letter``, and then acknowledges it.
        :param dead_letter: a subject, of another stream, for messages that cannot be read. What is published has
            the message's headers but those of NATS, and ``airflow-events-reason`` and ``airflow-events-source``.
        :param deliver_policy: where a consumer that is not there yet begins: ``all`` at the stream's first
            message, ``new`` at the next one.
        :param lease: the ``ack_wait``, in seconds, of a consumer that is not there yet: after it a message that a
            process had in hand as it died goes to another wait. A process that lives keeps what it has, however
            long that takes.
        :param require_persistence: refuse a stream or a consumer that is kept in memory.
        :param nats_conn_id: an Airflow connection of type ``nats``, ``tls``, ``ws``, ``wss`` or ``generic``;
            ``docs/sources/nats.md`` says what it may have.
        :raises SourceMisconfigured: the connection is of another type; there is no such stream; the stream or the
            consumer would lose events, or hold them up; the user may not use them.
        :raises SourceUnreachable: the server was unreachable for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        from airflow_events.listeners.nats.consume import ConsumerHub, Received, bury
        from airflow_events.listeners.nats.consumer import SHORTEST, Wanted
        from airflow_events.listeners.nats.messages import Source, event_of

        check_choices(values, on_undecodable, dead_letter=dead_letter)
        check_names(durable=durable, **({} if subject is None else {"subject": subject}))
        if deliver_policy not in ("all", "new"):
            raise ValueError(f"deliver_policy is 'all' or 'new', not {deliver_policy!r}")
        if dead_letter is not None and not re.fullmatch(r"[^\s.*>]+(\.[^\s.*>]+)*", dead_letter):
            raise ValueError(f"dead_letter is a subject without wildcards, not {dead_letter!r}")
        after = seconds(lease, "lease")
        if after < SHORTEST:
            raise ValueError(f"lease is at least {SHORTEST:g} s, not {lease!r}")
        source, wanted = (
            Source(nats_conn_id, stream, durable),
            Wanted(subject, deliver_policy, after, require_persistence),
        )

        def read(received: Received) -> dict[str, Any]:
            event = event_of(source, received.stored, values)
            return {**event, "created": received.created, "durable": durable, "nats_conn_id": nats_conn_id}

        async def to_dead_letters(hub: ConsumerHub, delivery: Delivery, error: EventUndecodable) -> None:
            assert dead_letter is not None
            await bury(hub, source, delivery.message, dead_letter, error)

        return await receive(
            ("nats", source, wanted, values),
            lambda: ConsumerHub(source, wanted),
            read,
            {"skip": skip, "dead_letter": to_dead_letters}.get(on_undecodable),
        )

    def event_id(self, event: Any) -> str:
        """Return the stream, when it was made, the consumer and the message's sequence, as JSON."""
        from airflow_events.listeners.nats.client import coordinates

        # Events of the first edition do not say when the stream was made: they were held by claims.
        return coordinates(event["stream"], event.get("created", ""), event["durable"], event["sequence"])

    def event_content(self, event: Any) -> Any:
        """
        Return its id, and when the stream stored it.

        A stream that has lost its last messages, by a power failure or as its files were restored, gives their
        sequences to others.
        """
        return [self.event_id(event), event["timestamp"]]

    async def acknowledge(self, event: Any) -> None:
        """Acknowledge the message by its sequence."""
        from airflow_events.listeners.nats.consume import acknowledge
        from airflow_events.listeners.nats.messages import Source

        source = Source(event["nats_conn_id"], event["stream"], event["durable"])
        await acknowledge(source, event.get("created", ""), event["sequence"])


class NatsWatchListener(LogWatchListener):
    """
    Wait for the first message of a stream that matches, and take nothing away.

    The event is as of `NatsListener`, without ``created``, ``durable`` and ``nats_conn_id``.
    """

    @watches
    def poll_for_event(
        self,
        stream: str,
        *,
        match: dict[str, Any] | str | None = None,
        since: datetime | str | timedelta | None = None,
        subject: str | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "skip",
        nats_conn_id: str = DEFAULT,
    ) -> Watch:
        """
        Return the first message that matches, stored at ``since`` or later.

        :param match: see `airflow_events.listeners.support.values.Match`.
        :param since: a moment, or a timedelta from the creation of the run; None is its creation.
        :param subject: of which subjects, with wildcards; None is all of them.

        The other parameters and errors are as of `NatsListener.poll_for_event`; here an undecodable message is
        skipped, with a warning in the triggerer's log, unless ``on_undecodable`` is ``fail``.
        """
        from airflow_events.listeners.nats.messages import Source
        from airflow_events.listeners.nats.watch import StreamHub

        check_choices(values, on_undecodable)
        source = Source(nats_conn_id, stream)
        key = ("nats watch", source, subject, values)
        return Watch(key, lambda: StreamHub(source, subject, values), match, since, on_undecodable)
