"""That nobody's request keeps a database connection for longer than its transaction, and few are taken at once."""

from __future__ import annotations

import asyncio
import inspect
import threading
import uuid

import pytest
from airflow_events import admission, waits
from airflow_events.api.app import create_app
from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

pytestmark = pytest.mark.slow


def dependencies(dependant):
    for each in dependant.dependencies:
        yield each.call
        yield from dependencies(each)


def test_no_route_is_given_a_session_for_as_long_as_it_is_answered():
    """FastAPI ends what a dependency yields when the event loop comes to it; until then its connection is out."""
    for route in create_app().routes:
        if dependant := getattr(route, "dependant", None):
            yielding = [
                call
                for call in dependencies(dependant)
                if inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call)
            ]
            assert not yielding, f"{route.path}: {yielding}"


@pytest.fixture
def out(server):
    """How many connections are out at once, at most, while they are asked for in our threads."""
    now, most, lock = set(), [0], threading.Lock()

    def taken(connection, record, proxy):
        with lock:
            now.add(record)
            most[0] = max(most[0], len(now))

    def given_back(connection, record):
        with lock:
            now.discard(record)

    event.listen(server.engine, "checkout", taken)
    event.listen(server.engine, "checkin", given_back)
    yield most
    event.remove(server.engine, "checkout", taken)
    event.remove(server.engine, "checkin", given_back)
    assert not now


async def test_sixty_viewers_at_once_leave_connections_to_airflow(server, out):
    server.waits.add("key")
    server.session.commit()
    async with server.many(server.token("VIEWER")) as client:
        answers = await asyncio.gather(*(client.get("/events/api/waits") for _ in range(60)))
    assert {answer.status_code for answer in answers} == {200}
    # Some more for who is logged in, and in which team: each in a moment of its own.
    assert out[0] <= admission.LOOKS + 4


async def test_who_sends_does_not_wait_for_those_who_look(server, monkeypatch):
    wait, goes_on = server.waits.add("urgent"), threading.Event()
    server.session.commit()
    monkeypatch.setattr(waits, "find", lambda *args, **kwargs: goes_on.wait(60) and waits.Page([], 0, False))
    async with server.many(server.token("USER")) as client:
        looks = [asyncio.create_task(client.get("/events/api/waits")) for _ in range(20)]
        sent = await client.post("/events/keys/urgent", json=1)
        assert not any(look.done() for look in looks)
        goes_on.set()
        answers = await asyncio.gather(*looks)
    assert (sent.status_code, sent.json()["waits"]) == (200, [wait.id])
    assert {answer.status_code for answer in answers} == {200}


@pytest.mark.parametrize(
    ("role", "method", "path"), [("USER", "POST", "keys/key"), ("VIEWER", "GET", "api/waits")]
)
def test_where_airflow_has_no_connection_left_it_is_to_be_asked_again(server, monkeypatch, role, method, path):
    engine = create_engine("sqlite://", poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.01)
    monkeypatch.setattr("airflow_events.inbox.database.create_session", lambda scoped: Session(engine))
    client = server.client(server.token(role))
    with engine.connect():
        answer = client.request(method, f"/events/{path}", json=1)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")


async def test_two_hundred_tasks_that_send_at_once_leave_connections_to_airflow(server, out):
    async with server.many("the proof of no task") as client:
        address = f"/events/tasks/{uuid.uuid4()}/events"
        body = {"key": "key", "event": 1, "to": "all", "ttl": None, "name": "n"}
        answers = await asyncio.gather(*(client.post(address, json=body) for _ in range(200)))
    assert {answer.status_code for answer in answers} == {401}
    assert out[0] <= admission.CHANGES


async def test_two_hundred_webhooks_that_nobody_has_signed_leave_connections_to_airflow(server, out):
    server.webhook("github")
    headers = {"X-Hub-Signature-256": "sha256=00", "Content-Type": "application/json"}
    async with server.many("nobody") as client:
        address = "/events/webhooks/github/keys/key"
        answers = await asyncio.gather(*(client.post(address, content=b"1", headers=headers) for _ in range(200)))
    assert {answer.status_code for answer in answers} == {403}
    assert out[0] <= admission.CHANGES


@pytest.mark.parametrize("same", ["wait", "key", "nothing"])
async def test_two_hundred_senders_at_once_are_each_told_what_became_of_it(server, out, same):
    if same == "wait":
        wait = server.waits.add()
        addresses = [f"/events/dags/shop/runs/{wait.run_id}/tasks/{wait.task_id}"] * 200
    else:
        begun = [server.waits.add(f"{same}-{number if same == 'nothing' else 0}") for number in range(20)]
        addresses = [f"/events/keys/{same}-{number if same == 'nothing' else 0}" for number in range(200)]
    server.session.commit()
    async with server.many(server.token("USER")) as client:
        answers = await asyncio.gather(*(client.post(address, json=1) for address in addresses))
    said = [answer.status_code for answer in answers]
    if same == "wait":
        assert sorted(said) == [200] + [409] * 199
    else:
        assert said.count(200) == 20 and said.count(202) == 180
        assert {server.waits.state(wait).state for wait in begun} == {"success"}
        server.session.rollback()
    assert out[0] <= admission.CHANGES + 4
