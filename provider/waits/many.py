"""The records of a task that waits for many events, as Airflow's database has them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from airflow.models.task_state_store import TaskStateStoreModel
from airflow.models.xcom import XComModel
from airflow_events.listeners.commit import Phase
from airflow_events.triggers.journal import LOG_KEY, Entry, Records, is_page
from airflow_events.triggers.record import PROGRESS_KEY
from airflow_events.waits import tables
from airflow_events.waits.tables import Key
from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session


def read(session: Session, key: Key) -> tuple[dict[str, Any], datetime | None, str] | None:
    """
    Return what is recorded, in the form of one record, when that was written last, and by whom.

    The event of that record has all events by their indexes, as they are stored. None if nothing is recorded.
    """
    records = Records()
    written: list[datetime] = []
    by_worker = False
    for model in (XComModel, TaskStateStoreModel):
        of_model: Any = model
        rows: Iterable[Any] = session.scalars(
            select(model).where(*tables.is_(model, key), of_model.key.contains(f"{LOG_KEY}:", autoescape=True))
        )
        for row in rows:
            if not is_page(row.key):
                continue
            page = json.loads(row.value) if isinstance(row.value, str) else row.value
            if not isinstance(page, dict):  # an XCom backend keeps it elsewhere
                continue
            for stored in page["entries"]:
                records.add(Entry.from_dict(stored))
            at = row.updated_at if isinstance(row, TaskStateStoreModel) else row.timestamp
            written.append(at)
            by_worker = by_worker or isinstance(row, TaskStateStoreModel)
    found = {index: records.of(index) for index in sorted(records)}
    events = {str(index): record for index, record in found.items() if record is not None}
    if not events:
        return None
    phase = Phase.RECORDED if records.uncommitted else Phase.COMMITTED
    record = {
        "phase": phase.value,
        "event": {index: record.event for index, record in events.items()},
        "recorded_at": max(record.recorded_at for record in events.values()),
    }
    return record, max(written), "worker" if by_worker else "triggerer"


def forget(session: Session, key: Key) -> None:
    """Delete all records of a task that waits for many events."""
    for model in (XComModel, TaskStateStoreModel):
        of_model: Any = model
        session.execute(
            delete(model)
            .where(
                *tables.is_(model, key),
                or_(of_model.key.contains(f"{LOG_KEY}:", autoescape=True), of_model.key == PROGRESS_KEY),
            )
            .execution_options(synchronize_session=False)
        )
