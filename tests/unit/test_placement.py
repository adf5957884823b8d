"""Where waits start and finish, and that templates which render in the triggerer come out as on a worker."""

from __future__ import annotations

import enum
import json
import types
import typing
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import PurePosixPath
from typing import Any

import jinja2
import pendulum
import pytest
from airflow.api_fastapi.execution_api.datamodels.taskinstance import TIRunContext as SentContext
from airflow.executors import workloads
from airflow.executors.workloads import TaskInstance
from airflow.jobs import triggerer_job_runner
from airflow.jobs.triggerer_job_runner import TriggerRunner
from airflow.models.dagrun import DagRun
from airflow.models.trigger import Trigger
from airflow.sdk import DAG, Asset, Param, task, task_group
from airflow.sdk.api.datamodels._generated import TIRunContext
from airflow.sdk.definitions._internal.templater import LiteralValue
from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType, TaskDeferred
from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.comms import ConnectionResult, ErrorResponse, MaskSecret, VariableResult
from airflow.sdk.execution_time.lazy_sequence import LazyXComSequence
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
from airflow.serialization.serialized_objects import DagSerialization
from airflow_events import EventListener, wait_for_event, wait_for_events
from airflow_events.errors import UndefinedInTemplate
from airflow_events.listeners.base import Wait
from airflow_events.listeners.http import HttpListener
from airflow_events.listeners.support import serde
from airflow_events.listeners.timer import TimerListener
from airflow_events.operators.placement import Placement, placement
from airflow_events.operators.wait_for_event import WaitForEventOperator, timezone_name
from airflow_events.triggers.calls import Calls
from airflow_events.triggers.event import EventTrigger
from airflow_events.triggers.rendering import render
from airflow_events.waits import arguments

DATE = datetime(2026, 3, 29, 0, 30, 15, 123456, tzinfo=timezone.utc)


class Colour(enum.Enum):
    RED = "red"
    DAILY = "{{ ds }}"


class Status(str, enum.Enum):
    PAID = "paid"


class Listener(EventListener):
    hosted = True

    async def poll_for_event(self, *args, **kwargs): ...


# As if it came from an installed package.
Listener.__module__ = "airflow_events.listeners.timer"
TimerListener.__module__  # where there is no such class, which nobody looks for here


def operator(*args: Any, listener: type[EventListener] = Listener, of_task: Any = None, **kwargs: Any) -> Any:
    return wait_for_event.override(**{"task_id": "wait", **(of_task or {})})(listener, *args, **kwargs).operator


@pytest.fixture
def dag():
    with DAG("d", schedule=None) as dag:
        yield dag


def shown(name: str) -> str:
    return "{{ " + name + " }}"


@dataclass
class Case:
    """
    An argument, and why it is rendered on a worker.

    :param because: a part of the reason, or None if it is rendered in the triggerer.
    :param dag: arguments of the DAG.
    :param fails: what the error says, in both places.
    """

    argument: Any
    because: str | None = None
    dag: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    conf: dict[str, Any] | None = None
    date: datetime | None = DATE
    fails: str | None = None


NATIVE = {"render_template_as_native_obj": True}
FILE = {"params": {"n": 17, "name": "x", "day": "2026-01-05", "list": [1, "2"], "map": {"a": {"b": 1}}}}
CASES = {
    # names that are plain values
    **{name: Case(shown(name)) for name in ("ds", "ds_nodash", "ts", "ts_nodash", "ts_nodash_with_tz")},
    **{name: Case(shown(name)) for name in ("run_id", "task_instance_key_str", "partition_key")},
    **{name: Case(shown(name)) for name in ("logical_date", "data_interval_start", "data_interval_end")},
    "no blanks, several": Case("a/{{ds}}/b-{{ ts }}.json"),
    "nested": Case([{"a": ("{{ ds }}", {"{{ ts }}"}), "{{ key }}": [["{{ run_id }}"]]}]),
    "method": Case("{{ ds.replace('-', '/').upper() }}"),
    "slice and item": Case("{{ ds[:4] }}{{ ds[5] }}{{ ds.split('-')[-1] }}"),
    "datetime": Case(
        "{{ logical_date.strftime('%Y/%m/%d %H') }}{{ logical_date.subtract(days=1).format('YYYY') }}"
    ),
    "time zone": Case(
        "{{ data_interval_end.in_timezone('Asia/Tokyo').isoformat() }} {{ logical_date.timestamp() }}"
    ),
    "difference": Case("{{ (logical_date.add(hours=3) - data_interval_start).total_seconds() }}"),
    "now": Case("{{ logical_date.now() }}", because="use logical_date.now,"),
    "age": Case("{{ (logical_date.add(days=1)).diff_for_humans() }}", because="use a value.diff_for_humans,"),
    "its time zone": Case("{{ logical_date.tzinfo }}", because="use logical_date.tzinfo,"),
    "naive": Case("{{ logical_date.replace(tzinfo=None) }}", because="use the argument tzinfo,"),
    "airflow's filters": Case(
        "{{ logical_date | ds }} {{ logical_date|ts_nodash_with_tz }} {{ dag_run.run_after | ts }}"
    ),
    # statements, comments, filters and tests of Jinja
    "if": Case("{% if ds > '2000' %}{{ ds }}{% else %}x{% endif %}"),
    "for": Case("{% for i in range(3) %}{{ loop.index }}{{ i }}{% endfor %}"),
    "set": Case("{% set x = ds %}{{ x }}{% set y = namespace(z=1) %}{{ y.z }}"),
    "set hides": Case("{% set d = logical_date %}{{ d.now() }}", because="use d.now,"),
    "do": Case("{% set l = [] %}{% do l.append(ds) %}{{ l | join(',') }}"),
    "macro": Case("{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m(ds) }}"),
    "comment alone": Case("a{# nothing #}b"),
    "line ends": Case("a\r\nb\n"),
    "no template": Case("50% {of} this } }}"),
    "raw": Case("{% raw %}{{ no_name }}{% endraw %}"),
    "default": Case("{{ params.no_param | default('d') }}{{ no_name is defined }}", because="use no_name,"),
    "default of a param": Case("{{ params.no_param | default('d') }}"),
    "random": Case("{{ [1, 2, 3] | random }}", because="use the filter random,"),
    "attr": Case("{{ logical_date | attr('age') }}", because="use the filter attr,"),
    "attribute by name": Case(
        "{{ [logical_date] | map(attribute='age') | list }}", because="use the filter map of age,"
    ),
    "map": Case("{{ ['a', 'b'] | map('upper') | join }}"),
    "lipsum": Case("{{ lipsum() }}", because="use lipsum,"),
    "include": Case("{% include 'a.sql' %}", because="use a template of another file (include),"),
    "import": Case("{% from 'a.sql' import b %}", because="use a template of another file (fromimport),"),
    "syntax": Case("{{ ds", because="use what Jinja does not take ("),
    "filter that there is not": Case("{{ ds | no_filter }}", because="use the filter or test no_filter,"),
    "dunder": Case("{{ ds.__class__ }}", because="use ds.__class__,"),
    # the run
    "conf": Case(
        "{{ dag_run.conf.path }}/{{ dag_run.conf['now']['date'] }}", conf={"path": "p", "now": {"date": "d"}}
    ),
    "conf, get": Case("{{ dag_run.conf.get('path', 'other') }}", conf={"a": 1}),
    "conf that is none": Case("{{ dag_run.conf.path }}", fails="has no attribute 'path'"),
    "conf as a whole": Case("{{ dag_run.conf }}", conf={"a": [1, None, True]}),
    "run": Case(
        "{{ dag_run.run_id }} {{ dag_run.dag_id }} {{ dag_run.logical_date }} {{ dag_run.run_after | ds }}"
    ),
    "run, dates": Case("{{ dag_run.data_interval_start.isoformat() }} {{ dag_run.start_date.strftime('%Y %Z') }}"),
    "run's date as an object": Case("{{ [dag_run.run_after] }}", because="use dag_run.run_after,"),
    "run's date, if there is one": Case("{{ dag_run.logical_date is none }}"),
    "run_type": Case("{{ dag_run.run_type }}", because="use dag_run.run_type,"),
    "state": Case("{{ dag_run.state }}", because="use dag_run.state,"),
    "run as a whole": Case("{{ dag_run }}", because="use dag_run,"),
    "run behind another name": Case("{% set r = dag_run %}{{ r.run_type }}", because="use dag_run,"),
    "run by item": Case("{{ dag_run['conf']['a'] }}", conf={"a": "b"}),
    "task instance": Case("{{ ti.task_id }} {{ ti.run_id }} {{ task_instance.map_index }} {{ ti.try_number }}"),
    "dag and task": Case("{{ dag.dag_id }} {{ task.task_id }} {{ task.dag_id }}"),
    "xcom_pull": Case("{{ ti.xcom_pull('make') }}", because="use ti.xcom_pull,"),
    "xcom_pull, task_instance": Case(
        "{{ task_instance.xcom_pull(task_ids='a') }}", because="use task_instance.xcom_pull,"
    ),
    "task instance as a whole": Case("{{ ti }}", because="use ti,"),
    "max_tries": Case("{{ ti.max_tries }}", because="use ti.max_tries,"),
    "dag's owner": Case("{{ dag.owner }}", because="use dag.owner,"),
    "through the task": Case("{{ ti.task.retries }}", because="use ti.task.retries,"),
    **{
        name: Case(shown(name), because=f"use {name},")
        for name in (
            "prev_start_date_success",
            "prev_data_interval_end_success",
            "inlet_events",
            "outlet_events",
            "triggering_asset_events",
            "task_state_store",
            "no_name",
            "inlets",
            "test_mode",
        )
    },
    # macros, Variables, connections
    "macros": Case("{{ macros.ds_add(ds, 3) }} {{ macros.ds_format(ds, '%Y-%m-%d', '%d.%m') }}"),
    "timedelta": Case("{{ logical_date + macros.timedelta(days=1) }}"),
    "uuid": Case("{{ macros.uuid.uuid4() }}", because="use macros.uuid.uuid4,"),
    "random macro": Case("{{ macros.random() }}", because="use macros.random,"),
    "time": Case("{{ macros.datetime.now() }}", because="use macros.datetime.now,"),
    "variable": Case("{{ var.value.folder }}/{{ var.json.settings.deep.now }}"),
    "variable, get": Case("{{ var.value.get('folder', 'x') }}{{ var.value.get('missing', 'fallback') }}"),
    "variable, item": Case(
        "{{ var.value['folder'] }}{{ var.value[params.name] }}", dag={"params": {"name": "folder"}}
    ),
    "variable that is missing": Case("{{ var.value.missing }}", fails="missing not found"),
    "own filter, by its name": Case(
        "{{ ['a'] | map('shout') | join }}",
        dag={"user_defined_filters": {"shout": str.upper}},
        because="own macros",
    ),
    "own filter, in the place of Jinja's": Case(
        "{{ ['a'] | map('upper') | join }}",
        dag={"user_defined_filters": {"upper": str.lower}},
        because="own macros",
    ),
    "a filter whose name is worked out": Case(
        "{{ ['a'] | map(params.f) | join }}",
        dag={"user_defined_filters": {"shout": str.upper}, "params": {"f": "upper"}},
        because="own macros",
    ),
    # what stands for something simpler
    "path": Case(PurePosixPath("/drops/{{ ds }}")),
    "path, asked of another task": Case(PurePosixPath("/{{ ti.xcom_pull('make') }}"), because="use ti.xcom_pull"),
    "path, own macro": Case(
        PurePosixPath("/{{ mine }}"), dag={"user_defined_macros": {"mine": 1}}, because="own macros"
    ),
    "enum": Case([Colour.RED, Colour.DAILY, {"status": Status.PAID}]),
    "deque": Case(deque(["{{ ds }}"])),
    "native, duration": Case("{{ data_interval_end - data_interval_start }}", dag=NATIVE),
    "variables as a whole": Case("{{ var.value }}", because="use var.value,"),
    "connection": Case("{{ conn.source.host }}:{{ conn.source.port }}{{ conn.source.extra_dejson.a }}"),
    "connection's hook": Case("{{ conn.source.get_hook() }}", because="use conn.source.get_hook,"),
    "connection, get": Case("{{ conn.get('source').host }}", because="use conn.get,"),
    # params
    "params": Case("{{ params.n }} {{ params['name'] }} {{ params.list[0] }} {{ params.map.a.b }}", dag=FILE),
    "params, get": Case("{{ params.get('n') }}", dag={"params": {"n": 1, "m": [2]}}),
    "params in a loop": Case("{% for x in params.list %}{{ x }},{% endfor %}", dag=FILE),
    "params by name": Case("{{ params[ds] }}", dag={"params": {"2026-03-29": 1}}),
    "conf wins": Case("{{ params.n }}", dag=FILE, conf={"n": 18}),
    "typed": Case("{{ params.n }}", dag={"params": {"n": Param(5, type="integer", minimum=3)}}, conf={"n": 6}),
    "of the task": Case("{{ params.n }}{{ params.m }}", dag=FILE, task={"params": {"n": 1, "m": 2}}),
    "tuple": Case("{{ params.t }}", dag={"params": {"t": (1, (2, 3))}}),
    "keys that are numbers": Case(
        "{{ params.t }}", dag={"params": {"t": {1: 2}}}, because="the param t, whose value"
    ),
    "not that one": Case("{{ params.n }}", dag={"params": {"n": 1, "t": {1: 2}}}),
    "order of keys": Case("{{ params.t }}", dag={"params": {"t": {"b": 2, "a": 1}}}, because="the param t, whose"),
    "any of them": Case(
        "{{ params.get('n') }}", dag={"params": {"n": 1, "t": {1: 2}}}, because="the param t, whose"
    ),
    "params as a whole": Case("{{ params }}", dag=FILE, because="use params,"),
    # undefined names
    "no logical date": Case("/drops/{{ ds }}", date=None, fails="'ds' is undefined"),
    "no logical date, guarded": Case("/drops/{{ ds if ds is defined else 'none' }}", date=None),
    "no logical date, datetime": Case("{{ logical_date.year }}", date=None, fails="'logical_date' is undefined"),
    "no logical date, run_id": Case(
        "{{ run_id }} {{ task_instance_key_str }} {{ dag_run.logical_date }}", date=None
    ),
    "misspelt param": Case("order-{{ params.ordr }}", dag={"params": {"order": 1}}, fails="no attribute 'ordr'"),
    "misspelt attribute": Case("{{ ds.uper() }}", fails="no attribute 'uper'"),
    "misspelt key": Case("{{ dag_run.conf['pth'] }}", conf={"path": 1}, fails="no attribute 'pth'"),
    # native objects
    "native": Case("{{ params.n }}", dag={**NATIVE, **FILE}),
    "native, list": Case(
        ["{{ params.list }}", "{{ params.map }}", "{{ ds }}", "{{ [ds, 1] }}"], dag={**NATIVE, **FILE}
    ),
    "native, conf": Case("{{ dag_run.conf }}", dag=NATIVE, conf={"a": [1, {"b": None}]}),
    "native, date": Case("{{ logical_date }}", dag=NATIVE),
    "native, text": Case("{{ params.n }}0", dag={**NATIVE, **FILE}),
    "native, literal": Case(["17", "(1, 2)", "1e3", "None", "a"], dag=NATIVE),
    "native, undefined": Case("{{ params.ordr }}", dag=NATIVE, fails="no attribute 'ordr'"),
    "native, undefined within": Case("{{ [params.ordr] }}", dag=NATIVE, fails="no attribute 'ordr'"),
    "native, of the task": Case("{{ params.n }}", dag=FILE, task=NATIVE),
    "native, not of the task": Case(
        "{{ params.name }}", dag={**NATIVE, **FILE}, task={"render_template_as_native_obj": False}
    ),
    # the DAG's own
    "own macro": Case(
        "{{ mine }}", dag={"user_defined_macros": {"mine": 1}}, because="DAG's own macros or filters"
    ),
    "own macro, name of Airflow's": Case("{{ ds }}", dag={"user_defined_macros": {"ds": 1}}, because="own macros"),
    "other macro": Case("{{ ts }}", dag={"user_defined_macros": {"mine": 1}}),
    "own filter": Case(
        "{{ ds | mine }}", dag={"user_defined_filters": {"mine": str.upper}}, because="own macros or"
    ),
    "other filter": Case("{{ ds | lower }}", dag={"user_defined_filters": {"mine": str.upper}}),
    "own Jinja": Case(
        "[[ ds ]]",
        dag={"jinja_environment_kwargs": {"variable_start_string": "[["}},
        because="Jinja environment of its own",
    ),
    "own undefined": Case(
        "{{ ds }}", dag={"template_undefined": jinja2.Undefined}, because="template_undefined of its own"
    ),
    # literals
    "numbers": Case([1, 1.5, True, None, "a", {"b": (1, 2)}, {1}]),
    "moment": Case([datetime(2026, 1, 1, tzinfo=timezone.utc), timedelta(minutes=1)]),
    "naive moment": Case(datetime(2026, 1, 1), dag={"start_date": pendulum.datetime(2026, 1, 1, tz="Asia/Tokyo")}),
    "uuid itself": Case(uuid.UUID(int=1), because="a value that a serialized DAG does not keep"),
    "frozenset": Case(frozenset({1}), because="a value that a serialized DAG does not keep"),
}


@pytest.mark.parametrize("name", CASES)
async def test_what_the_triggerer_renders_is_what_a_worker_renders(name, monkeypatch):
    case = CASES[name]
    with DAG("d", **{"schedule": None, **case.dag}) as dag:
        wait = operator(case.argument, of_task=case.task, key=case.argument)
    because = placement(wait).starts_on_worker_because
    if case.because is not None:
        assert case.because in (because or "")
        return
    assert because is None
    run = run_of(dag, case)
    if case.fails is not None:
        with pytest.raises((jinja2.UndefinedError, AirflowRuntimeError, TypeError), match=case.fails):
            await on_worker(dag, run, monkeypatch)
        with pytest.raises((UndefinedInTemplate, AirflowRuntimeError), match=case.fails):
            await in_triggerer(dag, run, monkeypatch)
        return
    expected = await on_worker(dag, run, monkeypatch)
    found = await in_triggerer(dag, run, monkeypatch)
    assert found == expected
    assert typed(found) == typed(expected)
    assert serde.arguments_digest(*found) == serde.arguments_digest(*expected)


async def test_an_undefined_name_is_named_with_its_place_and_the_reason(dag, monkeypatch):
    operator(["{{ run_id }}", "/drops/{{ ds }}"])
    with pytest.raises(UndefinedInTemplate) as error:
        await in_triggerer(dag, run_of(dag, Case("", date=None)), monkeypatch)
    assert str(error.value) == (
        "'ds' is undefined in listener_args[0][1], which is '/drops/{{ ds }}': the run has no logical date, from "
        "which it would follow"
    )


@pytest.mark.parametrize("native", [False, True])
async def test_many_arguments_render_as_one_does(native, monkeypatch):
    with DAG("d", schedule=None, params={"n": 5}, render_template_as_native_obj=native) as dag:
        wait_for_events.override(task_id="wait")(
            Watch, ["{{ ds }}", {"path": "{{ params.n }}"}, ["a\n", 7], "17"], topic="{{ run_id }}"
        )
    assert placement(dag.get_task("wait")).starts_on_worker_because is None
    run = run_of(dag, Case(""))
    trigger = await triggered(dag, run, monkeypatch)
    calls = Calls.decode(trigger.calls)
    task, _ = await worker(dag, run, monkeypatch)
    assert (calls.arguments, calls.common) == (task.arguments, task.listener_kwargs)
    assert calls.arguments[1:] == ([{"path": 5}, ["a", 7], 17] if native else [{"path": "5"}, ["a", 7], "17"])


class Watch(Listener):
    pass


Watch.__module__ = "airflow_events.listeners.timer"


def typed(value: Any) -> Any:
    """The types of a value, as far as a listener sees them."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [typed(item) for item in value]
    kinds = (datetime, timedelta)
    return next((kind for kind in kinds if isinstance(value, kind)), type(value))


def run_of(dag: DAG, case: Case) -> DagRun:
    date = case.date
    return DagRun(
        dag_id=dag.dag_id,
        run_id="manual__x",
        run_type="manual",
        state="running",
        logical_date=date,
        data_interval=(date, date + timedelta(days=1)) if date else None,
        run_after=datetime(2026, 3, 30, tzinfo=timezone.utc),
        start_date=datetime(2026, 3, 30, 1, 2, 3, tzinfo=timezone.utc),
        conf=case.conf,
    )


async def worker(dag: DAG, run: DagRun, monkeypatch: Any) -> tuple[Any, Any]:
    """Render the wait as `task_runner._prepare` does, after what the API server sends it."""
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", Supervisor(), raising=False)
    sent = SentContext(
        dag_run=run.dag_run_data, max_tries=3, task_reschedule_count=0, variables=[], connections=[],
        xcom_keys_to_clear=[], should_retry=False,
    )  # fmt: skip
    ti = RuntimeTaskInstance.model_construct(
        **of_task_instance(dag),
        task=dag.get_task("wait").prepare_for_execution(),
        _ti_context_from_server=TIRunContext.model_validate_json(sent.model_dump_json()),
        max_tries=3,
        start_date=datetime.now(timezone.utc),
        state="running",
    )
    context = ti.get_template_context()
    ti.render_templates(context, ti.task.dag.get_template_env())
    return ti.task, context


async def on_worker(dag: DAG, run: DagRun, monkeypatch: Any) -> tuple[Any, Any]:
    task, _ = await worker(dag, run, monkeypatch)
    task._check_arguments()  # as before it defers
    zone = Wait("", "", "", timezone=timezone_name(task)).tz
    return serde.localized(task.listener_args, zone), serde.localized(task.listener_kwargs, zone)


async def in_triggerer(dag: DAG, run: DagRun, monkeypatch: Any) -> tuple[Any, Any]:
    trigger = await triggered(dag, run, monkeypatch)
    return trigger.listener_args, trigger.listener_kwargs


async def triggered(dag: DAG, run: DagRun, monkeypatch: Any) -> Any:
    """Let Airflow's runner make the wait's trigger of what is in its database, and render its arguments."""
    made = []

    def render_template_fields(trigger: Any, context: Any, jinja_env: Any = None) -> None:
        made.append(trigger)
        if not hasattr(trigger, "calls"):
            render(trigger, context, jinja_env)

    async def do_nothing(trigger: Any) -> Any:
        return
        yield

    monkeypatch.setattr(EventTrigger, "render_template_fields", render_template_fields)
    monkeypatch.setattr("airflow_events.triggers.event.EventTrigger.run", do_nothing)
    monkeypatch.setattr("airflow_events.triggers.events.EventsTrigger.run", do_nothing)
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", TriggerersSupervisor(), raising=False)
    runner, workload = workload_of(dag, run)
    runner.to_create.append(workload)
    await runner.create_triggers()
    for trigger in runner.triggers.values():
        await trigger["task"]
    assert not runner.failed_triggers
    return made[0]


def workload_of(dag: DAG, run: DagRun) -> tuple[TriggerRunner, Any]:
    data = json.loads(json.dumps(DagSerialization.to_dict(dag)))
    start = DagSerialization.from_dict(data).get_task("wait").start_trigger_args
    row = Trigger(classpath=start.trigger_cls, kwargs=start.trigger_kwargs)
    return TriggerRunner(), workloads.RunTrigger(
        id=1,
        ti=TaskInstance(pool_slots=1, queue="default", priority_weight=1, **of_task_instance(dag)),
        classpath=row.classpath,
        encrypted_kwargs=row.encrypted_kwargs,
        dag_data=data,
        dag_run_data=run.dag_run_data.model_dump(exclude_unset=True),
    )


def of_task_instance(dag: DAG) -> dict[str, Any]:
    return {
        "id": uuid.UUID(int=1),
        "dag_version_id": uuid.UUID(int=2),
        "dag_id": dag.dag_id,
        "task_id": "wait",
        "run_id": "manual__x",
        "try_number": 1,
        "map_index": -1,
    }


class Supervisor:
    """What answers a worker that renders."""

    def send(self, message: Any) -> Any:
        kind = type(message).__name__
        if kind == "GetVariable":
            values = {"folder": "/drops", "settings": '{"deep": {"now": 1}}'}
            if message.key in values:
                return VariableResult(key=message.key, value=values[message.key])
            return ErrorResponse(error=ErrorType.VARIABLE_NOT_FOUND, detail={"key": message.key})
        if kind == "GetConnection":
            return ConnectionResult(
                **{"conn_id": message.conn_id, "conn_type": "http", "host": "h", "port": 81, "login": "l"},
                **{"password": "p", "schema": None, "extra": '{"a": "b"}'},
            )
        assert isinstance(message, MaskSecret), message
        return None


class TriggerersSupervisor(Supervisor):
    """The same in a triggerer, where another message is answered by nobody."""

    KINDS = typing.get_args(typing.get_args(triggerer_job_runner.ToTriggerSupervisor)[0])

    def send(self, message: Any) -> Any:
        assert isinstance(message, self.KINDS)
        return super().send(message)


def test_variables_and_connections_are_read_on_workers_where_a_triggerer_would_read_others(dag, monkeypatch):
    wait = operator("{{ var.value.folder }}")
    assert placement(wait).starts_on_worker_because is None
    monkeypatch.setenv("AIRFLOW__CORE__MULTI_TEAM", "True")
    assert placement(wait).starts_on_worker_because == (
        "its templates use a Variable or a connection, and "
        "[core] multi_team shows a triggerer others than a worker of the team"
    )
    assert placement(operator("{{ ds }}", of_task={"task_id": "other"})).starts_on_worker_because is None
    monkeypatch.delenv("AIRFLOW__CORE__MULTI_TEAM")
    monkeypatch.setenv("AIRFLOW__SECRETS__BACKEND", "some.Vault")
    assert "a secrets backend would hold up the triggerer" in placement(wait).starts_on_worker_because


def test_a_variable_is_read_once_for_a_wait(dag):
    """What a trigger of its own has is the template, which each triggerer that takes it over renders again."""
    again = "each triggerer that takes the wait over would read them again"
    for listener in (Listener, TimerListener, HttpListener):
        kept = operator("{{ var.value.folder }}", listener=listener, of_task={"task_id": listener.__name__})
        assert placement(kept).starts_on_worker_because is None
    own = operator("{{ var.value.folder }}", listener=Unhosted, of_task={"task_id": "own"})
    assert again in placement(own).starts_on_worker_because
    many = wait_for_events.override(task_id="many")(Watch, ["{{ var.value.folder }}"]).operator
    assert again in placement(many).starts_on_worker_because


class Unhosted(Listener):
    hosted = False


Unhosted.__module__ = "airflow_events.listeners.timer"


def test_what_may_add_to_the_events_of_outlets_runs_on_workers(dag):
    hooks = {"outlets": [Asset("orders")], "pre_execute": lambda context: None}
    assert "outlets, to whose events" in placement(operator(of_task=hooks)).finishes_on_worker_because
    without = operator(of_task={"task_id": "other", "pre_execute": lambda context: None})
    assert placement(without).finishes_on_worker_because is None


def test_a_subclass_may_set_a_template_field_of_its_own_last(dag):
    class Late(WaitForEventOperator):
        template_fields = (*WaitForEventOperator.template_fields, "note")

        def __init__(self, *, note, **arguments):
            super().__init__(**arguments)
            self.note = note

    late = Late(task_id="late", listener=Listener, note="{{ ti.xcom_pull('make') }}")
    assert "ti.xcom_pull" in placement(late).starts_on_worker_because


def test_the_dags_result_is_known_to_who_ends_the_wait():
    with DAG("d", schedule=None) as dag:
        operator().returns_dag_result = True  # as a function with @dag does that returns its output
        operator(of_task={"task_id": "other"})
    found = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    assert found.get_task("wait").returns_dag_result is True
    assert not getattr(found.get_task("other"), "returns_dag_result", False)
    assert EventTrigger(listener="m:L", dag_result=True).serialize()[1]["dag_result"] is True


async def test_a_param_without_a_value_would_end_the_triggerer(monkeypatch):
    with DAG("d", schedule=None, params={"given": 1, "order": Param(type="string")}) as dag:
        wait = operator(0)
    assert placement(wait).starts_on_worker_because == (
        "its param order has no default, and Airflow's triggerer crashes on it"
    )
    assert wait.start_from_trigger is False
    # Were it not so: an error that the runner does not expect, and does not survive.
    monkeypatch.setattr("airflow_events.operators.placement._params_without_value", lambda task: None)
    runner, workload = workload_of(dag, run_of(dag, Case("", conf={"order": "a"})))
    runner.to_create.append(workload)
    with pytest.raises(ValueError, match="No value passed"):
        await runner.create_triggers()


@task
def upstream(): ...


class Own(WaitForEventOperator):
    def execute(self, context):
        return super().execute(context)


class OwnEnd(WaitForEventOperator):
    def execute_complete(self, context, event):
        return super().execute_complete(context, event)


def on_success(context): ...


STARTS = {
    "output": (
        lambda: operator(upstream()),
        "its arguments hold the output of another task, or what is known at run time alone",
    ),
    "output in a dict in a list": (lambda: operator(a=[{"b": upstream()}]), "hold the output of another task"),
    "literal value": (lambda: operator(LiteralValue("{{ ds }}")), "hold the output of another task"),
    "run time": (lambda: operator(DAG("e", schedule=None).param("a", 1)), "hold the output of another task"),
    "default": (
        lambda: operator(0, of_task={"timeout": 1, "default": uuid.UUID(int=1)}),
        "its arguments or its default hold a value that a serialized DAG does not keep",
    ),
    "pre_execute": (
        lambda: operator(0, of_task={"pre_execute": lambda context: None}),
        "it has a pre_execute or an on_execute_callback, which only workers run",
    ),
    "on_execute_callback": (
        lambda: operator(0, of_task={"on_execute_callback": on_success}),
        "which only workers run",
    ),
    "execute of a subclass": (
        lambda: Own(task_id="wait", listener=Listener),
        "its class defines execute, which only workers call",
    ),
    "map_index_template": (
        lambda: operator(0, of_task={"map_index_template": "{{ ds }}"}),
        "it has a map_index_template, which only workers render",
    ),
    "max_active_tis_per_dag": (
        lambda: operator(0, of_task={"max_active_tis_per_dag": 1}),
        "it has a max_active_tis_per_dag or max_active_tis_per_dagrun, which are enforced only for workers",
    ),
    "max_active_tis_per_dagrun": (
        lambda: operator(0, of_task={"max_active_tis_per_dagrun": 1}),
        "which are enforced only for workers",
    ),
    "execution_timeout": (lambda: operator(0, of_task={"execution_timeout": timedelta(hours=1)}), None),
    "replay=False": (lambda: operator(0, of_task={"replay": False}), None),
    "outlets": (lambda: operator(0, of_task={"outlets": [Asset("a")]}), None),
    "pool": (lambda: operator(0, of_task={"pool": "small", "pool_slots": 3}), "it has a pool"),
    "param of the task with a schema": (
        lambda: operator(0, of_task={"params": {"limit": Param(5, type="integer")}}),
        "its param limit has a schema",
    ),
    "multiple outputs": (lambda: operator(0, of_task={"multiple_outputs": True}), None),
}


@pytest.mark.parametrize("name", STARTS)
def test_why_a_wait_starts_on_a_worker(dag, name):
    make, because = STARTS[name]
    found = placement(make()).starts_on_worker_because
    assert (because in found) if because else found is None


def test_queues_need_workers(dag, monkeypatch):
    monkeypatch.setenv("AIRFLOW__TRIGGERER__QUEUES_ENABLED", "True")
    assert placement(operator(0)) == Placement(
        "[triggerer] queues_enabled needs a queue, which the scheduler does not give to triggers", None
    )


ENDS = {
    "post_execute": (
        {"post_execute": lambda context, result: None},
        "it has a post_execute, which only workers run",
    ),
    "on_success_callback": (
        {"on_success_callback": [on_success]},
        "it has an on_success_callback, which only workers run",
    ),
    "on_skipped_callback": (
        {"on_skipped_callback": on_success, "soft_fail": True, "timeout": 1},
        "it has an on_skipped_callback, which only workers run",
    ),
    "on_skipped_callback, never skipped": ({"on_skipped_callback": on_success}, None),
    "no callbacks": ({"on_success_callback": []}, None),
    "on_failure_callback": ({"on_failure_callback": on_success, "on_retry_callback": on_success}, None),
    "outlets": ({"outlets": [Asset("a")]}, None),
    "multiple outputs": ({"multiple_outputs": True}, None),
    "replay=False": ({"replay": False}, None),
}


@pytest.mark.parametrize("name", ENDS)
def test_why_a_wait_finishes_on_a_worker(dag, name):
    of_task, because = ENDS[name]
    assert placement(operator(0, of_task=of_task)) == Placement(None, because)


def test_a_subclass_that_finishes_in_its_own_way_does_so_on_a_worker(dag):
    assert placement(OwnEnd(task_id="wait", listener=Listener)) == Placement(
        None, "its class defines execute_complete, which only workers call"
    )


def test_callbacks_of_the_dags_defaults_count():
    with DAG("d", schedule=None, default_args={"on_success_callback": on_success}):
        assert "on_success_callback" in placement(operator(0)).finishes_on_worker_because


async def test_a_wait_in_a_mapped_task_group_takes_its_arguments_from_the_mapping(monkeypatch):
    with DAG("d", schedule=None) as dag:

        @task_group
        def each(path, key):
            wait_for_event.override(task_id="wait")(Listener, [path], key=key)
            wait_for_events.override(task_id="waits")(Watch, path)
            wait_for_event.override(task_id="same")(Listener, "{{ ds }}")

        each.partial(key="k").expand(path=[["a"], ["b"]])
    wait = dag.get_task("each.wait")
    assert "what is known at run time alone" in placement(wait).starts_on_worker_because
    assert wait.start_from_trigger is False
    assert "what is known at run time alone" in placement(dag.get_task("each.waits")).starts_on_worker_because
    assert placement(dag.get_task("each.same")).starts_on_worker_because is None
    read = DagSerialization.from_dict(json.loads(json.dumps(DagSerialization.to_dict(dag))))
    assert read.get_task("each.wait").start_from_trigger is False
    # On a worker.
    ti = types.SimpleNamespace(map_index=1, run_id="r", task=wait, _upstream_map_indexes={})
    task = wait.prepare_for_execution()
    task.render_template_fields({"ti": ti, "run_id": "r", "task": task, "dag": dag}, dag.get_template_env())
    assert (task.listener_args, task.listener_kwargs) == ([[["b"]]], {"key": "k"})


def deferred(wait: Any) -> Any:
    """Let a worker that started a hundred seconds ago defer a wait, and return what it raises."""
    started = datetime.now(timezone.utc) - timedelta(seconds=100)
    ti = types.SimpleNamespace(dag_id="d", run_id="r", task_id="w", map_index=-1, max_tries=0, start_date=started)
    ti.xcom_pull = lambda **_: None
    store = types.SimpleNamespace(get=lambda key: None, set=lambda *args, **kwargs: None)
    context = {"ti": ti, "dag_run": types.SimpleNamespace(start_date=None), "task_state_store": store}
    with pytest.raises(TaskDeferred) as raised:
        wait._defer(context)
    return raised.value


def test_what_a_worker_has_rendered_is_shown_everywhere_as_that_worker_masks_it(dag, monkeypatch):
    """Of a connection's password that stands in an argument, a triggerer and an API server know nothing."""
    knows = lambda value, name: value.replace("of-a-connection", "***")  # noqa: E731
    monkeypatch.setattr("airflow_events.triggers.event.redact", knows)
    wait = operator(0).prepare_for_execution()
    wait.listener_args = ["https://shop/of-a-connection"]
    trigger = deferred(wait).trigger
    monkeypatch.undo()
    _, kwargs = trigger.serialize()
    assert kwargs["listener_args"] == ["https://shop/of-a-connection"]
    assert "'https://shop/***'" in EventTrigger(**kwargs)._call()
    assert "of-a-connection" not in str(arguments.read(Trigger.encrypt_kwargs(kwargs)))


class ReadOnce(Sequence):
    """As the outputs of a mapped task are, each of which a worker asks for, and nobody can when it has gone."""

    def __init__(self):
        self._items = [["a"], ["b"]]

    def __len__(self):
        return len(self._items)

    def __iter__(self):
        items, self._items = self._items, None
        return iter(items)

    def __getitem__(self, index):
        raise NotImplementedError


def test_the_outputs_of_a_mapped_task_are_read_once_and_before_the_wait_is_deferred(dag):
    """In ``dag.test()`` Airflow looks at the task again after that, and tells nobody outputs any more."""
    wait = operator(0).prepare_for_execution()
    wait.listener_args = [ReadOnce()]
    assert deferred(wait).trigger.listener_args == [[["a"], ["b"]]]
    assert wait.start_from_trigger
    waits = wait_for_events.override(task_id="waits")(Watch, [0]).operator.prepare_for_execution()
    waits.arguments = ReadOnce()
    assert deferred(waits).trigger.count == 2
    assert waits.start_from_trigger


@pytest.mark.parametrize("field", ["listener_args", "arguments"])
def test_a_look_at_where_a_wait_starts_reads_no_outputs(dag, field):
    """As ``dag.test()`` takes one after the last of the task, where nobody tells outputs any more."""
    make = wait_for_events if field == "arguments" else wait_for_event
    wait = make.override(task_id="wait")(Watch, [0]).operator.prepare_for_execution()
    unread = LazyXComSequence(xcom_arg=None, ti=None)
    setattr(wait, field, unread if field == "arguments" else [unread])
    assert not wait.start_from_trigger


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [
        ("listener_args", "drops", "is a list of positional arguments, not 'drops'"),
        ("listener_args", {"path": "drops"}, "is a list of positional arguments"),
        ("listener_args", None, "is a list of positional arguments, not None"),
        ("listener_kwargs", "drops", "is a mapping of named arguments, not 'drops'"),
    ],
)
def test_an_output_in_the_place_of_all_arguments_is_of_their_shape(dag, name, output, message):
    """A text would be taken apart, and its characters be the arguments."""
    wait = operator(0).prepare_for_execution()
    setattr(wait, name, output)
    with pytest.raises(TypeError, match=f"{name} {message}"):
        wait._defer({})


@pytest.mark.parametrize(
    ("of_task", "seconds"),
    [
        ({}, None),
        ({"execution_timeout": timedelta(seconds=160)}, 60),
        ({"execution_timeout": timedelta(seconds=160), "timeout": 10}, 60),
        ({"execution_timeout": timedelta(hours=2), "timeout": 10}, 310),
        ({"execution_timeout": timedelta(seconds=50)}, 0),
    ],
)
def test_execution_timeout_bounds_what_a_worker_defers_as_what_the_scheduler_does(dag, of_task, seconds):
    """See `TaskInstance.defer_task`; Airflow documents it as a bound of the whole, deferrals included."""
    left = deferred(operator(0, of_task=of_task)).timeout
    assert left == seconds if seconds is None else abs(left.total_seconds() - seconds) < 10


def test_the_log_names_the_reason_after_the_arguments_are_rendered_too(dag, capsys):
    wait = operator("{{ ti.xcom_pull('make') }}").prepare_for_execution()
    wait.listener_args = ["made"]
    deferred(wait)
    assert (
        "A worker begins this wait because its templates use ti.xcom_pull, which the triggerer"
        in capsys.readouterr().out
    )
    deferred(operator(0, of_task={"task_id": "other"}).prepare_for_execution())
    assert "A worker lets this wait go on; " in capsys.readouterr().out
