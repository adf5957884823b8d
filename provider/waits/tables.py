"""Which rows of Airflow's tables belong to waits, as SQL."""

from __future__ import annotations

from typing import Annotated, Any

from airflow.models.task_state_store import TaskStateStoreModel
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from airflow.models.xcom import XComModel
from airflow.utils.state import TaskInstanceState as State
from airflow_events.listeners.commit import Phase
from airflow_events.triggers.record import LOST_KEY, PROGRESS_KEY, RECORD_KEY
from pydantic import StringConstraints
from sqlalchemy import and_, exists, or_, select, union_all, update
from sqlalchemy.orm import Session, aliased
from sqlalchemy.sql import ColumnElement, Select

Key = tuple[str, str, str, int]
"""``dag_id``, ``run_id``, ``task_id``, ``map_index``."""

Name = Annotated[str, StringConstraints(max_length=250, pattern=r"^[^\x00]+$")]
"""One of the first three in a request: Airflow's columns are that long, and PostgreSQL takes no NUL."""

OPERATOR = "WaitForEventOperator"
OF_MANY = "WaitForEventsOperator"
_OUR_TRIGGERS = "airflow_events.triggers."

OPEN = (
    State.SCHEDULED,
    State.QUEUED,
    State.RUNNING,
    State.RESTARTING,
    State.DEFERRED,
    State.UP_FOR_RETRY,
    State.UP_FOR_RESCHEDULE,
)
"""The states of a task instance that waits, or is about to."""

AT_WORK = (State.QUEUED, State.RUNNING, State.RESTARTING, State.DEFERRED)
"""The states in which somebody may have the event in memory."""

ENDED = (State.SUCCESS, State.FAILED, State.SKIPPED, State.REMOVED)


def of_a_wait() -> ColumnElement[bool]:
    """Whether a task instance, joined with its trigger if it has one, is a wait."""
    return or_(
        TaskInstance.operator.in_((OPERATOR, OF_MANY)),
        Trigger.classpath.startswith(_OUR_TRIGGERS, autoescape=True),
    )


def is_(table: Any, key: Key) -> list[ColumnElement[bool]]:
    """Whether a row of a table belongs to the wait."""
    columns = (table.dag_id, table.run_id, table.task_id, table.map_index)
    return [column == value for column, value in zip(columns, key, strict=True)]


def lock(session: Session, key: Key) -> None:
    """
    Lock a wait's task instance until the end of the transaction, if it is there.

    The lock is a write that changes nothing, which all of Airflow's databases understand: on SQLite a transaction
    that begins with a SELECT does not keep others from writing.
    """
    unchanged = {"trigger_id": TaskInstance.trigger_id, "updated_at": TaskInstance.updated_at}
    session.execute(
        update(TaskInstance)
        .where(*is_(TaskInstance, key))
        .values(unchanged)
        .execution_options(synchronize_session=False)
    )


def has_record() -> ColumnElement[bool]:
    """Whether something is, or was, recorded for a task instance, as for waits of a subclass of the operator."""
    xcom, stored = aliased(XComModel), aliased(TaskStateStoreModel)
    return or_(
        exists().where(of(xcom), xcom.key == RECORD_KEY), exists().where(of(stored), stored.key == RECORD_KEY)
    )


def of(row: Any) -> ColumnElement[bool]:
    """Whether a row of another table belongs to the task instance."""
    return and_(
        row.dag_id == TaskInstance.dag_id,
        row.task_id == TaskInstance.task_id,
        row.run_id == TaskInstance.run_id,
        row.map_index == TaskInstance.map_index,
    )


def uncommitted() -> Select[Any]:
    """
    Select the ids of the task instances whose event is recorded and not committed.

    As the operator reads it: what a worker stored counts before the triggerer's XCom, and a record whose id is
    noted as lost is none. An XCom backend that stores values elsewhere hides the second kind from this.
    """
    record, lost = aliased(XComModel), aliased(XComModel)
    stored, any_stored = aliased(TaskStateStoreModel), aliased(TaskStateStoreModel)
    by_trigger = (
        select(TaskInstance.id)
        .join(record, of(record))
        .where(
            record.key.in_((RECORD_KEY, PROGRESS_KEY)),  # the second of a task that waits for many
            record.value["phase"].as_string() == Phase.RECORDED.value,
            ~exists().where(of(lost), lost.key == LOST_KEY, lost.value == record.value["id"]),
            ~exists().where(of(any_stored), any_stored.key == RECORD_KEY),
        )
    )
    # The column is text, so no dialect looks into it alike; `Record.as_dict` keeps the phase in front.
    by_worker = (
        select(TaskInstance.id)
        .join(stored, of(stored))
        .where(
            stored.key == RECORD_KEY,
            stored.value.startswith(f'{{"phase": "{Phase.RECORDED.value}"', autoescape=True),
        )
    )
    return select(union_all(by_trigger, by_worker).subquery().c.id)
