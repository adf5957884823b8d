"""Whose an event of a source is, by its identity: the rows of ``event_taken``, read and written for a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from airflow_events.inbox.models import EventTaken
from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session


@dataclass
class Taken:
    """
    Whose an event is.

    :param wait: for whoever looks.
    :param set_aside: why ``wait`` could not read it; None of an event that is recorded.
    :param is_new: whether it has no row yet; ``changed`` whether the row is to be written.
    :param committed: whether its source has nothing to be told.
    """

    content: bytes
    record_id: str
    wait: str
    set_aside: str | None = None
    is_new: bool = True
    changed: bool = False
    committed: bool = False


def taken_of(session: Session, identities: Iterable[str | None]) -> dict[bytes, Taken]:
    """
    Return whose events of these identities are.

    Rows that are there are locked until the end of the transaction, in the order of their keys: of two waits that
    take what was set aside, or an id with another content, one waits for the other, as it does for a new row. Of
    those that are not there nothing is locked: MySQL would lock gaps, and batches of new events stop each other.
    """
    wanted = sorted({bytes.fromhex(one) for one in identities if one})
    if not wanted:
        return {}
    columns = (EventTaken.content, EventTaken.record_id, EventTaken.wait, EventTaken.set_aside)
    there = session.scalars(select(EventTaken.identity).where(EventTaken.identity.in_(wanted))).all()
    if not there:
        return {}
    query = select(EventTaken.identity, *columns).where(EventTaken.identity.in_(sorted(there)))
    rows = session.execute(query.order_by(EventTaken.identity).with_for_update())
    return {row.identity: Taken(row.content, row.record_id, row.wait, row.set_aside, is_new=False) for row in rows}


def key_of(
    session: Session,
    taken: dict[bytes, Taken],
    identity: bytes,
    content: bytes,
    meanwhile: bytes | None = None,
) -> bytes:
    """
    Return under which key the row of an event is, or is to be: its identity, unless another event has that.

    Events of one identity and two contents may both come again, as long as they are not acknowledged.

    :param taken: whose the events are that were asked for; that by the other key is added.
    :param meanwhile: the content of the event that is about to have the identity, None if there is none.
    """
    known = taken.get(identity)
    is_free = known is None or known.set_aside is not None or known.content == content
    if is_free and meanwhile in (None, content):
        return identity
    key = second_key(identity, content)
    if key not in taken:
        taken.update(taken_of(session, [key.hex()]))
    return key


def second_key(identity: bytes, content: bytes) -> bytes:
    """Return what an event is known by whose identity another one has."""
    return hashlib.sha256(identity + content).digest()


def write_taken(session: Session, taken: Mapping[bytes, Taken], now: datetime) -> None:
    """Write whose events are, in the order of their keys, so that of two batches one waits for the other."""
    new: list[dict[str, Any]] = []
    changed: list[dict[str, Any]] = []
    for identity, one in sorted(taken.items()):
        row = {
            "identity": identity,
            "content": one.content,
            "record_id": one.record_id,
            "wait": one.wait,
            "taken_at": now,
            "acknowledged_at": now if one.committed else None,
            "set_aside": one.set_aside,
        }
        if one.changed:
            (new if one.is_new else changed).append(row)
    if new:
        session.execute(insert(EventTaken), new)
    for row in changed:
        statement = update(EventTaken).where(EventTaken.identity == row["identity"]).values(row)
        session.execute(statement.execution_options(synchronize_session=False))
