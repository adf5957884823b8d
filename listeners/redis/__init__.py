"""
Redis Streams, and Valkey's: a consumer group as a queue, and a stream as a log.

`consume` receives and acknowledges entries; `watch` reads a stream without a group; `client` makes Redis's client
of an Airflow connection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, ClassVar

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.support.clients import needs
from airflow_events.listeners.support.queue import Delivery, QueueListener, receive, skip
from airflow_events.listeners.support.values import Format, OnUndecodable, check_choices, check_names, seconds
from airflow_events.listeners.support.watch_listener import LogWatchListener
from airflow_events.listeners.support.watching import Watch, watches

needs("a Redis listener", "redis", "redis")

DEFAULT = "redis_default"


class RedisListener(QueueListener):
    """
    Take an entry of a stream as a member of a consumer group: each entry goes to one wait.

    The event is

    ``{"stream", "group", "id", "timestamp", "value", "digest", "server", "redis_conn_id"}``, ``timestamp`` a
    datetime in UTC, from the entry's id, and ``server`` the connection's ``host:port/db``. Server, stream, group
    and id are what tells the event from every other.

    An entry is pending in its group until the wait's event is recorded, and is acknowledged then. One that a
    process had in hand as it died goes to another wait after ``lease``. Entries are not deleted: how long a stream
    is, ``XADD ... MAXLEN`` or ``XTRIM`` decides. An entry that is trimmed away before a wait had it is gone.

    A group belongs to one Airflow. Its user needs ``XREADGROUP``, ``XACK``, ``XCLAIM`` and ``XAUTOCLAIM`` on the
    stream, and ``XGROUP`` where nobody else makes the group.
    """

    not_taken: ClassVar[Mapping[str, str]] = {
        "match": (
            "an entry that does not match would stay pending, and be claimed again and again. "
            "RedisWatchListener has match, and takes nothing away; start_on.override(match=...) passes over "
            "what does not match"
        )
    }

    async def poll_for_event(
        self,
        stream: str,
        *,
        group: str = "airflow",
        field: str | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "fail",
        dead_letter: str | None = None,
        start: str = "0",
        lease: float | timedelta = 60.0,
        require_persistence: bool = True,
        redis_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return when there is an entry for this wait: those that have waited longest are served first.

        :param stream: its key. It is made, with the group, if it is not there.
        :param group: the consumer group.
        :param field: which of the entry's fields is the value; None makes a dict of all of them, as text.
        :param values: of what format ``field`` is; see `airflow_events.listeners.support.values.decode`.
        :param on_undecodable: what to do with an entry that is not, or that Airflow cannot store: ``fail`` fails
            one wait for it, and it stays pending, for no other wait; ``skip`` acknowledges it, with a warning, and
            waits on; ``dead_letter`` adds it to the stream ``dead_letter``, and then acknowledges it.
        :param dead_letter: a stream, on the same connection, for entries that cannot be read. What is added has
            the entry's fields, and ``airflow-events-reason`` and ``airflow-events-source``. After a crash between
            the two steps it has an entry twice.
        :param start: where a new group starts: ``0`` at the first entry, ``$`` at the next one.
        :param lease: after how many seconds an entry that a process had in hand as it died goes to another wait. A
            process that lives keeps what it has, however long that takes.
        :param require_persistence: refuse a server that keeps nothing on disk.
        :param redis_conn_id: an Airflow connection of type ``redis``, ``rediss``, ``valkey`` or ``valkeys``, as
            the Redis provider has it: ``db``, ``ssl`` and ``ssl_...`` among the extras.
        :raises SourceMisconfigured: the connection is of another type; the server keeps nothing
            on disk; the key is no stream; the user may not use it.
        :raises SourceUnreachable: the server was unreachable for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        from airflow_events.listeners.redis.client import Source, event_of
        from airflow_events.listeners.redis.consume import Entry, GroupHub, bury

        check_choices(values, on_undecodable, dead_letter=dead_letter)
        check_names(stream=stream, group=group)
        if not re.fullmatch(r"\$|\d+(-\d+)?", str(start)):
            raise ValueError(f"start is '0', '$' or the id of an entry, not {start!r}")
        if dead_letter == stream:
            raise ValueError(f"dead_letter is another stream than the one that is read, not {dead_letter!r}")
        source = Source(redis_conn_id, stream, group)

        def read(entry: Entry) -> dict[str, Any]:
            event = event_of(source, entry.id, entry.fields, field, values)
            return {**event, "server": entry.server, "redis_conn_id": redis_conn_id}

        async def to_dead_letters(hub: GroupHub, delivery: Delivery, error: EventUndecodable) -> None:
            assert dead_letter is not None
            await bury(hub.client, source, delivery.message, dead_letter, error)

        after = seconds(lease, "lease")
        return await receive(
            ("redis", source, start, after, require_persistence, field, values),
            lambda: GroupHub(source, start, require_persistence, after),
            read,
            {"skip": skip, "dead_letter": to_dead_letters}.get(on_undecodable),
        )

    def event_id(self, event: Any) -> str:
        """Return server, stream, group and id of the entry, as JSON."""
        from airflow_events.listeners.redis.client import coordinates

        # Events of the first edition do not say the server: they were held by claims.
        return coordinates(event.get("server", ""), event["stream"], event["group"], event["id"])

    async def acknowledge(self, event: Any) -> None:
        """Acknowledge the entry by its id."""
        from airflow_events.listeners.redis.client import Source, client_of
        from airflow_events.listeners.redis.consume import acknowledge

        source = Source(event["redis_conn_id"], event["stream"], event["group"])
        async with client_of(source.conn_id) as client:
            await acknowledge(client, source, [event["id"]])


class RedisWatchListener(LogWatchListener):
    """
    Wait for the first entry of a stream that matches, and take nothing away.

    The event is ``{"stream", "id", "timestamp", "value"}``, as of `RedisListener`.
    """

    @watches
    def poll_for_event(
        self,
        stream: str,
        *,
        match: dict[str, Any] | str | None = None,
        since: datetime | str | timedelta | None = None,
        field: str | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "skip",
        redis_conn_id: str = DEFAULT,
    ) -> Watch:
        """
        Return the first entry that matches, added at ``since`` or later.

        :param match: see `airflow_events.listeners.support.values.Match`.
        :param since: a moment, or a timedelta from the creation of the run; None is its creation.

        The other parameters and errors are as of `RedisListener.poll_for_event`; here an undecodable entry is
        skipped, with a warning in the triggerer's log, unless ``on_undecodable`` is ``fail``.
        """
        from airflow_events.listeners.redis.client import Source
        from airflow_events.listeners.redis.watch import StreamHub

        check_choices(values, on_undecodable)
        check_names(stream=stream)
        source = Source(redis_conn_id, stream)
        key = ("redis watch", source, field, values)
        return Watch(key, lambda: StreamHub(source, field, values), match, since, on_undecodable)
