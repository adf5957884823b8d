"""
Redis Streams, and Valkey's: a consumer group as a queue, and a stream as a log.

`consume` claims entries by scripts, each of which is one step on the server; `watch` reads a stream without a
group; `client` makes Redis's client of an Airflow connection.
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

needs("a Redis listener", "redis", "redis")

log = logging.getLogger(__name__)

DEFAULT = "redis_default"


class RedisListener(EventListener):
    """
    Take an entry of a stream as a member of a consumer group: each entry goes to one wait, exactly once.

    The claim is Redis's own list of pending entries, with the wait's id as the consumer. The event is

    ``{"stream", "group", "id", "timestamp", "value", "redis_conn_id"}``, ``timestamp`` a datetime in UTC, from the
    entry's id.

    Entries are acknowledged and not deleted: how long a stream is, ``XADD ... MAXLEN`` or ``XTRIM`` decides. An
    entry that is trimmed away before a wait had it is gone.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        stream: str,
        *,
        group: str = "airflow",
        field: str | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "fail",
        start: str = "0",
        claim_timeout: float | timedelta = 3600.0,
        require_persistence: bool = True,
        redis_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return when there is an entry that no other wait of the group has, the oldest first.

        :param stream: its key. It is made, with the group, if it is not there.
        :param group: the consumer group.
        :param field: which of the entry's fields is the value; None makes a dict of all of them, as text.
        :param values: of what format ``field`` is; see `airflow_events.listeners.values.decode`.
        :param on_undecodable: what to do with an entry that is not: ``fail`` fails the wait and leaves the entry
            to others, ``skip`` acknowledges it, with a warning, and waits on.
        :param start: where a group that is not there yet begins: ``0`` at the first entry, ``$`` at the next one.
        :param claim_timeout: after how many seconds an entry that a wait has claimed and not committed goes to
            another. A wait that still lives loses nothing by it: its commit is refused, and it waits on.
        :param require_persistence: refuse a server that keeps nothing on disk.
        :param redis_conn_id: an Airflow connection of type ``redis``, as the Redis provider has it: ``db``,
            ``ssl`` and ``ssl_...`` among the extras.
        :raises SourceUnfit: the connection is of another type, or is a cluster's; the server keeps nothing on
            disk; the key is no stream; the user may not use it.
        :raises SourceUnreachable: the server was away for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        from airflow_events.listeners.redis.client import Source, client_of, event_of
        from airflow_events.listeners.redis.consume import Consumer, QueueHub, commit, release

        check_choices(values, on_undecodable)
        source = Source(redis_conn_id, stream, group)
        wait = current_wait().id
        lapse = claim_timeout.total_seconds() if isinstance(claim_timeout, timedelta) else claim_timeout
        key = ("redis", source, start, require_persistence)
        while True:
            async with shared(key, lambda: QueueHub(source, start, require_persistence)) as hub:
                entry, fields = await hub.take(Consumer(wait, round(lapse * 1000)))
            try:
                event = event_of(source, entry, fields, field, values)
            except EventUndecodable as error:
                async with client_of(redis_conn_id) as client:
                    if on_undecodable == "fail":
                        await release(client, source, wait)
                        raise
                    await commit(client, source, wait, entry)
                log.warning("Passed over, and acknowledged: %s", error)
            else:
                return {**event, "redis_conn_id": redis_conn_id}

    async def event_checkpointed(self, event: Any) -> None:
        """Acknowledge the entry, and note for ``[events] commit_memory`` seconds who did."""
        from airflow_events.listeners.redis.client import Source, client_of
        from airflow_events.listeners.redis.consume import commit

        source = Source(event["redis_conn_id"], event["stream"], event["group"])
        async with client_of(source.conn_id) as client:
            await commit(client, source, current_wait().id, event["id"])

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Let another wait have the entry at once."""
        from airflow_events.listeners.redis.client import Source, client_of
        from airflow_events.listeners.redis.consume import release

        stream = args[0] if args else kwargs["stream"]
        source = Source(kwargs.get("redis_conn_id", DEFAULT), stream, kwargs.get("group", "airflow"))
        async with client_of(source.conn_id) as client:
            await release(client, source, current_wait().id)


class RedisWatchListener(EventListener):
    """
    Wait for the first entry of a stream that matches, and take nothing away.

    The event is as of `RedisListener`, without ``group``.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        stream: str,
        *,
        match: dict[str, Any] | str | None = None,
        since: datetime | str | timedelta | None = None,
        field: str | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "skip",
        redis_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return the first entry that matches, added at ``since`` or later.

        :param match: see `airflow_events.listeners.values.Match`.
        :param since: a moment, or a timedelta from the start of the run; None is the start of the run.

        The other parameters and errors are as of `RedisListener.poll_for_event`; here an undecodable entry is
        passed over, with a warning in the triggerer's log, unless ``on_undecodable`` is ``fail``.
        """
        from airflow_events.listeners.redis.client import Source
        from airflow_events.listeners.redis.watch import StreamHub

        check_choices(values, on_undecodable)
        source = Source(redis_conn_id, stream)
        key = ("redis watch", source, field, values)
        return await first_match(key, lambda: StreamHub(source, field, values), match, since, on_undecodable)
