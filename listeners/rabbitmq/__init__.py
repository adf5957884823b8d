"""
RabbitMQ: a queue as a queue, and a stream as a log.

An AMQP acknowledgement cannot leave the channel that got the message, and a commit is made by another process
than the poll. So a claim moves the message: into a queue of the wait's own, from which the commit takes it.

`claims` has these moves, and why none of them loses a message; `messages` is what is written on what is moved;
`consume` claims for the waits on a queue; `watch` reads a stream; `client` makes connections of an Airflow
connection.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from typing import Any, ClassVar

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.clients import needs
from airflow_events.listeners.log import first_match
from airflow_events.listeners.shared import shared
from airflow_events.listeners.values import Format, OnUndecodable, check_choices

needs("a RabbitMQ listener", "rabbitmq", "aiormq")

log = logging.getLogger(__name__)

DEFAULT = "rabbitmq_default"


class RabbitMQListener(EventListener):
    """
    Take a message of a queue, classic or quorum: each goes to one wait, exactly once.

    The claim is a queue of the wait's own, into which the message is moved. The event is

    ``{"queue", "id", "claim", "timestamp", "value", "exchange", "routing_key", "message_id", "content_type",
    "headers", "properties", "rabbitmq_conn_id"}``. ``timestamp`` is the message's own, a datetime in UTC or None;
    ``headers`` are JSON shapes, bytes among them as text or Base64; ``properties`` has what else was set.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        queue: str,
        *,
        values: Format = "json",
        on_undecodable: OnUndecodable = "fail",
        claim_timeout: float | timedelta = 3600.0,
        unique_message_ids: bool = True,
        require_durable: bool = True,
        rabbitmq_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return when there is a message that no other wait has, in the queue's order.

        :param queue: its name. It must be there: it is not made.
        :param values: of what format the body is; see `airflow_events.listeners.values.decode`.
        :param on_undecodable: what to do with a message that is not: ``fail`` fails the wait and puts the message
            back, ``skip`` commits it, with a warning, and waits on.
        :param claim_timeout: after how many seconds a message that a wait has claimed and not committed goes back
            to the queue, to its end. A wait that still lives loses nothing by it: its commit is refused, and it
            waits on.
        :param unique_message_ids: whether two messages with the same ``message_id``, body and timestamp are one,
            sent once. It is asked only about a message that the broker gives out again. False keeps both, always.
        :param require_durable: refuse a queue that is not durable, deletes itself, or is exclusive.
        :param rabbitmq_conn_id: an Airflow connection of type ``amqp``, ``rabbitmq`` or ``generic``. Its schema is
            the virtual host, ``/`` by default; extras are ``ssl``, ``cafile``, ``certfile``, ``keyfile``, and
            ``heartbeat`` in seconds.
        :raises SourceUnfit: the connection is of another type, or refused; there is no such queue; it is a stream,
            or not durable; the user may not use it, or may not make the queues of the claims.
        :raises SourceUnreachable: the server was away for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        from airflow_events.listeners.rabbitmq.claims import commit, put_back
        from airflow_events.listeners.rabbitmq.client import Source, server_of, within
        from airflow_events.listeners.rabbitmq.consume import Consumer, QueueHub
        from airflow_events.listeners.rabbitmq.messages import event_of

        check_choices(values, on_undecodable)
        source = Source(rabbitmq_conn_id, queue)
        wait = current_wait().id
        lapse = claim_timeout.total_seconds() if isinstance(claim_timeout, timedelta) else float(claim_timeout)
        key = ("rabbitmq", source, require_durable)
        while True:
            async with shared(key, lambda: QueueHub(source, require_durable)) as hub:
                claim = await hub.take(Consumer(wait, lapse, unique_message_ids))
            try:
                return {**event_of(source, claim, values), "rabbitmq_conn_id": rabbitmq_conn_id}
            except EventUndecodable as error:
                async with server_of(rabbitmq_conn_id) as server:
                    if on_undecodable == "fail":
                        await within(put_back(server, source, wait, claim.claim))
                        raise
                    await within(commit(server, source, wait, claim.id, claim.claim))
                log.warning("Passed over, and committed: %s", error)

    async def event_checkpointed(self, event: Any) -> None:
        """Drop the message, and note for ``[events] commit_memory`` seconds who did."""
        from airflow_events.listeners.rabbitmq.claims import commit
        from airflow_events.listeners.rabbitmq.client import Source, server_of, within

        source = Source(event["rabbitmq_conn_id"], event["queue"])
        async with server_of(source.conn_id) as server:
            await within(commit(server, source, current_wait().id, event["id"], event["claim"]))

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Put the message back, to the queue's end."""
        from airflow_events.listeners.rabbitmq.claims import put_back
        from airflow_events.listeners.rabbitmq.client import Source, server_of, within

        source = Source(kwargs.get("rabbitmq_conn_id", DEFAULT), args[0] if args else kwargs["queue"])
        async with server_of(source.conn_id) as server:
            await within(put_back(server, source, current_wait().id))


class RabbitMQWatchListener(EventListener):
    """
    Wait for the first message of a stream that matches, and take nothing away.

    The event is as of `RabbitMQListener`, with the message's ``offset`` in the stream in the place of ``id`` and
    ``claim``.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        stream: str,
        *,
        match: dict[str, Any] | str | None = None,
        since: datetime | str | timedelta | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "skip",
        rabbitmq_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return the first message that matches, published at ``since`` or later.

        When it was published, its header ``timestamp_in_ms`` says, or its property ``timestamp``, which counts for
        the whole second. The broker tells no other: a message without them counts as published when it is read.

        :param stream: the name of a queue of type ``stream``. It must be there: it is not made.
        :param match: see `airflow_events.listeners.values.Match`.
        :param since: a moment, or a timedelta from the start of the run; None is the start of the run.

        The other parameters and errors are as of `RabbitMQListener.poll_for_event`; here an undecodable message is
        passed over, with a warning in the triggerer's log, unless ``on_undecodable`` is ``fail``.
        """
        from airflow_events.listeners.rabbitmq.client import Source
        from airflow_events.listeners.rabbitmq.watch import StreamHub

        check_choices(values, on_undecodable)
        source = Source(rabbitmq_conn_id, stream)
        key = ("rabbitmq watch", source, values)
        return await first_match(key, lambda: StreamHub(source, values), match, since, on_undecodable)
