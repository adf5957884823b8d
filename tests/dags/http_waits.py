"""The DAGs of the tests of HTTP events."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Asset, task
from airflow_events import callback_url, wait_for_event
from airflow_events.listeners.http import HttpListener
from airflow_events.listeners.timer import TimerListener
from airflow_events.operators.wait_for_event import WaitForEventOperator

SOON = timedelta(seconds=1)
ORDER = {"type": "object", "required": ["order"], "properties": {"order": {"type": "integer"}}}


def afterwards(context, result=None):
    """What only workers run."""


def wait(task_id, *args, **kwargs):
    operator_arguments = kwargs.pop("of_task", {})
    override = wait_for_event.override(task_id=task_id, retry_delay=SOON, **operator_arguments)
    return override(HttpListener, *args, **kwargs)


@task(retries=3, retry_delay=SOON)
def key(params=None):
    return params["key"]


@task(retries=3, retry_delay=SOON)
def gather(*events):
    # What a mapped task returned is a sequence that reads as it goes.
    return [event if isinstance(event, (str, int, dict, list)) else list(event) for event in events]


@task(retries=3, retry_delay=SOON)
def one(item):
    return item


with DAG("http", schedule=None, catchup=False, params={"key": "nobody"}):
    plain = wait("plain")
    later = wait("later", schema=ORDER)
    mapped = WaitForEventOperator.partial(task_id="mapped", listener=HttpListener, retry_delay=SOON).expand(
        listener_kwargs=[{"key": "{{ params.key }}"}, {"schema": ORDER}]
    )
    over = wait("over")
    plain >> later
    one.expand(item=over)
    gather(
        plain,
        later,
        wait("starts_on_worker", key=key()),
        wait("finishes_on_worker", of_task={"post_execute": afterwards}),
        wait("with_outlet", of_task={"outlets": [Asset("http_events_test")]}),
        mapped.output,
    )

with DAG("http_one", schedule=None, catchup=False, params={"key": "nobody"}):
    gather(wait("wait", "{{ params.key }}"))

with DAG("http_ends_on_worker", schedule=None, catchup=False):
    gather(wait("wait", of_task={"post_execute": afterwards}))

with DAG("http_anew", schedule=None, catchup=False):
    gather(wait("wait", of_task={"replay": False}))

with DAG("http_partner", schedule=None, catchup=False):
    # The wait begins at once; those who are invited have no account.
    one.override(task_id="invited")("{{ macros.airflow_events.callback_url(ti, 'wait', expires_in=600) }}")
    one.override(task_id="too_late")("{{ macros.airflow_events.callback_url(ti, 'wait', expires_in=0.1) }}")

    @task
    def invited_by_task(ti=None):
        address = callback_url(ti, "wait")
        print("The address is", address)
        return address

    invited_by_task()
    gather(wait("wait"))

with DAG("http_strict", schedule=None, catchup=False, params={"key": "nobody"}):
    gather(wait("wait", key="{{ params.key }}", schema=ORDER))

with DAG("http_time_out", schedule=None, catchup=False):
    gather(wait("wait", of_task={"timeout": 2, "default": "late"}))


with DAG("parked", schedule=None, catchup=False, params={"due": "", "key": "parked"}):
    wait_for_event.override(task_id="timer")(TimerListener, "{{ params.due }}")
    wait("event", key="{{ params.key }}")
    wait("skips", of_task={"timeout": 45, "soft_fail": True})
    wait("default", of_task={"timeout": 45, "default": {"of": "default"}})
    wait("late", of_task={"timeout": 45})
