"""The DAGs of the end-to-end tests. Each run has a folder of its own, ``base`` in its conf."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pendulum
from airflow.sdk import DAG, Asset, task
from airflow_events import EventListener, current_wait, wait_for_event
from airflow_events.listeners.http import HttpListener
from airflow_events.listeners.timer import TimerListener
from airflow_events.operators.wait_for_event import WaitForEventOperator
from beside import BesideListener
from probes import FailingCommit, GatedDirectory, LeasedQueue, Scripted, lay_down

BASE = "{{ params.base }}"
SOON = timedelta(seconds=1)


DAGS = {}


def dag(dag_id, **kwargs):
    DAGS[dag_id] = DAG(dag_id, schedule=None, catchup=False, params={"base": "/nonexistent"}, **kwargs)
    return DAGS[dag_id]


@task(retries=3, retry_delay=SOON)
def deliver(event, params=None, run_id=None, ti=None):
    """Note what downstream got, once for each run and try of the wait's delivery."""
    folder = Path(params["base"], "delivered")
    folder.mkdir(exist_ok=True)
    lay_down(folder / f"{run_id}.{ti.try_number}", event)
    return event


@task
def base(params=None):
    return params["base"]


def wait(listener, *args, **operator_arguments):
    return wait_for_event.override(task_id="wait", retry_delay=SOON, **operator_arguments)(listener, *args)


with dag("finish_in_triggerer"):
    deliver(wait(GatedDirectory, BASE))

with dag("leased"):
    deliver(wait(LeasedQueue, BASE))

with dag("begins_on_worker"):
    deliver(wait(GatedDirectory, base()))

with dag("anew_after_clear"):
    deliver(wait(GatedDirectory, BASE, replay=False))

with dag("with_outlet"):
    deliver(wait(GatedDirectory, BASE, outlets=[Asset("events_test_asset")]))

with dag("outputs"):
    deliver(wait(Scripted, BASE, {"a": 1, "b": [2]}, multiple_outputs=True))

with dag("failing_commit"):
    deliver(wait(FailingCommit, BASE))

with dag("poll_fails_first"):
    deliver(wait(Scripted, BASE, {"raise": "the source says no"}, "second poll"))

with dag("unserializable", default_args={"retries": 0}):
    deliver(wait(Scripted, BASE, "unserializable"))

with dag("blocks"):
    deliver(wait(Scripted, BASE, {"block": 0.7}))

with dag("stubborn"):
    deliver(wait(Scripted, BASE, "stubborn"))

with dag("of_outputs_of_a_mapped_task"):

    @task
    def number(n):
        return n

    deliver(wait(Scripted, BASE, number.expand(n=[1, 2, 3])))


def note_the_skip(context):
    Path(context["params"]["base"], "skipped").touch()


with dag("skipped"):
    skipped = {"timeout": 2, "soft_fail": True, "on_skipped_callback": note_the_skip}
    deliver(wait(Scripted, BASE, "file", **skipped))

with dag("sent_to"):
    deliver(wait(HttpListener, "sent"))

with dag("of_a_file"):
    deliver(wait(Scripted, BASE, "file"))

with dag("time_out"):
    skips = wait_for_event.override(task_id="skips", timeout=2, soft_fail=True)(Scripted, BASE, "file")
    defaults = wait_for_event.override(task_id="defaults", timeout=2, default={"none": None})(
        Scripted, BASE, "file"
    )
    from_worker = wait_for_event.override(task_id="from_worker", timeout=2, default="late")(
        Scripted, base(), "file"
    )

    @task(trigger_rule="all_done")
    def see(a, b, c):
        return [a, b, c]

    see(skips, defaults, from_worker)

with dag("time_out_fails"):
    wait(Scripted, BASE, "file", timeout=2)

with dag("time_out_later"):
    wait(Scripted, BASE, "file", timeout=8, soft_fail=True)

with dag("time_out_over_tries"):
    wait(Scripted, BASE, {"raise_after": 2}, retries=9, timeout=9)

with dag("execution_time_out"):
    wait(Scripted, BASE, "file", execution_timeout=timedelta(seconds=2), retries=0)

with dag("synchronous"):
    wait(Scripted, BASE, "variable")

with dag("shapes"):
    value = {"list": [1, 2.5, None], "when": datetime(2030, 1, 1, tzinfo=pendulum.UTC), "pair": (1, 2)}

    @task
    def kinds(event):
        return [type(event).__name__, type(event["when"]).__name__, type(event["pair"]).__name__]

    @task
    def one(item):
        return item

    @task
    def is_none(event):
        return event is None

    kinds(wait_for_event.override(task_id="in_triggerer")(Scripted, BASE, value))
    kinds.override(task_id="kinds_of_worker")(
        wait_for_event.override(task_id="on_worker")(Scripted, base(), value)
    )
    one.expand(item=wait_for_event.override(task_id="list_in_triggerer")(Scripted, BASE, ["a", "b"]))
    one.override(task_id="one_of_worker").expand(
        item=wait_for_event.override(task_id="list_on_worker")(Scripted, base(), ["c", "d", "e"])
    )
    is_none(wait_for_event.override(task_id="none_in_triggerer")(Scripted, BASE, None))


class InTheDagFile(EventListener):
    """Not importable anywhere else; it commits, to tell what it was given."""

    def __init__(self):
        self.polled = False

    async def poll_for_event(self, path, *, suffix):
        self.polled = True
        return {"path": path + suffix, "wait": current_wait().id}

    async def event_checkpointed(self, event):
        Path(event["path"]).write_text(f"committed, polled by this instance: {self.polled}")


with dag("own_listeners"):
    deliver(wait_for_event.override(task_id="wait")(InTheDagFile, BASE, suffix="/marker"))
    wait_for_event.override(task_id="beside")(BesideListener, f"{BASE}/beside")
    WaitForEventOperator.partial(task_id="mapped", listener=Scripted).expand(
        listener_args=[[BASE, "x"], [BASE, {"y": 1}]]
    )
    WaitForEventOperator.partial(task_id="mapped_timer", listener=TimerListener).expand(
        listener_args=[[0], [timedelta(seconds=1)]]
    )

with dag("timers", start_date=pendulum.datetime(2026, 1, 1, tz="Europe/Berlin")):
    events = {
        "past": 86400,
        "iso": "2026-01-01T12:00:00+02:00",
        "naive": datetime(2026, 1, 1, 12),
        "naive_iso": "2026-07-01T12:00",
        "after_start": timedelta(seconds=2),
        "duration": "PT1S",
        "template": "{{ dag_run.run_after }}",
    }

    @task
    def gather(*moments):
        return [moment.isoformat() for moment in moments]

    gather(*[wait_for_event.override(task_id=name)(TimerListener, when) for name, when in events.items()])

with dag("siblings"):

    @task
    def slow(path):
        import time

        time.sleep(3)
        return path

    @task
    def together(*events):
        return list(events)

    together(
        wait_for_event.override(task_id="first")(Scripted, BASE, "event"),
        wait_for_event.override(task_id="second")(Scripted, slow(base()), "after the sibling"),
    )
