"""
Whether the tables are there, which each API server asks at its start.

Airflow's components start without a check of their own. Where nobody can run ``airflow db migrate``, the option
``[events] migrate_on_start`` lets the API server migrate the tables of the inbox, and those alone.
"""

from __future__ import annotations

import logging

from airflow.utils.db import DBLocks, create_global_lock
from airflow.utils.session import create_session
from airflow_events import settings
from airflow_events.errors import InboxNotMigrated, InboxTooNew
from airflow_events.inbox.manager import InboxDBManager

log = logging.getLogger(__name__)

_PATIENCE = 30
"""For how many seconds somebody else may migrate; who has waited in vain asks again later."""


def check_or_migrate() -> None:
    """
    Check that the tables have the form that this version of the package needs, and see to it if that is allowed.

    Of several processes that migrate at once, one does it, and the others wait for it: they hold the lock that
    ``airflow db migrate`` holds, which SQLite does not have.

    :raises InboxNotMigrated: they have not, and the option does not say to migrate; `InboxTooNew` if a later
        version has migrated them, whatever the option says.
    """
    with create_session(scoped=False) as session:
        manager = InboxDBManager(session)
        try:
            manager.check()
            return
        except InboxTooNew:
            raise
        except InboxNotMigrated as problem:
            if not settings.migrate_on_start():
                raise
            found, wanted = problem.found, problem.wanted
        session.commit()
        # Airflow hands its database the number as it is: MySQL takes seconds, PostgreSQL milliseconds.
        patience = _PATIENCE if session.get_bind().dialect.name == "mysql" else _PATIENCE * 1000
        with create_global_lock(session, DBLocks.MIGRATIONS, lock_timeout=patience):
            manager.upgradedb()
        log.info("The tables of the inbox were migrated from revision %s to %s", found, wanted)
