"""That nobody but a running task itself is taken for it."""

from __future__ import annotations

import uuid

import pytest
from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.core_api.routes.public.task_state_store import task_state_store_router
from airflow_events import task_proof
from airflow_events.api.matcher import Matcher
from fastapi.testclient import TestClient

PROOF = "x" * 40


@pytest.fixture
def rest(server, monkeypatch):
    """Airflow's own REST API with our middleware, for somebody who may edit task instances of shop alone."""
    monkeypatch.setenv("AIRFLOW__CORE__MULTI_TEAM", "False")
    manager = get_auth_manager()
    may = lambda *, details=None, **_: details is None or details.id in (None, "shop")  # noqa: E731
    monkeypatch.setattr(manager, "get_authorized_dag_ids", lambda **_: {"shop"}, raising=False)
    monkeypatch.setattr(manager, "is_authorized_dag", may, raising=False)
    server.root.include_router(task_state_store_router, prefix="/api/v2")
    headers = server.client(server.token("USER")).headers
    return TestClient(Matcher(server.root), base_url="http://airflow", headers=headers)


@pytest.mark.parametrize(
    "name", ["airflow_events.sender", "AIRFLOW_events.sender", "airflow_events.sender ", "airflow_events.sendér"]
)
def test_who_may_edit_task_instances_is_not_taken_for_a_task(server, rest, name):
    key = uuid.uuid4().hex
    red = server.waits.add(key, dag_id="red")
    mine = server.waits.add(state="running", dag_id="shop")
    ti = server.waits.state(mine).id
    server.session.commit()
    store = f"/api/v2/dags/shop/dagRuns/{mine.run_id}/taskInstances/{mine.task_id}/state-store"
    assert rest.put(f"{store}/another", json={"value": "1"}).status_code == 204
    refused = rest.put(f"{store}/{name}", json={"value": task_proof.digest(PROOF)})
    assert refused.status_code == 403
    assert "is written by the task itself alone" in refused.json()["detail"]
    body = {"key": key, "event": "forged", "to": "all", "ttl": None, "name": "1"}
    assert server.client(PROOF).post(f"/events/tasks/{ti}/events", json=body).status_code == 401
    server.session.rollback()
    assert server.waits.state(red).state == "deferred"
