from __future__ import annotations

import dataclasses
import uuid
from datetime import date, datetime, timedelta, timezone

import pendulum
import pytest
from airflow.sdk.api.datamodels._generated import XComResponse
from airflow_events.errors import EventNotSerializable, UnknownOutcome
from airflow_events.listeners.support.serde import DEEPEST, arguments_digest, check, decode, encode, simple
from airflow_events.triggers import outcome
from airflow_events.triggers.calls import Calls


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
        ({"a": "b\0"}, r"event\['a'\]", "holds a NUL"),
        ({"a\0": 1}, r"event\[.*\]", "of its key: .* holds a NUL"),
        ({"\udcff": 1}, r"event\[.*\]", "of its key: .* no valid Unicode"),
        ([2**64], r"event\[0\]", "more than 64 bits"),
    ],
)
def test_anything_else_is_refused_with_its_place_and_type(value, place, reason):
    with pytest.raises(EventNotSerializable, match=f"^{place} cannot be delivered: .*{reason}"):
        check(value)


def nested(levels, *, inner=1, kind=list):
    for _ in range(levels):
        inner = {"a": inner} if kind is dict else kind([inner])
    return inner


@pytest.mark.parametrize("text", ["2030-01-31T08:00+02:00", "2030-01-31T08:00-05:30"])
def test_a_moment_with_an_offset_is_an_argument_in_utc(text):
    moment = datetime.fromisoformat(text)
    with pytest.raises(EventNotSerializable, match=r"event\['at'\] .*the time zone of .*; take UTC"):
        check({"at": moment})
    [plain] = simple([moment])
    assert plain == moment
    assert plain.tzinfo is timezone.utc
    assert check(plain) == moment


@pytest.mark.parametrize(
    "moment", [value for value in GOOD if isinstance(value, datetime)] + [datetime(2030, 1, 1)]
)
def test_a_moment_that_airflow_stores_is_an_argument_as_it_is(moment):
    assert simple(moment) is moment


@pytest.mark.parametrize("kind", [list, dict])
def test_what_is_nested_as_deeply_as_a_worker_can_read_is_taken_and_no_deeper(kind):
    """The last two lines are why: Airflow's own client stops reading there."""
    check(nested(DEEPEST, kind=kind))
    check([1, nested(DEEPEST - 1, kind=kind), 2])
    for value in (nested(DEEPEST + 1, kind=kind), [1, nested(DEEPEST, kind=kind)], nested(5000, kind=kind)):
        with pytest.raises(EventNotSerializable, match="nested too deeply"):
            check(value)
    XComResponse.model_validate_json(f'{{"key": "k", "value": {encode([[nested(DEEPEST, kind=kind)]])}}}')
    with pytest.raises(ValueError, match="recursion limit"):
        XComResponse.model_validate_json(f'{{"key": "k", "value": {encode(nested(200, kind=kind))}}}')


def test_levels_count_as_they_are_stored():
    check(nested(DEEPEST // 2 - 1, kind=tuple))
    with pytest.raises(EventNotSerializable, match="nested too deeply"):
        check(nested(DEEPEST // 2 + 1, kind=tuple))


@pytest.mark.parametrize("value", GOOD, ids=repr)
def test_an_outcome_arrives_as_it_was(value):
    assert outcome.decode(outcome.encode(outcome.Arrived(value))) == outcome.Arrived(value)


@pytest.mark.parametrize("payload", [None, "success", {"outcome": "Later", "value": "1"}, {"status": "ok"}])
def test_an_unknown_outcome_is_named(payload):
    with pytest.raises(UnknownOutcome, match="reads the outcomes Arrived, TimedOut and Rejected"):
        outcome.decode(payload)


ARGUMENTS = [
    "drops",
    {"b": (1, 2.5, None), "a": {"x", "y", "z", "a long one"}},
    datetime(2026, 1, 1, 12, tzinfo=timezone.utc),
    timedelta(hours=1),
    uuid.UUID(int=1),
]


@pytest.mark.parametrize("kind", [set, frozenset])
def test_a_set_is_written_in_one_order(kind):
    """By the text an inbox tells a redelivery from another event, and a place of a list from another."""
    one, other = kind([0, 8]), kind([8, 0])
    assert one == other
    assert list(one) != list(other), "as those of two processes"
    assert encode({"a": [one]}) == encode({"a": [other]})
    assert Calls([{"a": one}], {}).digest(0) == Calls([{"a": other}], {}).digest(0)
    assert decode(encode({"a": [one, {(1, "x"), "y"}]})) == {"a": [one, {(1, "x"), "y"}]}


def test_the_digest_of_arguments_is_frozen():
    assert arguments_digest([], {}) == "7c0dfa2244defba04073a1f2a178b94af095601c853d93dc8fe6b1cc4136d01c"
    assert arguments_digest(ARGUMENTS, {"key": "k"}) == (
        "c4d08b67725a1234b753eca4578ab677aa76ec264f0907d265b8b96d609dd7a3"
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, [2]], (1, (2,))),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a", "b", "c"}, frozenset({"c", "b", "a"})),
        (datetime(2026, 1, 1, tzinfo=timezone.utc), pendulum.datetime(2026, 1, 1, 9, tz="Asia/Tokyo")),
        (timedelta(minutes=90), pendulum.duration(hours=1.5)),
    ],
)
def test_arguments_that_a_listener_cannot_tell_apart_have_one_digest(one, other):
    assert arguments_digest([one], {"a": one}) == arguments_digest([other], {"a": other})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", 1),
        (1, True),
        (["a"], {"a"}),
        ([["a"], "b"], [["a", "b"]]),
        ({"set": []}, set()),
        ({"a": {}}, {"a": []}),
        ("2026-01-01T00:00:00.000000+00:00", datetime(2026, 1, 1, tzinfo=timezone.utc)),
        (datetime(2026, 1, 1, tzinfo=timezone.utc), datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=timezone.utc)),
    ],
)
def test_other_arguments_have_another_digest(one, other):
    assert arguments_digest([one], {}) != arguments_digest([other], {})
    assert arguments_digest([one], {}) != arguments_digest([], {"a": one})


def test_where_something_is_costs_nothing_until_it_is_told():
    """With a key of half a million characters, a hundred thousand items would be fifty gigabytes of text."""
    key = "k" * 500_000
    assert check({key: [0] * 100_000}) == {key: [0] * 100_000}
    with pytest.raises(EventNotSerializable, match=r"event\['k'\]\[1\]\[2\]"):
        check({"k": [0, [0, 0, object()]]})
