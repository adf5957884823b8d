"""
What the crash matrix (``test_matrix.py``) does not show: faults that take two steps, and a source that is away.

A gate in the test's listener stops the process at the point in question.
"""

from __future__ import annotations

import signal
import time

from cells import Cell
from faults import see, see_gone
from paths import ways
from source import EVENTS

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


def test_what_a_watch_recorded_outlives_its_source(stage):
    """Its triggerer is killed before the task ends, and the file is deleted before another one polls."""
    source, path, gap = next(way for way in ways() if (way[0].name, way[2].name) == ("directory (watch)", "noted"))
    cell = Cell(source, path, gap, "killed", stage.folder / "forgotten")
    cell.begin(stage, "forgotten")
    until(lambda: cell.stands_firm(stage), "it is about to end the task", 60)
    see(stage, [cell])
    stage.airflow.components["triggerer"].kill()
    see_gone([cell])
    for event in EVENTS:
        (cell.base / "drops" / event).unlink()
    stage.airflow.restart("triggerer")
    cell.open("")
    assert cell.run.finished() == "success"
    [delivered] = (cell.base / "delivered").iterdir()
    assert delivered.name == f"{cell.run.run_id} a"
    assert "The event of" in cell.run.logs("wait") and "is committed already" in cell.run.logs("wait")
