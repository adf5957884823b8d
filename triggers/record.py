"""The record as the triggerer reaches it: XComs of the wait's task instance."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.comms import DeleteXCom
from airflow.sdk.execution_time.xcom import XCom
from airflow_events.listeners.base import Wait
from airflow_events.listeners.commit import Record
from airflow_events.triggers.requests import Requests

RECORD_KEY = "event_record"
LOST_KEY = "event_lost"
DEADLINE_KEY = "event_deadline"
PROGRESS_KEY = "event_progress"


@dataclass
class XComRecord:
    """
    The record of a wait in Airflow's XCom table.

    It stays over retries and clears of a task that starts in the triggerer, and goes with the run. A task
    that starts on a worker loses it at the start of each try, which is Airflow's own doing.

    An XCom has no compare-and-set. So a record is not deleted when it is dropped, which a triggerer that
    stood still might do to another's: its id is noted as lost.

    :param wait: as it was when its trigger was made.
    :param after: the id of the record that was dropped last, as far as was read.
    :param to_come: what was written, as far as was read, ahead of an event that has not come yet.
    :param arrived: when the event came that is being recorded, in seconds since the epoch; None if none has come.
    """

    wait: Wait
    arrived: float | None = None
    after: str = field(init=False)
    to_come: Record | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.after = self.wait.after

    async def read(self) -> Record | None:
        self.to_come = None
        stored = await self._get(RECORD_KEY)
        if stored is None:
            return None
        record = Record.from_dict(stored)
        dropped = await self._get(LOST_KEY) if record.id else None
        self.after = dropped or self.after
        if record.lapsed or dropped == record.id != "":
            return None
        if record.is_to_come:
            self.to_come = record
            return None
        return record

    async def write(self, record: Record) -> None:
        await self._set(RECORD_KEY, record.as_dict())

    async def drop(self, record: Record) -> None:
        await self._set(LOST_KEY, record.id)

    async def deadline(self, timeout: timedelta, try_number: int, retries: int, now: datetime) -> datetime:
        """
        Return when the wait's time is up.

        It is counted from the first try. A trigger cannot tell a retry from a clear, which starts the time
        anew, but by what the try before left: see `hand_over_deadline`.
        """
        noted = await self._get(DEADLINE_KEY)
        if noted is None or noted["try_number"] != try_number:
            noted = {"at": now + timeout, "try_number": try_number, "last_try": try_number + retries}
            await self._set(DEADLINE_KEY, noted)
        at: datetime = noted["at"]
        return at

    async def hand_over_deadline(self) -> None:
        """Let the deadline count for the next try too, if there is to be one: this one is failing."""
        noted = await self._get(DEADLINE_KEY)
        if noted is not None and noted["try_number"] < noted["last_try"]:
            await self._set(DEADLINE_KEY, {**noted, "try_number": noted["try_number"] + 1})

    async def deliver(self, value: Any, *, mapped_length: int | None = None, dag_result: bool = False) -> None:
        """Write the task's return value, which Airflow's worker would do."""
        # The private parameter is what the worker uses too; without it no task can be mapped over the value.
        async with self._turn():
            await XCom.aset(
                key=XCom.XCOM_RETURN_KEY,
                value=value,
                dag_result=dag_result,
                _mapped_length=mapped_length,
                **self._key,
            )

    async def undeliver(self) -> None:
        """Delete the task's return value, which was written ahead of an event that will not come."""
        # There is no async method for it.
        async with self._turn():
            await task_runner.SUPERVISOR_COMMS.asend(DeleteXCom(key=XCom.XCOM_RETURN_KEY, **self._key))

    @property
    def _key(self) -> dict[str, Any]:
        return {
            "dag_id": self.wait.dag_id,
            "run_id": self.wait.run_id,
            "task_id": self.wait.task_id,
            "map_index": self.wait.map_index,
        }

    def _turn(self) -> AbstractAsyncContextManager[None]:
        return Requests.of_loop().turn(self.arrived)

    async def _get(self, key: str) -> Any:
        async with self._turn():
            return await XCom.aget_one(key=key, **self._key)

    async def _set(self, key: str, value: Any) -> None:
        async with self._turn():
            await XCom.aset(key=key, value=value, **self._key)
