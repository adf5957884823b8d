"""
What the first edition kept as Airflow Variables: events for keys, and what senders were told.

It is taken over once in the life of a deployment. Else whoever may edit Variables could have events given to
waits, in any name, by the next API server that starts.
"""

from __future__ import annotations

import hashlib
import json
import logging
from datetime import datetime, timezone
from typing import Any

from airflow.models.variable import Variable
from airflow.utils.sqlalchemy import with_row_locks
from airflow_events.api.wait_rows import name_of, now
from airflow_events.inbox.database import begin_writing, in_transaction
from airflow_events.inbox.models import LATEST, EventKept, EventSent
from airflow_events.listeners.http import address_of
from airflow_events.listeners.support import serde
from sqlalchemy import or_, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

log = logging.getLogger(__name__)

# The names of the Variables. Those of kept events sort by the moment at which they came.
_KEPT = "airflow_events.kept."
_SENT = "airflow_events.sent."


def take_over() -> int:
    """
    Make rows of the inbox of what is still in Variables, each in a transaction of its own; return how many.

    Any number of API servers may do it at once; when one of them is through, Variables count no more. What cannot
    be read stays where it is, and is named in the log.

    :raises sqlalchemy.exc.OperationalError: the database is unreachable; what is done is done, and the rest is to
        be.
    """
    if in_transaction(_is_done):
        return 0
    done = 0
    for name in in_transaction(_names):
        try:
            done += in_transaction(lambda session, name=name: _take_over(session, name))  # type: ignore[misc]
        except OperationalError:
            raise
        except Exception:
            log.exception(
                "The Variable %s cannot be read, and nobody gets the event that was kept in it: it was encrypted "
                "with another Fernet key, or changed by hand. Let its sender send it again, and delete it",
                name,
            )
    in_transaction(_set_done)
    return done


def _is_done(session: Session) -> bool:
    return session.get(EventSent, _DONE) is not None


def _set_done(session: Session) -> None:
    begin_writing(session)
    if not _is_done(session):
        session.add(EventSent(identity=_DONE, content=_DONE, receipt="null", expires=LATEST))


def identity_of(key: str, idempotency_key: str) -> bytes:
    """Return the identity of a row that was made of what the first edition noted for an idempotency key."""
    digest = hashlib.sha256(f"{key}\n{idempotency_key}".encode("utf-8", "surrogatepass")).hexdigest()
    return _identity(f"{_SENT}{digest[:40]}")


def _identity(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


_DONE = _identity("airflow_events: Variables are taken over")
"""Of the row that says so."""


def _names(session: Session) -> list[str]:
    ours = or_(*(Variable.key.startswith(prefix, autoescape=True) for prefix in (_KEPT, _SENT)))
    return list(session.scalars(select(Variable.key).where(ours).order_by(Variable.key)))


def _take_over(session: Session, name: str) -> bool:
    """Make a row of a Variable, and delete it; return whether it was there, and still good for something."""
    begin_writing(session)
    query = select(Variable).where(Variable.key == name)
    row = session.scalar(with_row_locks(query, session, skip_locked=True, key_share=False))
    if row is None:  # another API server has it
        return False
    session.delete(row)
    expires = min(datetime.fromisoformat(str(row.description).removeprefix("until ")), LATEST)
    if expires <= now():
        return False
    told = json.loads(row.get_val())
    made = _sent(name, told, expires) if name.startswith(_SENT) else _kept(name, told, expires)
    if session.scalar(select(type(made)).where(_is(made))) is not None:
        return False
    session.add(made)
    return True


def _kept(name: str, told: dict[str, Any], expires: datetime) -> EventKept:
    serde.decode(told["event"])  # or it could not be given to anybody
    came = int(name.split(".")[3]) / 1e9
    return EventKept(
        address=bytes.fromhex(address_of(told["key"])),
        key=told["key"],
        event=told["event"],
        event_id=told["event_id"],
        to=told["to"],
        sent_by=name_of(told["by"]),
        dags=None if told["dags"] is None else json.dumps(told["dags"]),
        reached=json.dumps(told["got"]),
        kept_at=datetime.fromtimestamp(came, timezone.utc),
        expires=expires,
    )


def _sent(name: str, told: dict[str, Any], expires: datetime) -> EventSent:
    return EventSent(
        identity=_identity(name),
        content=bytes.fromhex(told["digest"]),
        receipt=json.dumps(told["receipt"]),
        expires=expires,
    )


def _is(made: EventKept | EventSent) -> Any:
    """Whether there is that row already."""
    if isinstance(made, EventKept):
        return EventKept.event_id == made.event_id
    return EventSent.identity == made.identity
