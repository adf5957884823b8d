"""A key, Airflow's database in a file, and an API server with the inbox in it."""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import sys
import threading
import time
import types

import airflow_events.inbox
import pytest
import uvicorn
from airflow import settings
from airflow_events import inbox_token
from airflow_events.api.app import create_app
from airflow_events.inbox.entries import Answer, Status
from airflow_events.inbox.manager import InboxDBManager
from fastapi import FastAPI
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker


@pytest.fixture
def secret(monkeypatch):
    """Sign and check with this, as a process that starts with it."""

    def have(value):
        monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_SECRET", value)
        monkeypatch.setattr(inbox_token, "_signed", ("", 0.0, 0))
        inbox_token.keys.cache_clear()

    have("the secret of the tests")
    yield have
    inbox_token.keys.cache_clear()


@pytest.fixture
def carries_out(monkeypatch):
    """Let the inbox's transactions be a function."""

    def let(work):
        module = types.ModuleType("airflow_events.inbox.transactions")
        module.carry_out = work
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(airflow_events.inbox, "transactions", module, raising=False)

    return let


@pytest.fixture
def database(tmp_path, monkeypatch):
    """Airflow's, without a table; calling it makes those of the inbox, and returns their version."""
    url = f"sqlite:///{tmp_path}/airflow.db"
    engine = create_engine(url)
    monkeypatch.setattr(settings, "engine", engine)
    monkeypatch.setattr(settings, "SQL_ALCHEMY_CONN", url)
    monkeypatch.setattr(settings, "NonScopedSession", sessionmaker(engine))
    monkeypatch.setattr(settings, "Session", sessionmaker(engine))

    def make():
        with settings.NonScopedSession() as session:
            manager = InboxDBManager(session)
            manager.initdb()
            [head] = manager.get_script_object().get_heads()
        return head

    yield make
    engine.dispose()


_APP = functools.cache(create_app)


class ApiServer:
    """
    An API server with the app of this package, as Airflow mounts it, which can be unreachable.

    :ivar refusals: what the next requests get instead of an answer.
    :ivar batches: how many entries the requests had that came to the inbox.
    :ivar asked_at: when requests came, those among them that were refused.
    :ivar carry_out: the inbox's transactions; says of each entry that it is done, and its task instance.
    """

    def __init__(self, prefix="", **config):
        airflow = FastAPI()
        airflow.mount("/events", _APP())
        self._root = FastAPI()
        self._root.mount(prefix, airflow)
        self._config = config
        self._prefix = prefix
        self.refusals = []
        self.batches = []
        self.asked_at = []
        self.carry_out = lambda entries: [Answer(Status.DONE, entry.ti) for entry in entries]
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port = free.getsockname()[1]

    @property
    def url(self):
        scheme = "https" if "ssl_keyfile" in self._config else "http"
        return f"{scheme}://127.0.0.1:{self.port}{self._prefix}"

    def refuse(self, status, body="", headers=None, times=1):
        body = body if isinstance(body, str) else json.dumps(body)
        self.refusals += [(status, body, headers or {})] * times

    def carries_out(self, entries):
        self.batches.append(len(entries))
        return self.carry_out(entries)

    async def _app(self, scope, receive, send):
        if scope["type"] == "http":
            self.asked_at.append(time.monotonic())
            if self.refusals:
                status, body, headers = self.refusals.pop(0)
                headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": body.encode()})
                return
        await self._root(scope, receive, send)

    def start(self):
        config = uvicorn.Config(
            self._app,
            "127.0.0.1",
            self.port,
            interface="asgi3",
            log_level="warning",
            lifespan="off",
            **self._config,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)

    def stop(self):
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()


@pytest.fixture
def api(secret, carries_out, monkeypatch):
    """Start API servers, at the first of which triggerers ask."""
    servers = []

    def start(prefix="", **config):
        server = ApiServer(prefix, **config)
        carries_out(server.carries_out)
        monkeypatch.setenv("AIRFLOW__CORE__EXECUTION_API_SERVER_URL", f"{server.url}/execution/")
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop()
