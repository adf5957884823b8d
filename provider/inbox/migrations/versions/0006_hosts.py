"""Waits that share a trigger."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "e1a70c5b0006"
down_revision = "e1a70c5b0005"
branch_labels = None
depends_on = None

DIGEST = sa.LargeBinary(32).with_variant(mysql.BINARY(32), "mysql", "mariadb")
MOMENT = sa.TIMESTAMP(timezone=True).with_variant(mysql.TIMESTAMP(fsp=6), "mysql", "mariadb")
COLUMNS: dict[str, Any] = {"parked_try": sa.String(40), "host": DIGEST, "hosted_at": MOMENT}
INDEX = "event_wait_host"


def upgrade() -> None:
    """Make what is not there, since MySQL does not undo a migration that breaks off."""
    tables, columns, indexes = _there()
    for name, kind in COLUMNS.items():
        if name not in columns:
            op.add_column("event_wait", sa.Column(name, kind, nullable=True))
    if INDEX not in indexes:
        op.create_index(INDEX, "event_wait", ["host", "hosted_at"])
    if "event_host" not in tables:
        op.create_table(
            "event_host",
            sa.Column("host", DIGEST, primary_key=True, nullable=False),
            sa.Column("trigger_id", sa.Integer(), nullable=True),
        )


def downgrade() -> None:
    """Drop what is there. Waits that are hosted then have to be cleared."""
    _, columns, indexes = _there()
    as_sql = op.get_context().as_sql
    op.execute("DROP TABLE IF EXISTS event_host")
    if as_sql or INDEX in indexes:
        op.drop_index(INDEX, "event_wait")
    for name in COLUMNS:
        if as_sql or name in columns:
            op.drop_column("event_wait", name)


def _there() -> tuple[set[str], set[str], set[str | None]]:
    if op.get_context().as_sql:
        return set(), set(), set()
    inspector = sa.inspect(op.get_bind())
    columns = {column["name"] for column in inspector.get_columns("event_wait")}
    return set(inspector.get_table_names()), columns, {one["name"] for one in inspector.get_indexes("event_wait")}
