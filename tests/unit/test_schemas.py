"""What events must fit: judged soon, whatever a sender makes of it, and refused early where that cannot be."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from airflow.sdk import DAG
from airflow_events import wait_for_event
from airflow_events.listeners.http import HttpListener
from airflow_events.listeners.support.schemas import check_schema, fits, misfit

ORDER = {"type": "object", "required": ["order"], "properties": {"order": {"type": "integer"}}}
OF_TERM = {"type": "object", "properties": {"left": {"$ref": "#"}}, "required": ["left", "op"]}
TERM = {
    "oneOf": [
        {"type": "integer"},
        {"allOf": [OF_TERM, {"properties": {"op": {"const": "+"}}}]},
        {"allOf": [OF_TERM, {"properties": {"op": {"const": "-"}}}]},
    ]
}

# What takes hours where it is judged by trying: each a schema that somebody might write, and what a sender sends.
SLOW = """
from airflow_events.listeners.support.schemas import fits, misfit

many, term = range(100_000), 1
for _ in range(90):
    term = {"left": term, "op": "?"}
for schema, payload in [
    ({"pattern": "^(a+)+$"}, "a" * 250_000 + "!"),
    ({"patternProperties": {"^(a|a)*$": {}}, "additionalProperties": False}, {"a" * 100_000 + "!": 1}),
    ({"pattern": "a*a*a*a*a*a*b"}, "a" * 250_000),
    ({"uniqueItems": True}, [[number] for number in many] + [[1.0]]),
    ({"unevaluatedProperties": False, "allOf": [{"patternProperties": {"^a": {}}}]}, {f"b{n}": n for n in many}),
    (TERM, term),
    ({"anyOf": [{"items": {"anyOf": [{"type": "string"}, {"type": "null"}]}}, {"items": False}]}, list(many)),
]:
    assert not fits(schema, payload)
    assert 0 < len(misfit(schema, payload)) < 600
assert fits({"uniqueItems": True}, [[2.0 ** (61 * i), 2.0 ** (61 * j)] for i in range(16) for j in range(16)])
"""


def test_it_is_judged_soon_whatever_somebody_sends():
    subprocess.run([sys.executable, "-c", f"TERM = {TERM!r}\n{SLOW}"], check=True, timeout=120)


@pytest.mark.parametrize(
    ("schema", "payload"),
    [
        (True, 1),
        (ORDER, {"order": 1, "more": None}),
        ({"type": "integer"}, 1.0),
        ({"uniqueItems": True}, [1, True, "1", [1], {"a": 1}]),
        ({"pattern": r"^[\u0020-\u007e]+$"}, "a b"),
        ({"pattern": r"^\d{3}$"}, "123"),
        ({"format": "email"}, "no address"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "format": "date"}, "no date"),
        ({"allOf": [{"$ref": "#"}]}, 1),
        ({"maximum": 2**64}, 2**64 - 1),
        (TERM, {"left": {"left": 1, "op": "-"}, "op": "+"}),
    ],
)
def test_what_fits(schema, payload):
    check_schema(schema)
    assert fits(schema, payload)


@pytest.mark.parametrize(
    ("schema", "payload", "why"),
    [
        (False, 1, r"\$: False schema"),
        (ORDER, {}, r'\$: "order" is a required property'),
        (ORDER, {"order": "x"}, r'\$\.order: "x" is not of type "integer"'),
        ({"items": {"minimum": 3}}, [3, 1], r"\$\[1\]: 1 is less than the minimum of 3"),
        ({"uniqueItems": True}, [1, 1.0], "non-unique"),
        ({"pattern": r"^\d{3}$"}, "٣٣٣", "does not match"),
        ({"pattern": "^a$"}, "a\n", "does not match"),
        (TERM, {"left": "x", "op": "+"}, r"\$: "),
    ],
)
def test_what_does_not_and_why(schema, payload, why):
    assert not fits(schema, payload)
    assert re.match(f".*{why}", misfit(schema, payload))


NOT_TAKEN = [
    ({"type": "order"}, r"\$\.type: "),
    ({"pattern": "(?=a)a"}, "takes linear time: none with look-around, references back"),
    ({"pattern": r"(a)\1"}, "takes linear time"),
    ({"patternProperties": {"(a{1000}){1000}": {}}}, "takes linear time"),
    ({"$ref": "https://example.com/order"}, "it is not fetched"),
    ({"$ref": "file:///etc/passwd"}, "it is not fetched"),
    ({"$ref": "#/nowhere"}, "does not exist"),
    ({"$schema": "https://example.com/of-our-own"}, "Unknown meta-schema"),
    (7, r"\$"),
]


@pytest.mark.parametrize(("schema", "why"), NOT_TAKEN, ids=repr)
def test_what_cannot_be_judged_is_refused_as_the_dag_is_parsed(schema, why):
    with pytest.raises(ValueError, match=rf"^approval: schema: it is not a valid JSON Schema .*: .*{why}"):
        wait_for_event.override(task_id="approval")(HttpListener, key="{{ params.order }}", schema=schema)


def test_what_is_known_at_run_time_alone_is_refused_then():
    with DAG("shop"):
        order = wait_for_event.override(task_id="order")(HttpListener)
        task = wait_for_event.override(task_id="wait")(HttpListener, key=order, schema={"type": "order"}).operator
    task.listener_kwargs["key"] = "order-1"
    with pytest.raises(ValueError, match="wait: schema: it is not a valid JSON Schema"):
        task._check_arguments()


def test_threads_judge_at_once():
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: fits(TERM, {"left": number % 2 or "x", "op": "+"}), range(400)))
    assert found == [bool(number % 2) for number in range(400)]
