"""How Alembic runs the migrations; the DB manager calls it."""

from __future__ import annotations

from typing import Any

from airflow import settings
from airflow_events.inbox.manager import InboxDBManager
from alembic import context
from sqlalchemy import Engine


def _run(**where: Any) -> None:
    context.configure(
        target_metadata=InboxDBManager.metadata,
        version_table=InboxDBManager.version_table_name,
        render_as_batch=True,
        transaction_per_migration=True,
        **where,
    )
    with context.begin_transaction():
        context.run_migrations()


def _run_in(engine: Engine) -> None:
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            # It can undo a migration that breaks off, and keep out another process, in a transaction that
            # neither Alembic nor Python's driver begins by itself.
            with connection.begin():
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                _run(connection=connection)
        else:
            _run(connection=connection)


_engine = context.config.attributes.get("engine") or settings.get_engine()
if context.is_offline_mode():
    _run(dialect_name=_engine.dialect.name, literal_binds=True)
else:
    _run_in(_engine)
