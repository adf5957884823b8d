"""One transaction: begun with a write where that is what locks, tried again, and what follows its commit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from airflow.utils.retries import MAX_DB_RETRIES, run_with_db_retries
from airflow.utils.session import create_session
from airflow.utils.sqlalchemy import get_dialect_name
from sqlalchemy import text
from sqlalchemy.exc import DataError, DBAPIError
from sqlalchemy.orm import Session

log = logging.getLogger(__name__)

# What clients of MySQL call an OperationalError, and the database says of a value each time: packet too large, no
# collation in common, out of range, truncated, no such text, too long, no or too deep JSON, no such text in a
# column.
_VALUES_OF_MYSQL = (1153, 1264, 1267, 1292, 1366, 1406, 3140, 3141, 3151, 3157, 3854)

# What PostgreSQL and MySQL say of a table, and of a column, that they do not know.
_UNDEFINED = frozenset({"42P01", "42703", 1146, 1054})

_T = TypeVar("_T")
_LATER = "airflow_events.once_committed"


def in_transaction(work: Callable[[Session], _T], *, again: bool = True) -> _T:
    """
    Return what ``work`` returns, once its transaction is committed.

    :param again: whether to do it again where the database gave up the transaction (a deadlock, a lost connection,
        a unique key that another transaction was faster with); it must find out for itself what an earlier attempt
        may have committed.
    :raises sqlalchemy.exc.DBAPIError: the database gave up the last attempt too.
    """
    for attempt in run_with_db_retries(MAX_DB_RETRIES if again else 1):
        with attempt, create_session(scoped=False) as session:
            result = work(session)
    for follow in session.info.pop(_LATER, ()):
        try:
            follow()
        except Exception:  # the transaction is committed, whatever becomes of what follows
            log.warning("What follows a transaction failed; the transaction itself is done", exc_info=True)
    return result


def is_of_a_value(error: DBAPIError) -> bool:
    """Whether the database refuses a value, as it will each time."""
    cause = error.orig
    code = cause.args[0] if cause is not None and cause.args else None
    return isinstance(error, DataError) or code in _VALUES_OF_MYSQL


def lacks_tables(error: DBAPIError) -> bool:
    """Whether the database knows no such table, or no such column of one: it is not migrated."""
    cause = error.orig
    said = cause.args[0] if cause is not None and cause.args else None
    codes = {getattr(cause, "sqlstate", None), getattr(cause, "pgcode", None), said}
    return bool(codes & _UNDEFINED) or str(said).startswith(("no such table", "no such column"))  # as SQLite says


def once_committed(session: Session, work: Callable[[], object]) -> None:
    """Call ``work`` when the session's transaction is committed by `in_transaction`, and not if it is given up."""
    session.info.setdefault(_LATER, []).append(work)


def begin_writing(session: Session) -> None:
    """
    Let a transaction that reads what it is going to change keep others from changing it meanwhile.

    PostgreSQL and MySQL lock the rows that are read for it. SQLite knows no such locks, and begins a transaction
    with its first write: this is one that changes nothing.
    """
    if get_dialect_name(session) == "sqlite":
        session.execute(text("UPDATE event_wait SET generation = generation WHERE 1 = 0"))
