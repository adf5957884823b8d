"""Rotating the Fernet key of parked and hosted waits, as `airflow rotate-fernet-key` does it for triggers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from airflow.models.crypto import get_fernet
from airflow_events.inbox.database import in_transaction
from airflow_events.inbox.models import EventWait
from cryptography.fernet import InvalidToken
from sqlalchemy import and_, select, tuple_, update
from sqlalchemy.orm import Session

_PIECE = 500
_KEY = (EventWait.dag_id, EventWait.task_id, EventWait.run_id, EventWait.map_index, EventWait.place)


@dataclass
class Rotated:
    """
    What was done.

    :param rotated: how many rows are encrypted with the first key now.
    :param unreadable: how many none of the keys can read. Such waits have to be cleared.
    """

    rotated: int = 0
    unreadable: int = 0


def rotate() -> Rotated:
    """
    Encrypt what parked and hosted waits keep with the first of the Fernet keys; it may be done again.

    A wait that ends or begins again meanwhile is left alone.
    """
    done, last = Rotated(), None
    while rows := in_transaction(lambda session, last=last: _some(session, last)):  # type: ignore[misc]
        in_transaction(lambda session, rows=rows: _rotate(session, rows, done))  # type: ignore[misc]
        last = tuple(rows[-1][:-1])
    return done


def _some(session: Session, last: tuple[Any, ...] | None) -> list[Any]:
    query = select(*_KEY, EventWait.parked).where(EventWait.parked.is_not(None)).order_by(*_KEY).limit(_PIECE)
    if last is not None:
        query = query.where(tuple_(*_KEY) > last)
    return list(session.execute(query).all())


def _rotate(session: Session, rows: list[Any], done: Rotated) -> None:
    fernet: Any = get_fernet()
    for *key, kept in rows:
        try:
            again = fernet.rotate(kept.encode()).decode() if fernet.is_encrypted else kept
        except InvalidToken:
            done.unreadable += 1
            continue
        is_it = and_(*(column == value for column, value in zip(_KEY, key, strict=True)), EventWait.parked == kept)
        session.execute(
            update(EventWait).where(is_it).values(parked=again).execution_options(synchronize_session=False)
        )
        done.rotated += 1
