"""The signed URLs."""

from __future__ import annotations

import hashlib

import jwt
import pytest
from airflow_events import settings
from airflow_events.api import callback
from airflow_events.api.callback import TokenExpired, TokenInvalid, callback_url, check, sign
from airflow_events.listeners.base import Wait

WAIT = Wait("dag", "manual__2026-01-01T00:00:00+00:00", "task", 3)


@pytest.fixture(autouse=True)
def configured(monkeypatch):
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example.com/prefix/")
    monkeypatch.setenv("AIRFLOW__EVENTS__CALLBACK_SECRET", "one")


def test_a_token_says_what_was_signed():
    assert check(sign(WAIT, 60)).wait == WAIT


def test_an_address_is_of_the_api_server():
    class Ti:
        dag_id, run_id = WAIT.dag_id, WAIT.run_id

    url, _, token = callback_url(Ti(), "task", map_index=3).partition("?token=")
    assert url == "https://airflow.example.com/prefix/events/callback"
    assert check(token).wait == WAIT


def test_one_that_has_expired():
    with pytest.raises(TokenExpired):
        check(sign(WAIT, -1))


def test_one_of_another_deployment(monkeypatch):
    token = sign(WAIT, 60)
    monkeypatch.setenv("AIRFLOW__EVENTS__CALLBACK_SECRET", "two")
    with pytest.raises(TokenInvalid):
        check(token)


@pytest.mark.parametrize(
    "claims", [{}, {"aud": "apis"}, {"exp": None}, {"iat": None}], ids=["not signed", "audience", "exp", "iat"]
)
def test_one_that_was_made_otherwise(claims):
    whole = {"aud": "airflow-events-callback", "iat": 1, "exp": 2**33, "wait": ["d", "r", "t", -1], **claims}
    whole = {name: value for name, value in whole.items() if value is not None}
    if claims:
        token = jwt.encode(whole, callback._secret(), algorithm="HS256")
    else:
        token = jwt.encode(whole, None, algorithm="none")
    with pytest.raises(TokenInvalid):
        check(token)


def test_the_secret_of_the_api_is_not_the_key_itself(monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__CALLBACK_SECRET", "")
    monkeypatch.setenv("AIRFLOW__API__SECRET_KEY", "of the api")
    assert settings.callback_secret() == "of the api"
    with pytest.raises(TokenInvalid):
        check(jwt.encode({"aud": "airflow-events-callback"}, "of the api" * 4, algorithm="HS256"))


@pytest.mark.parametrize("key", ["", None], ids=["empty", "not set"])
def test_without_a_secret_none_is_made_and_all_are_refused(monkeypatch, key):
    monkeypatch.setenv("AIRFLOW__EVENTS__CALLBACK_SECRET", "")
    if key is None:  # then the configuration of the Task SDK answers with the name of a default
        monkeypatch.delenv("AIRFLOW__API__SECRET_KEY", raising=False)
    else:
        monkeypatch.setenv("AIRFLOW__API__SECRET_KEY", key)
    with pytest.raises(ValueError, match="callback_secret or"):
        sign(WAIT, 60)
    claims = {"aud": "airflow-events-callback", "iat": 1, "exp": 2**33, "wait": ["d", "r", "t", -1]}
    for known in ("", "{SECRET_KEY}"):
        guessed = hashlib.sha256(f"airflow-events-callback:{known}".encode()).digest()
        with pytest.raises(TokenInvalid):
            check(jwt.encode(claims, guessed, algorithm="HS256"))
