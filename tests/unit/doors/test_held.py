"""What was tried against the doors and did not get through, kept so."""

from __future__ import annotations

import asyncio
import gzip

import pytest
from airflow_events.errors import EventUndecodable
from in_process import ROUTES


async def test_three_hundred_bodies_that_do_not_end_hold_up_nobody(server):
    """They have neither a thread nor a connection, whoever sends them."""
    wait = server.waits.add()
    server.session.commit()
    go_on = asyncio.Event()
    begun = []

    async def slowly():
        begun.append(1)
        yield b"["
        await go_on.wait()
        yield b"]"

    async with server.many(server.token("USER")) as client:
        address = f"/events/dags/{wait.dag_id}/runs/{wait.run_id}/tasks/{wait.task_id}"
        headers = {"Content-Type": "application/json"}
        slow = [asyncio.create_task(client.post(address, content=slowly(), headers=headers)) for _ in range(300)]
        while len(begun) < 300:
            await asyncio.sleep(0.01)
        assert server.engine.pool.checkedout() == 0
        assert (await client.post(address, json="quick")).status_code == 200
        assert not any(task.done() for task in slow)
        go_on.set()
        assert {answer.status_code for answer in await asyncio.gather(*slow)} == {409}


def test_what_is_compressed_is_not_unpacked(server):
    bomb = gzip.compress(b"[" + b" " * 50_000_000 + b"]")
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = server.client(server.token("USER")).post("/events/keys/bomb", content=bomb, headers=headers)
    assert answer.status_code == 422


@pytest.mark.parametrize("text", ["%", "_", "\\", "%' OR '1'='1", "a%"])
def test_wildcards_of_the_database_are_letters(server, text):
    server.waits.add("key")
    server.session.commit()
    for name in ("text", "dag_id", "listener"):
        found = server.client(server.token("VIEWER")).get("/events/api/waits", params={name: text}).json()
        wanted = text in "_" and name == "text"  # which is in every name of a run
        assert bool(found["waits"]) == wanted


def test_no_answer_is_a_page_of_somebody_elses(server):
    """A reason, a name or an event with markup in it is JSON, and the page's own files run no script in it."""
    markup = "<script>alert(1)</script>"
    client = server.client(server.token("ADMIN"))
    for method, path in ROUTES:
        names = dict.fromkeys(("dag_id", "run_id", "task_id", "key", "conn_id", "name", "ti"), markup)
        address = f"/events{path.replace(':path', '').format(**names, map_index=-1)}"
        answer = client.request(method, address, json={"reason": markup} if method == "POST" else None)
        kind = answer.headers.get("content-type", "")
        if kind.startswith("text/html"):
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert markup not in answer.text
        else:
            assert kind.startswith("application/json")


def test_who_may_not_read_xcoms_sees_neither_an_event_nor_why_there_is_none(server, monkeypatch):
    token = server.token("VIEWER")
    given, rejected, failed = (server.waits.add() for _ in range(3))
    said = str(EventUndecodable("a message", "JSON", "Expecting value", b"for few eyes: a message"))
    server.waits.set(failed, state="scheduled", next_method="__fail__", next_kwargs={"traceback": [said]})
    server.session.commit()
    sender = server.client(server.token("USER"))

    def task(wait):
        return f"/events/dags/{wait.dag_id}/runs/{wait.run_id}/tasks/{wait.task_id}"

    assert sender.post(task(given), json="for few eyes: an event").status_code == 200
    assert sender.post(f"{task(rejected)}/reject", json={"reason": "for few eyes: a reason"}).status_code == 200
    viewer = server.client(token)
    pages = [f"/events/api/waits/{w.dag_id}/{w.run_id}/{w.task_id}/-1" for w in (given, rejected, failed)]
    assert [("for few eyes" in viewer.get(page).text) for page in pages] == [True] * 3
    monkeypatch.setattr("airflow_events.page.routes._may", lambda user, method, dag_id, entity: False)
    for page in pages:
        answer = viewer.get(page)
        assert answer.status_code == 200 and "for few eyes" not in answer.text


@pytest.mark.parametrize("key", ["M%FCller", "%FF", "a%ED%A0%80"])
def test_a_key_that_is_not_utf8_is_refused(server, key):
    """Else the event would be kept for a key that no wait has, and that of "Müller" and "Möller" be one."""
    answer = server.client(server.token("USER")).post(f"/events/keys/{key}", json=1)
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["path", "key"])
