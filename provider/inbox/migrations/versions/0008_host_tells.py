"""A host tells what is wrong with its sources, and where its log is."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "e1a70c5b0008"
down_revision = "e1a70c5b0007"
branch_labels = None
depends_on = None

COLUMNS: dict[str, Any] = {"log_of": sa.Text(), "trouble": sa.Text()}


def upgrade() -> None:
    """Make what is not there, since MySQL does not undo a migration that breaks off."""
    columns = _there()
    for name, kind in COLUMNS.items():
        if name not in columns:
            op.add_column("event_host", sa.Column(name, kind, nullable=True))


def downgrade() -> None:
    """Drop what is there."""
    columns = _there()
    for name in COLUMNS:
        if op.get_context().as_sql or name in columns:
            op.drop_column("event_host", name)


def _there() -> set[str]:
    if op.get_context().as_sql:
        return set()
    return {column["name"] for column in sa.inspect(op.get_bind()).get_columns("event_host")}
