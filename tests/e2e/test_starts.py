"""Events that start runs, in a real Airflow: each starts one, whatever is killed, as far as there is room."""

from __future__ import annotations

import itertools
import json
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from deployment import until

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(airflow, base_at):
    """The folders of the DAGs of tests/dags/starts.py, which Airflow has read."""
    found = {}
    for dag_id in ("started", "started_slowly", "by_asset", "in_batches", "by_key"):
        found[dag_id] = base_at(airflow.home / "starts" / dag_id)
        for folder in ("drops", "gates"):
            (found[dag_id].path / folder).mkdir(parents=True)
    airflow.add_dags(TESTS / "dags" / "starts.py")
    airflow.wait_for_dags(*found)
    return found


def drop(base, *names):
    """Lay down files that are whole as soon as they are seen: half of one would be another event."""
    for name in names:
        unfinished = base.path / "unfinished"
        unfinished.write_text(name)
        unfinished.rename(base.path / "drops" / name)


def runs(airflow, dag_id):
    """The file names of the runs of a DAG, as their conf has them, and the runs' states."""
    found, page = [], None
    while page is None or len(page) == 100:  # as many as Airflow gives at once
        path = f"/dags/{dag_id}/dagRuns?limit=100&offset={len(found)}&order_by=id"
        page = airflow.api("GET", path)["dag_runs"]
        found += page
    return {run["dag_run_id"]: (run["conf"]["event"]["name"], run["state"]) for run in found}


def moment(text):
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def names(airflow, dag_id="started"):
    return sorted(name for name, _ in runs(airflow, dag_id).values())


def test_each_event_starts_one_run_whatever_is_killed(airflow, folders):
    base = folders["started"]
    expected = []

    def drop_some(about, number=5):
        files = [f"{about} {number}" for number in range(number)]
        expected.extend(files)
        drop(base, *files)

    def all_have_a_run():
        until(lambda: base.archived == sorted(expected), f"all files are archived, {base.archived}")
        assert names(airflow) == sorted(expected)

    drop_some("before all", 1)
    all_have_a_run()
    for gate in ("polled", "recorded", "committed"):
        base.arm(gate)
        drop_some(gate)
        at_the_gate = base.reached(gate)
        triggerer = airflow.components["triggerer"]
        assert at_the_gate.pid in [process.pid for process in triggerer.family()]
        triggerer.kill()
        assert not psutil.pid_exists(at_the_gate.pid)
        airflow.restart("triggerer")
        all_have_a_run()

    before = len(base.archived)
    drop_some("as the server dies", 40)
    until(lambda: len(base.archived) > before, "the first of them is archived", pause=0.01)
    server = airflow.components["api-server"]
    server.kill()
    assert not server.alive
    drop_some("without a server")
    time.sleep(3)
    assert not [name for name in base.archived if name.startswith("without")]  # nothing of which there is no run
    airflow.restart("api-server")
    until(airflow.answers, "the API server answers")
    all_have_a_run()
    until(lambda: {state for _, state in runs(airflow, "started").values()} == {"success"}, "the runs succeed")
    assert base.waiting == []


def test_a_paused_dag_takes_nothing_and_goes_on_where_it_was(airflow, folders, terminal):
    base = folders["started"]
    before = names(airflow)
    airflow.api("PATCH", "/dags/started", {"is_paused": True})
    drop(base, "while paused")
    time.sleep(8)
    assert (names(airflow), base.waiting) == (before, ["while paused"])
    listed = {one["dag_id"]: one for one in json.loads(terminal("events", "starts", "--output", "json"))}
    assert (listed["started"]["state"], listed["started_slowly"]["state"]) == ("paused", "open")
    airflow.api("PATCH", "/dags/started", {"is_paused": False})
    until(lambda: base.waiting == [], "it goes on")
    until(lambda: names(airflow) == sorted([*before, "while paused"]), "there is a run")


def test_a_dag_that_is_read_while_it_is_paused_goes_on_too(airflow, folders):
    """Airflow ends the trigger then, and makes another when it has read the DAG again."""
    base = folders["started"]
    before = names(airflow)
    file = airflow.dags / "starts.py"

    def read_again():
        file.write_text(file.read_text() + "\n")

    def watchers():
        found = airflow.api("GET", "/assets?name_pattern=started%27&limit=10")["assets"]
        return [watcher for asset in found for watcher in asset["watchers"]]

    until(lambda: len(watchers()) == 1, f"there is a watcher: {watchers()}")
    airflow.api("PATCH", "/dags/started", {"is_paused": True})
    read_again()
    until(lambda: not watchers(), "the watcher is gone")
    drop(base, "while gone")
    time.sleep(5)
    assert (names(airflow), base.waiting) == (before, ["while gone"])
    airflow.api("PATCH", "/dags/started", {"is_paused": False})
    read_again()
    until(lambda: base.waiting == [], "it goes on")
    until(lambda: names(airflow) == sorted([*before, "while gone"]), "there is a run")


def test_no_more_is_taken_than_there_is_room_for(airflow, folders):
    base = folders["started_slowly"]
    files = [f"file {number}" for number in range(6)]
    drop(base, *files)
    until(lambda: len(base.archived) == 2, "two are taken")
    time.sleep(6)
    assert (len(names(airflow, "started_slowly")), len(base.archived), len(base.waiting)) == (2, 2, 4)
    (base.path / "go").touch()
    until(lambda: base.archived == files, "the others follow")
    assert names(airflow, "started_slowly") == files
    states = lambda: {state for _, state in runs(airflow, "started_slowly").values()}  # noqa: E731
    until(lambda: states() == {"success"}, "they end")


def test_of_two_triggerers_that_die_in_turn_no_event_starts_two_runs(airflow, folders):
    base = folders["started"]
    before = names(airflow)
    other = airflow.start_one("triggerer", as_name="triggerer@2")
    files = [f"of two {number}" for number in range(60)]
    for number in range(0, 60, 20):
        drop(base, *files[number : number + 20])
        until(lambda: len(base.archived) > len(before), "some are taken", pause=0.01)
        dies = airflow.components["triggerer"] if number else other
        dies.kill()
        assert not dies.alive
        airflow.restart(dies.name)
    until(lambda: base.waiting == [], "all are taken")
    until(lambda: names(airflow) == sorted([*before, *files]), "each has one run")


def taken_though_killed(airflow, base, files):
    """Drop files, kill the triggerer over what it has recorded, and wait until all are archived."""
    base.arm("recorded")
    drop(base, *files)
    base.reached("recorded")
    airflow.components["triggerer"].kill()
    airflow.restart("triggerer")
    until(lambda: base.archived == files, f"all are archived: {base.archived}")


def test_each_event_becomes_one_asset_event(airflow, folders):
    files = [f"file {number}" for number in range(10)]
    taken_though_killed(airflow, folders["by_asset"], files)
    [asset] = airflow.api("GET", "/assets?name_pattern=drops")["assets"][:1]
    events = airflow.api("GET", f"/assets/events?asset_id={asset['id']}&limit=100")["asset_events"]
    assert sorted(event["extra"]["payload"]["name"] for event in events) == files


def test_batches_are_without_holes_whatever_is_killed(airflow, folders):
    files = [f"file {number:02}" for number in range(22)]
    taken_though_killed(airflow, folders["in_batches"], files)
    found = airflow.api("GET", "/dags/in_batches/dagRuns?limit=100")["dag_runs"]
    batches = [[event["name"] for event in run["conf"]["events"]] for run in found]
    assert sorted(name for batch in batches for name in batch) == files
    assert {len(batch) for batch in batches} <= {1, 2, 3, 4} and len(batches) < 12


def test_of_each_key_one_run_is_active_though_the_triggerer_is_killed(airflow, folders):
    """The key is the size of the file: its name's length."""
    base = folders["by_key"]
    drop(base, "a", "b", "c", "dd", "ee", "part.tmp")
    until(lambda: base.archived == ["a", "dd", "part.tmp"], f"one of each key is taken: {base.archived}")
    for _ in range(2):
        time.sleep(4)
        assert (names(airflow, "by_key"), base.waiting) == (["a", "dd"], ["b", "c", "ee"])
        triggerer = airflow.components["triggerer"]
        triggerer.kill()
        assert not triggerer.alive
        airflow.restart("triggerer")
    (base.path / "go").touch()
    until(lambda: base.waiting == [], "the others follow")
    found = airflow.api("GET", "/dags/by_key/dagRuns?limit=100&order_by=id")["dag_runs"]
    events = [run["conf"]["event"] for run in found]
    assert [event["name"] for event in events if event["size"] == 1] == ["a", "b", "c"]
    assert [event["name"] for event in events if event["size"] == 2] == ["dd", "ee"]
    assert [run["conf"]["key"] for run in found] == [str(event["size"]) for event in events]
    dates = [run["logical_date"] for run in found]
    assert [moment(date) for date in dates] == [moment(event["modified"]) for event in events]
    ends = {run["dag_run_id"]: run["end_date"] for run in found}
    by_key = {size: [run for run in found if run["conf"]["event"]["size"] == size] for size in (1, 2)}
    for runs_of_key in by_key.values():
        for before, after in itertools.pairwise(runs_of_key):
            assert moment(ends[before["dag_run_id"]]) <= moment(after["queued_at"])


def test_clearing_a_run_keeps_its_event_and_deleting_it_forgets_it(airflow, folders):
    base = folders["started"]
    drop(base, "to be deleted")
    until(lambda: "to be deleted" in names(airflow), "there is a run")
    [run_id] = [id for id, (name, _) in runs(airflow, "started").items() if name == "to be deleted"]
    until(lambda: runs(airflow, "started")[run_id][1] == "success", "it ends")
    airflow.api("POST", f"/dags/started/dagRuns/{run_id}/clear", {"dry_run": False})
    until(
        lambda: runs(airflow, "started")[run_id] == ("to be deleted", "success"), "it ends again, with its event"
    )
    airflow.api("DELETE", f"/dags/started/dagRuns/{run_id}")
    time.sleep(3)
    assert "to be deleted" not in names(airflow)
    assert "to be deleted" in base.archived
