"""
PostgreSQL: a table as a queue (an outbox), and a query that is asked until it has a row.

`table` has the statements, each of which claims, commits or gives back as a whole or not at all; `consume` claims
for the waits on a table; `watch` asks queries; `client` makes connections of an Airflow connection.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

from airflow_events.errors import EventUndecodable
from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.clients import needs
from airflow_events.listeners.shared import shared
from airflow_events.listeners.values import Format, OnUndecodable, check_choices, decode

needs("a PostgreSQL listener", "postgres", "psycopg")

log = logging.getLogger(__name__)

DEFAULT = "postgres_default"
CHANNEL = "airflow_events"


def create_table(
    table: str, *, value_type: str = "jsonb", columns: Mapping[str, str] | None = None, channel: str = CHANNEL
) -> str:
    """
    Return the statements that make a table for `PostgresListener`, its indexes and its notifying trigger.

    They are for whoever keeps the database's schema; nothing in this package runs them.

    :param table: ``table`` or ``schema.table``.
    :param value_type: ``jsonb``, ``json``, ``text`` or ``bytea``.
    :param columns: names that are not the usual ones, as of `PostgresListener.poll_for_event`.
    :param channel: where the trigger notifies.
    """
    from airflow_events.listeners.postgres.table import CREATE, VALUES, identifier, source_of
    from psycopg import sql

    if value_type not in VALUES:
        raise ValueError(f"value_type is one of {', '.join(map(repr, VALUES))}, not {value_type!r}")
    _check_channel(channel)
    source = source_of(DEFAULT, table, columns)
    if source.columns.created_at is None:
        raise ValueError("a new table has created_at")
    function = identifier(*table.split(".")[:-1], "airflow_events_notify")
    more = {"type": sql.SQL(value_type), "function": function, "channel": sql.Literal(channel)}
    return source.statement(CREATE, **more).as_string(None)


class PostgresListener(EventListener):
    """
    Take a row of a table: each row goes to one wait, exactly once.

    The claim, and who committed, are columns of the row itself. `create_table` has the statements for such a
    table. The event is

    ``{"table", "id", "timestamp", "value", "columns", "postgres_conn_id"}``, ``timestamp`` the row's
    ``created_at``, a datetime in UTC, and None where there is none; ``columns`` as they were given.

    Rows are marked as committed and not deleted. Delete them when ``[events] commit_memory`` seconds have passed
    since ``committed_at``: until then the row is what tells a repeated commit from somebody else's.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        table: str,
        *,
        columns: Mapping[str, str | None] | None = None,
        values: Format = "json",
        on_undecodable: OnUndecodable = "fail",
        order_by: str | Sequence[str] | None = None,
        channel: str | None = CHANNEL,
        poll_interval: float = 30.0,
        claim_timeout: float | timedelta = 3600.0,
        require_persistence: bool = True,
        postgres_conn_id: str = DEFAULT,
    ) -> dict[str, Any]:
        """
        Return when there is a row that no other wait has.

        :param table: ``table``, as the connection's search path finds it, or ``schema.table``. Written as the
            catalog has it: without quotes, and upper case is upper case.
        :param columns: how the table calls what is ``id``, ``value``, ``created_at``, ``claimed_by``,
            ``claimed_at``, ``committed_by`` and ``committed_at`` here: ``{"value": "payload"}``. Columns that are
            not in it go by these names. ``{"created_at": None}`` says that there is none.
        :param values: of what format the value is; see `airflow_events.listeners.values.decode`. ``text`` and
            ``bytes`` of a json column are its text.
        :param on_undecodable: what to do with a row that is not: ``fail`` fails the wait and leaves the row to
            others, ``skip`` commits it, with a warning, and waits on.
        :param order_by: a column or several, by which to take the rows; ``-`` in front puts the largest first.
            None is by ``id``.
        :param channel: where ``NOTIFY`` says that there are new rows. None listens nowhere.
        :param poll_interval: seconds between two looks at the table if nothing is notified.
        :param claim_timeout: after how many seconds a row that a wait has claimed and not committed goes to
            another. A wait that still lives loses nothing by it: its commit is refused, and it waits on.
        :param require_persistence: refuse an unlogged table.
        :param postgres_conn_id: an Airflow connection of type ``postgres``, as the Postgres provider has it: the
            schema is the database, the extras are libpq's options.
        :raises SourceUnfit: the connection is of another type, or has an extra that is no option of libpq; the
            table or a column is missing, or not as it must be; the user may not use it; the server is a standby.
        :raises SourceUnreachable: the server was away, or refused the login, for too long.
        :raises EventUndecodable: see ``on_undecodable``.
        """
        from airflow_events.listeners.postgres.consume import Claimer, Looks, TableHub
        from airflow_events.listeners.postgres.table import source_of

        check_choices(values, on_undecodable)
        _check_channel(channel)
        source = source_of(postgres_conn_id, table, columns)
        looks = Looks(_order(order_by), channel, _seconds("poll_interval", poll_interval), require_persistence)
        wait, lapse = current_wait().id, _seconds("claim_timeout", claim_timeout)
        while True:
            async with shared(("postgres", source, looks), lambda: TableHub(source, looks)) as hub:
                identity, created_at, raw = await hub.take(Claimer(wait, lapse))
            try:
                value = decode(raw, values, f"the row {identity} of {source}")
            except EventUndecodable as error:
                if on_undecodable == "fail":
                    await source.release(wait, identity, channel)
                    raise
                await source.commit(wait, identity)
                log.warning("Passed over, and committed: %s", error)
            else:
                return {
                    "table": table,
                    "id": identity,
                    "timestamp": created_at,
                    "value": value,
                    "columns": dict(columns or {}),
                    "postgres_conn_id": postgres_conn_id,
                }

    async def event_checkpointed(self, event: Any) -> None:
        """Write into the row who committed it."""
        from airflow_events.listeners.postgres.table import source_of

        source = source_of(event["postgres_conn_id"], event["table"], event["columns"])
        await source.commit(current_wait().id, event["id"])

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Let another wait have the row at once."""
        from airflow_events.listeners.postgres.table import source_of

        table = args[0] if args else kwargs["table"]
        source = source_of(kwargs.get("postgres_conn_id", DEFAULT), table, kwargs.get("columns"))
        channel = kwargs.get("channel", CHANNEL)
        await source.release(current_wait().id, event["id"] if event else None, channel)


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

    async def poll_for_event(
        self,
        query: str,
        *,
        parameters: Mapping[str, Any] | Sequence[Any] | None = None,
        interval: float = 10.0,
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
        :raises SourceUnfit: the server refuses the query, or it has two columns of one name; see also
            `PostgresListener.poll_for_event`.
        :raises SourceUnreachable: the server was away, or refused the login, for too long.
        """
        from airflow_events.listeners.postgres.watch import Asker, QueryHub, Question

        _check_channel(channel)
        if parameters is not None and (
            isinstance(parameters, str) or not isinstance(parameters, Mapping | Sequence)
        ):
            raise TypeError(f"parameters is a mapping, a sequence or None, not {parameters!r}")
        question = Question(query, parameters or None)
        asker = Asker(question, _seconds("interval", interval), channel)
        async with shared(("postgres watch", postgres_conn_id), lambda: QueryHub(postgres_conn_id)) as hub:
            return dict(await hub.take(asker))


def _seconds(name: str, given: float | timedelta) -> float:
    seconds = given.total_seconds() if isinstance(given, timedelta) else float(given)
    if not 0 < seconds < 10**9:
        raise ValueError(f"{name} is a number of seconds above 0, not {given!r}")
    return seconds


def _order(order_by: str | Sequence[str] | None) -> tuple[str, ...]:
    order = (order_by,) if isinstance(order_by, str) else tuple(order_by or ())
    if not all(isinstance(name, str) and name.removeprefix("-") for name in order):
        raise ValueError(f"order_by is a column or several, each with '-' in front or without, not {order_by!r}")
    return order


def _check_channel(channel: str | None) -> None:
    if channel is not None and not 0 < len(channel.encode()) < 64:
        raise ValueError(f"channel is a name of 1 to 63 bytes, or None, not {channel!r}")
