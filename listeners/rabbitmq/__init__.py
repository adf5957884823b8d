"""
RabbitMQ: a queue as a queue, and a stream as a log.

`consume` receives and acknowledges messages; `watch` reads a stream; `messages` says what a message becomes;
`frames` lets the client survive metadata that it cannot read; `client` makes connections of an Airflow connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, ClassVar, Literal

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.support.clients import needs
from airflow_events.listeners.support.queue import Delivery, QueueListener, receive, skip
from airflow_events.listeners.support.values import Format, OnUndecodable, check_choices, check_names
from airflow_events.listeners.support.watch_listener import LogWatchListener
from airflow_events.listeners.support.watching import Watch, watches

needs("a RabbitMQ listener", "rabbitmq", "aiormq")

DEFAULT = "rabbitmq_default"
WithoutId = Literal["refuse", "at_least_once"]
WITHOUT_ID = ("refuse", "at_least_once")
NO_ID = (
    "it has none, so it could not be told from a new one when the broker delivers it again; let its sender set a "
    "message_id of its own on each message, or give without_id='at_least_once'"
)


class RabbitMQListener(QueueListener):
    """
    Take a message of a queue, classic or quorum: each goes to one wait.

    The event is

    ``{"server", "virtual_host", "queue", "message_id", "timestamp", "value", "digest", "exchange", "routing_key",
    "content_type", "headers", "properties", "rabbitmq_conn_id"}``. ``server`` is the connection's ``host:port``;
    ``timestamp`` is the message's own, a datetime in UTC or None; ``headers`` are JSON shapes, bytes among them as
    text or Base64; ``properties`` has what else was set. Server, virtual host, queue and ``message_id`` are what
    tells the event from every other: of a message without ``message_id``, ``delivery`` in its place, which is
    another one at each delivery.

    A message is unacknowledged until the wait's event is recorded, and is acknowledged then, over the channel that
    received it. If that is closed by then the broker delivers the message again, it is known by its id, and is
    acknowledged by whoever gets it.
    """

    not_taken: ClassVar[Mapping[str, str]] = {
        "match": (
            "each message that is given back counts against the queue's delivery limit. Bind a queue for "
            "what is wanted; RabbitMQWatchListener has match, and takes nothing away; "
            "start_on.override(match=...) passes over what does not match"
        )
    }

    async def poll_for_event(
        self,
        queue: str,
        *,
        values: Format = "json",
        on_undecodable: OnUndecodable = "fail",
        without_id: WithoutId = "refuse",
        require_durable: bool = True,
        rabbitmq_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return when there is a message for this wait: those that have waited longest are served first.

        :param queue: its name. It must be there: it is not made.
        :param values: of what format the body is; see `airflow_events.listeners.support.values.decode`. A body
            with the ``content_encoding`` ``gzip`` or ``deflate`` is unpacked first.
        :param on_undecodable: what to do with a message that is not, or that Airflow cannot store: ``fail`` fails
            one wait for it, and it stays unacknowledged, for no other wait; ``skip`` acknowledges it, with a
            warning, and waits on; ``dead_letter`` rejects it, so that it goes to the dead letter exchange of the
            queue. A queue that has none drops it.
        :param without_id: what to do with a message without ``message_id``, of which nobody can tell, when the
            broker delivers it again, whether a wait has had it: ``refuse`` fails one wait for it, as above, also
            where others are skipped; ``at_least_once`` takes it, and takes it again.
        :param require_durable: refuse a queue that is not durable. One that deletes itself is always refused.
        :param rabbitmq_conn_id: an Airflow connection of type ``amqp``, ``amqps``, ``rabbitmq`` or ``generic``.
            Its schema is the virtual host, ``/`` by default; extras are ``ssl``, ``cafile``, ``certfile``,
            ``keyfile``, and ``heartbeat`` in seconds.
        :raises SourceMisconfigured: the connection is of another type, or refused; there is no such queue; it is a
            stream, or not durable; the user may not use it.
        :raises SourceUnreachable: the server was unreachable for too long.
        :raises EventUndecodable: see ``on_undecodable`` and ``without_id``.
        """
        from airflow_events.listeners.rabbitmq.client import Source
        from airflow_events.listeners.rabbitmq.consume import Consumer, bury, refuse
        from airflow_events.listeners.rabbitmq.messages import Received, event_of

        buries = on_undecodable == "dead_letter"
        check_choices(values, on_undecodable, dead_letter=buries)
        check_names(queue=queue)
        if without_id not in WITHOUT_ID:
            raise ValueError(f"without_id is {' or '.join(map(repr, WITHOUT_ID))}, not {without_id!r}")
        takes_all = without_id == "at_least_once"
        source = Source(rabbitmq_conn_id, queue)

        def read(received: Received) -> dict[str, Any]:
            if received.message_id is None and not takes_all:
                raise EventUndecodable(f"a message of {source}", "known by a message_id", NO_ID, received.start)
            return event_of(source, received, values)

        async def unreadable(hub: Consumer, delivery: Delivery, error: EventUndecodable) -> None:
            if buries:
                await bury(hub, delivery, error)
            elif on_undecodable == "skip" and (takes_all or delivery.message.message_id is not None):
                await skip(hub, delivery, error)
            else:
                await refuse(hub, delivery, error)

        key = ("rabbitmq", source, require_durable, values, takes_all)
        return await receive(key, lambda: Consumer(source, require_durable), read, unreadable)

    def event_id(self, event: Any) -> str:
        """Return server, virtual host, queue and ``message_id``, as JSON."""
        from airflow_events.listeners.rabbitmq.client import coordinates

        # Events of the first edition have neither server nor virtual host, but an id of their own.
        return coordinates(
            event.get("server", ""),
            event.get("virtual_host", ""),
            event["queue"],
            event["message_id"],
            event.get("delivery") or event.get("id", ""),
        )


class RabbitMQWatchListener(LogWatchListener):
    """
    Wait for the first message of a stream that matches, and take nothing away.

    The event is as of `RabbitMQListener`, without ``server``, ``virtual_host`` and ``digest``, and with the
    message's ``offset`` in the stream.
    """

    @watches
    def poll_for_event(
        self,
        stream: str,
        *,
        match: dict[str, Any] | str | None = None,
        since: datetime | str | timedelta | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "skip",
        rabbitmq_conn_id: str = DEFAULT,
    ) -> Watch:
        """
        Return the first message that matches, published at ``since`` or later.

        When it was published, its header ``timestamp_in_ms`` says, or its property ``timestamp``, which counts for
        the whole second. The broker tells no other: a message without them counts as published when it is read.

        :param stream: the name of a queue of type ``stream``. It must be there: it is not made.
        :param match: see `airflow_events.listeners.support.values.Match`.
        :param since: a moment, or a timedelta from the creation of the run; None is its creation.

        The other parameters and errors are as of `RabbitMQListener.poll_for_event`; here an undecodable message is
        skipped, with a warning in the triggerer's log, unless ``on_undecodable`` is ``fail``.
        """
        from airflow_events.listeners.rabbitmq.client import Source
        from airflow_events.listeners.rabbitmq.watch import StreamHub

        check_choices(values, on_undecodable)
        check_names(stream=stream)
        source = Source(rabbitmq_conn_id, stream)
        key = ("rabbitmq watch", source, values)
        return Watch(key, lambda: StreamHub(source, values), match, since, on_undecodable)
