"""What waits look for in Airflow's own database."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "e1a70c5b0005"
down_revision = "e1a70c5b0004"
branch_labels = None
depends_on = None

LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
MOMENT = sa.TIMESTAMP(timezone=True).with_variant(mysql.TIMESTAMP(fsp=6), "mysql", "mariadb")
COLUMNS: dict[str, Any] = {"sought": LONG_TEXT, "sought_kind": sa.String(20), "sought_since": MOMENT}
INDEX = "event_wait_sought"


def upgrade() -> None:
    """Make what is not there, since MySQL does not undo a migration that breaks off."""
    columns, indexes = _there()
    for name, kind in COLUMNS.items():
        if name not in columns:
            op.add_column("event_wait", sa.Column(name, kind, nullable=True))
    if INDEX not in indexes:
        op.create_index(INDEX, "event_wait", ["sought_kind", "phase"])


def downgrade() -> None:
    """Drop what is there."""
    columns, indexes = _there()
    as_sql = op.get_context().as_sql
    if as_sql or INDEX in indexes:
        op.drop_index(INDEX, "event_wait")
    for name in COLUMNS:
        if as_sql or name in columns:
            op.drop_column("event_wait", name)


def _there() -> tuple[set[str], set[str | None]]:
    if op.get_context().as_sql:
        return set(), set()
    inspector = sa.inspect(op.get_bind())
    columns = {column["name"] for column in inspector.get_columns("event_wait")}
    return columns, {index["name"] for index in inspector.get_indexes("event_wait")}
