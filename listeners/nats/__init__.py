"""
NATS JetStream: a durable consumer as a queue, and a stream as a log.

`claims` is who has which message, as keys of a bucket; `consume` claims by it for the waits on a consumer; `watch`
reads a stream; `messages` is how a stream has its messages; `client` makes connections of an Airflow connection.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from typing import Any, ClassVar, Literal

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.clients import needs
from airflow_events.listeners.log import first_match
from airflow_events.listeners.shared import shared
from airflow_events.listeners.values import Format, OnUndecodable, check_choices

needs("a NATS listener", "nats", "nats")

log = logging.getLogger(__name__)

DEFAULT = "nats_default"
BUCKET = "airflow-events"
Start = Literal["all", "new"]


class NatsListener(EventListener):
    """
    Take a message of a stream through a durable consumer: each message goes to one wait, exactly once.

    Claims and commits are keys of a key-value bucket; the acknowledgement, which JetStream takes from anybody,
    follows the commit. The event is

    ``{"stream", "durable", "id", "sequence", "subject", "headers", "timestamp", "value", "bucket",
    "nats_conn_id"}``, ``timestamp`` a datetime in UTC, of when the stream stored the message; ``headers`` a dict
    of strings.

    How long a message stays, the stream's limits and its retention decide. One that is dropped before a wait had
    it is gone.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        stream: str,
        *,
        subject: str | None = None,
        durable: str = "airflow",
        values: Format = "json",
        on_undecodable: OnUndecodable = "fail",
        deliver_policy: Start = "all",
        claim_timeout: float | timedelta = 3600.0,
        require_persistence: bool = True,
        bucket: str = BUCKET,
        nats_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return when there is a message that no other wait on the consumer has, the oldest first.

        :param stream: its name. It must be there.
        :param subject: of which subjects, with wildcards; None is all of them, or those of a consumer that is
            there already.
        :param durable: the consumer's name. It is made if it is not there. Each consumer gets every message.
        :param values: of what format the message is; see `airflow_events.listeners.values.decode`.
        :param on_undecodable: what to do with a message that is not: ``fail`` fails the wait and leaves the
            message to others, ``skip`` acknowledges it, with a warning, and waits on.
        :param deliver_policy: where a consumer that is not there yet begins: ``all`` at the stream's first
            message, ``new`` at the next one.
        :param claim_timeout: after how many seconds a message that a wait has claimed and not committed goes to
            another. A wait that still lives loses nothing by it: its commit is refused, and it waits on.
        :param require_persistence: refuse a stream, a consumer or a bucket that is kept in memory.
        :param bucket: where claims and commits are kept. It is made if it is not there.
        :param nats_conn_id: an Airflow connection of type ``nats`` or ``generic``; ``docs/sources/nats.md`` says
            what may stand in it.
        :raises SourceUnfit: the connection is of another type; there is no such stream; the stream, the consumer
            or the bucket would lose events; the user may not use them.
        :raises SourceUnreachable: the server was away for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        from airflow_events.listeners.nats.claims import Claims
        from airflow_events.listeners.nats.client import server_of
        from airflow_events.listeners.nats.consume import QueueHub, Taker
        from airflow_events.listeners.nats.messages import Source, event_of

        check_choices(values, on_undecodable)
        if deliver_policy not in ("all", "new"):
            raise ValueError(f"deliver_policy is 'all' or 'new', not {deliver_policy!r}")
        source = Source(nats_conn_id, stream, durable, bucket)
        wait = current_wait().id
        lapse = claim_timeout if isinstance(claim_timeout, timedelta) else timedelta(seconds=claim_timeout)
        key = ("nats", source, subject, deliver_policy, require_persistence)
        while True:
            make = lambda: QueueHub(source, subject, deliver_policy, require_persistence)  # noqa: E731
            async with shared(key, make) as hub:
                message = await hub.take(Taker(wait, lapse))
            try:
                event = event_of(source, message, values)
            except EventUndecodable as error:
                async with server_of(nats_conn_id) as server:
                    claims = Claims(server, source)
                    if on_undecodable == "fail":
                        await claims.release(message.id, wait)
                        raise
                    await claims.commit(message.id, wait)
                log.warning("Passed over, and acknowledged: %s", error)
            else:
                return {**event, "durable": durable, "bucket": bucket, "nats_conn_id": nats_conn_id}

    async def event_checkpointed(self, event: Any) -> None:
        """Note for ``[events] commit_memory`` seconds who has the message, and acknowledge it."""
        from airflow_events.listeners.nats.claims import Claims
        from airflow_events.listeners.nats.client import server_of
        from airflow_events.listeners.nats.messages import Source

        source = Source(event["nats_conn_id"], event["stream"], event["durable"], event["bucket"])
        async with server_of(source.conn_id) as server:
            await Claims(server, source).commit(event["id"], current_wait().id)

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Let another wait have the message at once."""
        from airflow_events.listeners.nats.claims import Claims
        from airflow_events.listeners.nats.client import server_of
        from airflow_events.listeners.nats.messages import Source

        stream = args[0] if args else kwargs["stream"]
        conn_id, wait = kwargs.get("nats_conn_id", DEFAULT), current_wait().id
        source = Source(conn_id, stream, kwargs.get("durable", "airflow"), kwargs.get("bucket", BUCKET))
        async with server_of(conn_id) as server:
            claims = Claims(server, source)
            message = event["id"] if event is not None else await claims.chosen(wait)
            if message is not None:
                await claims.release(message, wait)


class NatsWatchListener(EventListener):
    """
    Wait for the first message of a stream that matches, and take nothing away.

    The event is as of `NatsListener`, without ``durable``, ``bucket`` and ``nats_conn_id``.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        stream: str,
        *,
        match: dict[str, Any] | str | None = None,
        since: datetime | str | timedelta | None = None,
        subject: str | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "skip",
        nats_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return the first message that matches, stored at ``since`` or later.

        :param match: see `airflow_events.listeners.values.Match`.
        :param since: a moment, or a timedelta from the start of the run; None is the start of the run.
        :param subject: of which subjects, with wildcards; None is all of them.

        The other parameters and errors are as of `NatsListener.poll_for_event`; here an undecodable message is
        passed over, with a warning in the triggerer's log, unless ``on_undecodable`` is ``fail``.
        """
        from airflow_events.listeners.nats.messages import Source
        from airflow_events.listeners.nats.watch import StreamHub

        check_choices(values, on_undecodable)
        source = Source(nats_conn_id, stream)
        key = ("nats watch", source, subject, values)
        return await first_match(key, lambda: StreamHub(source, subject, values), match, since, on_undecodable)
