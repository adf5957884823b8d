"""
Waits that share a trigger: their host, which polls for them all.

In Airflow's eyes a trigger is a task instance's. The host's is that of one of its waits, the anchor; when that one
ends, the same transaction gives it to another. So Airflow keeps it, runs it, and moves it when a triggerer dies.
Where the anchor is cleared, marked or deleted, Airflow deletes the trigger; the API server, which looks every few
seconds, makes another. A trigger that was nobody's for a moment is never used again: Airflow may be about to
delete it, and with it whatever task instance has it by then.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from airflow.utils.sqlalchemy import with_row_locks
from airflow.utils.state import TaskInstanceState
from airflow_events.inbox.database import begin_writing, in_transaction
from airflow_events.inbox.models import SINGLE, EventHost, EventWait
from sqlalchemy import and_, insert, not_, or_, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement

TRIGGER = "airflow_events.triggers.host.HostTrigger"
"""Class path of the hosts' trigger; it is frozen."""

_LONGEST = 2000  # characters of what a host tells
_HEIRS = 1000  # of how many waits one that nobody else has locked is looked for
# `airflow db clean` deletes triggers by their age, and the task instance that has one with it. They do not become
# new, since triggerers take on the oldest first.
_RENEW_AFTER, _RENEWED = timedelta(hours=12), timedelta(hours=6)


def take_in(session: Session, joining: Mapping[bytes, Sequence[uuid.UUID]]) -> None:
    """
    Let task instances, which this transaction has locked, go on with their hosts; make those that are not there.

    :param joining: by host.
    """
    if not joining:
        return
    rows = _lock(session, joining, make=True)
    anchored = _anchored(session, joining)
    others: list[uuid.UUID] = []
    for host, ids in joining.items():
        if host not in anchored:
            _anchor(session, rows[host], ids[0])
            ids = ids[1:]
        others.extend(ids)
    if others:
        _execute(session, update(TaskInstance).where(TaskInstance.id.in_(sorted(others))).values(trigger_id=None))


def hand_on(session: Session, ending: Mapping[bytes, int], ids: Collection[uuid.UUID]) -> None:
    """
    Give hosts' triggers to others of their waits, since those that have them end in this transaction.

    :param ending: the id of the trigger that such a wait has, by host.
    :param ids: the task instances that end.
    """
    if not ending:
        return
    for host, row in _lock(session, ending).items():
        if row.trigger_id == ending[host] and (heir := _heir(session, host, ids)) is not None:
            _execute(
                session, update(TaskInstance).where(TaskInstance.id == heir).values(trigger_id=row.trigger_id)
            )


def repair() -> int:
    """
    Give a new trigger to hosts that have waits and none; return how many were given one.

    Any number of API servers may do it at once.
    """
    made = 0
    for host in in_transaction(_without):
        made += in_transaction(lambda session, host=host: _repair(session, host))  # type: ignore[misc]
    return made


def _without(session: Session) -> list[bytes]:
    """Return the hosts whose trigger no wait has; and renew those of the others that become too old."""
    now = datetime.now(timezone.utc)
    rows = session.execute(select(EventHost.host, EventHost.trigger_id)).all()
    anchored = _anchored(session, [row.host for row in rows])
    alive = [row.trigger_id for row in rows if row.host in anchored]
    old = and_(Trigger.id.in_(alive), Trigger.created_date < now - _RENEW_AFTER)
    if alive:
        _execute(session, update(Trigger).where(old).values(created_date=now - _RENEWED))
    _take_from_those_that_do_not_wait(session, [row.trigger_id for row in rows if row.host not in anchored])
    return [row.host for row in rows if row.host not in anchored]


def _take_from_those_that_do_not_wait(session: Session, triggers: Iterable[int | None]) -> None:
    """
    Take triggers from task instances that were cleared and have not begun again.

    Airflow leaves them the triggers, and these running, for as long as their DAG is paused, say.
    """
    ids = sorted({id for id in triggers if id is not None})
    if ids:
        waits = TaskInstance.state == TaskInstanceState.DEFERRED
        cleared = and_(TaskInstance.trigger_id.in_(ids), or_(TaskInstance.state.is_(None), not_(waits)))
        _execute(session, update(TaskInstance).where(cleared).values(trigger_id=None))


def _repair(session: Session, host: bytes) -> bool:
    begin_writing(session)
    # The task instance first, as everywhere; and nobody can let it go on otherwise meanwhile.
    heir = _heir(session, host, ())
    if heir is None:
        return False
    row = _lock(session, [host])[host]
    if _anchored(session, [host]):
        return False
    _anchor(session, row, heir)
    return True


def _lock(session: Session, hosts: Iterable[bytes], *, make: bool = False) -> dict[bytes, EventHost]:
    wanted = sorted(set(hosts))
    query = select(EventHost).where(EventHost.host.in_(wanted)).order_by(EventHost.host)
    locked = with_row_locks(query, session, of=EventHost, key_share=False).execution_options(
        populate_existing=True
    )
    rows = {row.host: row for row in session.scalars(locked)}
    if make and (missing := [host for host in wanted if host not in rows]):
        session.execute(insert(EventHost), [{"host": host, "trigger_id": None} for host in missing])
        rows = {row.host: row for row in session.scalars(locked)}
    return rows


def is_anchored(session: Session, host: bytes, trigger: int) -> bool:
    """Whether the trigger is the host's, and will be run: a wait of the host has it."""
    return _anchored(session, [host]).get(host) == trigger


def note(session: Session, host: bytes, *, waits: int, **told: str) -> None:
    """Keep what a host tells of itself, for whoever looks, if it is not what it told before."""
    values: dict[str, Any] = {"waits": waits, **{name: said[:_LONGEST] or None for name, said in told.items()}}
    known = session.execute(select(*(getattr(EventHost, name) for name in values)).where(EventHost.host == host))
    if [dict(row._mapping) for row in known] != [values]:
        _execute(session, update(EventHost).where(EventHost.host == host).values(**values))


def _anchored(session: Session, hosts: Collection[bytes]) -> dict[bytes, int]:
    """
    Return the triggers of those of the hosts whose trigger one of their waits has.

    The number alone does not say so: SQLite gives that of a trigger which was deleted to the next one.
    """
    query = (
        select(EventHost.host, EventHost.trigger_id)
        .join(Trigger, Trigger.id == EventHost.trigger_id)
        .join(TaskInstance, TaskInstance.trigger_id == EventHost.trigger_id)
        .join(EventWait, of_task())
        .where(
            EventHost.host.in_(sorted(set(hosts))),
            Trigger.classpath == TRIGGER,
            TaskInstance.state == TaskInstanceState.DEFERRED,
            EventWait.host == EventHost.host,
        )
    )
    return {row.host: row.trigger_id for row in session.execute(query)} if hosts else {}


def _anchor(session: Session, row: EventHost, ti: uuid.UUID) -> None:
    trigger = Trigger(classpath=TRIGGER, kwargs={"host": row.host.hex()})
    session.add(trigger)
    session.flush()
    row.trigger_id = trigger.id
    session.flush()
    _execute(session, update(TaskInstance).where(TaskInstance.id == ti).values(trigger_id=trigger.id))


def _heir(session: Session, host: bytes, without: Collection[uuid.UUID]) -> uuid.UUID | None:
    """Lock and return a waiting task instance of a host, if there is one that nobody else has locked."""
    waits = (TaskInstance.trigger_id.is_(None), TaskInstance.state == TaskInstanceState.DEFERRED)
    query = (
        select(TaskInstance.id)
        .join(EventWait, of_task())
        .where(*waits_of(host), *waits, TaskInstance.id.not_in(sorted(without)))
        .order_by(EventWait.hosted_at)
        .limit(_HEIRS)
    )
    ids = session.scalars(query).all()
    # By their ids alone: MySQL keeps what it locks on its way to those that it skips.
    query = select(TaskInstance.id).where(TaskInstance.id.in_(ids), *waits).order_by(TaskInstance.id).limit(1)
    query = query.with_hint(TaskInstance, "FORCE INDEX (PRIMARY)", "mysql")
    query = with_row_locks(query, session, of=TaskInstance, skip_locked=True, key_share=False)
    heir: uuid.UUID | None = session.scalar(query) if ids else None
    return heir


def of_task() -> ColumnElement[bool]:
    """Whether the row of a wait is of the task instance."""
    names = ("dag_id", "task_id", "run_id", "map_index")
    return and_(*(getattr(EventWait, name) == getattr(TaskInstance, name) for name in names))


def waits_of(host: bytes) -> list[Any]:
    """Whether a wait with its task instance is open, and a host's; it may have its event, to be committed yet."""
    return [
        EventWait.host == host,
        EventWait.place == SINGLE,
        TaskInstance.state == TaskInstanceState.DEFERRED,
    ]


def _execute(session: Session, statement: Any) -> None:
    session.execute(statement.execution_options(synchronize_session=False))
