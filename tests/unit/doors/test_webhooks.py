"""Webhooks: what a replay does, and connections that cannot be read."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
import uuid

import pytest
import time_machine


@pytest.fixture
def key():
    return f"deploy-{uuid.uuid4().hex}"


def mac(body, secret=b"a secret"):
    return hmac.new(secret, body, hashlib.sha256).hexdigest()


def github(server, conn_id, key, payload, *, ttl="", **headers):
    body = json.dumps(payload).encode()
    signed = {"Content-Type": "application/json", "X-Hub-Signature-256": f"sha256={mac(body)}", **headers}
    return server.client().post(f"/events/webhooks/{conn_id}/keys/{key}{ttl}", content=body, headers=signed)


def stripe(server, conn_id, key, payload):
    body, at = json.dumps(payload).encode(), str(int(time.time())).encode()
    signed = {"Content-Type": "application/json"}
    signed["Stripe-Signature"] = f"t={at.decode()},v1={mac(at + b'.' + body)}"
    return server.client().post(f"/events/webhooks/{conn_id}/keys/{key}", content=body, headers=signed)


@pytest.mark.parametrize("ids", [("d1", "d2", None), (None, "d1", None), ("d1", "d1", "d1")])
def test_a_delivery_of_github_that_is_replayed_counts_once_whatever_its_id(server, key, ids):
    """The id is not signed: whoever has seen a delivery can send it again under another."""
    server.webhook("github")
    first, *others = (
        github(server, "github", key, {"ref": "main"}, **({} if id_ is None else {"X-GitHub-Delivery": id_}))
        for id_ in ids
    )
    assert first.status_code == 202
    assert [each.json() for each in others] == [first.json()] * 2
    other = github(server, "github", key, {"ref": "another"}, **{"X-GitHub-Delivery": "d1"})
    assert other.status_code == 202 and other.json()["event_id"] != first.json()["event_id"]


def test_it_is_remembered_for_a_week_however_short_the_event_is_kept(server, key):
    """The address is not signed either: neither its ttl, nor the key."""
    server.webhook("github")
    first = github(server, "github", key, 1, ttl="?ttl=1").json()["event_id"]
    with time_machine.travel(time.time() + 6 * 86400):
        assert github(server, "github", key, 1).json()["event_id"] == first
    with time_machine.travel(time.time() + 8 * 86400):
        assert github(server, "github", key, 1).json()["event_id"] != first


def test_one_of_stripe_is_known_by_its_id_or_else_its_content(server, key):
    server.webhook("stripe", webhook="stripe")
    for payload in ({"id": "evt_1", "type": "paid"}, {"type": "paid"}, {"id": 7}, ["evt_1"]):
        first, again = (stripe(server, "stripe", key, payload) for _ in range(2))
        assert first.status_code == 202 and first.json() == again.json()
    # Its body counts how many have not taken it yet.
    first, again = (stripe(server, "stripe", key, {"id": "evt_2", "pending_webhooks": n}) for n in (2, 1))
    assert first.status_code == again.status_code == 202 and first.json() == again.json()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"dags": "one"}, "airflow_events.dags: Input should be a valid list"),
        ({"dags": [1]}, "airflow_events.dags.0: Input should be a valid string"),
        ({"dags": {"one": 1}}, "airflow_events.dags: "),
        ({"dag": ["one"]}, "airflow_events.dag: Extra inputs are not permitted"),
        ({"events": "push"}, "airflow_events.events: "),
        ({"keys": ["deploy-*"]}, "airflow_events.keys: "),
        ({"keys": None}, "airflow_events.keys: "),
    ],
    ids=repr,
)
def test_a_connection_that_cannot_be_read_is_refused_by_name(server, key, extra, said, caplog):
    wait = server.waits.add(key, dag_id="shop")
    server.webhook("unread", **extra)
    answer = github(server, "unread", key, 1)
    assert answer.status_code == 403
    assert f"the extra of the connection unread cannot be read: {said}" in answer.json()["detail"]
    assert said in caplog.text
    assert server.waits.state(wait).state == "deferred"
    # Who has not its secret learns nothing.
    body = b"1"
    headers = {"Content-Type": "application/json", "X-Hub-Signature-256": f"sha256={mac(body, b'x')}"}
    answer = server.client().post(f"/events/webhooks/unread/keys/{key}", content=body, headers=headers)
    assert (answer.status_code, answer.json()) == (403, {"detail": "the signature is not valid here"})


@pytest.mark.parametrize("extra", [{"webhook": None}, {"webhook": ["github"]}, {"webhook": "gitlab"}])
def test_one_that_is_for_no_webhooks_has_no_valid_signature(server, key, extra):
    server.webhook("none", **extra)
    assert github(server, "none", key, 1).json() == {"detail": "the signature is not valid here"}


def test_it_goes_to_the_dags_of_its_connection_and_keys_alone(server, key):
    server.webhook("of-red", dags=["red"], keys="deploy-*")
    red, shop = server.waits.add(key, dag_id="red"), server.waits.add(key, dag_id="shop")
    server.session.commit()
    assert github(server, "of-red", key, 1, ttl="?to=all").json()["waits"] == [red.id]
    assert server.waits.state(shop).state == "deferred"
    assert github(server, "of-red", "another", 1).status_code == 403
