"""The tokens with which triggerers ask the inbox."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import jwt
import pytest
import time_machine
from airflow.configuration import conf
from airflow_events import inbox_token
from airflow_events.errors import InboxKeyMissing, InboxTokenRefused
from airflow_events.inbox_token import check, sign
from cryptography.fernet import Fernet

OLD, NEW = Fernet.generate_key().decode(), Fernet.generate_key().decode()


@pytest.fixture(autouse=True)
def have(monkeypatch):
    """Have these for keys, as a process that starts with them."""

    def begin(fernet_key, secret=""):
        monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", fernet_key)
        monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_SECRET", secret)
        monkeypatch.setattr(inbox_token, "_signed", ("", 0.0, 0))
        monkeypatch.setattr(inbox_token, "_ahead", 0.0)
        inbox_token.keys.cache_clear()

    begin(OLD)
    yield begin
    inbox_token.keys.cache_clear()


def of(reason, token):
    with pytest.raises(InboxTokenRefused, match=reason) as refused:
        check(token)
    assert token not in str(refused.value) or not token


def test_a_token_says_who_signed_it():
    host, _, pid = check(sign()).rpartition(":")
    assert host and pid == str(os.getpid())


def test_it_is_used_again_for_some_minutes_and_signed_anew_long_before_it_expires():
    with time_machine.travel(time.time(), tick=False) as clock:
        first = sign()
        clock.shift(100)
        assert sign() == first
        second = sign(fresh=True)
        assert second != first
        assert sign() == second
        clock.shift(120)
        third = sign()
        assert third != second
        clock.shift(-3600)
        assert sign() != third, "the clock was set back"


def test_a_process_that_is_forked_signs_in_its_own_name(monkeypatch):
    sign()
    monkeypatch.setattr(os, "getpid", lambda: 17)
    assert check(sign()).endswith(":17")


def test_it_expires_and_clocks_may_differ_by_a_minute():
    with time_machine.travel(time.time(), tick=False) as clock:
        token = sign()
        clock.shift(300 + 59)
        assert check(token)
        clock.shift(2)
        of("expired", token)
        clock.shift(-300 - 61 - 59)
        assert check(token)
        clock.shift(-2)
        of("future", token)


def test_while_the_fernet_key_is_rotated_all_of_the_list_are_accepted_and_the_first_signs(have):
    old = sign()
    have(f"{NEW},{OLD}")
    assert check(old)
    new = sign()
    have(f" {NEW} ,")
    assert check(new)
    of("another key", old)


def test_a_secret_of_its_own_takes_the_place_of_the_fernet_key(have):
    of_fernet = sign()
    have(OLD, "a secret")
    of("another key", of_fernet)
    token = sign()
    have("", "a secret")
    assert check(token)
    have(OLD, "another")
    of("another key", token)


@pytest.mark.parametrize(
    "fernet_key",
    ["", " ", ",", "{FERNET_KEY}", "short", f"{OLD},short", OLD[:-4], "\u00e9" * 44],
    ids=["empty", "blank", "empty list", "template", "short", "one of two", "cut", "not ASCII"],
)
def test_what_is_no_fernet_key_is_refused(have, fernet_key):
    have(fernet_key)
    for refused in (sign, lambda: check("token")):
        with pytest.raises(InboxKeyMissing, match=r"\[core\] fernet_key.* \[events\] inbox_secret") as error:
            refused()
        assert not fernet_key.strip(" ,") or fernet_key not in str(error.value)


def test_the_key_that_airflow_has_by_default_is_not_its_template(have, monkeypatch):
    monkeypatch.delenv("AIRFLOW__CORE__FERNET_KEY")
    if conf.get("core", "fernet_key"):
        assert check(sign())
    else:
        with pytest.raises(InboxKeyMissing):
            sign()


WHOLE = {"aud": "airflow-events-inbox", "iat": 1, "exp": 2**33, "sub": "host:1"}


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": "airflow-events-callback"},
        {"aud": None},
        {"exp": None},
        {"iat": None},
        {"sub": None},
        {"sub": 1},
        {"iat": "x"},
        {"exp": "x"},
    ],
    ids=str,
)
def test_one_that_says_something_else(claims):
    said = {name: value for name, value in {**WHOLE, **claims}.items() if value is not None}
    of("no token for the inbox", jwt.encode(said, inbox_token.keys()[0], algorithm="HS256"))


def test_one_that_is_signed_otherwise():
    assert check(jwt.encode(WHOLE, inbox_token.keys()[0], algorithm="HS256")) == "host:1"
    of("no token", jwt.encode(WHOLE, None, algorithm="none"))
    of("no token", jwt.encode(WHOLE, inbox_token.keys()[0] * 2, algorithm="HS512"))
    of("another key", jwt.encode(WHOLE, OLD, algorithm="HS256"))
    of("another key", sign()[:-8] + "AAAAAAAA")


@pytest.mark.parametrize(
    "token", ["", ".", "..", "a.b.c", "\u00e9.\u00e9.\u00e9", "e30.e30.e30", "x" * 10_000, "\ud800"], ids=ascii
)
def test_what_is_no_token(token):
    of("no token", token)


def test_it_imports_nothing_of_the_database():
    # What Airflow's own configuration imports is Airflow's.
    code = (
        "import sys, airflow.configuration, jwt, airflow.utils.net; had = set(sys.modules)\n"
        "from airflow_events.inbox_token import sign, check\n"
        "assert check(sign())\n"
        "print([name for name in set(sys.modules) - had if name.startswith(('sqlalchemy.orm', 'airflow.models'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
