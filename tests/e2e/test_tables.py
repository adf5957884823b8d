"""Airflow's own commands make, check and drop our tables too, and an API server makes them where it may."""

from __future__ import annotations

import contextlib
from datetime import datetime, timezone

import pytest
from airflow_events.inbox.models import Base, EventSent
from sqlalchemy import create_engine, func, insert, inspect, select

from databases import NAMES, missing, serve
from deployment import Deployment, until

MANAGER = "airflow_events.inbox.manager.InboxDBManager"
NOW = datetime.now(timezone.utc)
OURS = {*Base.metadata.tables, "alembic_version_events"}


# PostgreSQL is what Airflow is installed with; the migrations alone are tried on each (tests/unit/inbox).
DATABASES = [pytest.param(name, marks=() if name == "postgres" else pytest.mark.release) for name in NAMES]


@pytest.fixture(params=DATABASES)
def deployment(request, tmp_path):
    """An Airflow whose database is empty."""
    with contextlib.ExitStack() as stack:
        if problem := missing(request.param):
            pytest.skip(problem)
        server = stack.enter_context(serve(request.param))
        url = server.url if server else None
        # Nobody has to list the manager; the command that is for one manager wants it.
        settings = {"database.external_db_managers": MANAGER}
        yield stack.enter_context(Deployment(tmp_path / "airflow", database=url, settings=settings))


@pytest.fixture
def terminal(deployment, terminal_of):
    """Run its ``airflow`` commands, once it is prepared."""
    deployment.prepare()
    with terminal_of(deployment) as command:
        yield command


@pytest.fixture
def database(deployment):
    engine = create_engine(deployment.database or f"sqlite:///{deployment.home}/airflow.db")
    yield engine
    engine.dispose()


def tables(database):
    return set(inspect(database).get_table_names())


def drop_ours(terminal):
    """As an Airflow has it that was migrated before this package was installed into it."""
    terminal("db-manager", "downgrade", MANAGER, "--to-version", "0.1.0", "--yes")


def check(terminal):
    terminal("db", "check-migrations", "--migration-wait-timeout", "1")


def test_airflows_commands_see_to_them(terminal, database):
    check(terminal)
    made = tables(database)
    assert made > OURS

    drop_ours(terminal)
    assert tables(database) == made - set(Base.metadata.tables)
    with pytest.raises(RuntimeError, match="unapplied migrations"):
        check(terminal)
    terminal("db", "migrate")
    check(terminal)

    with database.begin() as connection:
        connection.execute(
            insert(EventSent).values(identity=b"i" * 32, content=b"c" * 32, receipt="", expires=NOW)
        )
    terminal("db", "reset", "--yes")
    check(terminal)
    assert tables(database) == made
    with database.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(EventSent)) == 0
    terminal("db", "reset", "--yes", "--skip-init")
    assert not tables(database) & (OURS | {"task_instance"})


@pytest.mark.parametrize("deployment", ["postgres"], indirect=True)
def test_an_api_server_goes_on_without_them_and_makes_them_where_it_may(deployment, terminal, database):
    drop_ours(terminal)
    deployment.start("api-server")
    log = deployment.components["api-server"].log
    until(lambda: "set [events] migrate_on_start = True" in log.read_text(), "the API server says what is missing")
    assert deployment.answers()
    assert "event_wait" not in tables(database)
    deployment.stop()

    deployment.settings["events.migrate_on_start"] = "True"
    deployment.start("api-server")
    until(lambda: tables(database) >= OURS, "the API server has made the tables")
    until(lambda: "were migrated from revision None" in log.read_text(), "it says so")
    assert deployment.answers()
    check(terminal)
