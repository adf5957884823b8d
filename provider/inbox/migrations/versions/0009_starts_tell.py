"""A trigger that starts runs tells what is left at its source, and what is wrong with it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "e1a70c5b0009"
down_revision = "e1a70c5b0008"
branch_labels = None
depends_on = None

MOMENT = sa.TIMESTAMP(timezone=True).with_variant(mysql.TIMESTAMP(fsp=6), "mysql", "mariadb")
INDEX = "ix_event_start_told_at"


def upgrade() -> None:
    """Make what is not there, since MySQL does not undo a migration that breaks off."""
    tables, indexes = _there()
    if "event_start" not in tables:
        op.create_table(
            "event_start",
            sa.Column("trigger_id", sa.Integer(), primary_key=True, nullable=False, autoincrement=False),
            sa.Column("lag", sa.BigInteger(), nullable=True),
            sa.Column("trouble", sa.Text(), nullable=True),
            sa.Column("told_at", MOMENT, nullable=False),
        )
    if INDEX not in indexes:
        op.create_index(INDEX, "event_start", ["told_at"])


def downgrade() -> None:
    """Drop what is there."""
    op.execute("DROP TABLE IF EXISTS event_start")


def _there() -> tuple[set[str], set[str | None]]:
    if op.get_context().as_sql:
        return set(), set()
    inspector = sa.inspect(op.get_bind())
    tables = set(inspector.get_table_names())
    if "event_start" not in tables:
        return tables, set()
    return tables, {one["name"] for one in inspector.get_indexes("event_start")}
