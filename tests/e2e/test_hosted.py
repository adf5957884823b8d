"""Waits that share a trigger, in a real Airflow: one row, one anchor, and what becomes of them when that goes."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from redis import Redis
from sqlalchemy import create_engine, select

from deployment import until

TASKS = tuple(f"wait_{number}" for number in range(6))
HOST = "airflow_events.triggers.host.HostTrigger"


@pytest.fixture
def triggers(airflow):
    """Read which triggers the task instances of a run have, and of what class they are."""
    engine = create_engine(airflow.environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"])

    def read(run):
        query = (
            select(TaskInstance.task_id, Trigger.classpath)
            .join(Trigger, Trigger.id == TaskInstance.trigger_id)
            .where(TaskInstance.run_id == run.run_id, TaskInstance.state == "deferred")
        )
        with engine.connect() as connection:
            return {row.task_id: row.classpath for row in connection.execute(query)}

    yield read
    engine.dispose()


@pytest.fixture
def run(airflow, inbox, tmp_path, triggers):
    """A run whose waits have all joined their host and are polled for."""
    run = airflow.run("hosted", {"base": str(tmp_path), "of": tmp_path.name})
    for task in TASKS:
        until(
            lambda task=task: (row := inbox(run, task)) and row.host and row.generation == 2, f"{task} is hosted"
        )
    until(lambda: set(triggers(run)) <= {*TASKS}, "the wait that fails has no trigger")
    yield run
    for task in TASKS:  # of a test that failed: the next one's would have its host
        if run.task_state(task) == "deferred":
            run.mark(task, "failed")


def drop(tmp_path, number):
    (tmp_path / f"{tmp_path.name}-{number}").write_text("here")


def test_they_have_one_trigger_and_each_gets_its_event(airflow, run, tmp_path, triggers):
    """Also after a SIGKILL of the triggerer, and of the API server as the anchor ends."""
    [(anchor, kind)] = triggers(run).items()
    assert kind == HOST
    other = next(task for task in TASKS if task != anchor)
    drop(tmp_path, other[-1])
    run.until_task(other, "success")
    assert triggers(run) == {anchor: HOST}

    airflow.components["triggerer"].kill()
    assert not airflow.components["triggerer"].alive
    drop(tmp_path, anchor[-1])
    airflow.restart("triggerer")
    run.until_task(anchor, "success")
    [(heir, kind)] = triggers(run).items()
    assert kind == HOST and heir not in (anchor, other)

    airflow.components["api-server"].kill()
    for task in TASKS:
        drop(tmp_path, task[-1])
    airflow.restart("api-server")
    until(airflow.answers, "the API server answers")
    for task in TASKS:
        run.until_task(task, "success")
        assert run.worker_starts(task) == 0
    assert run.xcom(anchor)["name"] == f"{tmp_path.name}-{anchor[-1]}"
    until(lambda: not triggers(run), "nobody has it any more")


def test_those_that_watch_a_log_rest_and_each_gets_its_message_whatever_is_killed(
    airflow, inbox, log_server, tmp_path
):
    """The triggerer is killed before a message comes, and as others come; the log says that nothing is gone."""
    stream = tmp_path.name
    with Redis(port=log_server.port) as client:

        def send(number):
            client.xadd(stream, {"data": json.dumps({"n": number})})

        send(99)  # nobody's, so that the stream is there
        run = airflow.run("log", {"stream": stream})
        for task in TASKS:
            until(lambda task=task: (row := inbox(run, task)) and row.host, f"{task} is hosted")
        page = f"{airflow.url}/events/api/waits?stage=open&run_id={quote(run.run_id)}&limit=50"

        def shared_by():
            return {wait["shared_by"] for wait in airflow.request("GET", page, None)["waits"]}

        until(lambda: shared_by() == {len(TASKS)}, "the host polls for all of them")
        # What rests has not begun again with its host.
        assert sorted(inbox(run, task).generation for task in TASKS)[:-1] == [1] * (len(TASKS) - 1)

        airflow.components["triggerer"].kill()
        assert not airflow.components["triggerer"].alive
        send(0)
        airflow.restart("triggerer")
        run.until_task("wait_0", "success")
        for number in range(1, 5):
            send(number)
        airflow.components["triggerer"].kill()
        assert not airflow.components["triggerer"].alive
        airflow.restart("triggerer")
        send(5)
        for number, task in enumerate(TASKS):
            run.until_task(task, "success")
            assert run.xcom(task)["value"] == {"n": number}
            assert run.worker_starts(task) == 0
        assert (client.xlen(stream), client.xinfo_groups(stream)) == (7, [])


@pytest.mark.parametrize("end", ["clear", "mark"])
def test_where_the_anchor_goes_another_is_found(airflow, run, tmp_path, triggers, inbox, end):
    [(anchor, _)] = triggers(run).items()
    if end == "clear":
        run.clear(anchor)
        until(lambda: inbox(run, anchor).generation >= 4 and inbox(run, anchor).host, "it has joined again")
    else:
        run.mark(anchor, "failed")
    until(lambda: list(triggers(run).values()) == [HOST], "there is a host again")
    for task in TASKS:
        drop(tmp_path, task[-1])
    for task in TASKS:
        run.until_task(task, "failed" if (task, end) == (anchor, "mark") else "success")


def test_a_poll_that_raises_fails_its_own_wait_alone(airflow, run, inbox, triggers):
    assert run.until_task("fails", "failed") == "failed"
    log = run.logs("fails", "attempt=1.log")  # of the worker that failed it
    assert "Trigger failed" in log and "Traceback (most recent call last)" in log and "settle" in log
    assert list(triggers(run).values()) == [HOST]
    assert {run.task_state(task) for task in TASKS} == {"deferred"}
    for task in TASKS:
        run.mark(task, "failed")


def test_a_source_that_cannot_be_reached_is_said_of_each_wait(airflow, run, tmp_path):
    """And where the host's log is, since a task's own log cannot have it."""
    page = f"{airflow.url}/events/api/waits?stage=open&run_id={quote(run.run_id)}&limit=50"

    def waits():
        listed = airflow.request("GET", page, None)["waits"]
        return {wait["task_id"]: wait for wait in listed if wait["task_id"] in TASKS}

    until(lambda: [bool(wait["log_of"]) for wait in waits().values()] == [True] * 6, "it says where its log is")
    assert {wait["trouble"] for wait in waits().values()} == {None}
    away = tmp_path.with_name(f"{tmp_path.name}-away")
    tmp_path.rename(away)
    until(lambda: all(wait["trouble"] for wait in waits().values()), "it is said")
    assert "cannot be reached; trying again" in waits()["wait_1"]["trouble"]
    assert ", try 1" in waits()["wait_1"]["log_of"]
    away.rename(tmp_path)
    until(lambda: not any(wait["trouble"] for wait in waits().values()), "it is said no more")
    for task in TASKS:
        drop(tmp_path, task[-1])
    for task in TASKS:
        run.until_task(task, "success")
