"""
When Airflow drops its tables (``airflow db reset``), the inbox's go first.

Airflow asks DB managers to drop theirs after its own, and that is too late: ``event_wait`` has a foreign key to
``task_instance``, which PostgreSQL and MySQL do not drop before it. So this is hung on SQLAlchemy's event for it.
The command line imports this, so it imports little; who calls ``airflow.utils.db.resetdb`` from Python imports it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from airflow.models.base import metadata as airflow_metadata
from sqlalchemy import Connection, MetaData, Table, event

VERSION_TABLE = "alembic_version_events"


def drop(connection: Connection) -> None:
    """Drop the tables of the inbox and their version, if they are there, with all that is in them."""
    from airflow_events.inbox.models import Base

    Base.metadata.drop_all(connection)
    Table(VERSION_TABLE, MetaData()).drop(connection, checkfirst=True)


@event.listens_for(airflow_metadata, "before_drop")
def _drop_before(
    target: MetaData, connection: Connection, tables: Collection[Table] | None = None, **_: Any
) -> None:
    if any(table.name == "task_instance" for table in tables or ()):
        drop(connection)
