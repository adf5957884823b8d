"""What a user sees of waits that end as they should, and of those that cannot."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from datetime import datetime
from urllib.parse import quote

import pytest
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from sqlalchemy import create_engine, delete, insert, select, update

from deployment import until

# Their runs need nothing of a test, and begin together, since each of them mostly waits.
BY_THEMSELVES = (
    "of_outputs_of_a_mapped_task", "shapes", "timers", "unserializable", "time_out", "time_out_fails",
    "execution_time_out", "synchronous",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def begun(airflow, new_base):
    """Return the run of one of these DAGs; before the first test, since they take a while together."""
    return {dag: airflow.run(dag, new_base(dag).conf) for dag in BY_THEMSELVES}.__getitem__


@pytest.mark.parametrize(
    ("dag", "workers"),
    [
        ("finish_in_triggerer", 0),
        ("begins_on_worker", 1),
        pytest.param("leased", 0, marks=pytest.mark.release),
        pytest.param("with_outlet", 0, marks=pytest.mark.release),
    ],
)
def test_an_event_is_delivered_once_with_as_many_workers_as_are_needed(airflow, base, dag, workers):
    run = airflow.run(dag, base.conf)
    run.until_task("wait", "deferred")
    base.drop("a")
    base.send("a")
    assert run.finished() == "success"
    assert run.worker_starts("wait") == workers
    assert len(base.delivered) == 1
    if dag == "leased":
        assert base.owners == {"a": f"{dag}/{run.run_id}/wait/-1"}
    else:
        assert (base.archived, base.waiting) == (["a"], [])


def test_what_is_to_be_called_for_a_skip_is_called(airflow, base):
    run = airflow.run("skipped", base.conf)
    assert run.finished() == "success"
    assert run.task_state("wait") == "skipped"
    assert (base.path / "skipped").exists()


def test_the_first_line_of_the_log_says_what_is_waited_for(airflow, base):
    run = airflow.run("finish_in_triggerer", base.conf)
    run.until_task("wait", "deferred")
    first = until(lambda: [line for line in run.logs("wait").splitlines() if "Waiting" in line], "the log's line")[
        0
    ]
    assert f"Waiting for an event of GatedDirectory('{base.path}') since 20" in first
    assert f"the wait is finish_in_triggerer/{run.run_id}/wait/-1" in first
    base.drop("a")
    assert run.finished() == "success"


def test_runs_that_wait_at_once_get_an_event_each(airflow, base):
    runs = [airflow.run("finish_in_triggerer", base.conf) for _ in range(5)]
    for run in runs:
        run.until_task("wait", "deferred")
    base.drop(*"abcde")
    assert [run.finished() for run in runs] == ["success"] * 5
    assert base.archived == list("abcde")
    assert sorted(json.loads(event)["name"] for event in base.delivered.values()) == list("abcde")


def test_a_wait_runs_whose_trigger_has_the_number_of_one_that_is_gone(airflow, base, inbox):
    """SQLite gives it to the next one; and another triggerer may have deleted it, before this one has looked."""
    engine = create_engine(airflow.environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"])
    tasks, triggers = TaskInstance.__table__, Trigger.__table__
    number = select(tasks.c.trigger_id).where(tasks.c.task_id == "wait")
    first = airflow.run("finish_in_triggerer", base.conf)
    until(lambda: (row := inbox(first)) and row.host and row.generation == 2, "its host polls for it")
    with engine.connect() as connection:
        gone = connection.scalar(number.where(tasks.c.run_id == first.run_id))
    triggerer = airflow.components["triggerer"]
    airflow.freeze(triggerer, alone=True)
    try:
        base.drop("a")
        until(lambda: first.task_state("wait") == "success", "the first one ends")
        second = airflow.run("finish_in_triggerer", base.conf)
        second.until_task("wait", "deferred")
        with engine.begin() as connection:  # what SQLite does by itself
            new = connection.scalar(number.where(tasks.c.run_id == second.run_id))
            if new != gone:
                [row] = connection.execute(select(triggers).where(triggers.c.id == new)).mappings()
                connection.execute(delete(triggers).where(triggers.c.id == gone))
                connection.execute(insert(triggers).values(**{**row, "id": gone, "triggerer_id": None}))
                connection.execute(update(tasks).where(tasks.c.trigger_id == new).values(trigger_id=gone))
                connection.execute(delete(triggers).where(triggers.c.id == new))
    finally:
        triggerer.signal(signal.SIGCONT)
        engine.dispose()
    base.drop("b")
    assert second.finished() == "success"


def test_an_outlet_is_registered(airflow, base):
    base.drop("a")
    run = airflow.run("with_outlet", base.conf)
    assert run.finished() == "success"
    events = airflow.api("GET", f"/assets/events?source_dag_id=with_outlet&source_run_id={quote(run.run_id)}")
    assert events["total_entries"] == 1


def test_the_outputs_of_a_mapped_task_are_a_list(begun):
    run = begun("of_outputs_of_a_mapped_task")
    assert run.finished() == "success"
    assert run.xcom("wait") == [1, 2, 3]


def test_shapes_survive_every_way_and_can_be_mapped_over(begun):
    run = begun("shapes")
    assert run.finished() == "success"
    assert run.xcom("kinds") == run.xcom("kinds_of_worker") == ["dict", "datetime", "tuple"]
    tasks = run.tasks()
    assert {t for t in tasks if t.startswith("one[")} == {"one[0]", "one[1]"}
    assert {t for t in tasks if t.startswith("one_of_worker[")} == {f"one_of_worker[{n}]" for n in range(3)}
    assert [run.xcom("one", map_index=n) for n in range(2)] == ["a", "b"]
    assert run.xcom("is_none") is True
    assert run.worker_starts("in_triggerer") == run.worker_starts("list_in_triggerer") == 0


def test_listeners_of_the_dag_file_and_beside_it(airflow, base):
    run = airflow.run("own_listeners", base.conf)
    run.until_task("beside", "deferred")
    (base.path / "beside").write_text("you")
    assert run.finished() == "success"
    assert run.xcom("wait") == {"path": f"{base.path}/marker", "wait": f"own_listeners/{run.run_id}/wait/-1"}
    # The instance that commits is not the one that polled.
    assert (base.path / "marker").read_text() == "committed, polled by this instance: False"
    assert run.xcom("beside") == "hello you"
    assert [run.xcom("mapped", map_index=n) for n in range(2)] == ["x", {"y": 1}]
    assert [run.worker_starts(f"mapped_timer[{n}]") for n in range(2)] == [1, 1]


def test_timers(begun):
    """Moments of all kinds; a timedelta counts from the start of the run, not from the parsing of the DAG."""
    run = begun("timers")
    assert run.finished() == "success"
    about = run.deployment.api("GET", run.path)
    start = datetime.fromisoformat(about["start_date"].replace("Z", "+00:00"))
    after = about["run_after"].replace("Z", "+00:00")
    past, iso, naive, naive_iso, after_start, duration, template = run.xcom("gather")
    assert past == "1970-01-02T00:00:00+00:00"
    assert iso == "2026-01-01T10:00:00+00:00"
    assert naive == "2026-01-01T11:00:00+00:00"
    assert naive_iso == "2026-07-01T10:00:00+00:00"
    assert (datetime.fromisoformat(after_start) - start).total_seconds() == pytest.approx(2, abs=0.001)
    assert (datetime.fromisoformat(duration) - start).total_seconds() == pytest.approx(1, abs=0.001)
    assert datetime.fromisoformat(template) == datetime.fromisoformat(after)
    assert all(run.worker_starts(task) == 0 for task in run.tasks() if task != "gather")


def test_an_event_that_comes_while_a_sibling_still_runs_is_kept(airflow, base):
    run = airflow.run("siblings", base.conf)
    run.until_task("first", "success")
    assert run.task_state("second") in (None, "scheduled", "queued")  # its arguments are not there yet
    assert run.finished() == "success"
    assert run.xcom("together") == ["event", "after the sibling"]


def test_a_poll_that_fails_shows_its_traceback_and_is_tried_again(airflow, base):
    run = airflow.run("poll_fails_first", base.conf)
    assert run.finished() == "success"
    assert run.xcom("wait") == "second poll"
    log = run.logs("wait")
    assert "RuntimeError: the source says no" in log
    assert "probes.py" in log
    assert base.polls == 2


def test_an_event_that_cannot_be_stored_fails_the_wait_before_anything_is_committed(begun, inbox):
    run = begun("unserializable")
    assert run.finished() == "failed"
    log = run.logs("wait")
    assert "event['order']['lines'][1] cannot be delivered" in log
    assert "builtins.object" in log or "a object" in log
    assert inbox(run).phase is None


def test_a_listener_that_blocks_the_loop_is_named(airflow, base):
    run = airflow.run("blocks", base.conf)
    assert run.finished() == "success"
    assert "Scripted.poll_for_event has blocked the triggerer for 0." in run.logs("wait")


def test_a_commit_that_fails_is_tried_again_and_the_next_try_of_the_task_only_commits(airflow, base):
    (base.path / "failures").write_text("9")  # more than fit into one try's commit_timeout
    base.send("m")
    run = airflow.run("failing_commit", base.conf)
    assert run.finished() == "success"
    tries = run.tasks()["wait"]["try_number"]
    assert tries >= 2
    log = run.logs("wait")
    assert "event_checkpointed failed for the wait" in log
    assert "ConnectionError" in log
    assert "the source is unreachable" in log
    assert "CommitFailed" in log
    assert len([call for call in base.calls if call.startswith("poll")]) == 1
    assert base.owners == {"m": f"failing_commit/{run.run_id}/wait/-1"}
    assert len(base.delivered) == 1


def test_when_the_time_is_over(begun):
    run = begun("time_out")
    assert run.finished() == "success"
    tasks = run.tasks()
    assert tasks["skips"]["state"] == "skipped"
    assert (tasks["defaults"]["state"], run.xcom("defaults")) == ("success", {"none": None})
    assert (tasks["from_worker"]["state"], run.xcom("from_worker")) == ("success", "late")
    assert run.worker_starts("skips") == run.worker_starts("defaults") == 0
    assert run.xcom("see") == [None, {"none": None}, "late"]


def test_a_time_out_fails_as_a_sensors_and_is_not_tried_again(begun):
    run = begun("time_out_fails")
    assert run.finished() == "failed"
    assert run.tasks()["wait"]["try_number"] == 1
    log = run.logs("wait")
    assert "AirflowSensorTimeout" in log
    assert "No event of Scripted came until" in log


def test_retries_do_not_extend_the_time(airflow, base):
    run = airflow.run("time_out_over_tries", base.conf)
    assert run.finished() == "failed"
    assert 2 <= run.tasks()["wait"]["try_number"] <= 4
    assert "AirflowSensorTimeout" in run.logs("wait")


def test_a_clear_starts_the_time_again(airflow, base, inbox):
    run = airflow.run("time_out_later", base.conf)
    run.until_task("wait", "deferred")
    until(lambda: (row := inbox(run)) and row.deadline, "the wait has begun")
    run.mark("wait", "success")
    deadline = inbox(run).deadline
    run.finished()
    run.clear("wait")
    run.until_task("wait", "skipped")
    assert inbox(run).deadline > deadline
    assert run.logs("wait").count("No event came until") == 1


def test_the_tasks_execution_timeout_is_not_taken_for_the_waits(begun):
    run = begun("execution_time_out")
    assert run.finished() == "failed"
    log = run.logs("wait")
    assert "TaskDeferralTimeout" in log
    assert "AirflowSensorTimeout" not in log


def test_a_listener_may_use_airflows_synchronous_calls(begun):
    run = begun("synchronous")
    assert run.finished() == "success"
    assert run.xcom("wait") == "from the default"


def test_a_clear_after_a_default_waits_anew(airflow, base):
    run = airflow.run("time_out", base.conf)
    run.finished()
    run.clear("defaults")
    run.until_task("defaults", "deferred")
    (base.path / "event").write_text("an event, this time")
    run.until_task("defaults", "success")
    assert run.xcom("defaults") == "an event, this time"


def test_a_listener_that_returns_after_its_wait_was_marked_delivers_nothing(airflow, base, inbox):
    run = airflow.run("stubborn", base.conf)
    run.until_task("wait", "deferred")
    until(lambda: (base.path / "polls").exists(), "the poll has begun")
    run.mark("wait", "failed")
    until(lambda: "release 'too late'" in base.calls, "what it returned is released")
    assert run.task_state("wait") == "failed"
    assert run.xcom("wait") is None
    assert inbox(run).phase is None


def test_a_listener_that_returns_after_its_wait_was_cleared_delivers_nothing(airflow, base, inbox):
    run = airflow.run("stubborn", base.conf)
    run.until_task("wait", "deferred")
    until(lambda: (base.path / "polls").exists(), "the poll has begun")
    run.clear("wait")
    until(lambda: base.polls == 2, "the next try polls")
    assert run.task_state("wait") == "deferred"
    assert inbox(run).phase is None
    run.mark("wait", "failed")


@pytest.mark.parametrize("mark", ["failed", pytest.param("success", marks=pytest.mark.release)])
def test_a_wait_that_a_user_ends_leaves_its_file_to_the_next(airflow, base, mark):
    base.drop("a")
    base.arm("polled")
    run = airflow.run("finish_in_triggerer", base.conf)
    base.reached("polled")
    other = airflow.run("finish_in_triggerer", base.conf)
    other.until_task("wait", "deferred")
    run.mark("wait", mark)
    assert base.archived == []
    other.until_task("wait", "success")
    assert base.archived == ["a"]


@pytest.mark.parametrize(
    "dag", ["finish_in_triggerer", "begins_on_worker", pytest.param("leased", marks=pytest.mark.release)]
)
def test_a_clear_delivers_the_same_event_again(airflow, base, dag):
    base.drop("a", "b")
    base.send("a", "b")
    run = airflow.run(dag, base.conf)
    assert run.finished() == "success"
    before = run.xcom("wait")
    run.clear("wait", "deliver")
    until(lambda: run.state not in ("success", "failed"), "the run goes on")
    assert run.finished() == "success"
    assert run.xcom("wait") == before
    assert len(base.archived) + len(base.owners) == 1
    assert len(base.delivered) == 2
    assert len(set(base.delivered.values())) == 1


@pytest.mark.parametrize(
    "dag", ["finish_in_triggerer", "begins_on_worker", pytest.param("with_outlet", marks=pytest.mark.release)]
)
def test_a_forgotten_event_is_not_delivered_again(airflow, base, dag, terminal):
    """As docs/operations.md says: forget the event, and clear."""
    base.drop("a", "b")
    run = airflow.run(dag, base.conf)
    assert run.finished() == "success"
    terminal("events", "forget", run.dag_id, run.run_id, "wait", "--yes")
    run.clear("wait", "deliver")
    until(lambda: run.state not in ("success", "failed"), "the run goes on")
    assert run.finished() == "success"
    assert base.archived == ["a", "b"]


def test_replay_off_waits_for_another_event_after_a_clear_and_not_after_a_retry(airflow, base):
    base.drop("a", "b")
    run = airflow.run("anew_after_clear", base.conf)
    assert run.finished() == "success"
    first = run.xcom("wait")["name"]
    run.clear("wait", "deliver")
    until(lambda: run.state not in ("success", "failed"), "the run goes on")
    assert run.finished() == "success"
    assert {first, run.xcom("wait")["name"]} == {"a", "b"}
    assert base.archived == ["a", "b"]


def test_a_clear_while_waiting_goes_on_waiting(airflow, base):
    run = airflow.run("finish_in_triggerer", base.conf)
    run.until_task("wait", "deferred")
    run.clear("wait")
    until(lambda: run.tasks()["wait"]["try_number"] == 2, "the second try")
    base.drop("a")
    assert run.finished() == "success"
    assert base.archived == ["a"]


def test_an_event_that_its_source_has_no_longer_is_dropped_and_waited_on(airflow, base):
    base.drop("a")
    base.arm("recorded")
    run = airflow.run("finish_in_triggerer", base.conf)
    base.reached("recorded")
    (base.path / "drops" / "a").write_text("written to again")
    base.open("recorded")
    assert run.finished() == "success"
    assert "was written to after it was taken" in run.logs("wait")
    assert run.xcom("wait")["size"] == len("written to again")
    assert (base.archived, base.waiting) == (["a"], [])


@contextlib.contextmanager
def for_themselves(airflow, *dags):
    """Leave the runs of DAGs to ``dag.test()``: a scheduler on its database may start their tasks, too."""
    for dag in dags:
        airflow.api("PATCH", f"/dags/{dag}", {"is_paused": True})
    try:
        yield
    finally:
        for dag in dags:
            airflow.api("PATCH", f"/dags/{dag}", {"is_paused": False})


def test_dag_test_waits_for_a_file_and_says_where_to_send_an_event_over_http(airflow, base):
    """Nothing outlives ``dag.test()``, so nothing is recorded; the event is committed and delivered."""
    base.drop("a")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import waits\n"
        "for name in sys.argv[2:]:\n"
        f"    run = waits.DAGS[name].test(run_conf={{'base': {str(base.path)!r}}})\n"
        "    print(name, 'ended as', run.state)"
    )
    dags = "finish_in_triggerer", "sent_to"
    path = os.pathsep.join(filter(None, (str(airflow.plugins), airflow.environment.get("PYTHONPATH"))))
    environment = {**airflow.environment, "PYTHONPATH": path}
    together = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-c", code, str(airflow.dags), *dags]
    with for_themselves(airflow, *dags), subprocess.Popen(command, env=environment, **together) as process:
        alarm = threading.Timer(180, process.kill)
        alarm.start()
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"curl -X POST (http://127\.0\.0\.1:\d+/)", line):
                with pytest.raises(urllib.error.HTTPError, match="422"):
                    urllib.request.urlopen(found[1], b"no JSON", timeout=30)
                urllib.request.urlopen(found[1], b'{"order": 42}', timeout=30)
        alarm.cancel()
    ends = [line.strip() for line in said if "ended as" in line]
    assert ends == [f"{dag} ended as success" for dag in dags], "".join(said)[-3000:]
    assert base.archived == ["a"]
    assert {"order": 42} in [json.loads(event) for event in base.delivered.values()]
