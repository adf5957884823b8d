"""Of an event that is kept, who is asked whether it may still go to a wait."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "e1a70c5b0010"
down_revision = "e1a70c5b0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make room for it, unless it is there, since MySQL does not undo a migration that breaks off."""
    if op.get_context().as_sql or not _is_there():
        long_text = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
        op.add_column("event_kept", sa.Column("sender", long_text))


def downgrade() -> None:
    """Forget it: what was so as an event was sent counts again."""
    if op.get_context().as_sql or _is_there():
        op.drop_column("event_kept", "sender")


def _is_there() -> bool:
    return any(column["name"] == "sender" for column in sa.inspect(op.get_bind()).get_columns("event_kept"))
