from __future__ import annotations

import time
from datetime import date, datetime, timezone
from uuid import UUID

import pytest
from airflow_events.errors import EventUndecodable
from airflow_events.listeners.support.values import Index, Match, checked, decode


@pytest.mark.parametrize(
    ("raw", "values", "value"),
    [
        (b'{"a": [1, null]}', "json", {"a": [1, None]}),
        ("ä".encode(), "text", "ä"),
        (b"\x00\xff", "bytes", "AP8="),
        (None, "json", None),
    ],
)
def test_decode(raw, values, value):
    assert decode(raw, values, "here") == value


@pytest.mark.parametrize(
    ("raw", "values"),
    [
        (b"{", "json"),
        (b"", "json"),
        (b"NaN", "json"),
        (b"\xff", "text"),
        (b"\xff", "json"),
        (b"[" * 100_000, "json"),
    ],
)
def test_what_cannot_be_decoded_says_where(raw, values):
    with pytest.raises(EventUndecodable, match=f"the entry 7 is not {values}") as caught:
        decode(raw, values, "the entry 7")
    assert caught.value.where == "the entry 7"


@pytest.mark.parametrize("event", [{"text": "a\0b"}, {"__type": "Order"}, [2**70], {1, 2**64}, object()])
def test_what_cannot_be_stored_is_as_undecodable_as_what_cannot_be_read(event):
    with pytest.raises(EventUndecodable, match="the entry 7 is not storable: event") as caught:
        checked(event, "the entry 7")
    assert caught.value.where == "the entry 7"
    assert checked({"id": [1, None]}, "the entry 7") == {"id": [1, None]}


@pytest.mark.parametrize(
    ("wanted", "value", "matches"),
    [
        (None, 1, True),
        (None, None, True),
        ({}, 5, True),
        ({"id": 42}, {"id": 42, "other": 1}, True),
        ({"id": "42"}, {"id": 42}, True),
        ({"id": 42}, {"id": "42"}, True),
        ({"id": 42}, {"id": 42.0}, True),
        ({"id": True}, {"id": 1}, False),
        ({"id": "true"}, {"id": True}, True),
        ({"id": None}, {}, False),
        ({"id": None}, {"id": None}, True),
        ({"id": 1}, [1], False),
        ({"id": 1}, None, False),
        ({"order.id": 1}, {"order": {"id": 1}}, True),
        ({"order.id": 1}, {"order.id": 1}, True),
        ({"order.id": 1}, {"order": 1}, False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ({"a": [1, {"x": 2}]}, {"a": [1, {"x": 2}]}, True),
        ("id == `42`", {"id": 42}, True),
        ("id == `42`", {"id": 43}, False),
        ("items[?price > `10`]", {"items": [{"price": 11}]}, True),
        ("items[?price > `10`]", {"items": [{"price": 1}]}, False),
        ("count", {"count": 0}, True),
        ("flag", {"flag": False}, False),
        ("missing", {}, False),
        ("starts_with(name, 'x')", {"name": 5}, False),
        ("ceil(to_number(amount))", {"amount": "1e999"}, False),
        ({"day": "2026-03-01"}, {"day": date(2026, 3, 1)}, True),
        ({"day": "2026-03-02"}, {"day": date(2026, 3, 1)}, False),
        ({"at": "2026-03-01T12:00:00+00:00"}, {"at": datetime(2026, 3, 1, 12, tzinfo=timezone.utc)}, True),
        ({"id": str(UUID(int=7))}, {"id": UUID(int=7)}, True),
        ({"amount": "5.0"}, {"amount": 5.0}, True),  # as a template writes it
        ({"amount": "5.0"}, {"amount": 5}, True),
        ({"amount": "5"}, {"amount": 5.0}, True),
        ({"amount": "-5.0", "n": "1.0"}, {"amount": -5, "n": 1}, True),
        ({"amount": "1e+22"}, {"amount": 1e22}, True),
        ({"version": "1.0"}, {"version": "1"}, False),
        ({"version": "1"}, {"version": "1.0"}, False),
    ],
)
def test_match(wanted, value, matches):
    match = Match(wanted)
    assert match.matches(value) is matches
    index = Index()
    index.add("wait", match)
    assert list(index.find(value)) == (["wait"] if matches else [])
    index.remove("wait", match)
    index.remove("wait", match)
    assert list(index.find(value)) == []


@pytest.mark.parametrize(("wanted", "error"), [("a b", ValueError), (5, TypeError), (["a"], TypeError)])
def test_matches_that_are_none(wanted, error):
    with pytest.raises(error, match="match is"):
        Match(wanted)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("contain(name, 'x')", r"Unknown function: contain\(\)"),
        ("items[?start_with(name, 'x')] | [::2]", r"Unknown function: start_with\(\)"),
        ("state == 'paid' && {n: foo(a)}.n", r"Unknown function: foo\(\)"),
        ("starts_with(name)", r"Expected 2 arguments for function starts_with\(\), received 1"),
    ],
)
def test_a_function_that_jmespath_has_not_is_refused_and_not_waited_for(wanted, message):
    with pytest.raises(ValueError, match="match is no JMESPath expression: " + message):
        Match(wanted)


def test_a_look_up_does_not_grow_with_the_waits():
    """As a ratio in one run: 100 times the waits, and about the same time."""

    def seconds(waits):
        index = Index()
        for number in range(waits):
            index.add(number, Match({"id": number}))
        best = 9.9
        for _ in range(5):
            began = time.perf_counter()
            for number in range(200):
                assert list(index.find({"id": number % 100})) == [number % 100]
            best = min(best, time.perf_counter() - began)
        return best

    assert seconds(10_000) < 10 * seconds(100)


def test_an_event_that_no_request_to_the_inbox_takes_cannot_be_stored(monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_MAX_BODY", "200000")
    event = {"value": "x" * 150_000}
    assert checked(event, "the entry 7") == event
    for value in ("x" * 190_000, '"' * 110_000):  # each quote takes four: it stands in JSON in JSON
        with pytest.raises(
            EventUndecodable, match=r"and a request to the inbox 200,000 \(\[events\] inbox_max_body"
        ):
            checked({"value": value}, "the entry 7")
