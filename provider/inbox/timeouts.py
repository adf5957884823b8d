"""
Airflow's own timeouts of deferrals, of waits whose events are recorded already.

Airflow gives each deferral a timeout of its own, some while after the deadline of the wait, at which its scheduler
ends it. With the record, and with the beginning of a wait that has one, it goes: the event wins over the deadline.
Of a retry or a clear that no triggerer begins in time, because there is none, nobody would say so; the API server
does.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from airflow.utils.state import TaskInstanceState
from airflow_events.inbox import tasks
from airflow_events.inbox.database import in_transaction
from airflow_events.inbox.models import SINGLE, EventWait
from airflow_events.inbox.transactions import LARGEST_BATCH, has_event
from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session, aliased
from sqlalchemy.sql import ColumnElement

_AHEAD = timedelta(hours=1)
"""How far ahead a timeout may be that is looked at."""


def clear_timeouts() -> int:
    """
    Take their timeouts from deferred task instances that have what they wait for; return from how many.

    The next beginning of the wait sets a timeout again, should the wait not have its event then.
    """
    found = in_transaction(_with_events)
    cleared = 0
    for start in range(0, len(found), LARGEST_BATCH):
        some = found[start : start + LARGEST_BATCH]
        cleared += in_transaction(lambda session, some=some: _clear(session, some))  # type: ignore[misc]
    return cleared


def _clear(session: Session, ids: Collection[uuid.UUID]) -> int:
    tasks.lock(session, ids)
    still = _with_events(session, TaskInstance.id.in_(ids))
    if still:
        without = update(TaskInstance).where(TaskInstance.id.in_(still)).values(trigger_timeout=None)
        session.execute(without.execution_options(synchronize_session=False))
    return len(still)


def _with_events(session: Session, *which: ColumnElement[bool]) -> list[uuid.UUID]:
    """Return the ids of task instances that would be ended soon, and have what they wait for."""
    ti, wait, place = TaskInstance, EventWait, aliased(EventWait)
    key, key_of_place = ([of.dag_id, of.task_id, of.run_id, of.map_index] for of in (wait, place))
    of_list = select(func.count()).where(
        *(one == other for one, other in zip(key_of_place, key, strict=True)),
        place.place > SINGLE,
        place.phase.is_not(None),
    )
    there = of_list.scalar_subquery()
    query = (
        select(
            ti.id,
            ti.max_tries.label("clears"),
            ti.trigger_timeout,
            wait.phase,
            wait.record_clears,
            wait.expires,
            wait.wanted,
            there.label("there"),
            of_list.where(place.record_clears == ti.max_tries).scalar_subquery().label("there_since_clear"),
            Trigger.encrypted_kwargs,
        )
        .join(
            wait, (key[0] == ti.dag_id) & (key[1] == ti.task_id) & (key[2] == ti.run_id) & (key[3] == ti.map_index)
        )
        .outerjoin(Trigger, Trigger.id == ti.trigger_id)
        .where(
            ti.state == TaskInstanceState.DEFERRED,
            ti.trigger_timeout < datetime.now(timezone.utc) + _AHEAD,
            wait.place == SINGLE,
            or_(wait.phase.is_not(None), wait.wanted <= there),
            *which,
        )
    )
    return [row.id for row in session.execute(query) if _has_its_events(row)]


def _has_its_events(row: Any) -> bool:
    """Whether the wait has, at its timeout, what it is to deliver, or to end with."""
    return _counts(row, replay=False) or (_counts(row, replay=True) and _replays(row.encrypted_kwargs))


def _counts(row: Any, *, replay: bool) -> bool:
    if has_event(row, row.clears, row.trigger_timeout, replay=replay):
        return True
    return row.wanted is not None and row.wanted <= (row.there if replay else row.there_since_clear)


def _replays(kwargs: str | None) -> bool:
    """Whether the trigger is to deliver what was recorded before a clear; False if its row cannot be read."""
    try:
        return kwargs is not None and bool(Trigger._decrypt_kwargs(kwargs).get("replay", True))
    except Exception:  # of another Fernet key, say: Airflow ends the wait, and the next clear delivers
        return False
