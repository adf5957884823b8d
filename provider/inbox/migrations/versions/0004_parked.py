"""Waits that go on without a trigger."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "e1a70c5b0004"
down_revision = "e1a70c5b0003"
branch_labels = None
depends_on = None

LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
MOMENT = sa.TIMESTAMP(timezone=True).with_variant(mysql.TIMESTAMP(fsp=6), "mysql", "mariadb")
COLUMNS = (("parked", LONG_TEXT), ("wake_at", MOMENT), ("wake", LONG_TEXT))
INDEX = "event_wait_wake_at"


def upgrade() -> None:
    """Add the columns and the index, as far as they are not there: MySQL undoes no migration that breaks off."""
    there, indexes = _there()
    for name, kind in COLUMNS:
        if name not in there:
            op.add_column("event_wait", sa.Column(name, kind, nullable=True))
    if INDEX not in indexes:
        op.create_index(INDEX, "event_wait", ["wake_at"])


def downgrade() -> None:
    """Drop them. Waits that are parked then have to be cleared."""
    there, indexes = _there()
    as_sql = op.get_context().as_sql
    if as_sql or INDEX in indexes:
        op.drop_index(INDEX, "event_wait")
    for name, _ in COLUMNS:
        if as_sql or name in there:
            op.drop_column("event_wait", name)


def _there() -> tuple[set[str], set[str]]:
    """Return the names of the columns and of the indexes that the table has."""
    if op.get_context().as_sql:
        return set(), set()
    table = sa.inspect(op.get_bind())
    columns = {column["name"] for column in table.get_columns("event_wait")}
    return columns, {str(index["name"]) for index in table.get_indexes("event_wait")}
