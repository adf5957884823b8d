"""
What the first edition recorded, for runs that were open while Airflow was upgraded.

It kept the event of a wait as an XCom, and where a worker had recorded it, in the task state store. Those of a
list of waits stood in a log, in pages of some hundred entries. A wait that begins here for the first time takes
over what there is; nothing writes there any more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from airflow.models.task_state_store import TaskStateStoreModel
from airflow.models.xcom import XComModel
from airflow.sdk.serde import deserialize
from airflow_events.inbox.entries import Phase
from airflow_events.inbox.models import DIGEST_LENGTH, SINGLE
from airflow_events.inbox.tasks import Task
from sqlalchemy import delete, or_, select, tuple_
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement

log = logging.getLogger(__name__)

_RECORD, _LOST, _DEADLINE = "event_record", "event_lost", "event_deadline"
_LOG = "event_log:"
# The name of a page of the log: with replay=False it begins with the generation that it counts for.
_PAGE = re.compile(rf"(?:(\d+):)?{_LOG}\d+\.\d+:\d+")
_LONGEST_NAME = 40
_Key = tuple[str, str, str, int]


def records(session: Session, tasks: Sequence[Task]) -> dict[_Key, dict[int, dict[str, Any]]]:
    """
    Return what to write into the rows of those of ``tasks`` of which something was recorded.

    By their keys, and by the places.
    """
    by_key = {task.key: task for task in tasks}
    if not by_key:
        return {}
    by_trigger = _read(session, XComModel, by_key)
    by_worker = _read(session, TaskStateStoreModel, by_key)
    found = {}
    for key in by_trigger.keys() | by_worker.keys():
        task, of_trigger, of_worker = by_key[key], by_trigger.get(key, {}), by_worker.get(key, {})
        try:
            found[key] = {SINGLE: _taken_over(task, of_trigger, of_worker), **_places(task, of_trigger, of_worker)}
        except Exception:
            log.exception(
                "What the first edition recorded for %s cannot be read, and is left where it is: the XComs and "
                "the task state named event_record, event_lost, event_deadline and event_log",
                task.name,
            )
    return found


def forget(session: Session, task: Task) -> None:
    """Delete what was recorded."""
    for model in (XComModel, TaskStateStoreModel):
        table: Any = model
        columns = (table.dag_id, table.task_id, table.run_id, table.map_index)
        session.execute(
            delete(model)
            .where(tuple_(*columns).in_([task.key]), _is_ours(table))
            .execution_options(synchronize_session=False)
        )


def _is_ours(table: Any) -> ColumnElement[bool]:
    return or_(table.key.in_((_RECORD, _LOST, _DEADLINE)), table.key.contains(_LOG, autoescape=True))


def _read(session: Session, table: Any, tasks: Mapping[_Key, Task]) -> dict[_Key, dict[str, Any]]:
    columns = (table.dag_id, table.task_id, table.run_id, table.map_index)
    query = select(*columns, table.key, table.value).where(tuple_(*columns).in_(list(tasks)), _is_ours(table))
    found: dict[_Key, dict[str, Any]] = {}
    for dag_id, task_id, run_id, map_index, name, value in session.execute(query):
        shape = value
        while isinstance(shape, str) and shape[:1] in ('"', "{"):  # text within text, of what a success brought
            shape = json.loads(shape)
        found.setdefault((dag_id, task_id, run_id, map_index), {})[name] = shape
    return found


def _taken_over(task: Task, by_trigger: Mapping[str, Any], by_worker: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    noted = by_worker.get(_DEADLINE) or by_trigger.get(_DEADLINE)
    if isinstance(noted, dict) and noted.get("at") is not None:
        values["deadline"] = deserialize(noted["at"])
        values["clears"] = noted.get("generation", task.clears)
    lost = by_worker.get(_LOST) or by_trigger.get(_LOST)
    if isinstance(lost, str):
        values["lost"] = lost
    told = by_worker.get(_RECORD) or by_trigger.get(_RECORD)
    if not isinstance(told, dict) or "phase" not in told:
        return values
    recorded_at = datetime.fromisoformat(told["recorded_at"]) if told.get("recorded_at") else None
    is_to_come = told.get("foreseen") and recorded_at is not None and recorded_at > datetime.now(timezone.utc)
    if is_to_come or (told.get("id") and told["id"] == lost):
        return values
    clears = told.get("generation", task.clears)
    values.update(
        phase=told["phase"],
        event=json.dumps(told["event"]),
        record_id=told.get("id") or "",
        record_clears=clears,
        recorded_after=told.get("after"),
        recorded_at=recorded_at,
        committed_at=recorded_at if told["phase"] == Phase.COMMITTED else None,
        expires=None if told.get("until") is None else deserialize(told["until"]),
        receipt=None if told.get("receipt") is None else json.dumps(told["receipt"]),
    )
    if told["phase"] == Phase.REJECTED:
        rejected = told["event"]
        values.update(reason=rejected["reason"], sent_by=rejected["by"], record_clears=rejected["generation"])
    return values


class _Place:
    """What the log says of one place. It says the same in whatever order its entries are read."""

    def __init__(self) -> None:
        self.records: dict[str, tuple[str, Mapping[str, Any]]] = {}  # by their ids: for which arguments, and what
        self.committed: set[str] = set()
        self.lost: set[str] = set()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take an entry in: a record, or what became of an earlier one."""
        if record := entry.get("record"):
            self.records.setdefault(record.get("id") or "", (entry["call"], record))
        self.committed.update({entry["committed"]} if entry.get("committed") else ())
        self.lost.update({entry["lost"]} if entry.get("lost") else ())

    def values(self, task: Task) -> dict[str, Any]:
        """Return what to write into its row."""
        # It goes on under the name that it had, by which its claims are known.
        lost = hashlib.sha256("".join(sorted(self.lost)).encode()).hexdigest()[:_LONGEST_NAME]
        values: dict[str, Any] = {"lost": lost} if self.lost else {}
        ids = [id for id in self.records if id in self.committed or id not in self.lost]
        if not ids:
            return values
        id = min(ids, key=self._rank)
        call, record = self.records[id]
        recorded_at = datetime.fromisoformat(record["recorded_at"]) if record.get("recorded_at") else None
        is_committed = self._is_committed(id)
        return {
            **values,
            "phase": (Phase.COMMITTED if is_committed else Phase.RECORDED).value,
            "event": json.dumps(record["event"]),
            "record_id": id,
            "record_clears": task.clears,
            "recorded_after": (record.get("after") or "")[:_LONGEST_NAME] or None,
            "recorded_at": recorded_at,
            "committed_at": recorded_at if is_committed else None,
            "arguments": bytes.fromhex(call).ljust(DIGEST_LENGTH, b"\0"),
        }

    def _is_committed(self, id: str) -> bool:
        return id in self.committed or self.records[id][1]["phase"] == Phase.COMMITTED

    def _rank(self, id: str) -> tuple[bool, str, str]:
        return not self._is_committed(id), self.records[id][1].get("recorded_at") or "", id


def _places(task: Task, *logs: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Read the log of a list of waits, which has pages of a trigger's and of a worker's."""
    found: dict[int, _Place] = {}
    for entry in _entries(task, logs):
        found.setdefault(entry["index"], _Place()).add(entry)
    return {index: place.values(task) for index, place in sorted(found.items())}


def _entries(task: Task, logs: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    for name, page in (item for log_of in logs for item in log_of.items()):
        match = _PAGE.fullmatch(name)
        if match is not None and match[1] in (None, str(task.clears)):
            yield from page["entries"]
