"""What the API server does with what triggerers ask: who may, what fits, and that it never has too much to do."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from airflow_events import inbox_token
from airflow_events.api import inbox_routes
from airflow_events.api.app import create_app
from airflow_events.inbox.entries import Answer, Begin, End, Finish, Record, Status, Stored, answer_of, as_json
from airflow_events.provider_info import VERSION
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DataError, DBAPIError

INBOX = "/events/inbox"

pytestmark = pytest.mark.usefixtures("secret")


@pytest.fixture
def app():
    """As Airflow's API server mounts it."""
    airflow = FastAPI()
    airflow.mount("/events", create_app())
    return airflow


@pytest.fixture
def client(app):
    return TestClient(
        app, headers={"Authorization": f"Bearer {inbox_token.sign()}"}, raise_server_exceptions=False
    )


def done(entries):
    return [Answer(Status.DONE, message=entry.ti) for entry in entries]


def asked(*entries):
    return {"entries": [as_json(entry) for entry in entries]}


def test_a_batch_comes_to_the_inbox_as_it_was_asked_and_its_answers_go_back(client, carries_out):
    entries = [
        Begin("a", listener="L", rendered={"x": [1]}, timeout=3.5, address="ff"),
        Record("b", 2, generation=3, event='"\u00e9"', end=End(xcoms={"k": 1}, outlets=({"name": "n"},))),
        Finish("c", end=End("skipped")),
    ]
    answers = [
        Answer(
            Status.DONE, generation=4, deadline="2030-01-01T00:00:00+00:00", stored=Stored("id", "recorded", "1")
        ),
        Answer(Status.TAKEN),
        Answer(Status.INVALID, "\u00e9"),
    ]
    came = []
    carries_out(lambda entries: came.extend(entries) or answers)
    response = client.post(INBOX, json=asked(*entries))
    assert response.status_code == 200
    assert came == entries
    assert response.json()["version"] == VERSION
    assert [answer_of(one) for one in response.json()["answers"]] == answers


def test_nobody_gets_in_without_a_token(client, carries_out):
    carries_out(lambda entries: pytest.fail("it was carried out"))
    del client.headers["Authorization"]
    for method in ("GET", "POST"):
        for header, reason in (
            (None, "no token in the header"),
            ("", "no token in the header"),
            ("Basic dTpw", "no token in the header"),
            ("Bearer", "no token for the inbox"),
            ("Bearer x.y.z", "no token for the inbox"),
        ):
            headers = {} if header is None else {"Authorization": header}
            response = client.request(method, INBOX, headers=headers, content="{")
            assert response.status_code == 401
            assert reason in response.json()["detail"]
            assert response.headers["WWW-Authenticate"] == "Bearer"


def test_one_of_another_deployment(client, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_SECRET", "another")
    inbox_token.keys.cache_clear()
    response = client.post(INBOX, json=asked(Begin("a")))
    assert response.status_code == 401
    assert "another key" in response.json()["detail"]


def test_an_api_server_without_a_key_says_what_to_set(client, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_SECRET", "")
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", "")
    inbox_token.keys.cache_clear()
    response = client.post(INBOX, json=asked(Begin("a")))
    assert response.status_code == 503
    assert "[core] fernet_key" in response.json()["detail"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{", "the body is not valid JSON"),
        ("[" * 100_000, "the body is not valid JSON"),
        ('{"entries": [NaN]}', "the body is not valid JSON"),
        ("[]", "the body is not"),
        ("{}", "the body is not"),
        ('{"entries": {}}', "the body is not"),
        ('{"entries": [1]}', "entry 0 cannot be read"),
        ('{"entries": [null]}', "entry 0 cannot be read"),
        ('{"entries": ["ab"]}', "entry 0 cannot be read"),
        (
            json.dumps({"entries": [as_json(Begin("a")), {"operation": "dance"}]}),
            "entry 1 .*operation is not one of",
        ),
        (json.dumps({"entries": [{"operation": "begin"}]}), "entry 0 .*missing .*'ti'"),
        (json.dumps({"entries": [{"operation": "begin", "ti": "a", "later": 1}]}), "entry 0 .*Begin has no later"),
        (json.dumps({"entries": [{"operation": "finish", "ti": "a", "end": 1}]}), "entry 0 cannot be read"),
        (json.dumps({"entries": [{"operation": "finish", "ti": "a", "end": {"outlets": 1}}]}), "entry 0 cannot"),
    ],
    ids=range(14),
)
def test_what_cannot_be_read(client, carries_out, body, reason):
    carries_out(lambda entries: pytest.fail("it was carried out"))
    response = client.post(INBOX, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert re.search(reason, response.json()["detail"])


def test_too_many_and_too_much(client, carries_out, monkeypatch):
    carries_out(done)
    assert client.post(INBOX, json=asked(*[Begin("a")] * 1000)).status_code == 200
    response = client.post(INBOX, json=asked(*[Begin("a")] * 1001))
    assert response.status_code == 413
    assert "1001 entries" in response.json()["detail"]
    assert client.post(INBOX, json=asked(Begin("a", call="x" * 300_000))).status_code == 200, "more than an event"
    monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_MAX_BODY", "1000")
    response = client.post(INBOX, json=asked(Begin("a", call="x" * 1000)))
    assert response.status_code == 413
    assert "1000 bytes ([events] inbox_max_body)" in response.json()["detail"]


def test_it_is_not_in_the_public_description():
    assert not any("inbox" in path for path in create_app().openapi()["paths"])


def test_the_database_is_away(client, carries_out):
    def raise_it(entries):
        with create_engine("postgresql+psycopg2://nobody@127.0.0.1:1/none").connect():
            pass

    carries_out(raise_it)
    response = client.post(INBOX, json=asked(Begin("a")))
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "2"


@pytest.mark.parametrize("what", ["1 FROM event_missing", "missing FROM dag_run"])
def test_the_tables_are_not_there(client, carries_out, engine, what):
    def raise_it(entries):
        with engine.connect() as connection:
            connection.execute(text(f"SELECT {what}"))

    carries_out(raise_it)
    response = client.post(INBOX, json=asked(Begin("a")))
    assert response.status_code == 503
    assert "airflow db migrate" in response.json()["detail"]
    assert response.headers["Retry-After"] == "10"


def test_what_else_the_database_refuses_is_not_taken_for_missing_tables(client, carries_out, engine):
    def raise_it(entries):
        with engine.connect() as connection:
            connection.execute(text("SELEKT 1"))

    with pytest.raises(DBAPIError):
        raise_it([])
    carries_out(raise_it)
    assert "migrate" not in client.post(INBOX, json=asked(Begin("a"))).json()["detail"]


def test_what_the_database_refuses_of_one_does_not_hold_up_the_others(client, carries_out):
    def carry_out(entries):
        if any(entry.ti == "b" for entry in entries):
            raise DataError("INSERT", {}, ValueError("value too long for type character varying(512)"))
        return done(entries)

    carries_out(carry_out)
    answers = client.post(INBOX, json=asked(Begin("a"), Begin("b"), Begin("c"))).json()["answers"]
    assert [answer["status"] for answer in answers] == ["done", "invalid", "done"]
    assert answers[1]["message"] == "the database refuses it: value too long for type character varying(512)"


def test_it_says_which_tables_there_are(client, database):
    assert client.get(INBOX).json() == {"version": VERSION, "tables": ""}
    head = database()
    assert client.get(INBOX).json() == {"version": VERSION, "tables": head}


class Batches:
    """Batches that the inbox has begun; they end when the test says so."""

    def __init__(self):
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Event()
        self.now = self.most = 0
        self._lock = threading.Lock()

    def carry_out(self, entries):
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.begun.release()
        self.may_end.wait(30)
        with self._lock:
            self.now -= 1
        return done(entries)


async def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_it_never_does_more_than_two_batches_and_lets_few_wait(app, client, carries_out):
    batches = Batches()
    carries_out(batches.carry_out)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://api", headers=client.headers) as asker:
        held = [asyncio.create_task(asker.post(INBOX, json=asked(Begin(str(number))))) for number in range(10)]
        for _ in range(2):
            await asyncio.to_thread(batches.begun.acquire, timeout=30)
        await until(lambda: not inbox_routes._room._value)
        refused = await asker.post(INBOX, json=asked(Begin("too many")))
        assert refused.status_code == 503
        assert refused.headers["Retry-After"] == "1"
        assert "send the same again" in refused.json()["detail"]
        assert (await asker.get(f"{INBOX}/nothing")).status_code == 404, "the event loop goes on"
        batches.may_end.set()
        for number, response in enumerate(await asyncio.gather(*held)):
            assert response.json()["answers"] == [{"status": "done", "message": str(number)}]
        assert batches.most == 2
        assert (await asker.post(INBOX, json=asked(Begin("later")))).status_code == 200


async def test_a_batch_that_waited_for_longer_than_its_asker_is_not_begun(app, client, carries_out, monkeypatch):
    monkeypatch.setattr(inbox_routes, "_LONGEST_TURN", 0.2)
    batches = Batches()
    carries_out(batches.carry_out)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://api", headers=client.headers) as asker:
        held = [asyncio.create_task(asker.post(INBOX, json=asked(Begin("a")))) for _ in range(3)]
        for _ in range(2):
            await asyncio.to_thread(batches.begun.acquire, timeout=30)
        await asyncio.sleep(0.3)
        batches.may_end.set()
        assert sorted(response.status_code for response in await asyncio.gather(*held)) == [200, 200, 503]
    assert not batches.begun.acquire(blocking=False)


async def test_who_hangs_up_frees_its_place_when_its_batch_ends(app, client, carries_out):
    batches = Batches()
    carries_out(batches.carry_out)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://api", headers=client.headers) as asker:
        held = [asyncio.create_task(asker.post(INBOX, json=asked(Begin("a")))) for _ in range(10)]
        for _ in range(2):
            await asyncio.to_thread(batches.begun.acquire, timeout=30)
        await until(lambda: not inbox_routes._room._value)
        for task in held:
            task.cancel()
        await asyncio.wait(held)
        await until(lambda: inbox_routes._room._value == 8)
        assert batches.now == 2
        batches.may_end.set()
        await until(lambda: inbox_routes._room._value == 10)
        assert batches.most == 2


def test_a_big_batch_is_read_in_a_thread(client, carries_out, monkeypatch):
    names = []

    def parse(raw):
        names.append(threading.current_thread().name)
        return json.loads(raw)

    carries_out(done)
    monkeypatch.setattr(inbox_routes, "parse", parse)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: client.post(INBOX, json=asked(Begin("a"))), range(4)))
    assert len(names) == 4
    assert all(name.startswith("airflow-events-inbox") for name in names)
