"""What triggerer, workers and API servers tell Airflow's metrics: a real Airflow, and a socket that listens."""

from __future__ import annotations

import httpx
import pytest
from source import conf

from deployment import until

COUNTERS = ("events.recorded", "events.committed", "events.commit_failed", "events.lost", "events.kept")
TIMERS = ("events.time_to_record", "events.time_to_delivery")


@pytest.fixture
def told(receiver):
    """Tell what has come in since the test began, by name."""
    before = {name: len(receiver.of(name)) for name in (*COUNTERS, *TIMERS)}

    def told(**tags):
        new = {name: receiver.of(name)[number:] for name, number in before.items()}
        counts = {name: len([m for m in ms if tags.items() <= m.tags.items()]) for name, ms in new.items()}
        return {name.removeprefix("events."): count for name, count in counts.items() if count}

    return told


@pytest.mark.parametrize(
    ("dag_id", "listener"), [("finish_in_triggerer", "GatedDirectory"), ("leased", "LeasedQueue")]
)
def test_of_a_wait_that_ends_in_the_triggerer_or_on_a_worker(airflow, base, told, dag_id, listener):
    base.drop("a")
    base.send("a")
    run = airflow.run(dag_id, base.conf)
    assert run.finished() == "success"
    expected = {"recorded": 1, "committed": 1, "time_to_record": 1, "time_to_delivery": 1}
    until(lambda: told(dag_id=dag_id) == expected, f"{told(dag_id=dag_id)} is {expected}")
    assert told(dag_id=dag_id, listener=listener) == expected
    # A clear delivers the record again, and nothing is recorded again.
    run.clear("wait", "deliver")
    assert run.finished() == "success"
    assert told(dag_id=dag_id) == expected


def test_commits_that_fail_and_claims_that_are_lost(airflow, base, told, tmp_path):
    # The first trigger that asks its supervisor for anything, as this commit does, waits for Airflow to build an
    # API there. That takes seconds, and here a commit has four.
    assert airflow.run("synchronous", base.conf).finished() == "success"
    (base.path / "failures").write_text("1")
    base.send("a")
    base.drop("a", "b")
    runs = [
        airflow.run("failing_commit", base.conf),
        airflow.run("contested_directory_no_worker", conf(base.path)),
    ]
    assert [run.finished() for run in runs] == ["success"] * 2
    failing = {"recorded": 1, "commit_failed": 1, "committed": 1, "time_to_record": 1, "time_to_delivery": 1}
    until(lambda: told(dag_id="failing_commit") == failing, f"{told(dag_id='failing_commit')} is {failing}")
    lost = {"recorded": 2, "lost": 1, "committed": 1, "time_to_record": 2, "time_to_delivery": 1}
    of_lost = {"dag_id": "contested_directory_no_worker", "listener": "Contested"}
    until(lambda: told(**of_lost) == lost, f"{told(**of_lost)} is {lost}")


def test_of_events_over_http(airflow, told):
    run = airflow.run("http")
    run.until_task("plain", "deferred")
    run.until_task("finishes_on_worker", "deferred")
    airflow.api("GET", "/dags?limit=1")
    headers = {"Authorization": f"Bearer {airflow._token}", "Idempotency-Key": "k"}

    def post(address, payload, status):
        answer = httpx.post(f"{airflow.url}/events{address}", json=payload, headers=headers, timeout=60)
        assert answer.status_code == status, answer.text

    def task(name):
        return f"/dags/http/runs/{run.run_id}/tasks/{name}"

    listener = {"listener": "HttpListener"}
    post(task("later"), {"order": "misfit"}, 422)
    assert told(dag_id="http") == {}
    post(task("later"), {"order": 1}, 202)
    expected = {"recorded": 1, "kept": 1, "time_to_record": 1}
    until(lambda: told(**listener, dag_id="http") == expected, "the early event is told")
    for _ in range(2):  # the same again is no second event
        post(task("plain"), 1, 200)
    expected = {"recorded": 2, "kept": 1, "time_to_record": 2, "time_to_delivery": 1}
    until(lambda: told(**listener, dag_id="http") == expected, "the event is told")
    post(task("finishes_on_worker"), 1, 200)
    run.until_task("finishes_on_worker", "success")
    expected = {"recorded": 3, "kept": 1, "time_to_record": 3, "time_to_delivery": 2}
    until(lambda: told(**listener, dag_id="http") == expected, "a worker tells the delivery")
    post(f"/keys/{run.run_id}", 1, 202)
    until(lambda: told(**listener).get("kept") == 2, "the event that is kept for a key is told")


def test_the_turns_of_users_are_told(airflow, receiver):
    airflow.api("GET", "/dags?limit=1")
    headers = {"Authorization": f"Bearer {airflow._token}"}
    kinds = {"look": ("GET", "/api/waits", 200), "change": ("POST", "/keys/of-the-metrics", 202)}
    for kind, (method, path, status) in kinds.items():
        before = len(receiver.of("events.time_to_admission", kind=kind))
        answer = httpx.request(method, f"{airflow.url}/events{path}", json=1, headers=headers, timeout=60)
        assert answer.status_code == status, answer.text

        def more(kind=kind, before=before):
            return len(receiver.of("events.time_to_admission", kind=kind)) > before

        until(more, f"the turn of a {kind} is told")


def test_the_open_waits_are_counted(airflow, base, receiver):
    def last(name, **tags):
        found = receiver.of(name, **tags)
        assert {metric.kind for metric in found} <= {"g"}
        return found[-1].value if found else None

    until(lambda: receiver.of("events.open_waits"), "the open waits are counted")
    run = airflow.run("finish_in_triggerer", base.conf)
    run.until_task("wait", "deferred")
    listener = {"listener": "GatedDirectory"}
    until(lambda: last("events.open_waits_by_listener", **listener) == 1, "the wait is counted")
    assert last("events.open_waits") >= 1
    base.drop("a")
    assert run.finished() == "success"
    until(lambda: last("events.open_waits_by_listener", **listener) == 0, "it waits no more")

    # One whose source takes no commit until its tries are used up.
    stood = last("events.uncommitted_waits")
    (base.path / "failures").write_text("1000")
    base.send("a")
    run = airflow.run("failing_commit", base.conf)
    assert run.finished() == "failed"
    until(lambda: last("events.uncommitted_waits") == stood + 1, "its event is recorded and not committed")
    (base.path / "failures").write_text("0")
    run.clear("wait", "deliver")
    assert run.finished() == "success"
    until(lambda: last("events.uncommitted_waits") == stood, "it is committed")
