"""What an API server does as it starts, in each state that the tables can be in."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from datetime import datetime, timezone

import airflow.settings
import pytest
from airflow_events.api import upkeep
from airflow_events.errors import InboxNotMigrated, InboxTooNew
from airflow_events.inbox.models import EventSent
from airflow_events.inbox.startup import check_or_migrate
from sqlalchemy import func, insert, select, text
from sqlalchemy.orm import sessionmaker

from deployment import until


@pytest.fixture(autouse=True)
def its_database(database, monkeypatch):
    """The database of the test is Airflow's."""
    monkeypatch.setattr(airflow.settings, "engine", database)
    monkeypatch.setattr(airflow.settings, "NonScopedSession", sessionmaker(database))


@pytest.fixture
def may_migrate(monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__MIGRATE_ON_START", "True")


def test_tables_that_are_there_are_left_as_they_are(manager):
    check_or_migrate()
    manager.check()


def test_missing_tables_are_named_with_what_to_do(manager):
    manager.downgrade("base")
    with pytest.raises(InboxNotMigrated) as raised:
        check_or_migrate()
    assert (raised.value.found, raised.value.wanted) == (None, "e1a70c5b0011")
    for word in ("are missing", "revision e1a70c5b0011", "`airflow db migrate`", "[events] migrate_on_start"):
        assert word in str(raised.value)


def test_missing_tables_are_made_where_that_is_allowed(manager, may_migrate, caplog):
    manager.downgrade("base")
    with caplog.at_level(logging.INFO):
        check_or_migrate()
    manager.check()
    assert "migrated from revision None to e1a70c5b0011" in caplog.text
    check_or_migrate()


def test_several_api_servers_may_start_at_once(database, manager, may_migrate):
    manager.downgrade("base")
    code = "from airflow_events.inbox.startup import check_or_migrate as work; input(); work()"
    url = database.url.render_as_string(hide_password=False)
    environment = {**os.environ, "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": url}
    pipe = subprocess.PIPE
    several = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=pipe, stdout=pipe, stderr=pipe)
        for _ in range(3)
    ]
    for process in several:  # each has been imported when it reads
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in several:
        said = process.communicate()
        assert process.returncode == 0, said
    manager.check()


@pytest.mark.parametrize("allowed", [False, True])
def test_tables_of_a_later_version_are_left_alone(database, manager, allowed, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__MIGRATE_ON_START", str(allowed))
    with database.begin() as connection:
        connection.execute(text("UPDATE alembic_version_events SET version_num = 'feed'"))
    with pytest.raises(InboxTooNew, match=r"of revision feed, which a later version .* install the later one"):
        check_or_migrate()


def count(database):
    with database.connect() as connection:
        return connection.scalar(select(func.count()).select_from(EventSent))


async def test_the_api_server_goes_on_without_the_tables_and_says_so_once(database, manager, monkeypatch, caplog):
    manager.downgrade("base")
    asked, forgotten = asyncio.Event(), asyncio.Event()

    def check():
        try:
            check_or_migrate()
        except InboxNotMigrated:
            checks.append(1)
            if len(checks) == 3:
                loop.call_soon_threadsafe(asked.set)
            raise

    def forget():
        loop.call_soon_threadsafe(forgotten.set)
        return forget_some()

    loop, checks, forget_some = asyncio.get_running_loop(), [], upkeep.forget
    monkeypatch.setattr(upkeep, "check_or_migrate", check)
    monkeypatch.setattr(upkeep, "forget", forget)
    monkeypatch.setattr(upkeep, "_PAUSE_IF_FAILING", 0.01)
    monkeypatch.setattr(upkeep, "_PAUSE", 0.1)
    task = asyncio.create_task(upkeep.keep_up())
    await asyncio.wait_for(asked.wait(), 30)
    assert not forgotten.is_set()
    manager.upgradedb()  # somebody runs `airflow db migrate`
    await asyncio.wait_for(forgotten.wait(), 30)
    with database.begin() as connection:
        old = datetime(2026, 1, 1, tzinfo=timezone.utc)
        row = {"identity": b"i" * 32, "content": b"c" * 32, "receipt": "", "expires": old}
        connection.execute(insert(EventSent).values(row))
    await asyncio.to_thread(until, lambda: count(database) == 0, "what is old is forgotten")
    task.cancel()
    assert [record.levelname for record in caplog.records if "cannot run" in record.getMessage()] == ["ERROR"]
    assert [record for record in caplog.records if record.name == upkeep.__name__][1:] == []
