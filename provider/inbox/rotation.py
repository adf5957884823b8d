"""Rotating the Fernet key of what the inbox encrypts, as `airflow rotate-fernet-key` does it for triggers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from airflow.models.crypto import get_fernet
from airflow_events.inbox.database import in_transaction
from airflow_events.inbox.models import EventKept, EventWait
from cryptography.fernet import InvalidToken
from sqlalchemy import and_, select, tuple_, update
from sqlalchemy.orm import InstrumentedAttribute, Session

_PIECE = 500


@dataclass(frozen=True)
class _Encrypted:
    """A column with encrypted text, and what tells the rows that have it."""

    column: InstrumentedAttribute[Any]
    key: tuple[InstrumentedAttribute[Any], ...]


_OF_WAIT = EventWait.dag_id, EventWait.task_id, EventWait.run_id, EventWait.map_index, EventWait.place
_ALL = _Encrypted(EventWait.parked, _OF_WAIT), _Encrypted(EventKept.sender, (EventKept.id,))


@dataclass
class Rotated:
    """
    What was done.

    :param rotated: how many rows are encrypted with the first key now.
    :param unreadable: how many none of the keys can read. Such waits have to be cleared; such kept events are
        given to nobody.
    """

    rotated: int = 0
    unreadable: int = 0


def rotate() -> Rotated:
    """
    Encrypt with the first of the Fernet keys what parked and hosted waits keep, and who has sent kept events.

    It may be done again. A wait that ends or begins again meanwhile is left alone.
    """
    done = Rotated()
    for what in _ALL:
        last: tuple[Any, ...] | None = None
        while rows := in_transaction(lambda session, last=last: _some(session, what, last)):  # type: ignore[misc]  # noqa: B023
            in_transaction(lambda session, rows=rows: _rotate(session, what, rows, done))  # type: ignore[misc]  # noqa: B023
            last = tuple(rows[-1][:-1])
    return done


def _some(session: Session, what: _Encrypted, last: tuple[Any, ...] | None) -> list[Any]:
    query = select(*what.key, what.column).where(what.column.is_not(None)).order_by(*what.key).limit(_PIECE)
    if last is not None:
        query = query.where(tuple_(*what.key) > last)
    return list(session.execute(query).all())


def _rotate(session: Session, what: _Encrypted, rows: list[Any], done: Rotated) -> None:
    fernet: Any = get_fernet()
    for *key, kept in rows:
        try:
            again = fernet.rotate(kept.encode()).decode() if fernet.is_encrypted else kept
        except InvalidToken:
            done.unreadable += 1
            continue
        is_it = and_(*(column == value for column, value in zip(what.key, key, strict=True)), what.column == kept)
        change = update(what.column.class_).where(is_it).values({what.column: again})
        session.execute(change.execution_options(synchronize_session=False))
        done.rotated += 1
