"""
What the crash matrix (``test_matrix.py``) does not show: faults that take two steps, and a source that is away.

A gate in the test's listener stops the process at the point in question.
"""

from __future__ import annotations

import signal
import time

from deployment import until


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


def test_the_source_is_away_for_long(airflow, base):
    """The commit is tried again with growing pauses, then the try fails, and the next goes on."""
    (base.path / "failures").write_text("12")
    base.send("a", "b")
    run = airflow.run("failing_commit", base.conf)
    assert run.finished(timeout=180) == "success"
    assert base.owners == {"a": f"failing_commit/{run.run_id}/wait/-1"}
    assert base.calls.count("attempt") == 13
