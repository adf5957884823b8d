"""Every route of the app with every kind of token, from the app itself: one that nobody thought of fails here."""

from __future__ import annotations

import hashlib
import hmac
import uuid
from datetime import datetime, timedelta, timezone

import jwt
import pytest
from airflow.models.revoked_token import RevokedToken
from airflow_events import inbox_token
from airflow_events.api.callback import sign
from airflow_events.listeners.base import Wait
from in_process import OPTIONS, ROUTES

LOGGED_IN = {"nobody", "viewer", "user", "op", "admin", "user of blue"}
VIEWERS = {"viewer", "user", "op", "admin"}
EDITORS = {"user", "op", "admin"}
OF_SHOP = "dag of no team"
_WAIT = "/dags/{dag_id}/runs/{run_id}/tasks/{task_id}"
_PAGE = "/api/waits/{dag_id}/{run_id}/{task_id}/{map_index}"

MAY = {
    ("POST", _WAIT): EDITORS,
    ("POST", f"{_WAIT}/reject"): EDITORS,
    # To whose waits an event goes is another question: to those of the teams one is in.
    ("POST", "/keys/{key:path}"): {*EDITORS, "user of blue"},
    ("POST", "/callback"): {"address"},
    ("POST", "/webhooks/{conn_id}/keys/{key:path}"): {"signature"},
    # A task, with the proof in its own state store (tests/unit/inbox/over_http/test_event_hook.py).
    ("POST", "/tasks/{ti}/events"): set(),
    ("GET", "/inbox"): {"triggerer"},
    ("POST", "/inbox"): {"triggerer"},
    ("GET", "/api/waits"): {*VIEWERS, "user of blue"},
    ("GET", "/api/starts"): {*VIEWERS, "user of blue"},
    ("GET", _PAGE): VIEWERS,
    ("POST", f"{_PAGE}/forget"): EDITORS,
    ("GET", "/page/"): LOGGED_IN,
    ("GET", "/page/{name}"): LOGGED_IN,
    ("GET", "/openapi.json"): LOGGED_IN,
}

BODY = b'{"reason": "none", "entries": []}'


def test_each_route_is_thought_of():
    assert set(ROUTES) == set(MAY)


@pytest.fixture(scope="module")
def wait(server):
    """A wait of a DAG of the team red."""
    found = server.waits.add("key", dag_id="red")
    server.session.commit()
    return found


@pytest.fixture(scope="module")
def tokens(server, wait):
    """What somebody can have in hand, each as headers and parameters."""

    def bearer(token):
        return {"headers": {"Authorization": f"Bearer {token}"}}

    def altered(**claims):
        token = server.token("ADMIN")
        told = jwt.decode(token, options={"verify_signature": False})
        return {**told, **claims}, jwt.get_unverified_header(token)

    def signed(secret, **claims):
        told, header = altered(**claims)
        return jwt.encode(told, secret, algorithm="HS512", headers={"kid": header.get("kid", "x")})

    secret = OPTIONS["API_AUTH__JWT_SECRET"]
    revoked = server.token("ADMIN", name="gone")
    RevokedToken.revoke(
        jwt.decode(revoked, options={"verify_signature": False})["jti"],
        datetime.now(timezone.utc) + timedelta(hours=1),
    )
    server.webhook("conn", dags=["red"])
    mac = hmac.new(b"a secret", BODY, hashlib.sha256).hexdigest()
    of_another = hmac.new(b"another secret", BODY, hashlib.sha256).hexdigest()
    return {
        "nothing": {},
        "garbage": bearer("not.a.token"),
        "unsigned": bearer(jwt.encode(altered()[0], None, algorithm="none")),
        "of another secret": bearer(signed("x" * 64)),
        "expired": bearer(server.token("ADMIN", seconds=-600)),
        "revoked": bearer(revoked),
        "of a task": bearer(signed(secret, aud="urn:airflow.apache.org:task")),
        "basic": {"headers": {"Authorization": "Basic YWRtaW46YWRtaW4="}},
        "nobody": bearer(server.token(None)),
        "viewer": bearer(server.token("VIEWER")),
        "user": bearer(server.token("USER")),
        "op": bearer(server.token("OP")),
        "admin": bearer(server.token("ADMIN")),
        "user of blue": bearer(server.token("USER", teams=["blue"])),
        "address": {"params": {"token": sign(wait, 600)}},
        "address that has another's signature": {"params": {"token": f"{sign(wait, 600)[:-8]}AAAAAAAA"}},
        "address as a login": bearer(sign(wait, 600)),
        "login as an address": {"params": {"token": server.token("ADMIN")}},
        "triggerer": bearer(inbox_token.sign()),
        "triggerer as an address": {"params": {"token": inbox_token.sign()}},
        "signature": {"headers": {"X-Hub-Signature-256": f"sha256={mac}"}},
        "signature of another": {"headers": {"X-Hub-Signature-256": f"sha256={of_another}"}},
        "signature of nothing": {"headers": {"X-Hub-Signature-256": "sha256=", "Stripe-Signature": "t=1,v1="}},
    }


def request(server, wait, method, path, token):
    names = {
        **{name: getattr(wait, name) for name in ("dag_id", "run_id", "task_id", "map_index")},
        "key": f"key-{uuid.uuid4().hex}", "conn_id": "conn", "name": "page.js", "ti": uuid.uuid4(),
    }  # fmt: skip
    headers = {"Content-Type": "application/json", **token.get("headers", {})}
    address = f"/events{path.replace(':path', '').format(**names)}"
    return server.client().request(method, address, content=BODY, headers=headers, params=token.get("params"))


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_only_who_may_gets_in(server, wait, tokens, method, path):
    got_in = set()
    for kind, token in tokens.items():
        answer = request(server, wait, method, path, token)
        assert answer.status_code < 500, f"{kind}: {answer.text}"
        if answer.status_code not in (401, 403):
            got_in.add(kind)
    assert got_in == MAY[method, path]


def test_what_it_is_about_may_be_named_in_the_parameters_and_the_path_counts(server, wait):
    """A DAG that one may edit, in the query, opens no other."""
    blue = server.token("USER", teams=["blue"])
    for method, path in ROUTES:
        if "{dag_id}" in path:
            token = {"headers": {"Authorization": f"Bearer {blue}"}, "params": {"dag_id": "blue"}}
            assert request(server, wait, method, path, token).status_code == 403


def test_an_event_for_a_key_goes_to_the_waits_of_ones_teams_alone(server):
    key = uuid.uuid4().hex
    red, blue = (server.waits.add(key, dag_id=team) for team in ("red", "blue"))
    server.session.commit()
    sent = server.client(server.token("USER", teams=["blue"])).post(f"/events/keys/{key}?to=all", json=1)
    assert sent.json()["waits"] == [blue.id]
    shown = server.client(server.token("VIEWER", teams=["blue"])).get("/events/api/waits?stage=open&limit=200")
    assert {each["dag_id"] for each in shown.json()["waits"]} <= {"blue", "shop"}
    assert server.waits.state(red).state == "deferred"


def forged(wait):
    """Addresses that nobody made who has the secret."""
    good = sign(wait, 600)
    head, body, mac = good.split(".")
    claims = jwt.decode(good, options={"verify_signature": False})
    for secret in (
        b"",
        b"a",
        b"secret",
        OPTIONS["API__SECRET_KEY"].encode(),
        OPTIONS["API_AUTH__JWT_SECRET"].encode(),
    ):
        yield jwt.encode(claims, secret.ljust(32), algorithm="HS256")
    for algorithm in ("HS384", "HS512"):
        yield jwt.encode(claims, hashlib.sha256(b"x").digest() * 2, algorithm=algorithm)
    yield jwt.encode(claims, None, algorithm="none")
    yield from (
        f"{head}.{body}.",
        f"{head}.{body}",
        f".{body}.{mac}",
        f"{head}..{mac}",
        body,
        "..",
        "a.b.c",
        "\ud7ff",
    )
    yield f"{head}.{jwt.encode({**claims, 'wait': ['x', 'y', 'z', -1]}, b'x' * 32).split('.')[1]}.{mac}"
    yield f"{head}.{jwt.encode({**claims, 'exp': 2**40}, b'x' * 32).split('.')[1]}.{mac}"
    yield good.swapcase()
    yield good[::-1]
    yield f"{good}A"
    yield good[:-5]
    yield "A" * 5000


def test_no_forged_address_gets_in(server, wait):
    tokens = list(forged(wait))
    assert len(tokens) >= 22
    for token in tokens:
        answer = server.client().post("/events/callback", params={"token": token}, json=1)
        assert answer.status_code in (401, 403, 422), token


def test_an_address_of_no_wait_is_none(server):
    answer = server.client().post("/events/callback", params={"token": sign(Wait("a", "b", "c"), 60)}, json=1)
    assert answer.status_code == 404


def test_an_idempotency_key_is_its_senders(server):
    """Neither swallows another's event, nor reads another's answer."""
    key, headers = uuid.uuid4().hex, {"Idempotency-Key": "1"}
    clients = [server.client(server.token("USER", name=name)) for name in ("ada", "bob", "ada")]
    answers = [client.post(f"/events/keys/{key}", json=1, headers=headers).json() for client in clients]
    assert answers[0] == answers[2] != answers[1]
    narrower = server.client(server.token("USER", name="ada", teams=["blue"]))
    assert narrower.post(f"/events/keys/{key}", json=1, headers=headers).json()["event_id"] not in str(answers)
    other = narrower.post(f"/events/keys/{key}", json=2, headers=headers)
    assert other.status_code == 422


def test_what_nobody_waits_for_is_kept_up_to_a_limit(server, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__HTTP_MOST_KEPT_FOR_KEY", "2")
    client, key = server.client(server.token("USER")), uuid.uuid4().hex
    said = [client.post(f"/events/keys/{key}", json=number) for number in range(3)]
    assert [answer.status_code for answer in said] == [202, 202, 429]
    assert int(said[2].headers["retry-after"]) > 0
    assert client.post(f"/events/keys/{key}-another", json=1).status_code == 202
