"""Forgetting a record: the event is the wait's no longer, and the next try or clear takes another."""

from __future__ import annotations

from dataclasses import dataclass

from airflow.models.task_state_store import TaskStateStoreModel
from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XCOM_RETURN_KEY, XComModel
from airflow_events.triggers.record import LOST_KEY, RECORD_KEY
from airflow_events.waits import many, tables
from airflow_events.waits.detail import Record, read_record, read_xcom, why_it_cannot_be_forgotten
from airflow_events.waits.tables import Key
from sqlalchemy import delete, select
from sqlalchemy.orm import Session


@dataclass(frozen=True)
class Forgotten:
    """
    What became of a forgetting.

    :param record: what was forgotten, or None if nothing was.
    :param refused: why nothing was, or None.
    """

    record: Record | None
    refused: str | None


def forget(session: Session, key: Key) -> Forgotten | None:
    """
    Forget the record of a wait, and the return value that came of it; None if there is no such task instance.

    Refused while the task is at work: whoever has the event in memory would record it again. The task instance
    is locked meanwhile, so none begins. An event that was not committed is given out again by its source.

    The caller commits; a crash before that leaves all as it was.
    """
    tables.lock(session, key)
    state = session.execute(select(TaskInstance.state).where(*tables.is_(TaskInstance, key))).one_or_none()
    if state is None:
        return None
    record = read_record(session, key)
    if refused := why_it_cannot_be_forgotten(state[0], record):
        return Forgotten(None, refused)
    assert record is not None
    in_xcom = read_xcom(session, key, RECORD_KEY)
    session.execute(
        delete(XComModel).where(*tables.is_(XComModel, key), XComModel.key.in_((RECORD_KEY, XCOM_RETURN_KEY)))
    )
    session.execute(
        delete(TaskStateStoreModel).where(
            *tables.is_(TaskStateStoreModel, key), TaskStateStoreModel.key.in_((RECORD_KEY, LOST_KEY))
        )
    )
    many.forget(session, key)
    if lost := (in_xcom or {}).get("id") or record.id:
        # Should a process that its task has outlived write the record once more, it is none.
        dag_id, run_id, task_id, map_index = key
        XComModel.set(
            LOST_KEY,
            lost,
            dag_id=dag_id,
            run_id=run_id,
            task_id=task_id,
            map_index=map_index,
            serialize=False,
            session=session,
        )
    return Forgotten(record, None)
