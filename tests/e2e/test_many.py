"""One task that waits for many events."""

from __future__ import annotations

import json

from airflow_events.listeners.support import serde

from deployment import until


def phases(inbox, run, count):
    """How far the event of each place has come, by index; of those that have one."""
    rows = {index: inbox(run, place=index) for index in range(count)}
    return {index: row.phase for index, row in rows.items() if row is not None and row.phase is not None}


def assert_each_is_committed_at_its_place(base, inbox, run, events):
    """``events``: by index."""
    rows = {index: inbox(run, place=index) for index in events}
    assert {index: row.phase for index, row in rows.items()} == dict.fromkeys(events, "committed")
    names = {index: serde.decode(row.event)["name"] for index, row in rows.items()}
    assert names == {index: event["name"] for index, event in events.items()}
    assert set(names.values()) == set(base.archived)


def test_a_thousand_timers_are_one_task_without_a_worker(airflow, base):
    run = airflow.run("many_timers", base.conf)
    assert run.finished() == "success"
    assert run.xcom("count") == [1000, True]
    assert run.worker_starts("wait") == 0


def test_what_has_arrived_outlives_the_triggerer_and_a_clear(airflow, base, inbox):
    names = [f"f{number:02}" for number in range(50)]
    run = airflow.run("many_files", base.conf)
    run.until_task("wait", "deferred")
    base.drop(*names[:20])
    until(lambda: len(phases(inbox, run, 50)) == 20, "20 of 50 have arrived", pause=0.3)
    assert inbox(run).call.startswith("GatedDirectory, 50 times, ")

    base.arm("recorded")
    base.drop(*names[20:30])
    process = base.reached("recorded")
    triggerer = airflow.components["triggerer"]
    assert process.pid in {member.pid for member in triggerer.family()}
    triggerer.kill()
    assert not process.is_running()
    # It died with some committed, at least one recorded only, and others to come.
    recorded = phases(inbox, run, 50)
    assert 20 <= list(recorded.values()).count("committed") < len(recorded) <= 30
    polls = base.calls.count(f"poll {run.run_id}")

    airflow.restart("triggerer")
    base.drop(*names[30:])
    assert run.finished() == "success"
    events = run.xcom("wait")
    assert sorted(event["name"] for event in events) == names
    assert_each_is_committed_at_its_place(base, inbox, run, dict(enumerate(events)))
    assert base.waiting == []
    assert list(base.delivered) == [f"{run.run_id}.1"]
    assert run.worker_starts("wait") == 0
    # The next triggerer polled for what was missing, and for nothing else.
    assert base.calls.count(f"poll {run.run_id}") - polls == 50 - len(recorded)

    base.drop("another")
    run.clear("wait", "deliver")
    until(lambda: len(base.delivered) == 2, "it is delivered again")
    assert run.finished() == "success"
    assert len(set(base.delivered.values())) == 1
    assert base.waiting == ["another"]


def test_the_first_that_come_and_the_others_go_back(airflow, base, inbox):
    run = airflow.run("many_first", base.conf)
    run.until_task("wait", "deferred")
    base.drop("a", "b", "c", "d")
    assert run.finished() == "success"
    [delivered] = base.delivered.values()
    events = dict(json.loads(delivered))
    assert len(events) == 2
    assert list(events) == sorted(events)
    assert_each_is_committed_at_its_place(base, inbox, run, events)
    assert sorted([*base.waiting, *(event["name"] for event in events.values())]) == ["a", "b", "c", "d"]


def test_a_default_stands_for_what_has_not_come(airflow, base):
    run = airflow.run("many_late", base.conf)
    run.until_task("wait", "deferred")
    base.drop("a")
    assert run.finished() == "success"
    [delivered] = base.delivered.values()
    came = [event for event in json.loads(delivered) if event != "none"]
    assert [event["name"] for event in came] == ["a"]
    assert json.loads(delivered).count("none") == 2
    assert base.archived == ["a"]


def test_the_output_of_another_task_is_the_list(airflow, base, inbox):
    run = airflow.run("many_upstream", base.conf)
    run.until_task("wait", "deferred")
    base.drop("a", "b", "c")
    assert run.finished() == "success"
    assert run.worker_starts("timers") == 1
    assert run.worker_starts("wait") == 1
    events = run.xcom("wait")
    assert sorted(event["name"] for event in events) == ["a", "b", "c"]
    assert_each_is_committed_at_its_place(base, inbox, run, dict(enumerate(events)))
    run.clear("wait", "deliver")
    base.drop("another")
    until(lambda: len(base.delivered) == 2, "it is delivered again")
    assert len(set(base.delivered.values())) == 1
    assert base.waiting == ["another"]
