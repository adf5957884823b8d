"""Airflow's real tables, empty, in each database that it can have; and the turns of the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys

import pytest
from airflow import models
from airflow.models.base import Base
from sqlalchemy import create_engine, event
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import Session

from mysql import Mysql, missing
from postgres import Postgres

_TABLES = """
from airflow import models, settings
from airflow.models.base import Base
models.import_all_models()
Base.metadata.create_all(settings.engine)
"""


@pytest.fixture(scope="session", params=["sqlite", "postgres", "mysql"])
def engine(request, tmp_path_factory):
    with contextlib.ExitStack() as stack:
        if request.param == "sqlite":
            url = f"sqlite:///{tmp_path_factory.mktemp('database')}/airflow.db"
        elif request.param == "postgres":
            url = stack.enter_context(Postgres()).url
        elif problem := missing():
            pytest.skip(problem)
        else:
            url = stack.enter_context(Mysql()).url
        if request.param == "mysql":
            # How long its keys may be hangs on a collation that Airflow chooses as it is imported.
            environment = {**os.environ, "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": url}
            subprocess.run([sys.executable, "-c", _TABLES], env=environment, check=True)
            engine = create_engine(url, isolation_level="READ COMMITTED")  # as Airflow has it there
        else:
            engine = create_engine(url)
            models.import_all_models()
            Base.metadata.create_all(engine)
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


def _compiles_for_mysql(connection, statement, *_):
    """Whatever a test asks of a database, MySQL has words for, also where no test asks a MySQL server."""
    if hasattr(statement, "compile"):
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
