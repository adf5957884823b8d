"""Events that are kept for waits that have not begun: which they are, and how one is dropped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from airflow._shared.secrets_masker import redact
from airflow_events.inbox.models import EventKept
from airflow_events.listeners.http import address_of
from airflow_events.listeners.support import serde
from airflow_events.waits import arguments
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session


@dataclass(frozen=True)
class Kept:
    """
    An event that is kept for a key.

    :param to: ``one``: the first wait that begins takes it; ``all``: each that begins does.
    :param dags: to whose waits it may go; None for all.
    :param reached: the ids of the waits that have it.
    :param event: JSON shapes, masked.
    """

    event_id: str
    key: str
    to: str
    sent_by: str
    dags: list[str] | None
    reached: list[str]
    kept_at: datetime
    expires: datetime
    event: Any


def kept(session: Session, *, key: str | None = None, limit: int = 100, offset: int = 0) -> tuple[list[Kept], int]:
    """
    Return events that are kept, the oldest first, and how many there are.

    Those that have expired, and are still there, are left out.

    :param key: only of this key.
    """
    which = [EventKept.expires > datetime.now().astimezone()]
    if key is not None:
        which.append(EventKept.address == bytes.fromhex(address_of(key)))
    total = session.scalar(select(func.count()).select_from(EventKept).where(*which)) or 0
    rows = session.scalars(select(EventKept).where(*which).order_by(EventKept.id).limit(limit).offset(offset))
    found = [
        Kept(
            row.event_id,
            row.key,
            row.to,
            row.sent_by,
            None if row.dags is None else json.loads(row.dags),
            json.loads(row.reached),
            row.kept_at,
            row.expires,
            arguments.jsonable(redact(serde.decode(row.event))),
        )
        for row in rows
    ]
    return found, total


def drop(session: Session, event_id: str) -> bool:
    """
    Drop a kept event, which then reaches no more waits; return whether it was there.

    An API server that is giving it to a wait comes first: then it is that wait's, or stays for others and is
    dropped here. Its sender's idempotency key stays known, so the same request is not taken for a new event.
    """
    dropped: Any = session.execute(
        delete(EventKept).where(EventKept.event_id == event_id).execution_options(synchronize_session=False)
    )
    return bool(dropped.rowcount)
