"""What tasks send to the waits of other DAGs."""

from __future__ import annotations

import uuid

from deployment import until


def test_a_task_that_is_retried_sends_each_event_once(airflow, inbox):
    key = f"order-{uuid.uuid4()}"
    waits = [airflow.run("sends_waits", {"key": key}) for _ in range(4)]
    for wait in waits:
        until(lambda wait=wait: inbox(wait), f"{wait} has begun, and told its key")
    sends = airflow.run("sends", {"key": key})
    assert sends.finished() == "success"
    assert [sends.tasks()[task]["try_number"] for task in ("operator", "hook")] == [2, 3]
    told = [sends.xcom("operator"), *sends.xcom("hook")]
    assert [sent["status"] for sent in told] == ["delivered"] * 3
    reached = [wait for sent in told for wait in sent["waits"]]
    assert len(set(reached)) == 3
    ended = [wait for wait in waits if f"{wait.dag_id}/{wait.run_id}/wait/-1" in reached]
    assert [wait.finished() for wait in ended] == ["success"] * 3
    events = [wait.xcom("gather")[0] for wait in ended]
    assert sorted(events, key=str) == [
        {"by": "hook", "number": 1},
        {"by": "hook", "number": 2},
        {"run": sends.run_id, "by": "operator"},
    ]
    # A clear sends nothing, either, and says what became of the event.
    sends.clear("operator", "hook")
    assert sends.finished() == "success"
    assert [sends.xcom("operator"), *sends.xcom("hook")] == told
    [other] = [wait for wait in waits if wait not in ended]
    assert other.task_state("wait") == "deferred"
    assert inbox(other).phase is None
    # What nobody waits for is kept for the wait that begins.
    early = f"order-{uuid.uuid4()}"
    assert airflow.run("sends", {"key": early}).finished() == "success"
    late = airflow.run("sends_waits", {"key": early})
    assert late.finished() == "success"
    assert late.xcom("gather")[0]["by"] == "operator"
