"""What can be sent to HTTP waits whose arguments are known only at run time, with DAGs as they are serialized."""

from __future__ import annotations

import json

import pytest
from airflow.sdk import DAG, task, task_group
from airflow.serialization.serialized_objects import DagSerialization
from airflow_events import wait_for_event
from airflow_events.api import sending
from airflow_events.api.refusals import TooEarly, Unfit
from airflow_events.listeners.http import HttpListener
from airflow_events.operators.wait_for_event import WaitForEventOperator

SCHEMA = {"type": "object", "required": ["order"], "properties": {"order": {"type": "integer"}}}


class WaitForApproval(WaitForEventOperator):
    """A user's own."""


@task
def make():
    return SCHEMA


def schema_of_a_task():
    wait_for_event.override(task_id="wait")(HttpListener, schema=make())


def arguments_of_a_task():
    WaitForEventOperator(task_id="wait", listener=HttpListener, listener_kwargs=make())


def in_a_mapped_group():
    @task_group
    def group(schema):
        wait_for_event.override(task_id="wait")(HttpListener, schema=schema)

    group.expand(schema=[SCHEMA, None])


def mapped():
    WaitForEventOperator.partial(task_id="wait", listener=HttpListener).expand(
        listener_kwargs=[{"key": "a", "schema": SCHEMA}]
    )


def mapped_over_a_task():
    WaitForEventOperator.partial(task_id="wait", listener=HttpListener).expand_kwargs(make())


def mapped_by_dictionaries():
    WaitForEventOperator.partial(task_id="wait", listener=HttpListener).expand_kwargs(
        [{"listener_kwargs": {"schema": SCHEMA}}]
    )


def mapped_with_a_schema_of_a_task():
    WaitForEventOperator.partial(task_id="wait", listener=HttpListener, listener_kwargs={"schema": make()}).expand(
        listener_args=[[]]
    )


def mapped_of_a_subclass():
    WaitForApproval.partial(task_id="wait", listener=HttpListener).expand(listener_kwargs=[{"schema": SCHEMA}])


def serialized(build):
    with DAG("shop", schedule=None) as dag:
        build()
    told = json.loads(json.dumps(DagSerialization.to_dict(dag)))
    task_id = "group.wait" if "group" in build.__name__ else "wait"
    return DagSerialization.from_dict(told).get_task(task_id)


EACH = pytest.mark.parametrize(
    "build",
    [
        schema_of_a_task,
        arguments_of_a_task,
        in_a_mapped_group,
        mapped,
        mapped_over_a_task,
        mapped_by_dictionaries,
        mapped_with_a_schema_of_a_task,
        mapped_of_a_subclass,
    ],
    ids=lambda build: build.__name__,
)


@EACH
def test_once_it_has_begun_its_own_schema_counts(http, build):
    wait = http.add(schema=SCHEMA, map_index=0 if "mapped" in build.__name__ else -1)
    http.tasks[wait.task_id] = serialized(build)
    with pytest.raises(Unfit):
        sending.send(http.session, wait, {"nonsense": 1}, by="ada")
    assert sending.send(http.session, wait, {"order": 1}, by="ada").status == "delivered"


@EACH
def test_before_it_has_begun_nothing_is_taken_for_it(http, build):
    wait = http.add(state="scheduled", schema=SCHEMA, map_index=0 if "mapped" in build.__name__ else -1)
    http.tasks[wait.task_id] = serialized(build)
    with pytest.raises(TooEarly):
        sending.send(http.session, wait, {"nonsense": 1}, by="ada")
