"""How far the logs of sources are settled."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "e1a70c5b0003"
down_revision = "e1a70c5b0002"
branch_labels = None
depends_on = None

LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
DIGEST = sa.LargeBinary(32).with_variant(mysql.BINARY(32), "mysql", "mariadb")
MOMENT = sa.TIMESTAMP(timezone=True).with_variant(mysql.TIMESTAMP(fsp=6), "mysql", "mariadb")


def upgrade() -> None:
    """Make the table; nothing if it is there, since MySQL does not undo a migration that breaks off."""
    if op.get_context().as_sql or not sa.inspect(op.get_bind()).has_table("event_position"):
        op.create_table(
            "event_position",
            sa.Column("source", DIGEST, primary_key=True, nullable=False),
            sa.Column("name", sa.Text(), nullable=False),
            sa.Column("owner", sa.String(40), nullable=False),
            sa.Column("positions", LONG_TEXT, nullable=False),
            sa.Column("changed_at", MOMENT, nullable=False),
        )


def downgrade() -> None:
    """Drop it."""
    op.execute("DROP TABLE IF EXISTS event_position")
