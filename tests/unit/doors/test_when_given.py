"""Who has sent an event that is kept is asked again when it is given: what has been taken from them, they lack."""

from __future__ import annotations

import hashlib
import hmac
import json
import uuid

import pytest
from airflow import models
from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
from airflow.models import crypto
from airflow_events.api import keys, matcher, senders
from airflow_events.inbox.models import EventKept
from cryptography.fernet import Fernet
from sqlalchemy import delete, select


@pytest.fixture
def key():
    return f"key-{uuid.uuid4().hex}"


@pytest.fixture
def time_passes(monkeypatch):
    """Nothing of what was asked before is known any more."""

    def forget():
        monkeypatch.setattr(keys, "reaches", senders.Reaches())
        monkeypatch.setattr(keys, "_refused", keys._Refused())

    forget()
    return forget


@pytest.fixture(autouse=True)
def nothing_is_kept(server, time_passes):
    """Of other tests, whose senders would be asked as well."""
    server.session.execute(delete(EventKept))
    server.session.commit()


class Manager:
    """
    Airflow's auth manager, with permissions that a test takes away.

    :ivar taken: pairs of a user's name and a DAG, or None for all.
    :ivar asked: the names of those of whom it was asked.
    """

    def __init__(self, monkeypatch):
        self.taken, self.asked = set(), []
        kind = type(get_auth_manager())
        really = kind.is_authorized_dag

        def is_authorized_dag(manager, *, user, details=None, **about):
            self.asked.append(user.username)
            lacks = self.taken & {(user.username, None), (user.username, details and details.id)}
            return not lacks and really(manager, user=user, details=details, **about)

        monkeypatch.setattr(kind, "is_authorized_dag", is_authorized_dag)


@pytest.fixture
def manager(server, monkeypatch):
    return Manager(monkeypatch)


def send(server, key, payload, *, name="ada", **parameters):
    client = server.client(server.token("OP", name=name))
    answer = client.post(f"/events/keys/{key}", json=payload, params=parameters)
    assert answer.status_code == 202, answer.text
    return answer.json()["event_id"]


def begin(server, key, **more):
    wait = server.waits.add(key, **more)
    server.session.commit()
    return wait


def event_of(server, wait):
    server.session.rollback()
    return server.waits.xcoms(wait).get("return_value")


def sender_of(server, event_id):
    server.session.rollback()
    return server.session.scalar(select(EventKept.sender).where(EventKept.event_id == event_id))


def test_who_may_not_send_any_more_gives_nothing_and_is_in_nobodys_way(server, key, manager, time_passes, caplog):
    caplog.set_level("INFO")
    hers, his = send(server, key, "ada's"), send(server, key, "bob's", name="bob")
    manager.taken.add(("ada", None))
    wait, other = begin(server, key), begin(server, key)
    assert matcher.match_once() == {his: [wait.id]}
    assert (event_of(server, wait), event_of(server, other)) == ("bob's", None)
    assert f"The kept event {hers} of ada is not given to {other.id}" in caplog.text
    manager.taken.clear()
    time_passes()
    assert matcher.match_once() == {hers: [other.id]}


def test_it_goes_to_the_dags_that_are_left(server, key, manager):
    sent = send(server, key, 1)
    manager.taken.add(("ada", "red"))
    begin(server, key, dag_id="red")
    blue = begin(server, key, dag_id="blue")
    assert matcher.match_once() == {sent: [blue.id]}


def test_an_event_for_all_goes_to_those_that_begin_while_its_sender_may_send(server, key, manager, time_passes):
    before = begin(server, key)
    client = server.client(server.token("OP", name="ada"))
    answer = client.post(f"/events/keys/{key}", json=1, params={"to": "all", "ttl": 60})
    assert answer.json()["waits"] == [before.id]
    begun = begin(server, key)
    assert matcher.match_once() == {answer.json()["event_id"]: [begun.id]}
    manager.taken.add(("ada", None))
    time_passes()
    late = begin(server, key)
    assert matcher.match_once() == {}
    assert event_of(server, late) is None


def test_a_user_who_is_there_no_more_gives_nothing(server, key, monkeypatch):
    """FAB's auth manager says so of one who was deleted, or locked."""
    send(server, key, 1)

    def deserialize_user(self, token):
        raise ValueError(f"User with id {token['sub']} is not active")

    monkeypatch.setattr(type(get_auth_manager()), "deserialize_user", deserialize_user)
    wait = begin(server, key)
    assert matcher.match_once() == {}
    assert event_of(server, wait) is None


def test_where_claims_alone_may_nothing_it_counts_what_was_so_when_it_was_sent(server, key, monkeypatch):
    """Keycloak's auth manager asks with a token of the user's, and does not put it into the claims."""

    def deserialize_user(self, token):
        if "exp" in token:  # of a request
            return SimpleAuthManagerUser(username=token["sub"], role=token["role"], teams=token["teams"])
        return SimpleAuthManagerUser(username=token["sub"], role=None)

    monkeypatch.setattr(type(get_auth_manager()), "deserialize_user", deserialize_user)
    sent = send(server, key, 1)
    assert sender_of(server, sent) is None
    wait = begin(server, key)
    assert matcher.match_once() == {sent: [wait.id]}


def test_an_event_that_comes_before_it_was_asked_goes_after_those_that_were_kept(server, key):
    sent = send(server, key, "first")
    wait = begin(server, key)
    assert send(server, key, "second", name="bob")
    assert matcher.match_once() == {sent: [wait.id]}
    assert event_of(server, wait) == "first"


def test_a_sender_is_asked_once_for_all_of_its_events(server, key, manager):
    for number in range(20):
        send(server, key, number)
    manager.taken.add(("ada", None))
    manager.asked.clear()
    begin(server, key)
    for _ in range(3):
        assert matcher.match_once() == {}
    assert len(manager.asked) < 20


def test_while_nobody_can_be_asked_it_stays(server, key, monkeypatch, caplog):
    sent = send(server, key, 1)
    wait = begin(server, key)
    with monkeypatch.context() as patch:

        def is_authorized_dag(self, **about):
            raise ConnectionError("no answer")

        patch.setattr(type(get_auth_manager()), "is_authorized_dag", is_authorized_dag)
        for _ in range(3):
            assert matcher.match_once() == {}
    assert caplog.text.count("cannot be asked; the events wait") == 1 and "no answer" in caplog.text
    assert matcher.match_once() == {sent: [wait.id]}


def deliver(server, conn_id, key, payload):
    body = json.dumps(payload).encode()
    mac = hmac.new(b"a secret", body, hashlib.sha256).hexdigest()
    headers = {"Content-Type": "application/json", "X-Hub-Signature-256": f"sha256={mac}"}
    answer = server.client().post(f"/events/webhooks/{conn_id}/keys/{key}", content=body, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()["event_id"]


@pytest.mark.parametrize(
    "now", [{"dags": ["red"]}, {"keys": "another-*"}, {"dags": "shop"}, None], ids=["dags", "keys", "slip", "gone"]
)
def test_a_webhooks_connection_is_read_again(server, key, time_passes, now):
    conn_id = f"hook-{key}"
    server.webhook(conn_id, dags=["shop", "blue"])
    sent = deliver(server, conn_id, key, 1)
    if now is None:
        server.session.execute(delete(models.Connection).where(models.Connection.conn_id == conn_id))
        server.session.commit()
    else:
        server.webhook(conn_id, **now)
    wait = begin(server, key)
    assert matcher.match_once() == {}
    server.webhook(conn_id)  # which allows all, the event has not seen
    time_passes()
    begin(server, key, dag_id="red")
    assert matcher.match_once() == {sent: [wait.id]}


def test_who_sent_is_encrypted_and_with_another_key_it_stays(server, key, monkeypatch, time_passes, caplog):
    def use(*fernet_keys):
        monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", ",".join(one.decode() for one in fernet_keys))
        crypto.get_fernet.cache_clear()

    first, second = Fernet.generate_key(), Fernet.generate_key()
    try:
        use(first)
        sent = send(server, key, 1)
        assert "ada" not in sender_of(server, sent)
        use(second)
        wait = begin(server, key)
        assert matcher.match_once() == {}
        assert "[core] fernet_key another one?" in caplog.text
        use(second, first)
        time_passes()
        assert matcher.match_once() == {sent: [wait.id]}
    finally:
        monkeypatch.undo()
        crypto.get_fernet.cache_clear()
