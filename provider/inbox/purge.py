"""What the inbox forgets, and when."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from airflow_events.inbox.models import EventKept, EventSent, EventStart, EventTaken
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

_A_DAY = timedelta(days=1)


def purge(session: Session, now: datetime, memory: timedelta, limit: int) -> int:
    """
    Delete what nobody asks for any more, and return how many rows: ``limit`` of them if there may be more.

    These are events that were acknowledged longer than ``memory`` ago, kept events and senders' receipts that have
    expired, and what triggers that start runs said of their sources a day ago. Who has an event stays known until
    its source has confirmed that it has forgotten the event, however old it is: until then, the source may deliver
    it again.

    Rows that somebody else has locked are passed over, so several processes may do this at once.
    """
    before = now - memory
    deleted = 0
    for table, key, moment, over in (
        (EventTaken, EventTaken.identity, EventTaken.acknowledged_at, before),  # NULL is before nothing
        (EventKept, EventKept.id, EventKept.expires, now),
        (EventSent, EventSent.identity, EventSent.expires, now),
        (EventStart, EventStart.trigger_id, EventStart.told_at, now - _A_DAY),
    ):
        if deleted < limit:
            deleted += _delete(session, table, key, moment < over, moment, limit - deleted)
    return deleted


def _delete(session: Session, table: Any, key: Any, old: Any, moment: Any, limit: int) -> int:
    # In two steps: MySQL deletes nothing by a subquery on the same table that has a LIMIT.
    oldest = select(key).where(old).order_by(moment).limit(limit).with_for_update(skip_locked=True)
    keys = session.scalars(oldest).all()
    if keys:
        session.execute(delete(table).where(key.in_(keys), old).execution_options(synchronize_session=False))
    return len(keys)
