"""What happens in Airflow itself: the end of a DAG run or a task, an update of an asset."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, NoReturn

from airflow.sdk import Asset
from airflow_events.listeners.base import EventListener, Wait, current_wait, is_template, working_for
from airflow_events.listeners.support.timestamps import parsed, when

RUN_STATES = ("success", "failed")
TASK_STATES = ("success", "failed", "skipped", "upstream_failed")

# Seconds that `since` may lie before or after the creation of the run, if it counts from there.
_FARTHEST = 10 * 365 * 86400.0

# What stands for an argument that nobody knows before it is rendered; templates in others are texts as any.
_IF_TEMPLATE: Mapping[str, Any] = {"state": "success", "map_index": -1, "logical_date": None, "since": None}

Moment = float | str | datetime | timedelta


class _FoundByTheApiServer(EventListener):
    """
    An event that stands in Airflow's own database, where the API server finds it for all who wait.

    The API server records the event and ends the task, as with events over HTTP: no wait polls.
    """

    recorded_from_outside: ClassVar[bool] = True

    @classmethod
    def check_arguments(cls, *args: Any, **kwargs: Any) -> None:
        told = inspect.signature(cls.sought).bind(*args, **kwargs)
        for name, value in told.arguments.items():
            if name in _IF_TEMPLATE and any(
                map(is_template, [value] if isinstance(value, str) else _items(value))
            ):
                told.arguments[name] = _IF_TEMPLATE[name]
        with working_for(Wait("", "", "")):
            cls.sought(*told.args, **told.kwargs)

    @classmethod
    def address(cls, *args: Any, **kwargs: Any) -> str | None:
        sought = cls.sought(*args, **kwargs)
        assert sought is not None
        # Not what a key can be: it has no such length.
        text = json.dumps([sought["kind"], sought["of"]], sort_keys=True)
        return hashlib.sha256(f"{'airflow':>512}{text}".encode()).hexdigest()


class DagRunListener(_FoundByTheApiServer):
    """The end of a DAG run: the first that ends in a state, from ``since`` on (``docs/sources/airflow.md``)."""

    @classmethod
    def sought(
        cls,
        dag_id: str,
        *,
        state: str | Sequence[str] = "success",
        run_id: str | None = None,
        logical_date: float | str | datetime | None = None,
        since: Moment | None = None,
    ) -> dict[str, Any]:
        of = {
            "dag_id": _text("dag_id", dag_id),
            "states": _states(state, RUN_STATES),
            **_run(run_id, logical_date),
        }
        return {"kind": "dag_run", "of": of, **_since(since, of)}

    async def poll_for_event(
        self,
        dag_id: str,
        *,
        state: str | Sequence[str] = "success",
        run_id: str | None = None,
        logical_date: float | str | datetime | None = None,
        since: Moment | None = None,
    ) -> NoReturn:
        """
        Wait until the API server has found the run.

        :param state: in which it ends: ``success`` or ``failed``, or a list of them.
        :param run_id: only this one.
        :param logical_date: only the one of this date; forms as of ``since``.
        :param since: not one that ended before: a datetime, ISO 8601, seconds since the epoch, or a timedelta from
            the creation of the wait's own run. None is that creation, and whenever it ended if ``run_id`` or
            ``logical_date`` says which.
        :raises ValueError: an argument is invalid.
        """
        await _forever()


class TaskListener(_FoundByTheApiServer):
    """The end of a task: its first instance that ends in a state, from ``since`` on."""

    @classmethod
    def sought(
        cls,
        dag_id: str,
        task_id: str,
        *,
        state: str | Sequence[str] = "success",
        map_index: int = -1,
        run_id: str | None = None,
        logical_date: float | str | datetime | None = None,
        since: Moment | None = None,
    ) -> dict[str, Any]:
        of = {
            "dag_id": _text("dag_id", dag_id),
            "task_id": _text("task_id", task_id),
            "map_index": int(map_index),
            "states": _states(state, TASK_STATES),
            **_run(run_id, logical_date),
        }
        return {"kind": "task", "of": of, **_since(since, of)}

    async def poll_for_event(
        self,
        dag_id: str,
        task_id: str,
        *,
        state: str | Sequence[str] = "success",
        map_index: int = -1,
        run_id: str | None = None,
        logical_date: float | str | datetime | None = None,
        since: Moment | None = None,
    ) -> NoReturn:
        """
        Wait until the API server has found the task instance.

        :param state: in which it ends: ``success``, ``failed`` (for good: without another try), ``skipped`` or
            ``upstream_failed``, or a list of them.
        :param map_index: of a mapped task; -1 for one that is not.
        :param run_id: only in this run; ``logical_date``, ``since``: as of `DagRunListener`.
        :raises ValueError: an argument is invalid.
        """
        await _forever()


class AssetListener(_FoundByTheApiServer):
    """An update of an asset: its first asset event, from ``since`` on."""

    @classmethod
    def sought(
        cls,
        name: str | None = None,
        *,
        uri: str | None = None,
        partition: str | None = None,
        since: Moment | None = None,
    ) -> dict[str, Any]:
        if (name is None) == (uri is None):
            raise ValueError("an asset has a name or a uri here: give one of them")
        # As Airflow stores a URI: without a slash at its end, say.
        which = {"uri": Asset(uri=_text("uri", uri)).uri} if name is None else {"name": _text("name", name)}
        of = {**which, "partition": None if partition is None else _text("partition", partition)}
        return {"kind": "asset", "of": of, **_since(since, {})}

    async def poll_for_event(
        self,
        name: str | None = None,
        *,
        uri: str | None = None,
        partition: str | None = None,
        since: Moment | None = None,
    ) -> NoReturn:
        """
        Wait until the API server has found the asset event.

        :param name: of the asset; or its ``uri``.
        :param partition: only an event with this partition key. None: any.
        :param since: as of `DagRunListener`; None is the creation of the run.
        :raises ValueError: an argument is invalid.
        """
        await _forever()


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else []


async def _forever() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is a text that is not empty, not {value!r:.100}")
    return value


def _states(state: Any, known: Collection[str]) -> list[str]:
    states = [state] if isinstance(state, str) else list(state)
    if not states or any(one not in known for one in states):
        raise ValueError(f"state is one of {', '.join(known)}, or a list of them, not {state!r:.100}")
    return sorted({str(one) for one in states})


def _run(run_id: Any, logical_date: Any) -> dict[str, str | None]:
    if isinstance(logical_date, timedelta):
        raise ValueError(f"logical_date is a date and a time, not {logical_date!r}")
    return {
        "run_id": None if run_id is None else _text("run_id", run_id),
        "logical_date": None if logical_date is None else when(logical_date, current_wait()).isoformat(),
    }


def _since(since: Moment | None, of: dict[str, Any]) -> dict[str, Any]:
    """
    Say since when: at a moment (``since``), or so many seconds after the run's creation (``after``).

    With neither, whenever it was. That is left to the inbox, which knows when the run was created.
    """
    if since is None:
        one_run = of.get("run_id") is not None or of.get("logical_date") is not None
        return {"since": None, "after": None if one_run else 0.0}
    if isinstance(since, str):
        since = parsed(since)
    if isinstance(since, timedelta):
        after = since.total_seconds()
        if abs(after) > _FARTHEST:
            raise ValueError(f"since is more than ten years from the creation of the run: {since!r}")
        return {"since": None, "after": after}
    return {"since": when(since, current_wait()).isoformat(), "after": None}
