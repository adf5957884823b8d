"""A task that waits for many events: what a DAG author meets, and what a worker does."""

from __future__ import annotations

import random
import uuid
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import pytest
from airflow.models.trigger import Trigger
from airflow.sdk import DAG, Asset, task
from airflow.sdk.bases.operator import TRIGGER_FAIL_REPR, TriggerFailureReason
from airflow.sdk.exceptions import AirflowFailException, AirflowSensorTimeout, AirflowSkipException, TaskDeferred
from airflow_events import Wait, wait_for_events
from airflow_events.errors import UnknownOutcome
from airflow_events.listeners.directory import DirectoryListener, DirectoryWatchListener
from airflow_events.listeners.http import HttpListener
from airflow_events.listeners.timer import TimerListener
from airflow_events.operators.placement import placement
from airflow_events.operators.wait_for_events import WaitForEventsOperator
from airflow_events.triggers import outcome
from airflow_events.triggers.calls import Calls, result
from airflow_events.triggers.events import EventsTrigger

WAIT = Wait("dag", "run", "task")


@pytest.fixture
def dag():
    with DAG("d", schedule=None) as dag:
        yield dag


@pytest.mark.parametrize(
    ("listener", "arguments", "of_task", "error", "message"),
    [
        (HttpListener, [[]], {}, TypeError, "does not take HttpListener: its events come to the API server"),
        (TimerListener, "2030-01-01", {}, TypeError, "arguments is a list .* not '2030-01-01'"),
        (TimerListener, [1, [2, 3]], {}, TypeError, r"arguments\[1\]: TimerListener.poll_for_event.*too many"),
        (TimerListener, [{"when": 1}], {}, TypeError, r"arguments\[0\].*'moment'|unexpected keyword"),
        (TimerListener, [1, "tomorrow"], {}, ValueError, r"arguments\[1\]: 'tomorrow' is neither ISO 8601"),
        (TimerListener, [object()], {}, TypeError, r"arguments\[0\] cannot be stored"),
        (TimerListener, [1], {"first": 2}, ValueError, "first=2, and the list has 1 items"),
        (TimerListener, [1], {"first": 0}, ValueError, "at least 1, or None for all, not 0"),
        (TimerListener, [1], {"first": 1, "default": 1, "timeout": 1}, ValueError, "nothing is missing"),
        (TimerListener, [1], {"soft_fail": True}, ValueError, "there is no timeout"),
    ],
)
def test_what_cannot_be_is_refused_when_the_dag_is_parsed(dag, listener, arguments, of_task, error, message):
    with pytest.raises(error, match=message):
        wait_for_events.override(**of_task)(listener, arguments)


@task
def upstream(): ...


ROUTES = {
    # starts in the triggerer, ends there
    "timers": (lambda: wait_for_events(TimerListener, [1, "{{ ts }}", timedelta(1)]), True, True),
    "directory": (lambda: wait_for_events(DirectoryListener, [{}], directory="d"), True, True),
    "upstream, timers": (lambda: wait_for_events(TimerListener, upstream()), False, True),
    "upstream in the list": (lambda: wait_for_events(TimerListener, [1, upstream()]), False, True),
    "upstream, watch": (lambda: wait_for_events(DirectoryWatchListener, upstream()), False, True),
    "upstream, directory": (lambda: wait_for_events(DirectoryListener, upstream()), False, True),
    "outlets": (lambda: wait_for_events.override(outlets=[Asset("a")])(TimerListener, [1]), True, True),
    "replay=False": (lambda: wait_for_events.override(replay=False)(DirectoryListener, ["d"]), True, True),
    "post_execute": (
        lambda: wait_for_events.override(post_execute=lambda context, result: None)(TimerListener, [1]),
        True, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", ROUTES)
def test_where_it_starts_and_ends(dag, way):
    make, starts, ends = ROUTES[way]
    operator = make().operator
    assert operator.start_from_trigger is starts
    if starts:
        told = operator.start_trigger_args.trigger_kwargs
        assert len(Calls.decode(told["calls"])) == told["count"] == len(operator.arguments)
    else:
        operator.arguments = [["d"]]  # as a worker has rendered them
        told = operator._trigger_arguments()
    assert bool(told["finish_on_worker"]) is not ends
    assert not told.keys() & {"listener_args", "listener_kwargs", "hand_over", "have"}


# MySQL's TEXT, which Airflow has for the arguments of triggers.
IN_MYSQL = 65_535


def test_a_trigger_row_of_thousands_fits_in_mysql(dag):
    """A scheduler whose database refuses the row that it makes would end, and so would each after it."""
    paths = [f"/data/orders/{number:05}/order-{uuid.UUID(int=number * 2**70)}.json" for number in range(1000)]
    for operator in (
        wait_for_events(TimerListener, [timedelta(seconds=number) for number in range(3000)]).operator,
        wait_for_events(DirectoryListener, paths).operator,
    ):
        told = operator.start_trigger_args.trigger_kwargs
        assert len(Trigger.encrypt_kwargs(told)) < IN_MYSQL < len(operator._calls.encode())
        assert told["calls"] == operator.start_trigger_args.trigger_kwargs["calls"]
        trigger = EventsTrigger(**told)
        assert trigger.calls == operator._calls.encode()
        assert trigger.serialize()[1]["calls"] == told["calls"]


def test_what_does_not_fit_in_mysql_begins_on_a_worker(dag):
    """Where the API server refuses it, and only its own task fails."""
    drawn = random.Random(1)
    long = ["".join(drawn.choices("0123456789abcdef", k=40)) for _ in range(2500)]
    refused = wait_for_events(DirectoryListener, long).operator
    assert "too long for a trigger in MySQL" in placement(refused).starts_on_worker_because
    assert refused.start_trigger_args is None
    fits = wait_for_events(DirectoryListener, long[:1500]).operator
    assert len(Trigger.encrypt_kwargs(fits.start_trigger_args.trigger_kwargs)) < IN_MYSQL


def test_it_is_a_task_with_upstream_and_can_be_mapped(dag):
    assert wait_for_events(TimerListener, upstream()).operator.upstream_task_ids == {"upstream"}
    mapped = WaitForEventsOperator.partial(task_id="m", listener=TimerListener).expand(arguments=[[1], [2]])
    assert mapped.retries == 3
    with pytest.raises(TypeError, match="does not take HttpListener"):
        WaitForEventsOperator.partial(task_id="n", listener=HttpListener)


def test_how_an_item_is_called():
    calls = Calls([5, [1, 2], (3,), {"a": 1, "topic": "u"}, None], {"topic": "t"})
    assert [calls.of(index) for index in range(5)] == [
        ((5,), {"topic": "t"}),
        ([1, 2], {"topic": "t"}),
        ((3,), {"topic": "t"}),
        ((), {"topic": "u", "a": 1}),
        ((None,), {"topic": "t"}),
    ]
    again = Calls.decode(calls.encode())
    assert [again.digest(index) for index in range(5)] == [calls.digest(index) for index in range(5)]
    assert len({calls.digest(index) for index in range(5)}) == 5
    assert Calls([5], {}).digest(0) != calls.digest(0)
    assert calls.describe("L") == "L(5, topic='t') and 4 more"


def test_the_digests_of_the_first_edition_are_those_of_now():
    """Frozen: they stand in the records of runs that are open while Airflow is upgraded."""
    calls = Calls([5, [1, 2], {"a": 1, "topic": "u"}], {"topic": "t"})
    assert [calls.digest(index) for index in range(3)] == [
        digest.ljust(64, "0") for digest in ("07418914a768870a39", "7fed868cdb0dfda1bd", "f5f6a61c46db085bcd")
    ]


def test_what_is_delivered():
    assert result({1: "b", 0: "a"}, 2, None) == ["a", "b"]
    assert result({1: "b"}, 3, None, [None]) == [None, "b", None]
    assert result({2: "c", 0: "a"}, 3, 2) == [(0, "a"), (2, "c")]


def test_each_place_has_a_name_of_its_own():
    assert WAIT.id == "dag/run/task/-1"
    assert Wait("dag", "run", "task", index=5).id == "dag/run/task/-1#5"


CONTEXT = {
    "ti": SimpleNamespace(dag_id="d", run_id="run", task_id="wait", map_index=-1),
    "dag_run": SimpleNamespace(start_date=datetime(2026, 11, 23, tzinfo=timezone.utc)),
}
LATE = outcome.TimedOut(datetime(2026, 11, 23, 12, tzinfo=timezone.utc), 1)


def made(listener=TimerListener, arguments=(1, 2, 3), **of_task):
    return wait_for_events.override(task_id="wait", **of_task)(listener, list(arguments)).operator


def deferred(operator, go_on):
    """Call what defers the task, and return the trigger."""
    with pytest.raises(TaskDeferred) as error:
        go_on(operator)
    assert isinstance(error.value.trigger, EventsTrigger)
    return error.value.trigger


def told(event):
    return lambda operator: operator.execute_complete(CONTEXT, event)


def test_a_worker_only_defers_and_returns_what_it_is_told(dag):
    operator = made()
    trigger = deferred(operator, lambda operator: operator.execute(CONTEXT))
    assert (trigger.count, trigger.wait["run_id"], trigger.wait["map_index"]) == (3, "run", -1)
    assert trigger.shown == "TimerListener, 3 times, the first of them TimerListener(1)"
    assert operator.execute_complete(CONTEXT, outcome.encode(outcome.Arrived(["a", ("b",), None]))) == [
        "a",
        ("b",),
        None,
    ]
    with pytest.raises(AirflowFailException, match="rejected by ada: no"):
        operator.execute_complete(CONTEXT, outcome.encode(outcome.Rejected("no", "ada")))
    with pytest.raises(UnknownOutcome):
        operator.execute_complete(CONTEXT, {"outcome": "of tomorrow"})


def test_when_the_time_is_up_a_worker_says_how_many_came(dag):
    with pytest.raises(AirflowSensorTimeout, match="1 of 3 events of TimerListener came until 2026-11-23T12"):
        made(timeout=5).execute_complete(CONTEXT, outcome.encode(LATE))
    with pytest.raises(AirflowSkipException, match="1 of 3 events"):
        made(timeout=5, soft_fail=True).execute_complete(CONTEXT, outcome.encode(LATE))
    # A trigger of the first edition had none of the events that it told of.
    deferred(made(timeout=5, default=0), told(outcome.encode(outcome.TimedOut(LATE.deadline))))


@pytest.mark.parametrize(("of_task", "raised"), [({}, AirflowSensorTimeout), ({"default": 0}, TaskDeferred)])
def test_where_no_triggerer_was_there_in_time_the_default_is_left_to_one(dag, of_task, raised):
    """It has what came; the worker has not."""
    next_kwargs = {"error": TriggerFailureReason.TRIGGER_TIMEOUT}
    with pytest.raises(raised):
        made(timeout=5, **of_task).resume_execution(TRIGGER_FAIL_REPR, next_kwargs, CONTEXT)


@pytest.mark.parametrize("name", ["Batch", "Gathered"])
def test_what_a_trigger_of_the_first_edition_hands_over_another_one_finds(dag, name):
    deferred(made(), told({"outcome": name, "value": "[]"}))


def test_fewer_than_the_first_that_are_wanted_cannot_come(dag):
    operator = wait_for_events.override(first=2)(TimerListener, upstream()).operator
    operator.arguments = [1]
    with pytest.raises(AirflowFailException, match="first=2, and the list has 1 items"):
        operator.execute(CONTEXT)
