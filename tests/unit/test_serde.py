from __future__ import annotations

import dataclasses
import uuid
from datetime import date, datetime, timedelta, timezone

import pendulum
import pytest
from airflow_events.errors import EventNotSerializable, UnknownOutcome
from airflow_events.listeners.serde import check, decode, encode
from airflow_events.triggers import outcome


@dataclasses.dataclass
class Order:
    number: int


class Name(str):
    pass


GOOD = [
    None,
    True,
    0,
    1.5,
    "text",
    [],
    {},
    [1, [2, {"a": None}]],
    {"a": {"b": [1, 2]}},
    (1, (2, "x")),
    {1, 2},
    datetime(2026, 1, 1, tzinfo=timezone.utc),
    pendulum.datetime(2026, 1, 1, tz="Europe/Berlin"),
    date(2026, 1, 1),
    timedelta(seconds=5),
    uuid.UUID(int=7),
]


@pytest.mark.parametrize("value", GOOD, ids=repr)
def test_what_airflow_takes_comes_back_equal(value):
    check(value)
    assert decode(encode(value)) == value
    assert type(decode(encode(value))) is type(value)


@pytest.mark.parametrize(
    ("value", "place", "reason"),
    [
        (object(), r"event", "object"),
        ({"a": [1, {"b": object()}]}, r"event\['a'\]\[1\]\['b'\]", "object"),
        ({1: "x"}, r"event\[1\]", "its key is a int"),
        ([float("nan")], r"event\[0\]", "nan"),
        ({"a": b"bytes"}, r"event\['a'\]", "bytes"),
        (Order(1), r"event", "Order"),
        ((1, lambda: None), r"event\[1\]", "function"),
        ({"__classname__": "x"}, r"event", "reserves the key '__classname__'"),
        (Name("x"), r"event", "Name"),
        ({"a": {"__type": "set", "__var": [1]}}, r"event\['a'\]", "reserves the key '__type'"),
        (["\udcff"], r"event\[0\]", "no valid Unicode"),
        ({"\udcff": 1}, r"event\[.*\]", "of its key: .* no valid Unicode"),
        ([2**64], r"event\[0\]", "more than 64 bits"),
    ],
)
def test_anything_else_is_refused_with_its_place_and_type(value, place, reason):
    with pytest.raises(EventNotSerializable, match=f"^{place} cannot be delivered: .*{reason}"):
        check(value)


@pytest.mark.parametrize("value", GOOD, ids=repr)
def test_an_outcome_arrives_as_it_was(value):
    assert outcome.decode(outcome.encode(outcome.Arrived(value))) == outcome.Arrived(value)


@pytest.mark.parametrize("payload", [None, "success", {"outcome": "Later", "value": "1"}, {"status": "ok"}])
def test_an_unknown_outcome_is_named(payload):
    with pytest.raises(UnknownOutcome, match="reads the outcomes Arrived, Batch, Gathered, TimedOut and Rejected"):
        outcome.decode(payload)
