"""Forgetting a record: the event is the wait's no longer, and the next try or clear takes another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from airflow.models.xcom import XCOM_RETURN_KEY, XComModel
from airflow_events.inbox import legacy, tasks
from airflow_events.inbox.entries import Phase
from airflow_events.inbox.models import SINGLE, EventTaken, EventWait
from airflow_events.inbox.transactions import FORGOTTEN
from airflow_events.waits import tables
from airflow_events.waits.detail import why_it_cannot_be_forgotten
from airflow_events.waits.tables import Key
from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session


@dataclass(frozen=True)
class Forgotten:
    """
    What became of a forgetting.

    :param refused: why nothing was forgotten, or None.
    """

    refused: str | None


def forget(session: Session, key: Key, *, by: str) -> Forgotten | None:
    """
    Forget the record of a wait, and the return value that came of it; None if there is no such task instance.

    Refused while the task is at work: whoever has the event in memory would record it again. The task instance
    is locked meanwhile, so none begins. An event that was not committed is given out again by its source, and
    may be anybody's then. One that was committed is nobody's: another wait may have a redelivery of it in hand.

    :param by: who asks for it, for the audit log.

    The caller commits; a crash before that leaves all as it was.
    """
    dag_id, run_id, task_id, map_index = key
    task = tasks.lock_one(session, dag_id, task_id, run_id, map_index)
    if task is None:
        return None
    rows = session.execute(
        select(EventWait.place, EventWait.phase, EventWait.record_id).where(*tables.is_(EventWait, key))
    ).all()
    has_begun = any(row.place == SINGLE for row in rows)
    earlier = {} if has_begun else legacy.records(session, [task]).get(task.key, {})
    is_recorded = any(row.phase for row in rows) or any("phase" in values for values in earlier.values())
    if refused := why_it_cannot_be_forgotten(task.state, is_recorded):
        return Forgotten(refused)
    names = {"dag_id": dag_id, "run_id": run_id, "task_id": task_id, "map_index": map_index}
    for place, values in earlier.items():  # taken over as by the beginning of a wait, and then forgotten
        taken = {**names, "place": place, "generation": 0, "clears": task.clears, **values}
        session.execute(insert(EventWait).values(taken))
    lost = EventWait.phase == Phase.RECORDED.value
    for which, changes in ([lost], {"lost": EventWait.record_id}), ([], FORGOTTEN):
        _execute(session, update(EventWait).where(*tables.is_(EventWait, key), *which).values(changes))
    ids = sorted({row.record_id for row in rows if row.record_id and row.phase == Phase.RECORDED})
    _execute(session, delete(EventTaken).where(EventTaken.record_id.in_(ids)))
    _execute(session, delete(XComModel).where(*tables.is_(XComModel, key), XComModel.key == XCOM_RETURN_KEY))
    legacy.forget(session, task)
    tasks.note(session, task, "forget_event", by, {})
    return Forgotten(None)


def _execute(session: Session, statement: Any) -> None:
    session.execute(statement.execution_options(synchronize_session=False))
