"""Airflow's real tables and ours, empty, in each database that it can have; and the turns of the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys

import pytest
from airflow import models
from airflow.models.base import Base
from airflow.models.dagrun import DagRun
from airflow.models.log import Log
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from airflow.models.xcom import XComModel
from airflow_events.inbox import models as inbox
from airflow_events.inbox.manager import InboxDBManager
from http_waits import HttpWaits
from sqlalchemy import create_engine, delete, event
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from databases import NAMES, missing, serve

_TABLES = """
from airflow import models, settings
from airflow.models.base import Base
models.import_all_models()
Base.metadata.create_all(settings.engine)
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of what only asks the tables of the inbox, MySQL is a variant: `_compiles_for_mysql` has looked at it."""
    for item in items:
        on_mysql = hasattr(item, "callspec") and item.callspec.params.get("engine") == "mysql"
        if on_mysql and "inbox" not in item.path.parts:
            item.add_marker(pytest.mark.release)


@pytest.fixture(scope="session", params=NAMES)
def engine(request, tmp_path_factory):
    with contextlib.ExitStack() as stack:
        if problem := missing(request.param):
            pytest.skip(problem)
        server = stack.enter_context(serve(request.param))
        url = server.url if server else f"sqlite:///{tmp_path_factory.mktemp('database')}/airflow.db"
        if request.param == "mysql":
            # How long its keys may be hangs on a collation that Airflow chooses as it is imported.
            environment = {**os.environ, "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": url}
            subprocess.run([sys.executable, "-c", _TABLES], env=environment, check=True)
            engine = create_engine(url, isolation_level="READ COMMITTED")  # as Airflow has it there
        else:
            engine = create_engine(url)
            models.import_all_models()
            Base.metadata.create_all(engine)
        with Session(engine) as session:
            InboxDBManager(session).upgradedb()
        event.listen(engine, "before_execute", _compiles_for_mysql)
        yield engine
        engine.dispose()


@pytest.fixture
def session(engine):
    """A session in a transaction that is never committed."""
    with engine.connect() as connection, connection.begin() as transaction, Session(connection) as session:
        yield session
        session.close()
        transaction.rollback()


@pytest.fixture
def database(engine):
    """The same database, for what Alembic asks and does: that has its own words in each."""
    engine = create_engine(engine.url, poolclass=NullPool)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def as_airflow_has_it(connection, _):
            connection.execute("PRAGMA foreign_keys = ON")

    return engine


@pytest.fixture
def manager(database):
    """The DB manager of the inbox. Whatever a test does with it, our tables are there afterwards, and empty."""
    with Session(database) as session:
        yield InboxDBManager(session)
    with Session(database) as session:
        manager = InboxDBManager(session)
        with database.begin() as connection:
            manager.drop_tables(connection)
        manager.upgradedb()


def _compiles_for_mysql(connection, statement, *_):
    """Whatever a test asks of a database, MySQL has words for, also where no test asks a MySQL server."""
    of_one_database = getattr(statement, "_post_values_clause", None) is not None  # Airflow's own ON CONFLICT
    if hasattr(statement, "compile") and not of_one_database:
        said = str(statement.compile(dialect=mysql.dialect()))
        assert not any(word in said.upper() for word in (" RETURNING ", "::", " ILIKE ", " NULLS ")), said


@pytest.fixture
async def turn():
    """The number of the event loop's turn, which shows what was done in one piece."""
    loop, number = asyncio.get_running_loop(), 0

    def begin():
        nonlocal number, handle
        number += 1
        handle = loop.call_soon(begin)

    handle = loop.call_soon(begin)
    yield lambda: number
    handle.cancel()


@pytest.fixture
def http(session, monkeypatch):
    """Waits for HTTP events."""
    return HttpWaits(session, monkeypatch)


@pytest.fixture
def committed(engine, monkeypatch):
    """What `in_transaction` works on, with commits, and a session that sees them; nothing is left of it."""

    @contextlib.contextmanager
    def create_session(scoped=False):
        with Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    monkeypatch.setattr("airflow_events.inbox.database.create_session", create_session)
    with Session(engine) as session:
        yield session
        session.rollback()
        tables = [inbox.EventWait, inbox.EventKept, inbox.EventSent, XComModel, TaskInstance, DagRun, Trigger, Log]
        for table in [*tables, models.variable.Variable]:
            session.execute(delete(table))
        session.commit()


@pytest.fixture
def http_committed(committed, monkeypatch):
    """Waits for HTTP events that other transactions see, once they are committed."""
    return HttpWaits(committed, monkeypatch)
