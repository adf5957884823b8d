"""What Airflow's own means take: a trigger that ends its task, without a worker, when a file is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from airflow.plugins_manager import AirflowPlugin
from airflow.sdk import BaseOperator
from airflow.triggers.base import BaseTrigger, StartTriggerArgs, TaskSuccessEvent, TriggerEvent


class AppearsTrigger(BaseTrigger):
    """Looks four times in a second, and ends its task."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "appears.AppearsTrigger", {"path": self.path}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        while not Path(self.path).exists():  # noqa: ASYNC110, ASYNC240 (as Airflow's own FileTrigger does)
            await asyncio.sleep(0.25)
        yield TaskSuccessEvent()


class Appears(BaseOperator):
    """Waits in the triggerer for a file."""

    template_fields = ("path",)
    start_from_trigger = True

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = path
        self.start_trigger_args = StartTriggerArgs(
            trigger_cls="appears.AppearsTrigger",
            trigger_kwargs={"path": path},
            next_method="execute_complete",
            next_kwargs=None,
            timeout=None,
        )


class AppearsPlugin(AirflowPlugin):
    """Makes Airflow import this module in each of its processes."""

    name = "appears"
