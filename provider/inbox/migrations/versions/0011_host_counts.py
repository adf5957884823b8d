"""A host tells for how many waits it polls."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "e1a70c5b0011"
down_revision = "e1a70c5b0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make room for it, unless it is there, since MySQL does not undo a migration that breaks off."""
    if op.get_context().as_sql or not _is_there():
        op.add_column("event_host", sa.Column("waits", sa.Integer()))


def downgrade() -> None:
    """Forget it."""
    if op.get_context().as_sql or _is_there():
        op.drop_column("event_host", "waits")


def _is_there() -> bool:
    return any(column["name"] == "waits" for column in sa.inspect(op.get_bind()).get_columns("event_host"))
