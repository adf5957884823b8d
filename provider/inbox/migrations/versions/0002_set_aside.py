"""Events that no wait could read."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "e1a70c5b0002"
down_revision = "e1a70c5b0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Let the inbox know of them; nothing if it does, since MySQL does not undo a migration that breaks off."""
    if op.get_context().as_sql or not _is_there():
        op.add_column("event_taken", sa.Column("set_aside", sa.Text()))


def downgrade() -> None:
    """Forget them."""
    if op.get_context().as_sql or _is_there():
        op.execute("DELETE FROM event_taken WHERE set_aside IS NOT NULL")
        op.drop_column("event_taken", "set_aside")


def _is_there() -> bool:
    return any(column["name"] == "set_aside" for column in sa.inspect(op.get_bind()).get_columns("event_taken"))
