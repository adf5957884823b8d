"""Waits for what happens in Airflow itself."""

from __future__ import annotations


def test_the_ends_of_a_run_and_a_task_and_an_asset_event_are_found(airflow, inbox):
    before = airflow.run("airflow_loader")
    assert before.finished() == "success"
    waits = [airflow.run("airflow_waits") for _ in range(2)]
    for run in waits:
        for wait in ("run", "task", "asset", "failed"):
            run.until_task(wait, "deferred")
    loader = airflow.run("airflow_loader")
    assert loader.finished() == "success"
    for run in waits:
        for wait in ("run", "task", "asset"):
            run.until_task(wait, "success")
        assert run.task_state("failed") == "deferred"
    failed = airflow.run("airflow_loader", {"fails": True})
    assert failed.finished() == "failed"
    for run in waits:
        assert run.finished() == "success"
        ended, task, asset, broken = run.xcom("gather")
        assert (ended["run_id"], ended["state"]) == (loader.run_id, "success")
        assert (task["run_id"], task["task_id"], task["state"]) == (loader.run_id, "publish", "success")
        assert (asset["source_run_id"], asset["extra"]) == (loader.run_id, {"rows": 17})
        assert (broken["run_id"], broken["state"]) == (failed.run_id, "failed")
    # A clear delivers what was found before, though there is more by now.
    run = waits[0]
    events = run.xcom("gather")
    assert airflow.run("airflow_loader").finished() == "success"
    run.clear("run", "task", "asset", "failed")
    assert run.finished() == "success"
    assert run.xcom("gather") == events
    assert inbox(run, "run").sought_kind == "dag_run"
