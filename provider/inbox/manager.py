"""Makes and migrates the tables: ``airflow db migrate`` runs it, since the provider's description names it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from airflow.utils.db_manager import BaseDBManager
from airflow_events.errors import InboxNotMigrated, InboxTooNew
from airflow_events.inbox import dropping
from airflow_events.inbox.models import Base

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Connection

_HERE = Path(__file__).resolve().parent


class InboxDBManager(BaseDBManager):
    """
    The DB manager of the inbox.

    The tables have one way into being, the migrations, so that what is tested is what everybody has. It works in
    the database of its session, and ends the session's transaction before it changes a table, since what an open
    transaction has read would hold up the change.
    """

    metadata = Base.metadata
    version_table_name = dropping.VERSION_TABLE
    migration_dir = str(_HERE / "migrations")
    alembic_file = str(_HERE / "alembic.ini")
    supports_table_dropping = True
    # Of each release with a migration the last, for ``--to-version``. The first edition had no tables.
    revision_heads_map = {"0.1.0": "base", "0.2.0": "e1a70c5b0011"}  # noqa: RUF012 (as Airflow declares it)

    def get_alembic_config(self) -> Config:
        """Say where the migrations are, and for which database."""
        from alembic.config import Config

        config = Config(self.alembic_file)
        config.set_main_option("script_location", self.migration_dir.replace("%", "%%"))
        config.attributes["engine"] = self.session.get_bind().engine
        return config

    def check(self) -> None:
        """
        Check that the tables have the form that this version of the package needs.

        :raises InboxNotMigrated: they have not; `InboxTooNew` if a later version has migrated them.
        """
        found, known = self._revisions()
        if found != known[0]:
            raise InboxNotMigrated(found, known[0])

    def create_db_from_orm(self) -> None:
        """Make the tables, by the migrations."""
        self.upgradedb()

    def upgradedb(
        self,
        to_revision: str | None = None,
        from_revision: str | None = None,
        show_sql_only: bool = False,
        use_migration_files: bool = False,
    ) -> None:
        """
        Make the tables, or bring them to their newest form.

        Tables without a version are what a migration left that broke off, in a database that does not undo it
        (MySQL): it is run again.

        :raises InboxTooNew: a later version of the package has migrated them.
        """
        from alembic import command

        found, _ = self._revisions()
        self.session.commit()
        revision = to_revision or "head"
        if show_sql_only:
            revision = f"{from_revision or found or 'base'}:{revision}"
        command.upgrade(self.get_alembic_config(), revision, sql=show_sql_only)

    def downgrade(self, to_revision: str, from_revision: str | None = None, show_sql_only: bool = False) -> None:
        """Bring the tables back to an earlier form; ``base`` drops them, with all that is in them."""
        from alembic import command

        found, known = self._revisions()
        self.session.commit()
        revision = f"{from_revision or found or known[0]}:{to_revision}" if show_sql_only else to_revision
        command.downgrade(self.get_alembic_config(), revision, sql=show_sql_only)

    def drop_tables(self, connection: Connection) -> None:
        """Drop the tables and their version, if they are there."""
        dropping.drop(connection)

    def _revisions(self) -> tuple[str | None, list[str]]:
        """
        Return the revision of the tables, None if there are none, and those that are known, the latest first.

        :raises InboxTooNew: that of the tables is not known.
        """
        found: str | None = self.get_current_revision()
        known = [one.revision for one in self.get_script_object().walk_revisions()]
        if found is not None and found not in known:
            raise InboxTooNew(found, known[0])
        return found, known
