"""
Parked waits whose moment has come: of a timer, or of a deadline.

Each API server looks for them when the next moment comes, and once a second at least. Who takes one has it for
some time, after which another may: whoever dies in between leaves it as it was. What is carried out is an entry of
the inbox: what the wait has outlived, and what another has done meanwhile, changes nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow.utils.sqlalchemy import with_row_locks
from airflow_events import metrics
from airflow_events.inbox.carrying_out import carry_out_each
from airflow_events.inbox.database import begin_writing, in_transaction
from airflow_events.inbox.entries import Entry, Record, Status, entry_of
from airflow_events.inbox.models import EventWait
from airflow_events.inbox.transactions import LARGEST_BATCH, NOT_PARKED
from sqlalchemy import func, select, tuple_, update
from sqlalchemy.orm import Session

log = logging.getLogger(__name__)

_LEASE = timedelta(seconds=30)
_KEY = (EventWait.dag_id, EventWait.task_id, EventWait.run_id, EventWait.map_index, EventWait.place)


def wake_due() -> int:
    """
    Carry out what is due of some parked waits; return of how many: `LARGEST_BATCH` if there may be more.

    :raises sqlalchemy.exc.DBAPIError: the database is unreachable; it can be done again.
    """
    taken = in_transaction(_take)
    due = [(row, entry) for row in taken if (entry := _entry(row)) is not None]
    over = []
    answers = carry_out_each([entry for _, entry in due])
    for (row, entry), answer in zip(due, answers, strict=True):
        if answer.status == Status.INVALID:  # Airflow ends the wait, some while after its deadline
            log.error("The parked wait %s could not be ended: %s", "/".join(map(str, row[:4])), answer.message)
        if answer.status != Status.DONE:
            over.append(row)
        elif entry.operation == Record.operation:
            _tell(row)
    if over:
        in_transaction(lambda session: _forget(session, over))
    return len(taken)


def _entry(row: Any) -> Entry | None:
    """Return what is to happen; None if this version cannot read it, and another one may."""
    try:
        return entry_of(json.loads(row.wake))
    except Exception:
        log.exception("What is to happen to the parked wait %s cannot be read", "/".join(map(str, row[:4])))
        return None


def seconds_to_next(longest: float) -> float:
    """Return in how many seconds a parked wait is due next; ``longest`` if none is before that."""
    at: datetime | None = in_transaction(lambda session: session.scalar(select(func.min(EventWait.wake_at))))
    if at is None:
        return longest
    return max(min((at - datetime.now(timezone.utc)).total_seconds(), longest), 0.0)


def _tell(row: Any) -> None:
    """Tell the metrics of an event that came at its moment, and is recorded."""
    tags = {"dag_id": row.dag_id, "listener": row.listener or ""}
    metrics.count(metrics.RECORDED, **tags)
    for name in (metrics.TO_RECORD, metrics.TO_DELIVERY):
        metrics.since(name, row.wake_at.timestamp(), **tags)


def _take(session: Session) -> Sequence[Any]:
    """Take waits that are due, so that nobody else does for some time."""
    begin_writing(session)
    now = datetime.now(timezone.utc)
    query = (
        select(*_KEY, EventWait.generation, EventWait.listener, EventWait.wake_at, EventWait.wake)
        .where(EventWait.wake_at <= now)
        .order_by(EventWait.wake_at)
        .limit(LARGEST_BATCH)
    )
    due = session.execute(with_row_locks(query, session, of=EventWait, skip_locked=True, key_share=False)).all()
    if due:
        _set(session, due, wake_at=now + _LEASE)
    return due


def _forget(session: Session, over: Sequence[Any]) -> None:
    """Note that there is nothing to be done any more for waits that are over, and have not begun again since."""
    begin_writing(session)
    keys = [row[:5] for row in over]
    found = select(*_KEY, EventWait.generation).where(tuple_(*_KEY).in_(keys)).order_by(*_KEY)
    # What somebody has locked is looked at again when it is no longer taken.
    now = session.execute(with_row_locks(found, session, of=EventWait, skip_locked=True, key_share=False))
    generations = {tuple(row[:5]): row.generation for row in now}
    still = [row for row in over if generations.get(tuple(row[:5])) == row.generation]
    if still:
        _set(session, still, **NOT_PARKED)


def _set(session: Session, rows: Sequence[Any], **values: Any) -> None:
    statement = update(EventWait).where(tuple_(*_KEY).in_([tuple(row[:5]) for row in rows])).values(values)
    session.execute(statement.execution_options(synchronize_session=False))
