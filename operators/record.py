"""The record as a worker reaches it: Airflow's task state store, and the triggerer's copy of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from airflow.sdk.execution_time.context import NEVER_EXPIRE, TaskStateStoreAccessor
from airflow_events.listeners import serde
from airflow_events.listeners.commit import Record
from airflow_events.triggers.record import DEADLINE_KEY, LOST_KEY, RECORD_KEY

_FENCE_KEY = "event_fence"


@dataclass(frozen=True)
class WorkerRecord:
    """
    The record of a wait, from a worker.

    The task state store keeps it over retries and clears, and it goes with the run. The copy among the
    XComs is for the trigger, which reaches nothing else. The copy is written first: a wait that starts
    in the triggerer would poll again if it were missing.

    A generation counts the clears of the task instance: its ``max_tries`` grows with each clear and never
    by a retry.

    :param replay: whether the record of an earlier generation counts.
    """

    ti: Any
    store: TaskStateStoreAccessor
    replay: bool = True

    @property
    def after(self) -> str:
        """The id of the record that was dropped last, by a worker or a trigger; empty if none was."""
        # As the trigger reads it, which reaches XComs alone: those go with each try that starts on a worker.
        by_trigger = self._pull(LOST_KEY)
        if by_trigger and self._pull(RECORD_KEY) is not None:
            return str(by_trigger)
        return self._get(LOST_KEY) or ""

    async def read(self) -> Record | None:
        stored = self._get(RECORD_KEY)
        if stored is None:
            # Recorded by a trigger, which then handed over to a worker.
            stored = self._pull(RECORD_KEY)
            if stored is None or not self.replay:
                return None
            record = Record.from_dict(stored)
            lost = record.id and record.id == self._pull(LOST_KEY)
            return None if lost or record.lapsed or record.is_to_come else record
        if not self.replay and stored["generation"] != self.ti.max_tries:
            return None
        record = Record.from_dict(stored)
        return None if record.lapsed else record

    async def write(self, record: Record) -> None:
        # Unlike the store, XComs take the writes of a worker that its task has outlived: ask the store first.
        self.store.delete(_FENCE_KEY)
        self.ti.xcom_push(RECORD_KEY, record.as_dict())
        self._set(RECORD_KEY, {**record.as_dict(), "generation": self.ti.max_tries})

    async def drop(self, record: Record) -> None:
        self.store.delete(RECORD_KEY)
        self._set(LOST_KEY, record.id)
        self.ti.xcom_push(LOST_KEY, record.id)

    def deadline(self, timeout: timedelta, now: datetime) -> datetime:
        """Return when the wait's time is up: counted from the first try, and anew after a clear."""
        if (noted := self.noted_deadline()) is None:
            noted = now + timeout
            self._set(DEADLINE_KEY, {"at": noted, "generation": self.ti.max_tries})
        return noted

    def noted_deadline(self) -> datetime | None:
        """Return the deadline that was noted, here or by the trigger, or None."""
        noted = self._get(DEADLINE_KEY)
        if noted is None or noted["generation"] != self.ti.max_tries:
            noted = self._pull(DEADLINE_KEY)
        at: datetime | None = noted["at"] if noted else None
        return at

    def _pull(self, key: str) -> Any:
        return self.ti.xcom_pull(task_ids=self.ti.task_id, key=key, map_indexes=self.ti.map_index)

    def _get(self, key: str) -> Any:
        stored = self.store.get(key)
        return None if stored is None else serde.decode(json.dumps(stored))

    def _set(self, key: str, value: Any) -> None:
        self.store.set(key, serde.as_json(value), retention=NEVER_EXPIRE)
