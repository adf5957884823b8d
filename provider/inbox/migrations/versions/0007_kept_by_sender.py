"""How many events are kept for a sender is asked by an index."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "e1a70c5b0007"
down_revision = "e1a70c5b0006"
branch_labels = None
depends_on = None

INDEX = "ix_event_kept_sent_by"


def upgrade() -> None:
    """Make it, unless it is there, since MySQL does not undo a migration that breaks off."""
    if INDEX not in _there():
        op.create_index(INDEX, "event_kept", ["sent_by"])


def downgrade() -> None:
    """Drop it, if it is there."""
    if op.get_context().as_sql or INDEX in _there():
        op.drop_index(INDEX, "event_kept")


def _there() -> set[str | None]:
    if op.get_context().as_sql:
        return set()
    return {one["name"] for one in sa.inspect(op.get_bind()).get_indexes("event_kept")}
