"""What a DAG author meets at parse time: errors, defaults, and where a wait starts and finishes."""

from __future__ import annotations

import enum
import uuid
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pendulum
import pytest
from airflow.sdk import DAG, Asset, BaseOperator, task
from airflow.sdk.bases.operator import TRIGGER_FAIL_REPR, TriggerFailureReason
from airflow.sdk.exceptions import AirflowSensorTimeout, AirflowSkipException, TaskDeferralTimeout
from airflow_events import EventListener, send_event, wait_for_event, wait_for_events
from airflow_events.listeners.directory import DirectoryListener, DirectoryWatchListener
from airflow_events.listeners.http import HttpListener
from airflow_events.listeners.kafka import KafkaListener, KafkaWatchListener
from airflow_events.listeners.nats import NatsListener
from airflow_events.listeners.rabbitmq import RabbitMQListener
from airflow_events.listeners.redis import RedisListener, RedisWatchListener
from airflow_events.listeners.sqs import SqsListener
from airflow_events.listeners.support import serde
from airflow_events.listeners.timer import TimerListener
from airflow_events.operators.placement import placement
from airflow_events.operators.wait_for_event import WaitForEventOperator
from airflow_events.triggers import reference


class Anything(EventListener):
    async def poll_for_event(self, *args, **kwargs): ...


# As if it came from an installed package.
Anything.__module__ = "airflow_events.listeners.timer"


@pytest.fixture
def dag():
    with DAG("d", schedule=None) as dag:
        yield dag


def operator(listener=TimerListener, *args, **kwargs):
    output = wait_for_event.override(**kwargs)(listener, *(args or (0,)))
    return output.operator


class NeedsArguments(EventListener):
    def __init__(self, url):
        pass

    async def poll_for_event(self): ...


class NotAsync(EventListener):
    def poll_for_event(self): ...


class NoPoll(EventListener):
    pass


class Static(EventListener):
    @staticmethod
    async def poll_for_event(url): ...


class AsyncId(EventListener):
    async def poll_for_event(self): ...

    async def event_id(self, event): ...


class Committing(EventListener):
    async def poll_for_event(self, path, *, limit=1): ...

    async def event_checkpointed(self, event): ...


# As if it came from an installed package.
Committing.__module__ = "airflow_events.listeners.timer"


@pytest.mark.parametrize(
    ("listener", "message"),
    [
        ("TimerListener", "a subclass of EventListener, not 'TimerListener', which is an instance of str"),
        (TimerListener(), "which is an instance of TimerListener"),
        (dict, "a subclass of EventListener; dict is not"),
        (EventListener, "EventListener does not define poll_for_event"),
        (NoPoll, "NoPoll does not define poll_for_event"),
        (NeedsArguments, "NeedsArguments must be made without arguments .*'url'"),
        (NotAsync, "NotAsync.poll_for_event must be an 'async def'"),
        (Static, "Static.poll_for_event must be an ordinary method, with self"),
        (AsyncId, "AsyncId.event_id must be a 'def', and no 'async def'"),
    ],
)
def test_what_is_no_listener_is_refused(dag, listener, message):
    with pytest.raises(TypeError, match=message):
        wait_for_event(listener)
    with pytest.raises(TypeError, match=message):
        WaitForEventOperator.partial(task_id="mapped", listener=listener)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"TimerListener.poll_for_event\(.*moment.*missing a required argument: 'moment'"),
        ((1, 2), {}, "too many positional arguments"),
        ((), {"when": 1}, "missing a required argument: 'moment'|unexpected keyword argument 'when'"),
        ((object(),), {}, r"wait_for_event: listener_args\[0\] cannot be stored"),
        (({"a": {1: 2}},), {}, r"listener_args\[0\]\['a'\]\[1\]"),
    ],
)
def test_arguments_that_the_listener_does_not_take_are_refused(dag, args, kwargs, message):
    with pytest.raises(TypeError, match=message):
        wait_for_event(TimerListener, *args, **kwargs)


@pytest.mark.parametrize(
    ("listener", "message"),
    [
        (KafkaListener, "KafkaListener takes no match: an offset that is left open holds up the group's"),
        (RedisListener, "would stay pending"),
        (NatsListener, "Give the consumer a filter subject"),
        (RabbitMQListener, "Bind a queue for what is wanted"),
        (SqsListener, "filter policy"),
        (DirectoryListener, "chosen by its name, with pattern"),
    ],
)
def test_a_consumer_that_cannot_leave_what_does_not_match_says_why(dag, listener, message):
    with pytest.raises(TypeError, match=message):
        wait_for_event(listener, "q", match={"kind": "paid"})


@pytest.mark.parametrize(
    ("listener", "argument", "message"),
    [
        (TimerListener, "tomorrow", "wait_for_event: 'tomorrow' is neither ISO 8601"),
        (TimerListener, "08:00", "needs a moment or a duration"),
        (TimerListener, None, "not None of type NoneType"),
        (HttpListener, "", "a key is a text of 1 to 256 characters"),
        (HttpListener, 7.5, "in one line, not 7.5"),
        (HttpListener, True, "in one line, not True"),
    ],
)
def test_a_literal_with_which_no_wait_could_wait_is_refused_as_the_dag_is_parsed(dag, listener, argument, message):
    with pytest.raises(ValueError, match=message):
        wait_for_event(listener, argument)


def test_a_schema_is_no_template(dag):
    schema = {"properties": {"a": {"description": "use {{ name }}"}}}
    with pytest.raises(ValueError, match="wait_for_event: schema: it is taken as it is written"):
        wait_for_event(HttpListener, "key", schema=schema)


@pytest.mark.parametrize("listener", [TimerListener, HttpListener])
def test_what_a_template_says_is_seen_when_it_is_rendered(dag, listener):
    wait_for_event(listener, "{{ params.what }}")
    wait_for_event(listener, "{% if 1 %}{% endif %}")


class Order:
    """Something that Airflow is allowed to store."""


def test_an_argument_of_a_class_that_no_triggerer_can_import_is_refused(dag, monkeypatch):
    """Its triggerer would end as it reads it, and with it all other waits."""
    monkeypatch.setattr(serde, "check", lambda value, name: value)
    monkeypatch.setattr(reference, "is_importable", lambda kind: kind is not Order)
    with pytest.raises(TypeError, match=r"listener_args\[1\]\['a'\] is a Order, which a triggerer cannot import"):
        wait_for_event(Anything, 1, {"a": Order()})


def test_what_stands_for_something_simpler_is_that(dag):
    class Kind(enum.Enum):
        PAID = "paid"

    wait = wait_for_event(Anything, Path("/data"), {"kind": Kind.PAID}, pendulum.duration(hours=1)).operator
    told = wait.start_trigger_args.trigger_kwargs
    assert told["listener_args"] == ["/data", {"kind": "paid"}, timedelta(hours=1)]
    assert type(told["listener_args"][2]) is timedelta


@pytest.mark.parametrize("name", ["timeout", "retries", "task_id", "outlets"])
def test_an_argument_of_the_task_among_the_listeners_is_shown_its_place(dag, name):
    with pytest.raises(
        TypeError, match=rf"{name} is an argument of the task.* wait_for_event\.override\({name}=...\)"
    ):
        wait_for_event(TimerListener, 1, **{name: 30})
    with pytest.raises(TypeError, match=rf"wait_for_events\.override\({name}=...\)"):
        wait_for_events(TimerListener, [1], **{name: 30})


def test_an_argument_that_a_wait_for_many_alone_has_is_shown_its_place(dag):
    with pytest.raises(TypeError, match=r"first is an argument .*: wait_for_events\.override\(first=...\)"):
        wait_for_events(TimerListener, [1], first=1)


@pytest.mark.parametrize("how", ["expand", "partial", "expand_kwargs"])
@pytest.mark.parametrize(
    ("call", "operator"),
    [
        (wait_for_event, "WaitForEventOperator"),
        (wait_for_events, "WaitForEventsOperator"),
        (send_event, "SendEventOperator"),
    ],
)
def test_mapping_it_says_how_it_is_done(dag, how, call, operator):
    with pytest.raises(TypeError, match=rf"{operator}.partial\(.*\)\.expand"):
        getattr(call, how)(TimerListener)


def test_an_argument_of_the_task_among_those_of_an_event_is_shown_its_place(dag):
    with pytest.raises(TypeError, match=r"of the task: send_event\.override\(retries=...\)"):
        send_event("key", 1, retries=2)


def test_a_default_is_a_literal(dag):
    @task
    def upstream(): ...

    with pytest.raises(TypeError, match="wait_for_event: default is a literal, and no output of another task"):
        wait_for_event.override(timeout=5, default=upstream())(TimerListener, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"listener_args": {"directory": "/x"}}, "listener_args is a list of positional arguments"),
        ({"listener_args": "ab"}, "listener_args is a list of positional arguments, not 'ab'"),
        ({"listener_args": 5}, "listener_args is a list of positional arguments, not 5"),
        ({"listener_args": [1], "listener_kwargs": ["a"]}, "listener_kwargs is a mapping"),
        ({"listener_args": [1], "replay": "no"}, "replay is True or False, not 'no'"),
        ({"listener_args": [1], "timeout": 5, "soft_fail": "yes"}, "soft_fail is True or False, not 'yes'"),
    ],
)
def test_arguments_of_another_shape_are_refused(dag, arguments, message):
    with pytest.raises(TypeError, match=message):
        WaitForEventOperator(task_id="wait", listener=TimerListener, **arguments)


@pytest.mark.parametrize("kind", [set, frozenset])
def test_a_set_is_no_list_of_places(dag, kind):
    """A place is known by its index, and a set has another order in each process."""
    with pytest.raises(TypeError, match="the items of a set have another place at each parse; sort them"):
        wait_for_events(TimerListener, kind([1, 2]))


@pytest.mark.parametrize("timeout", [timedelta(weeks=520_000), timedelta.max, float("inf"), float("nan")])
def test_a_timeout_that_no_database_can_hold_is_refused(dag, timeout):
    with pytest.raises(ValueError, match=r"timeout (is at most|must be positive)"):
        wait_for_event.override(timeout=timeout)(TimerListener, 1)
    with pytest.raises(ValueError, match=r"timeout (is at most|must be positive)"):
        WaitForEventOperator.partial(task_id="wait", listener=TimerListener, timeout=timeout)


def test_default_arguments_of_the_dag_that_are_for_other_tasks_harm_no_wait():
    with DAG("defaults", default_args={"soft_fail": True}):
        assert not wait_for_event(TimerListener, 1).operator.soft_fail
        assert wait_for_event.override(timeout=5)(TimerListener, 1).operator.soft_fail
        assert wait_for_event.override(timeout=5, default=1)(TimerListener, 1).operator.default == 1


def test_a_timeout_that_a_cluster_policy_sets_is_taken_as_the_constructor_takes_it(dag):
    operator = wait_for_event(TimerListener, 1).operator
    operator.timeout = 60
    assert operator.start_trigger_args.trigger_kwargs["timeout"] == 60.0
    assert operator.timeout == timedelta(minutes=1)
    with pytest.raises(TypeError, match="not '1h'"):
        operator.timeout = "1h"


def test_a_mapped_wait_has_the_timeout_of_the_defaults_or_one_each():
    with DAG("defaults", default_args={"timeout": 5}):
        mapped = WaitForEventOperator.partial(task_id="one", listener=TimerListener, soft_fail=True)
        mapped.expand(listener_args=[[0]])
        each = WaitForEventOperator.partial(task_id="each", listener=TimerListener, default=1)
        each.expand(listener_args=[[0]], timeout=[1, 2])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"timeout": "1h"}, TypeError),
        ({"timeout": 5, "soft_fail": True, "default": 1}, ValueError),
    ],
)
def test_a_mapped_wait_is_checked_when_the_dag_is_parsed(dag, arguments, error):
    with pytest.raises(error):
        WaitForEventOperator.partial(task_id="wait", listener=TimerListener, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"timeout": 0}, ValueError, "timeout must be positive, not 0"),
        ({"timeout": timedelta(seconds=-1)}, ValueError, "must be positive"),
        ({"timeout": "1h"}, TypeError, "a number of seconds or None, not '1h'"),
        ({"soft_fail": True}, ValueError, "there is no timeout"),
        ({"default": None}, ValueError, "there is no timeout"),
        ({"timeout": 1, "soft_fail": True, "default": 1}, ValueError, "give one"),
        ({"timeout": 1, "default": object()}, TypeError, "default cannot be stored"),
        ({"no_such_argument": 1}, TypeError, "no_such_argument"),
    ],
)
def test_arguments_of_the_task_are_checked(dag, arguments, error, message):
    with pytest.raises(error, match=message):
        operator(**arguments)


def test_it_has_retries_by_default_and_others_win():
    assert (operator().retries, operator().retry_delay) == (3, timedelta(seconds=10))
    assert operator(retries=0).retries == 0
    with DAG("d", schedule=None, default_args={"retries": 7, "retry_delay": timedelta(hours=1)}):
        assert (operator().retries, operator().retry_delay) == (7, timedelta(hours=1))
        assert operator(retries=1).retries == 1
    with DAG("e", schedule=None):
        mapped = WaitForEventOperator.partial(task_id="m", listener=TimerListener).expand(listener_args=[[0]])
        assert mapped.retries == 3


def test_task_ids_are_as_of_taskflow(dag):
    assert [wait_for_event(TimerListener, 0).operator.task_id for _ in range(3)] == [
        "wait_for_event",
        "wait_for_event__1",
        "wait_for_event__2",
    ]
    assert operator(task_id="mine").task_id == "mine"


def test_upstream_outputs_are_dependencies(dag):
    @task
    def upstream(): ...

    waits = wait_for_event(TimerListener, upstream())
    assert waits.operator.upstream_task_ids == {"upstream"}


@task
def upstream(): ...


ROUTES = {
    "timer": (lambda: operator(), True, True),
    "template": (lambda: operator(TimerListener, "{{ ts }}"), True, True),
    "naive datetime": (lambda: operator(TimerListener, datetime(2026, 1, 1)), True, True),
    "directory": (lambda: operator(DirectoryListener, "d"), True, True),
    "directory watch": (lambda: operator(DirectoryWatchListener, "d"), True, True),
    "committing": (lambda: operator(Committing, "p"), True, True),
    "outlets": (lambda: operator(outlets=[Asset("a")]), True, True),
    "post_execute": (lambda: operator(post_execute=lambda context, result: None), True, False),
    "on_success_callback": (lambda: operator(on_success_callback=lambda context: None), True, False),
    "multiple outputs": (lambda: operator(multiple_outputs=True), True, True),
    "pre_execute": (lambda: operator(pre_execute=lambda context: None), False, True),
    "on_execute_callback": (lambda: operator(on_execute_callback=lambda context: None), False, True),
    "upstream output, timer": (lambda: operator(TimerListener, upstream()), False, True),
    "upstream output, nested": (lambda: operator(DirectoryListener, "d", [upstream()]), False, True),
    "upstream output, directory": (lambda: operator(DirectoryListener, upstream()), False, True),
    "upstream output, watch": (lambda: operator(DirectoryWatchListener, upstream()), False, True),
    "not kept by the serialized DAG": (lambda: operator(Anything, uuid.UUID(int=1)), False, True),
    "replay=False": (lambda: operator(DirectoryListener, "d", replay=False), True, True),
    "too long for MySQL": (lambda: operator(DirectoryListener, "d", "x" * 45_000), False, True),
    "long": (lambda: operator(DirectoryListener, "d", "x" * 43_000), True, True),
    "from the DAG file": (lambda: operator(Local, "d"), True, True),
}


class Local(EventListener):
    async def poll_for_event(self, path): ...


Local.__module__ = "__main__"


@pytest.mark.parametrize("way", ROUTES)
def test_where_a_wait_starts_and_finishes(dag, way):
    make, starts_in_triggerer, finishes_in_triggerer = ROUTES[way]
    wait = make()
    found = placement(wait)
    reasons = (found.starts_on_worker_because, found.finishes_on_worker_because)
    assert tuple(why is None for why in reasons) == (starts_in_triggerer, finishes_in_triggerer), reasons
    assert wait.start_from_trigger is starts_in_triggerer
    if starts_in_triggerer:
        assert bool(wait.start_trigger_args.trigger_kwargs["finish_on_worker"]) is not finishes_in_triggerer
    else:
        assert wait.start_trigger_args is None


def test_macros_of_the_dag_make_templates_start_on_a_worker():
    with DAG("d", schedule=None, user_defined_macros={"mine": 1}):
        assert operator(TimerListener, "{{ mine }}").start_from_trigger is False
        assert operator(TimerListener, 5).start_from_trigger is True


def test_outlets_added_later_count(dag):
    wait = operator()
    wait.outlets.append(Asset("a"))
    [outlet] = wait.start_trigger_args.trigger_kwargs["outlets"]
    assert outlet == {"name": "a", "uri": "a", "type": "Asset"}


def test_naive_datetimes_are_in_the_dags_time_zone():
    import pendulum

    with DAG("d", schedule=None, start_date=pendulum.datetime(2026, 1, 1, tz="Asia/Tokyo")):
        wait = operator(TimerListener, datetime(2026, 1, 1, 9))
    [moment] = wait.start_trigger_args.trigger_kwargs["listener_args"]
    assert moment == pendulum.datetime(2026, 1, 1)


def test_where_a_wait_starts_cannot_be_set(dag):
    with pytest.raises(AttributeError, match="follows from its arguments"):
        operator().start_from_trigger = False


def test_pickled_listeners_can_be_refused(dag, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__PICKLED_LISTENERS", "False")
    with pytest.raises(ValueError, match=r"Local is defined beside the DAG.*pickled_listeners = False"):
        operator(Local, "d")
    with pytest.raises(ValueError, match="pickled_listeners = False"):
        WaitForEventOperator.partial(task_id="m", listener=Local)


def test_it_is_no_sensor_that_holds_a_worker(dag):
    assert isinstance(operator(), BaseOperator)
    assert not hasattr(operator(), "poke")


def test_airflow_shows_a_wait_by_the_name_of_its_listener(dag):
    assert operator().operator_name == "TimerListener"
    mapped = WaitForEventOperator.partial(task_id="m", listener=TimerListener).expand(listener_args=[[0]])
    assert mapped.operator_name == "WaitForEventOperator"


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ({"default": "late"}, "late"),
        ({"default": Path("/empty.csv")}, "/empty.csv"),  # as the trigger delivers it
        ({"soft_fail": True}, AirflowSkipException),
        ({}, AirflowSensorTimeout),
    ],
)
def test_no_triggerer_until_the_time_is_up(dag, arguments, result):
    """It ends as a wait whose trigger says so: never with TaskDeferralTimeout, which would be tried again."""
    ti = SimpleNamespace(dag_id="d", run_id="run", task_id="wait", map_index=-1)
    context = {"ti": ti, "dag_run": SimpleNamespace(start_date=None)}
    wait = operator(timeout=10, **arguments)
    told = {"error": TriggerFailureReason.TRIGGER_TIMEOUT}
    if isinstance(result, str):
        assert wait.resume_execution(TRIGGER_FAIL_REPR, told, context) == result
    else:
        with pytest.raises(result):
            wait.resume_execution(TRIGGER_FAIL_REPR, told, context)


def test_the_tasks_own_execution_timeout_is_another_error(dag):
    wait = operator(timeout=100, execution_timeout=timedelta(seconds=10))
    with pytest.raises(TaskDeferralTimeout):
        wait.resume_execution(TRIGGER_FAIL_REPR, {"error": TriggerFailureReason.TRIGGER_TIMEOUT}, {})


@pytest.mark.parametrize(
    ("listener", "arguments", "message"),
    [
        (DirectoryListener, {"pattern": "**/*.csv"}, "pattern is for names in the directory itself"),
        (DirectoryWatchListener, {"pattern": "**/*.csv"}, "pattern is for names in the directory itself"),
        (DirectoryListener, {"pattern": ["*.csv", "*.txt"]}, "pattern is one shell pattern"),
        (DirectoryListener, {"done_marker": "done"}, "done_marker is a file name with {name} in it"),
        (DirectoryListener, {"settle": -1}, "settle is a number of seconds of at least 0"),
        (DirectoryListener, {"on_commit": "move"}, "on_commit is one of 'archive', 'delete', not 'move'"),
        (KafkaListener, {"on_undecodable": "drop"}, "on_undecodable is one of .*, not 'drop'"),
        (KafkaListener, {"values": "xml"}, "values is one of .*, not 'xml'"),
        (RedisListener, {"values": "xml"}, "values is one of 'json', 'text', 'bytes', not 'xml'"),
        (RedisListener, {"on_undecodable": "drop"}, "on_undecodable is one of .*, not 'drop'"),
        (RedisWatchListener, {"match": "a b"}, "match is no JMESPath expression"),
        (RedisWatchListener, {"since": "tomorrow"}, "'tomorrow' is neither ISO 8601"),
        (RedisWatchListener, {"since": "now"}, "'now' is neither ISO 8601"),
        (RedisWatchListener, {"since": 20260329}, "since is a moment, and 20260329 neither one"),
    ],
)
def test_what_no_wait_could_wait_with_is_refused_as_the_dag_is_parsed(dag, listener, arguments, message):
    with pytest.raises(ValueError, match=message):
        wait_for_event.override(task_id="wait")(listener, "where", **arguments)
    # What a template says is not known yet.
    templates = dict.fromkeys(arguments, "{{ params.p }}")
    wait_for_event.override(task_id="wait")(listener, "where", **templates)


def test_a_watch_of_several_topics_is_refused_as_the_dag_is_parsed(dag):
    with pytest.raises(ValueError, match=r"topic is the name of one topic for a watch, not \['a', 'b'\]"):
        wait_for_event(KafkaWatchListener, topic=["a", "b"])
