"""Airflow's metadata database, of each kind that it may be: for the tests, and for what is run at length."""

from __future__ import annotations

import contextlib

import mysql
from mysql import Mysql
from postgres import Postgres

NAMES = ("sqlite", "postgres", "mysql")


def missing(name: str) -> str | None:
    """Say in one line what this machine lacks for a database of that name, or return None."""
    return mysql.missing() if name == "mysql" else None


def serve(name: str) -> contextlib.AbstractContextManager[Postgres | Mysql | None]:
    """Return a server as a context that ends it; None for SQLite, which is a file of the deployment."""
    if name == "sqlite":
        return contextlib.nullcontext()
    return Mysql() if name == "mysql" else Postgres()
