"""
Each row of ``docs/what-a-crash-leaves.md``, with processes that are really killed there.

A gate in the test's listener stops the process at the point in question; the test kills it, sees it gone,
starts what an operator would start again, and asks the source by looking at its files.
"""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from deployment import until


def kill_triggerer(airflow, process):
    """Kill the triggerer of which ``process`` is the part that runs triggers, and start another."""
    triggerer = airflow.components["triggerer"]
    assert process.pid in {member.pid for member in triggerer.family()}, "not the triggerer stands at the gate"
    triggerer.kill()
    assert not process.is_running()
    airflow.restart("triggerer")


def kill_worker(airflow, process):
    """Kill a worker's task process."""
    assert process.pid not in {member.pid for member in airflow.components["triggerer"].family()}
    assert process.pid in {member.pid for member in airflow.components["scheduler"].family()}
    process.kill()
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "the worker is gone", 10)


def assert_delivered_once(base, run, name="a"):
    """The source says that the wait has this one event, and downstream got it once."""
    wait = f"{run.dag_id}/{run.run_id}/wait/-1"
    if run.dag_id == "one_worker":
        assert base.owners == {name: wait}
    else:
        assert (base.archived, base.claimed, base.waiting) == ([name], [], [])
    assert list(base.delivered) == [f"{run.run_id}.1"]


@pytest.mark.parametrize("dag", ["finish_in_triggerer", "one_worker", "two_workers"])
def test_the_triggerer_dies_while_polling(airflow, base, dag):
    run = airflow.run(dag, base.conf)
    until(lambda: [call for call in base.calls if call.startswith("poll")], "it polls")
    triggerer = airflow.components["triggerer"]
    triggerer.kill()
    assert triggerer.family() == []
    base.drop("a")
    base.send("a")
    airflow.restart("triggerer")
    assert run.finished() == "success"
    assert_delivered_once(base, run)
    assert len([call for call in base.calls if call.startswith("poll")]) == 2


@pytest.mark.parametrize("dag", ["finish_in_triggerer", "one_worker", "two_workers"])
def test_the_triggerer_dies_after_the_event_and_before_the_record(airflow, base, dag):
    base.drop("a")
    base.send("a")
    base.arm("polled")
    run = airflow.run(dag, base.conf)
    process = base.reached("polled")
    assert run.xcom("wait", "event_record") is None
    kill_triggerer(airflow, process)
    assert run.finished() == "success"
    assert_delivered_once(base, run)


@pytest.mark.parametrize("gate", ["recorded", "committed"])
def test_the_triggerer_dies_around_the_commit(airflow, base, gate):
    base.drop("a", "b")
    base.arm(gate)
    run = airflow.run("finish_in_triggerer", base.conf)
    process = base.reached(gate)
    assert run.xcom("wait", "event_record")["phase"] == "recorded"
    assert (base.archived == []) == (gate == "recorded")
    kill_triggerer(airflow, process)
    assert run.finished() == "success"
    assert (base.archived, base.claimed, base.waiting) == (["a"], [], ["b"])
    assert list(base.delivered) == [f"{run.run_id}.1"]
    # Whoever took over went on from the record, and did not poll again.
    assert len([call for call in base.calls if call.startswith("poll")]) == 1
    assert f"The event of GatedDirectory('{base.path}') is recorded already" in run.logs("wait")


@pytest.mark.parametrize("gate", ["recorded", "committed"])
@pytest.mark.parametrize("dag", ["one_worker", "two_workers"])
def test_a_worker_dies_around_the_commit(airflow, base, dag, gate):
    base.drop("a", "b")
    base.send("a", "b")
    base.arm(gate)
    run = airflow.run(dag, base.conf)
    process = base.reached(gate)
    assert run.xcom("wait", "event_record")["phase"] == "recorded"
    kill_worker(airflow, process)
    assert run.finished() == "success"
    assert run.tasks()["wait"]["try_number"] == 2
    assert len(base.owners or base.archived) == 1
    assert_delivered_once(base, run) if dag == "one_worker" else None
    assert (base.archived, base.claimed) == ([] if dag == "one_worker" else ["a"], [])
    assert list(base.delivered) == [f"{run.run_id}.1"]
    assert len([call for call in base.calls if call.startswith("poll")]) == 1


def test_a_worker_dies_with_its_supervisor(airflow, base):
    """The machine of the worker is gone: Airflow misses its heartbeat."""
    base.send("a", "b")
    base.arm("recorded")
    run = airflow.run("one_worker", base.conf)
    process = base.reached("recorded")
    supervisor = process.parent()
    supervisor.kill()
    process.kill()
    psutil.wait_procs([supervisor, process], timeout=10)
    assert run.finished(timeout=180) == "success"
    assert base.owners == {"a": f"one_worker/{run.run_id}/wait/-1"}
    assert list(base.delivered) == [f"{run.run_id}.1"]


@pytest.mark.parametrize(("dag", "gate"), [("finish_in_triggerer", "polled"), ("finish_in_triggerer", "recorded")])
def test_two_triggerers_on_one_trigger_with_a_repeatable_poll(airflow, base, dag, gate):
    """One claim, both commit the same event, one success."""
    base.drop("a", "b")
    base.arm(gate)
    run = airflow.run(dag, base.conf)
    process = base.reached(gate)
    old = airflow.components["triggerer"]
    assert process.pid in {member.pid for member in old.family()}
    airflow.freeze(old)
    try:
        airflow.start_one("triggerer", as_name="triggerer@second")
        assert run.finished() == "success"
        assert_files(base, ["a"], ["b"])
        base.open(gate)
    finally:
        old.signal(signal.SIGCONT)
    until(lambda: run.logs("wait").count("trigger completed") >= 2, "the first triggerer has gone on", 30)
    time.sleep(2)
    assert run.state == "success"
    assert_files(base, ["a"], ["b"])
    assert run.xcom("wait")["name"] == "a"
    assert run.xcom("wait", "event_record")["phase"] == "committed"
    assert list(base.delivered) == [f"{run.run_id}.1"]


def assert_files(base, archived, waiting):
    assert (base.archived, base.claimed, base.waiting) == (archived, [], waiting)


def test_a_triggerer_that_stood_still_learns_of_what_was_recorded_meanwhile(airflow, base):
    """Its trigger was another's, who recorded and committed the event, and died before the task ended."""
    run = airflow.run("finish_in_triggerer", base.conf)
    until(lambda: [call for call in base.calls if call.startswith("poll")], "it polls")
    old = airflow.components["triggerer"]
    base.arm("committed")
    airflow.freeze(old)
    try:
        second = airflow.start_one("triggerer", as_name="triggerer@second")
        base.drop("a")
        process = base.reached("committed")
        assert process.pid in {member.pid for member in second.family()}
        second.kill()
        time.sleep(7)  # until its trigger may be had again
    finally:
        old.signal(signal.SIGCONT)
    assert run.finished() == "success"
    assert_files(base, ["a"], [])
    assert list(base.delivered) == [f"{run.run_id}.1"]


def test_two_triggerers_on_one_trigger_with_another_poll(airflow, base):
    """Two claims, one resume: that event is committed, and the other's claim lapses."""
    base.send("a", "b")
    base.arm("polled")
    run = airflow.run("one_worker", base.conf)
    process = base.reached("polled")
    old = airflow.components["triggerer"]
    assert process.pid in {member.pid for member in old.family()}
    airflow.freeze(old)
    try:
        airflow.start_one("triggerer", as_name="triggerer@second")
        assert run.finished() == "success"
        [committed] = base.owners
        base.open("polled")
    finally:
        old.signal(signal.SIGCONT)
    until(lambda: run.logs("wait").count("trigger completed") >= 2, "the first triggerer has gone on", 30)
    time.sleep(2)
    wait = f"one_worker/{run.run_id}/wait/-1"
    assert base.owners == {committed: wait}
    assert list(base.delivered) == [f"{run.run_id}.1"]
    # The other message is nobody's, and the next run gets it.
    other = airflow.run("one_worker", base.conf)
    assert other.finished() == "success"
    assert base.owners == {committed: wait, ({"a", "b"} - {committed}).pop(): f"one_worker/{other.run_id}/wait/-1"}


def test_a_worker_that_is_outlived_by_its_task(airflow, base):
    """It is stopped before the commit, its task is given to another, and it goes on: the same event, once."""
    base.send("a", "b")
    base.arm("recorded")
    run = airflow.run("one_worker", base.conf)
    process = base.reached("recorded")
    supervisor = process.parent()
    os.kill(supervisor.pid, signal.SIGSTOP)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        assert run.finished(timeout=180) == "success"
        assert base.owners == {"a": f"one_worker/{run.run_id}/wait/-1"}
        base.open("recorded")
    finally:
        for stopped in (process, supervisor):
            if stopped.is_running():
                os.kill(stopped.pid, signal.SIGCONT)
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "it has ended", 60)
    assert base.owners == {"a": f"one_worker/{run.run_id}/wait/-1"}
    assert list(base.delivered) == [f"{run.run_id}.1"]
    assert run.state == "success"


@pytest.mark.parametrize("gate", ["polled", "recorded", "committed"])
def test_a_triggerer_that_is_told_to_end(airflow, base, gate):
    """SIGTERM at each step, as in a rolling restart."""
    base.drop("a", "b")
    base.arm(gate)
    run = airflow.run("finish_in_triggerer", base.conf)
    process = base.reached(gate)
    airflow.components["triggerer"].stop()
    assert not process.is_running()
    airflow.restart("triggerer")
    assert run.finished() == "success"
    assert_files(base, ["a"], ["b"])
    assert list(base.delivered) == [f"{run.run_id}.1"]


@pytest.mark.parametrize("gate", ["recorded", "committed"])
def test_a_user_clears_the_wait_around_its_commit(airflow, base, gate):
    base.drop("a", "b")
    base.arm(gate)
    run = airflow.run("finish_in_triggerer", base.conf)
    base.reached(gate)
    run.clear("wait")
    assert run.finished() == "success"
    assert_files(base, ["a"], ["b"])
    assert run.xcom("wait")["name"] == "a"
    assert list(base.delivered) == [f"{run.run_id}.1"]


def test_the_source_is_away_for_long(airflow, base):
    """The commit is tried again with growing pauses, then the try fails, and the next goes on."""
    (base.path / "failures").write_text("12")
    base.send("a", "b")
    run = airflow.run("failing_commit", base.conf)
    assert run.finished(timeout=180) == "success"
    assert base.owners == {"a": f"failing_commit/{run.run_id}/wait/-1"}
    assert base.calls.count("attempt") == 13
