"""The DAGs of the tests of what one DAG sends another."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, task
from airflow_events import EventHook, send_event, wait_for_event
from airflow_events.listeners.http import HttpListener

SOON = timedelta(seconds=1)


def fails_once(context, result=None):
    if context["ti"].try_number == 1:
        raise RuntimeError("the event is sent, and this try dies")


@task(retries=3, retry_delay=SOON)
def gather(*events):
    return list(events)


with DAG("sends_waits", schedule=None, catchup=False, params={"key": "nobody"}):
    gather(wait_for_event.override(task_id="wait", retry_delay=SOON)(HttpListener, key="{{ params.key }}"))

with DAG("sends", schedule=None, catchup=False, params={"key": "nobody"}):
    operator = send_event.override(task_id="operator", retry_delay=SOON, post_execute=fails_once)(
        "{{ params.key }}", {"run": "{{ run_id }}", "by": "operator"}
    )

    @task(retries=3, retry_delay=SOON)
    def hook(params=None, ti=None):
        sent = []
        for number in (1, 2):
            sent.append(EventHook().send(params["key"], {"by": "hook", "number": number}))
            if ti.try_number == number:  # each try gets one event further than the one before
                raise RuntimeError("the event is sent, and this try dies")
        return sent

    operator >> hook()
