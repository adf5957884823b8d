"""
An API server with the app of this package in it, in this process: Airflow's login, its tables in a SQLite file.

What needs no scheduler, triggerer or worker is tested by it in milliseconds.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from airflow import models, settings
from airflow._shared.module_loading import import_string
from airflow.api_fastapi.app import _AuthManagerState, create_auth_manager, get_auth_manager, init_auth_manager
from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
from airflow.models.base import Base
from airflow.models.dag import DagModel
from airflow.models.dagbundle import DagBundleModel
from airflow.models.team import Team, dag_bundle_team_association_table
from airflow_events import inbox_token
from airflow_events.api import keys
from airflow_events.api.app import create_app
from airflow_events.inbox.manager import InboxDBManager
from fastapi import FastAPI
from fastapi.testclient import TestClient
from http_waits import HttpWaits
from sqlalchemy import create_engine, delete, insert
from sqlalchemy.orm import Session, scoped_session, sessionmaker

OPTIONS = {
    "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
    "CORE__MULTI_TEAM": "True",
    "API__SECRET_KEY": "the secret key of the tests",
    "API__BASE_URL": "https://airflow.example.com",
    "API_AUTH__JWT_SECRET": "only-for-the-tests-and-long-enough-for-hs512-signatures-to-be-fine-0123456789",
    "EVENTS__INBOX_SECRET": "the secret of the inbox of the tests",
}
TEAMS = ("red", "blue")
"""Each has a bundle of its own name, with a DAG of its own name."""
DAGS = ("shop", *TEAMS)

ROUTES = sorted((method, route.path) for route in create_app().routes for method in route.methods)
"""Of the app, the internal ones too."""


@dataclass
class InProcess:
    """
    The API server.

    :ivar root: the app that Airflow's own would be: ours is below ``/events``.
    :ivar session: of the test's own. What is to be seen by requests has to be committed.
    """

    root: FastAPI
    engine: object
    session: Session
    waits: HttpWaits
    clients: list = field(default_factory=list)

    def client(self, token=None, **options):
        """Somebody who asks, as a program does."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return TestClient(
            self.root, base_url="http://airflow", headers=headers, raise_server_exceptions=False, **options
        )

    def many(self, token):
        """The same in an event loop, for many requests at once."""
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.root, raise_app_exceptions=False),
            base_url="http://airflow",
            headers={"Authorization": f"Bearer {token}"},
            timeout=120,
        )

    def token(self, role, *, name=None, teams=TEAMS, seconds=3600):
        """What somebody of a role logs in with; the role None may nothing."""
        user = SimpleAuthManagerUser(username=name or str(role).lower(), role=role, teams=list(teams))
        return get_auth_manager().generate_jwt(user, expiration_time_in_seconds=seconds)

    def webhook(self, conn_id, secret="a secret", **extra):
        """Add a connection that webhooks are signed by."""
        told = json.dumps({"airflow_events": {"webhook": "github", "keys": "*", **extra}})
        connection = models.Connection(conn_id=conn_id, conn_type="generic", password=secret, extra=told)
        self.session.execute(delete(models.Connection).where(models.Connection.conn_id == conn_id))
        self.session.add(connection)
        self.session.commit()


@contextlib.contextmanager
def in_process(folder: Path, **options):
    """Start one, with its database in ``folder``; nothing of it is left in this process afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        passwords = {"CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(folder / "passwords.json")}
        for name, value in {**OPTIONS, **passwords, **options}.items():
            patch.setenv(f"AIRFLOW__{name}", value)
        url = f"sqlite:///{folder}/airflow.db"
        engine = create_engine(url, connect_args={"timeout": 60, "check_same_thread": False})
        models.import_all_models()
        Base.metadata.create_all(engine)
        sessions = sessionmaker(engine, expire_on_commit=False)
        patch.setattr(settings, "engine", engine)
        patch.setattr(settings, "SQL_ALCHEMY_CONN", url)
        patch.setattr(settings, "NonScopedSession", sessions)
        patch.setattr(settings, "Session", scoped_session(sessions))
        patch.setattr(_AuthManagerState, "instance", None)
        patch.setattr(inbox_token, "_signed", ("", 0.0, 0))
        patch.setattr(keys, "_total", keys._Total())
        patch.setattr(keys, "_refused", keys._Refused())
        inbox_token.keys.cache_clear()
        DagModel.get_team_name.cache_clear()
        with sessions() as session:
            InboxDBManager(session).initdb()
            if of_logins := create_auth_manager().get_db_manager():
                import_string(of_logins)(session).initdb()
        with sessions() as session:
            _teams(session)
            root = FastAPI()
            root.mount("/events", create_app())
            init_auth_manager(root)
            yield InProcess(root, engine, session, HttpWaits(session, patch))
        engine.dispose()
    inbox_token.keys.cache_clear()


def _teams(session):
    for bundle in ("all", *TEAMS):
        session.add(DagBundleModel(name=bundle))
    for team in TEAMS:
        session.add(Team(name=team))
    session.flush()
    for team in TEAMS:
        association = {"dag_bundle_name": team, "team_name": team}
        session.execute(insert(dag_bundle_team_association_table).values(association))
    for dag_id in DAGS:
        session.add(DagModel(dag_id=dag_id, bundle_name=dag_id if dag_id in TEAMS else "all"))
    session.commit()
