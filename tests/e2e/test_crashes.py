"""
What the crash matrix (``test_matrix.py``) does not show: faults that take two steps, and a source that is
unreachable.

A gate in the test's listener, or a gap of the matrix, stops the process at the point in question.
"""

from __future__ import annotations

import contextlib
import signal
import time

from cells import Cell
from faults import FAULTS, see, see_gone
from gaps import GAPS
from paths import ways
from source import EVENTS, conf

from deployment import until

GAP = {gap.id: gap for gap in GAPS}
NAMED = {fault.name: fault for fault in FAULTS}


def assert_files(base, archived, waiting):
    assert (base.archived, base.waiting) == (archived, waiting)


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


def test_a_triggerer_that_stood_still_as_it_began_learns_of_what_was_recorded_meanwhile(stage):
    """The same, in the moment between the inbox's answer, by which the wait has nothing, and the poll."""
    cell = stand(stage, "directory", "no worker", "triggerer-polling")
    with frozen(stage):
        committed = cell.also(GAP["triggerer-committed"])
        second = stage.airflow.start_one("triggerer", as_name="triggerer@second")
        see_it_reached(stage, committed, second)
        second.kill()
        time.sleep(7)  # until its trigger may be had again
    time.sleep(3)  # until the first has noticed
    cell.open("")
    assert_ends_well(stage, cell)


def test_two_triggerers_on_one_trigger_with_another_poll(stage):
    """The first record wins; the other is refused, and the lease of what it polled expires."""
    cell = stand(stage, "queue with leases", "no worker", "triggerer-recording")
    with frozen(stage):
        recorded = cell.also(GAP["triggerer-recorded"])
        second = stage.airflow.start_one("triggerer", as_name="triggerer@second")
        see_it_reached(stage, recorded, second)
        row = stage.row(cell.run)
        cell.open("")
    until(lambda: cell.passed, "the first asks for its record too")
    time.sleep(2)
    assert stage.row(cell.run).record_id == row.record_id and row.phase == "recorded"
    recorded.open("")
    assert_ends_well(stage, cell)
    # The other message is nobody's, and the next run gets it.
    other = stage.airflow.run(cell.run.dag_id, conf(cell.base), run_id=f"{cell.run.run_id}-other")
    assert other.finished() == "success"
    assert cell.source.committed(cell.base) == set(EVENTS)


def test_a_beginning_that_comes_late(stage):
    """It is carried out after the same, asked again: the host has begun the wait, and goes on with it."""
    cell = begin(stage, "directory", "no worker", "api-server-beginning", "asked again")
    polling = cell.also(GAP["triggerer-polling"])
    until(lambda: polling.stands_firm(stage), "it is asked again, and the trigger is about to poll")
    assert stage.row(cell.run).generation == 2  # by its own trigger, and by the host
    cell.open("")
    polling.open("")
    assert_ends_well(stage, cell)
    assert stage.row(cell.run).generation == 2  # it was outlived, and changed nothing


def test_the_source_is_away_for_long(airflow, base):
    """The commit is tried again for a while, then the try fails, and the next commits the same event."""
    (base.path / "failures").write_text("1000")
    base.send("a", "b")
    run = airflow.run("failing_commit", base.conf)
    run.until_task("wait", "up_for_retry")
    assert not base.owners
    (base.path / "failures").write_text("0")
    assert run.finished() == "success"
    assert base.owners == {"a": f"failing_commit/{run.run_id}/wait/-1"}
    assert "event_checkpointed failed" in run.logs("wait")
    assert base.calls.count(f"poll {run.run_id}") == 1


def test_what_a_watch_recorded_outlives_its_source(stage):
    """The worker that ends it is killed, and the file is deleted before the next one begins."""
    cell = stand(stage, "directory (watch)", "ends on a worker", "worker-resumed")
    for event in EVENTS:
        (cell.base / "drops" / event).unlink()
    cell.process.kill()
    see_gone([cell])
    assert cell.run.finished() == "success"
    [delivered] = (cell.base / "delivered").iterdir()
    assert delivered.name == f"{cell.run.run_id} a"
    assert "is committed already" in cell.run.logs("wait")


def begin(stage, source, path, gap, fault="killed"):
    """Let a wait come to a gap."""
    way = next(way for way in ways() if (way[0].name, way[1].name, way[2].id) == (source, path, gap))
    cell = Cell(*way, NAMED[fault], stage.folder / "cell")
    cell.begin(stage, f"crash-{gap}-{int(time.time())}")
    return cell


def stand(stage, source, path, gap):
    """Let a wait stand in a gap."""
    cell = begin(stage, source, path, gap)
    until(lambda: cell.stands_firm(stage), f"a process stands in {gap}")
    see(stage, [cell])
    return cell


@contextlib.contextmanager
def frozen(stage):
    """Let the triggerer stand still."""
    triggerer = stage.airflow.components["triggerer"]
    stage.airflow.freeze(triggerer)
    try:
        yield
    finally:
        triggerer.signal(signal.SIGCONT)


def see_it_reached(stage, cell, component):
    until(lambda: cell.stands_firm(stage), f"a process stands in {cell.gap.id}")
    assert cell.process.pid in {member.pid for member in component.family()}


def assert_ends_well(stage, cell):
    stage.finish([cell], 90)
    cell.judge(stage)
    assert cell.problems == []
