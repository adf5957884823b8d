"""Rows that are encrypted with a Fernet key which is not there any more: they harm no other."""

from __future__ import annotations

import uuid

from airflow.models.asset import AssetModel, AssetWatcherModel, DagScheduleAssetReference
from airflow.models.dag import DagModel
from airflow.models.trigger import Trigger
from sqlalchemy import update

OF_ANOTHER_KEY = "gAAAAABnotofthiskey"


def test_an_event_goes_to_another_wait_of_its_key(server):
    key = uuid.uuid4().hex
    old, new = server.waits.add(key), server.waits.add(key)
    of_old = Trigger.id == server.waits.state(old).trigger_id
    server.session.execute(update(Trigger).where(of_old).values(encrypted_kwargs=OF_ANOTHER_KEY))
    server.session.commit()
    client = server.client(server.token("USER"))
    answer = client.post(f"/events/keys/{key}", json=1)
    assert (answer.status_code, answer.json()["waits"]) == (200, [new.id])
    refused = client.post(f"/events/dags/{old.dag_id}/runs/{old.run_id}/tasks/{old.task_id}", json=1)
    assert refused.status_code == 503
    assert f"what {old.id} waits for cannot be read" in refused.json()["detail"]


def test_what_starts_runs_is_listed(server):
    trigger = Trigger("airflow_events.triggers.starts.StartTrigger", {"up_to": 1})
    asset = AssetModel(name="s", uri="s", group="airflow-events")
    server.session.add_all([trigger, asset])
    server.session.flush()
    trigger.encrypted_kwargs = OF_ANOTHER_KEY
    server.session.add(AssetWatcherModel(name="w", asset_id=asset.id, trigger_id=trigger.id))
    server.session.add(DagScheduleAssetReference(asset_id=asset.id, dag_id="shop"))
    server.session.execute(update(DagModel).values(is_stale=False))
    server.session.commit()
    answer = server.client(server.token("VIEWER")).get("/events/api/starts")
    assert answer.status_code == 200
    assert [start["dag_id"] for start in answer.json()] == ["shop"]
