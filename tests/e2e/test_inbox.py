"""The inbox in a real Airflow: what a user sees of waits without a worker, also while the API server is down."""

from __future__ import annotations

import time
from urllib.parse import quote

from sqlalchemy import create_engine, text

from deployment import Run, until


def heard(airflow, run, task_id="wait"):
    """What Airflow's listeners were told of a task instance (tests/plugins/listening.py)."""
    notes = airflow.home / "heard" / f"{run.dag_id} {run.run_id} {task_id} -1"
    return notes.read_text().split() if notes.exists() else []


def test_airflows_listeners_hear_of_what_no_worker_ends(airflow, base):
    """A plugin that listens to task states costs no wait a worker, and misses none."""
    base.drop("a")
    run = airflow.run("finish_in_triggerer", base.conf)
    assert run.finished() == "success"
    assert run.worker_starts("wait") == 0
    until(lambda: heard(airflow, run) == ["success"], "the listener is told once")
    skipping = airflow.run("time_out", base.conf)
    assert skipping.finished() == "success"
    until(lambda: heard(airflow, skipping, "skips") == ["skipped"], "the listener is told of the skip")


def test_the_arguments_are_shown_as_they_were_rendered(airflow, base, inbox):
    run = airflow.run("finish_in_triggerer", base.conf)
    until(lambda: inbox(run), "the wait has begun")
    assert inbox(run).call == f"GatedDirectory('{base.path}')"
    shown = airflow.api("GET", f"{run.path}/taskInstances/wait")["rendered_fields"]
    assert shown == {"listener_args": [str(base.path)], "listener_kwargs": {}}
    run.mark("wait", "failed")


def test_multiple_outputs_are_pushed_without_a_worker(airflow, base):
    run = airflow.run("outputs", base.conf)
    assert run.finished() == "success"
    assert (run.xcom("wait"), run.xcom("wait", "a"), run.xcom("wait", "b")) == ({"a": 1, "b": [2]}, 1, [2])
    assert run.worker_starts("wait") == 0


def test_a_user_sees_the_end_in_the_audit_log_and_the_duration(airflow, base):
    base.drop("a")
    run = airflow.run("finish_in_triggerer", base.conf)
    assert run.finished() == "success"
    task = run.tasks()["wait"]
    assert task["duration"] > 0 and task["end_date"] >= task["start_date"]
    events = airflow.api("GET", f"/eventLogs?dag_id={run.dag_id}&run_id={quote(run.run_id)}&task_id=wait")
    assert [entry["event"] for entry in events["event_logs"]].count("success") == 1


def test_a_wait_begins_and_gets_its_event_while_the_api_server_is_away(airflow, terminal, base, inbox):
    """It says in its log what it waits for, keeps its event, and ends by itself when the server is there again."""
    engine = create_engine(airflow.environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"])
    airflow.components["api-server"].kill()
    run = Run(airflow, "finish_in_triggerer", "while-away")
    conf = f'{{"base": "{base.path}"}}'
    terminal("dags", "trigger", run.dag_id, "--run-id", run.run_id, "--conf", conf)

    def state():
        with engine.connect() as connection:
            query = text("SELECT state FROM task_instance WHERE run_id = :run AND task_id = 'wait'")
            return connection.execute(query, {"run": run.run_id}).scalar()

    until(lambda: state() == "deferred", "the wait is started")
    base.drop("a")
    until(lambda: "cannot be reached" in run.logs("wait"), "its log says so")
    time.sleep(5)
    log = run.logs("wait")
    assert log.count("cannot be reached") == 1  # one line, not one for each attempt
    assert airflow.url in log
    assert base.calls == []  # it has not begun, so it has not polled
    assert inbox(run) is None
    airflow.restart("api-server")
    until(airflow.answers, "the API server answers")
    assert run.finished() == "success"
    assert base.archived == ["a"]
    assert run.worker_starts("wait") == 0
    # The host's trigger, which is anchored to it, has a log of its own in the place of the one before.
    assert "Waiting for an event of GatedDirectory" in run.logs("wait")
    engine.dispose()


def test_an_event_that_comes_while_the_api_server_is_away_stays_at_its_source(airflow, base, inbox):
    run = airflow.run("finish_in_triggerer", base.conf)
    until(lambda: [call for call in base.calls if call.startswith("poll")], "it polls")
    airflow.components["api-server"].kill()
    base.drop("a")
    until(lambda: "cannot be reached" in run.logs("wait"), "it has the event, and cannot record it")
    assert (base.waiting, base.archived) == (["a"], [])
    assert inbox(run).phase is None
    airflow.restart("api-server")
    until(airflow.answers, "the API server answers")
    assert run.finished() == "success"
    assert base.archived == ["a"]
