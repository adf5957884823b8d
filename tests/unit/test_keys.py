"""Events for a key for which nobody waits yet, against Airflow's real tables."""

from __future__ import annotations

import contextlib
import logging
from datetime import timedelta

import pytest
from airflow.models.variable import Variable
from airflow_events.api import keys, matcher
from airflow_events.api.refusals import NoSuchWait, Unfit
from sqlalchemy import func, select, update


def send(session, key, payload, **kwargs):
    return keys.send(session, key, payload, by="ada", dags=None, **kwargs)


def kept(session):
    where = Variable.key.startswith("airflow_events.kept.")
    return session.scalar(select(func.count()).select_from(Variable).where(where))


@pytest.mark.parametrize("key", ["order-1", "a%b_c/d", "größe", "注文", "🎉"])
def test_it_is_kept_and_the_same_again_is_the_same(session, key):
    receipt = send(session, key, {"n": 1}, idempotency_key="k")
    assert (receipt.status, receipt.waits) == ("kept", [])
    assert send(session, key, {"n": 1}, idempotency_key="k") == receipt
    with pytest.raises(Unfit, match="another payload"):
        send(session, key, {"n": 2}, idempotency_key="k")
    assert kept(session) == 1
    assert send(session, key, {"n": 1}).event_id != receipt.event_id
    assert kept(session) == 2
    assert keys.match(session, key) == {}
    assert keys.wanted(session) == []
    assert kept(session) == 2


def test_what_has_lapsed_is_dropped(session):
    for payload in range(3):
        send(session, f"key{payload}", payload, ttl=timedelta(seconds=60), idempotency_key="k")
    session.execute(update(Variable).values(description="until 2020-01-01T00:00:00.000000+00:00"))
    send(session, "key0", "anew", idempotency_key="k")
    assert kept(session) == 3  # of its own key it dropped what had lapsed
    keys.tidy(session)
    assert kept(session) == 1


def test_for_all_without_a_time_to_live_nothing_is_kept(session):
    with pytest.raises(NoSuchWait), session.begin_nested():
        send(session, "nobody", 1, to="all")
    assert kept(session) == 0
    assert send(session, "nobody", 1, to="all", ttl=timedelta(seconds=60)).status == "kept"
    assert keys.match(session, "nobody") == {}


@pytest.mark.parametrize("value", ["no JSON", "{}", "null", '{"from": "another version"}'])
def test_one_that_cannot_be_read_holds_up_no_other_and_is_named_in_the_log(session, value, caplog):
    send(session, "key", 1)
    broken = session.scalars(select(Variable)).one()
    broken.set_val(value)
    session.flush()
    other = send(session, "key", 2)
    with caplog.at_level(logging.ERROR):
        assert keys.match(session, "key") == {}
        assert keys.wanted(session) == []
    assert other.status == "kept"
    assert kept(session) == 2
    assert broken.key in caplog.text


def test_a_key_that_cannot_be_matched_holds_up_no_other(monkeypatch):
    """A match that fails is made to, since none is known that does."""
    asked = []

    def match(session, key):
        asked.append(key)
        if key == "broken":
            raise ValueError("no")
        return {f"event for {key}": [key]}

    monkeypatch.setattr(keys, "wanted", lambda session: ["first", "broken", "last"])
    monkeypatch.setattr(keys, "match", match)
    monkeypatch.setattr(matcher, "in_transaction", lambda work: work(contextlib.nullcontext()))
    with pytest.raises(RuntimeError, match="'broken'"):
        matcher.match_once()
    assert asked == ["first", "broken", "last"]
