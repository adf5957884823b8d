"""Which rows of Airflow's tables belong to waits, as SQL."""

from __future__ import annotations

from typing import Annotated, Any

from airflow.jobs.job import Job
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from airflow.utils.state import TaskInstanceState as State
from airflow_events.inbox.models import SINGLE, EventHost, EventWait
from pydantic import StringConstraints
from sqlalchemy import and_, func, update
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement, Select

Key = tuple[str, str, str, int]
"""``dag_id``, ``run_id``, ``task_id``, ``map_index``."""

Name = Annotated[str, StringConstraints(max_length=250, pattern=r"^[^\x00]*[^\x00 ]$")]
"""
One of the first three in a request: Airflow's columns are that long, PostgreSQL takes no NUL, and MySQL takes
those for one that differ by spaces at their ends.
"""

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

AT_WORK = (State.SCHEDULED, State.QUEUED, State.RUNNING, State.RESTARTING, State.DEFERRED)
"""The states in which somebody may have the event in memory, or it is on its way to a worker."""

ENDED = (State.SUCCESS, State.FAILED, State.SKIPPED, State.REMOVED)


def joined(statement: Select[Any]) -> Select[Any]:
    """Select from task instances, each with its wait's row, the trigger that polls for it, and its triggerer."""
    return (
        statement.select_from(TaskInstance)
        .outerjoin(EventWait, and_(of(EventWait), EventWait.place == SINGLE))
        .outerjoin(EventHost, EventHost.host == EventWait.host)
        .outerjoin(Trigger, Trigger.id == func.coalesce(TaskInstance.trigger_id, EventHost.trigger_id))
        .outerjoin(Job, Job.id == Trigger.triggerer_id)
    )


def of_our_operator() -> ColumnElement[bool]:
    """Whether a task instance is one of our operators, which one of a subclass of theirs does not show."""
    return TaskInstance.operator.in_((OPERATOR, OF_MANY))


def of_our_trigger() -> ColumnElement[bool]:
    """Whether a task instance, `joined`, is deferred to one of our triggers."""
    return Trigger.classpath.startswith(_OUR_TRIGGERS, autoescape=True)


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


def of(row: Any) -> ColumnElement[bool]:
    """Whether a row of another table belongs to the task instance."""
    return and_(
        row.dag_id == TaskInstance.dag_id,
        row.task_id == TaskInstance.task_id,
        row.run_id == TaskInstance.run_id,
        row.map_index == TaskInstance.map_index,
    )
