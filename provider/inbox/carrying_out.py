"""How entries are carried out of which the database refuses to write one."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from airflow_events.inbox.database import in_transaction, is_of_a_value
from airflow_events.inbox.entries import Answer, Entry, Status, as_json
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

log = logging.getLogger(__name__)

# What MySQL's clients say of a connection that the server has closed.
_HANGS_UP = (2006, 2013)


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
        too_long = _too_long(error, entries)
        # Two that a unique key takes for one, after all attempts: no other transaction was faster.
        if not too_long and not is_of_a_value(error) and not isinstance(error, IntegrityError):
            raise
        if len(entries) > 1:
            return [answer for entry in entries for answer in carry_out_each([entry])]
        log.warning("The database refuses what it is to write", exc_info=error)
        why = too_long or f"the database refuses it: {str(error.orig).splitlines()[0]}"
        return [Answer(Status.INVALID, why)]


def _too_long(error: DBAPIError, entries: Sequence[Entry]) -> str:
    """
    Say what is too long for MySQL, which then hangs up as if the connection were lost; empty if nothing is.

    What counts is the statement, in which quotes and backslashes are escaped once more.
    """
    if error.orig is None or not error.orig.args or error.orig.args[0] not in _HANGS_UP:
        return ""
    try:
        most = in_transaction(lambda session: session.scalar(text("SELECT @@max_allowed_packet")))
    except DBAPIError:  # it is unreachable
        return ""
    longest = max(map(_written, entries))
    return f"it takes {longest:,} bytes, and MySQL's max_allowed_packet is {most:,}" if longest > most else ""


def _written(entry: Entry) -> int:
    told = json.dumps(as_json(entry))
    return len(told) + sum(map(told.count, "\"'\\"))
