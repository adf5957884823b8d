"""How entries are carried out of which the database refuses to write one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from airflow_events.inbox.entries import Answer, Entry, Status
from sqlalchemy.exc import DataError, DBAPIError

log = logging.getLogger(__name__)

# Packet too large, out of range, truncated, no such text, too long.
_VALUES_OF_MYSQL = (1153, 1264, 1292, 1366, 1406)


def carry_out_each(entries: Sequence[Entry]) -> list[Answer]:
    """
    Do what `airflow_events.inbox.transactions.carry_out` does.

    What the database refuses to write is `Status.INVALID`, and harms no other.

    :raises DBAPIError: as there.
    """
    from airflow_events.inbox import transactions

    try:
        return transactions.carry_out(entries)
    except DBAPIError as error:
        if not _is_of_a_value(error):
            raise
        if len(entries) > 1:
            return [answer for entry in entries for answer in carry_out_each([entry])]
        log.warning("The database refuses what it is to write", exc_info=error)
        return [Answer(Status.INVALID, f"the database refuses it: {str(error.orig).splitlines()[0]}")]


def _is_of_a_value(error: DBAPIError) -> bool:
    """Whether the database refuses a value, as it will each time; clients of MySQL call some of that otherwise."""
    cause = error.orig
    code = cause.args[0] if cause is not None and cause.args else None
    return isinstance(error, DataError) or code in _VALUES_OF_MYSQL
