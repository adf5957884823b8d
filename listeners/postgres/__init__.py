"""
PostgreSQL: a table as a queue (an outbox), and a query that is asked until it has a row.

`table` has the statements that read and acknowledge rows; `consume` receives for the waits on a table; `watch`
asks queries; `client` makes connections of an Airflow connection.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.base import EventListener
from airflow_events.listeners.support.clients import needs
from airflow_events.listeners.support.queue import Delivery, QueueListener, Wanting, receive, skip
from airflow_events.listeners.support.shared import shared
from airflow_events.listeners.support.values import (
    Format,
    OnUndecodable,
    check_choices,
    decode,
    digest_of,
    seconds,
)

if TYPE_CHECKING:
    from airflow_events.listeners.postgres.consume import Row, TableHub
    from airflow_events.listeners.postgres.table import OnCommit, Source

needs("a PostgreSQL listener", "postgres", "psycopg")

log = logging.getLogger(__name__)

DEFAULT = "postgres_default"
CHANNEL = "airflow_events"


def create_table(
    table: str,
    *,
    value_type: str = "jsonb",
    columns: Mapping[str, str] | None = None,
    channel: str = CHANNEL,
    on_commit: OnCommit = "mark",
) -> str:
    """
    Return the statements that make a table for `PostgresListener`, its index and its notifying trigger.

    They are for whoever keeps the database's schema; nothing in this package runs them.

    :param table: ``table`` or ``schema.table``.
    :param value_type: ``jsonb``, ``json``, ``text`` or ``bytea``.
    :param columns: names that are not the usual ones, as of `PostgresListener.poll_for_event`.
    :param channel: where the trigger notifies.
    :param on_commit: as of `PostgresListener.poll_for_event`; for ``delete`` no column is made to mark rows in.
    """
    from airflow_events.listeners.postgres.table import ACKNOWLEDGED, CREATE, INDEX, VALUES, identifier, source_of
    from psycopg import sql

    if value_type not in VALUES:
        raise ValueError(f"value_type is one of {', '.join(map(repr, VALUES))}, not {value_type!r}")
    _check_channel(channel)
    source = source_of(DEFAULT, table, columns, on_commit)
    if source.columns.created_at is None:
        raise ValueError("a new table has created_at")
    function = identifier(*table.split(".")[:-1], "airflow_events_notify")
    more = {"type": sql.SQL(value_type), "function": function, "channel": sql.Literal(channel)}
    marks = on_commit == "mark"
    more["acknowledged"] = source.statement(ACKNOWLEDGED if marks else "")
    more["index"] = source.statement(INDEX if marks else "")
    return source.statement(CREATE, **more).as_string(None)


def create_dead_letter_table(table: str) -> str:
    """
    Return the statement that makes a table for rows that cannot be read; see `create_table`.

    :param table: ``table`` or ``schema.table``.
    """
    from airflow_events.listeners.postgres.table import CREATE_DEAD_LETTERS, source_of

    return source_of(DEFAULT, table, None).statement(CREATE_DEAD_LETTERS).as_string(None)


class PostgresListener(QueueListener):
    """
    Take a row of a table: each row goes to one wait.

    A row is acknowledged by one column of the table, which says when, or by being deleted. `create_table` has the
    statements for such a table. The event is

    ``{"table", "id", "timestamp", "value", "digest", "source", "columns", "on_commit", "postgres_conn_id"}``,
    ``timestamp`` the row's ``created_at``, a datetime in UTC, and None where there is none; ``digest`` that of the
    value as the server has it; ``source`` the server's identifier, the database, the table with its schema, and
    the table's oid; the rest as it was given. ``source`` and ``id`` are what tells the event from every other.

    Every triggerer reads every row that is not acknowledged, without a lock, and Airflow's inbox decides which
    wait has it. A row that somebody else deletes while a wait has it in hand is the wait's all the same.
    """

    async def poll_for_event(
        self,
        table: str,
        *,
        columns: Mapping[str, str | None] | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "fail",
        dead_letter: str | None = None,
        on_commit: OnCommit = "mark",
        order_by: str | Sequence[str] | None = None,
        match: Mapping[str, Any] | None = None,
        channel: str | None = CHANNEL,
        poll_interval: float | timedelta = 30.0,
        require_persistence: bool = True,
        postgres_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return when there is a row for this wait: those that have waited longest are served first.

        :param table: ``table``, as the connection's search path finds it, or ``schema.table``. Written as the
            catalog has it: without quotes, and upper case is upper case.
        :param columns: how the table calls what is ``id``, ``value``, ``created_at`` and ``acknowledged_at`` here:
            ``{"value": "payload"}``. Columns that are not in it go by these names. ``{"created_at": None}`` says
            that there is none.
        :param values: of what format the value is; see `airflow_events.listeners.support.values.decode`. ``text``
            and ``bytes`` of a json column are its text.
        :param on_undecodable: what to do with a row that is not, or that Airflow cannot store: ``fail`` fails one
            wait for it, and it stays unacknowledged, for no other wait; ``skip`` acknowledges it, with a warning,
            and waits on; ``dead_letter`` adds it to the table ``dead_letter``, and then acknowledges it.
        :param dead_letter: a table, on the same connection, for rows that cannot be read;
            `create_dead_letter_table` has its statement. After a crash between the two steps it has a row twice.
        :param on_commit: ``mark`` writes into ``acknowledged_at`` when; ``delete`` deletes the row.
        :param order_by: a column or several, by which to take the rows; ``-`` in front puts the largest first.
            None is by ``id``.
        :param match: which rows this wait takes: what fields of the value must be, as text, numbers or booleans; a
            dot leads into a nested one, and a number is equal to its text as PostgreSQL writes it. Other rows are
            left to others. The value has to be of type jsonb. None takes each row.
        :param channel: where ``NOTIFY`` says that there are new rows: on ``airflow_events`` with the table's name,
            or nothing, on another with whatever payload. None listens nowhere.
        :param poll_interval: seconds between two looks at the table if nothing is notified.
        :param require_persistence: refuse an unlogged table.
        :param postgres_conn_id: an Airflow connection of type ``postgres``, as the Postgres provider has it: the
            schema is the database, the extras are libpq's options.
        :raises SourceMisconfigured: the connection is of another type, or has an extra that is no option of libpq;
            the table or a column is missing, or not as it must be; the user may not use it.
        :raises SourceUnreachable: the server was unreachable, refused the login, or was a standby, for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        from airflow_events.listeners.postgres.consume import Looks, TableHub
        from airflow_events.listeners.postgres.table import check_table, source_of, wanted_of

        check_choices(values, on_undecodable, dead_letter=dead_letter)
        _check_channel(channel)
        source = source_of(postgres_conn_id, table, columns, on_commit)
        if dead_letter is not None:
            check_table(dead_letter, "dead_letter")
        interval = seconds(poll_interval, "poll_interval")
        wanted = wanted_of(match)
        looks = Looks(_order(order_by), channel, interval, require_persistence)

        def read(row: Row) -> dict[str, Any]:
            return {
                "table": table,
                "id": row.id,
                "timestamp": row.created_at,
                "digest": digest_of(row.raw),
                "value": decode(row.raw, values, f"the row {row.id} of {source}"),
                "source": list(row.origin),
                "columns": dict(columns or {}),
                "on_commit": on_commit,
                "postgres_conn_id": postgres_conn_id,
            }

        async def to_dead_letters(hub: TableHub, delivery: Delivery, error: EventUndecodable) -> None:
            assert dead_letter is not None
            await source.bury(delivery.message.id, delivery.message.raw, error.reason, dead_letter)
            log.warning("Added to the dead letters in %r: %s", dead_letter, error)

        return await receive(
            ("postgres", source, looks, values),
            lambda: TableHub(source, looks),
            read,
            {"skip": skip, "dead_letter": to_dead_letters}.get(on_undecodable),
            lambda: Wanting(wanted),
        )

    def event_id(self, event: Any) -> str:
        """Return the server's identifier, the database, the table, its oid and the row's id, as JSON."""
        from airflow_events.listeners.postgres.client import coordinates

        # Events of the first edition do not say their source: they were held by claims.
        system, database, table, oid = event.get("source") or ("", "", event["table"], 0)
        return coordinates(system, database, table, oid, event["id"])

    def event_content(self, event: Any) -> Any:
        """Return what is the row's, by whichever connection, name of its table and format it was read."""
        return [event["timestamp"], event.get("digest", event["value"])]

    async def acknowledge(self, event: Any) -> None:
        """
        Acknowledge the row by its id.

        :raises LockNotAvailable: somebody has locked it; that can be tried again.
        :raises SourceMisconfigured: the server does not let us.
        """
        source, oid = _source_of(event)
        for refused in (await source.acknowledge(oid, [event["id"]])).values():
            raise refused


def _source_of(event: Any) -> tuple[Source, int | None]:
    """Return the table of an event, and its oid."""
    from airflow_events.listeners.postgres.table import source_of

    conn_id, table, columns = event["postgres_conn_id"], event["table"], event["columns"]
    if "source" in event:
        return source_of(conn_id, table, columns, event["on_commit"]), event["source"][-1]
    # Of the first edition: it marked rows in committed_at, and had columns for claims.
    marked = {"id": columns.get("id", "id"), "acknowledged_at": columns.get("committed_at", "committed_at")}
    return source_of(conn_id, table, marked), None


class PostgresWatchListener(EventListener):
    """
    Wait until a query has a row.

    The event is the first row, as a dict by the names of its columns: null, booleans, integers, floating-point
    numbers, text, json and arrays of these as they are, ``timestamptz`` as a datetime in UTC, ``bytea`` as Base64
    text, and everything else (``numeric``, ``uuid``, ``date``, ``interval``, ...) as the text that PostgreSQL
    writes for it. So are numbers and moments that JSON and Python have not: ``NaN``, ``infinity``.

    It looks at what is, and not at what was: a row that came and went between two looks is not seen, and who
    polls again may get another. Nothing is taken away.
    """

    hosted: ClassVar[bool] = True

    async def poll_for_event(
        self,
        query: str,
        *,
        parameters: Mapping[str, Any] | Sequence[Any] | None = None,
        interval: float | timedelta = 10.0,
        channel: str | None = None,
        postgres_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return the first row of ``query`` once it has one.

        Waits with the same query and parameters are one question to the server, and all of a triggerer share a
        connection, over which one question is asked after another: a query that takes long delays the others.

        :param query: one ``SELECT``, ``VALUES``, ``TABLE`` or ``WITH``, which is run in a read-only transaction.
            Beware of those that always have a row: ``SELECT count(*)`` wants a ``HAVING count(*) > 0``.
        :param parameters: what ``%(name)s``, or ``%s`` in their order, in the query stand for; they are bound by
            the server and never become part of its text. If there are any, a percent sign is written ``%%``.
        :param interval: seconds between two looks.
        :param channel: where ``NOTIFY`` asks for a look at once. None listens nowhere.
        :param postgres_conn_id: as of `PostgresListener.poll_for_event`; the server may be a standby.
        :raises SourceMisconfigured: the server refuses the query, or it has two columns of one name; see also
            `PostgresListener.poll_for_event`.
        :raises SourceUnreachable: the server was unreachable, or refused the login, for too long.
        """
        from airflow_events.listeners.postgres.watch import Asker, QueryHub, Question

        _check_channel(channel)
        if parameters is not None and (
            isinstance(parameters, str) or not isinstance(parameters, Mapping | Sequence)
        ):
            raise TypeError(f"parameters is a mapping, a sequence or None, not {parameters!r}")
        question = Question(query, parameters or None)
        asker = Asker(question, seconds(interval, "interval"), channel)
        async with shared(("postgres watch", postgres_conn_id), lambda: QueryHub(postgres_conn_id)) as hub:
            return dict(await hub.take(asker))


def _order(order_by: str | Sequence[str] | None) -> tuple[str, ...]:
    order = (order_by,) if isinstance(order_by, str) else tuple(order_by or ())
    if not all(isinstance(name, str) and name.removeprefix("-") for name in order):
        raise ValueError(f"order_by is a column or several, each with '-' in front or without, not {order_by!r}")
    return order


def _check_channel(channel: str | None) -> None:
    if channel is not None and not 0 < len(channel.encode()) < 64:
        raise ValueError(f"channel is a name of 1 to 63 bytes, or None, not {channel!r}")
