"""
What is accepted as an event can be read back downstream, whatever it is: found by search, in each database.

Each value goes the way of an event: into the wait's row and the XCom of the task, out as Airflow's execution API
hands it out, and in again as a worker reads it. What `serde.check` refuses need not come back, and nothing else
may fail.
"""

from __future__ import annotations

import json
import uuid
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from airflow.api_fastapi.execution_api.datamodels.xcom import XComResponse
from airflow.models.xcom import XComModel
from airflow.sdk.api.datamodels._generated import XComResponse as AsAWorkerReadsIt
from airflow.sdk.bases.xcom import BaseXCom
from airflow.utils.sqlalchemy import get_dialect_name
from airflow_events import waits as shown
from airflow_events.errors import EventNotSerializable
from airflow_events.inbox.entries import End
from airflow_events.listeners.support import serde
from examples import of_examples
from fastapi.encoders import jsonable_encoder
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import select

TEXTS = st.one_of(
    st.text(st.characters(codec=None, categories=None), max_size=20),
    st.sampled_from(
        ["\0", "\udc80", "\ud83d", "🎉", "\u2028", "\ufeff", "\uffff", "é", "e\u0301", "a ", "__type", "'\"\\\\"]
    ),
)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**400]),
    st.floats(),
    st.sampled_from([-0.0, 5e-324, 1.7976931348623157e308, 1e-7, 1e16, 123456789.123456789]),
)
OTHERS = st.one_of(
    st.datetimes(timezones=st.sampled_from([None, timezone.utc, timezone(timedelta(hours=5, minutes=45))])),
    st.dates(),
    st.timedeltas(),
    st.uuids(),
    st.binary(max_size=5),
    st.decimals(),
    st.complex_numbers(),
    st.just(object()),
)
KEYS = st.one_of(
    TEXTS, st.sampled_from(["__classname__", "__version__", "__data__", "__id__", "__var", "dag_id", ""])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def within(children):
    return st.one_of(
        st.lists(children, max_size=4),
        st.dictionaries(KEYS, children, max_size=4),
        st.dictionaries(st.one_of(KEYS, st.integers(), st.none()), children, max_size=2),
        st.tuples(children, children),
        st.sets(st.one_of(SCALARS), max_size=3),
    )


@st.composite
def deep(draw):
    """About as deep as is allowed, and deeper, of lists and objects in any order."""
    value = draw(SCALARS)
    for is_list in draw(st.lists(st.booleans(), min_size=serde.DEEPEST - 6, max_size=serde.DEEPEST + 2)):
        value = [value] if is_list else {"a": value}
    return value


SHALLOW = st.recursive(st.one_of(SCALARS, OTHERS), within, max_leaves=12)
VALUES = st.one_of(SHALLOW, SHALLOW, SHALLOW, deep())


def holds_large_float(value):
    """PostgreSQL's JSONB writes those without an exponent, and so they come back as integers, nearly equal."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(holds_large_float, value))
    if isinstance(value, dict):
        return any(map(holds_large_float, value.values()))
    return isinstance(value, float) and abs(value) >= 1e16


@pytest.fixture
def waiting(waits):
    """A wait that has begun, and its generation."""
    ti = waits.deferred()
    return ti, waits.begin(ti).generation


def read_back(waits, ti):
    """As a downstream task reads what the wait returned."""
    dag_id, task_id, run_id, _ = waits._keys[ti]
    where = (XComModel.dag_id == dag_id, XComModel.run_id == run_id, XComModel.task_id == task_id)
    stored = waits.session.scalars(select(XComModel).where(*where, XComModel.key == "return_value")).one()
    sent = XComResponse(key="return_value", value=stored.value).model_dump_json()
    return BaseXCom.deserialize_value(AsAWorkerReadsIt.model_validate_json(sent))


@of_examples(120)
@example([1, 1.0, True, "1"])
@example({"a": (1, {2}), "b": datetime(2026, 3, 29, 2, 30, tzinfo=timezone.utc)})
@example([date(1, 1, 1), timedelta(days=-1, microseconds=1), uuid.UUID(int=0), Decimal("1.10")])
@given(value=VALUES)
def test_what_is_accepted_is_read_back_equal(waits, waiting, value):
    ti, generation = waiting
    try:
        serde.check(value)
    except EventNotSerializable:
        return
    with waits.session.begin_nested() as undone:
        end = End(xcoms={"return_value": serde.as_json(value)})
        waits.record(ti, generation, serde.encode(value), end=end)
        waits.session.expire_all()
        came = serde.decode(waits.row(ti).event)
        returned = read_back(waits, ti)
        assert came == value
        if not (get_dialect_name(waits.session) == "postgresql" and holds_large_float(value)):
            assert returned == value
            assert type(returned) is type(value)
        dag_id, task_id, run_id, map_index = waits._keys[ti]
        detail = shown.show(waits.session, (dag_id, run_id, task_id, map_index))
        json.dumps(jsonable_encoder(detail)).encode()  # and the page can show it
        undone.rollback()
