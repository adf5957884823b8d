"""The tables of the inbox."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from airflow.models.base import StringID, metadata
from alembic import op
from sqlalchemy.dialects import mysql

revision = "e1a70c5b0001"
down_revision = None
branch_labels = None
depends_on = None

LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
DIGEST = sa.LargeBinary(32).with_variant(mysql.BINARY(32), "mysql", "mariadb")
MOMENT = sa.TIMESTAMP(timezone=True).with_variant(mysql.TIMESTAMP(fsp=6), "mysql", "mariadb")


def upgrade() -> None:
    """Make them; those that are there stay, since MySQL does not undo a migration that breaks off."""
    _table(
        "event_wait",
        sa.Column("dag_id", _like("dag_id"), primary_key=True, nullable=False),
        sa.Column("task_id", _like("task_id"), primary_key=True, nullable=False),
        sa.Column("run_id", _like("run_id"), primary_key=True, nullable=False),
        sa.Column("map_index", sa.Integer(), primary_key=True, nullable=False, autoincrement=False),
        sa.Column("place", sa.Integer(), primary_key=True, nullable=False, autoincrement=False),
        sa.Column("listener", sa.String(250)),
        sa.Column("call", LONG_TEXT),
        sa.Column("arguments", DIGEST),
        sa.Column("address", DIGEST),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("holder", sa.String(250)),
        sa.Column("since", MOMENT),
        sa.Column("run_start", MOMENT),
        sa.Column("deadline", MOMENT),
        sa.Column("clears", sa.Integer(), nullable=False),
        sa.Column("phase", sa.String(20)),
        sa.Column("event", LONG_TEXT),
        sa.Column("record_id", sa.String(40)),
        sa.Column("record_clears", sa.Integer()),
        sa.Column("recorded_after", sa.String(40)),
        sa.Column("lost", sa.String(40)),
        sa.Column("recorded_at", MOMENT),
        sa.Column("committed_at", MOMENT),
        sa.Column("delivered_at", MOMENT),
        sa.Column("finished_by", sa.Integer()),
        sa.Column("sent_by", sa.String(250)),
        sa.Column("reason", LONG_TEXT),
        sa.Column("expires", MOMENT),
        sa.Column("receipt", LONG_TEXT),
        sa.Column("wanted", sa.Integer()),
        sa.ForeignKeyConstraint(
            ["dag_id", "task_id", "run_id", "map_index"],
            [f"{_task_instance()}.{name}" for name in ("dag_id", "task_id", "run_id", "map_index")],
            name="event_wait_task_instance_fkey",
            ondelete="CASCADE",
            onupdate="CASCADE",
        ),
    )
    _index("event_wait_phase", "event_wait", "phase")
    _index("event_wait_address", "event_wait", "address")
    _table(
        "event_taken",
        sa.Column("identity", DIGEST, primary_key=True, nullable=False),
        sa.Column("content", DIGEST, nullable=False),
        sa.Column("record_id", sa.String(40), nullable=False),
        sa.Column("wait", sa.Text(), nullable=False),
        sa.Column("taken_at", MOMENT, nullable=False),
        sa.Column("acknowledged_at", MOMENT),
    )
    _index("ix_event_taken_record_id", "event_taken", "record_id")
    _index("ix_event_taken_acknowledged_at", "event_taken", "acknowledged_at")
    _table(
        "event_kept",
        sa.Column("id", sa.Integer(), primary_key=True, nullable=False),
        sa.Column("address", DIGEST, nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("event", LONG_TEXT, nullable=False),
        sa.Column("event_id", sa.String(40), nullable=False),
        sa.Column("to", sa.String(10), nullable=False),
        sa.Column("sent_by", sa.String(250), nullable=False),
        sa.Column("dags", LONG_TEXT),
        sa.Column("reached", LONG_TEXT, nullable=False),
        sa.Column("kept_at", MOMENT, nullable=False),
        sa.Column("expires", MOMENT, nullable=False),
        sa.UniqueConstraint("event_id", name="event_kept_event_id_key"),
    )
    _index("ix_event_kept_address", "event_kept", "address")
    _index("ix_event_kept_expires", "event_kept", "expires")
    _table(
        "event_sent",
        sa.Column("identity", DIGEST, primary_key=True, nullable=False),
        sa.Column("content", DIGEST, nullable=False),
        sa.Column("receipt", LONG_TEXT, nullable=False),
        sa.Column("expires", MOMENT, nullable=False),
    )
    _index("ix_event_sent_expires", "event_sent", "expires")


def downgrade() -> None:
    """Drop them."""
    for table in ("event_sent", "event_kept", "event_taken", "event_wait"):
        op.execute(f"DROP TABLE IF EXISTS {table}")


def _table(name: str, *items: Any) -> None:
    if op.get_context().as_sql or not sa.inspect(op.get_bind()).has_table(name):
        op.create_table(name, *items)


def _index(name: str, table: str, column: str) -> None:
    if op.get_context().as_sql or not sa.inspect(op.get_bind()).has_index(table, name):
        op.create_index(name, table, [column])


def _task_instance() -> str:
    """Return the name of Airflow's table, which `[database] sql_alchemy_schema` may have put into a schema."""
    return f"{metadata.schema}.task_instance" if metadata.schema else "task_instance"


def _like(column: str) -> sa.types.TypeEngine[str]:
    """Return the type of one of Airflow's names: MySQL's foreign keys need the collation that it has there."""
    context = op.get_context()
    if context.dialect.name != "mysql" or context.as_sql:
        return StringID()
    columns = sa.inspect(op.get_bind()).get_columns("task_instance", metadata.schema)
    return next(one["type"] for one in columns if one["name"] == column)
