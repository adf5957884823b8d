"""
Where a wait starts and where it finishes: the whole rule.

A wait starts in the triggerer if everything that it needs is known to the scheduler, and on a worker
otherwise. It finishes where its event can be recorded such that no retry, clear or second triggerer changes
it: in the triggerer if it started there and its listener has nothing to commit, or polls repeatably.
"""

from __future__ import annotations

from datetime import timezone
from typing import TYPE_CHECKING, Any

from airflow.sdk.bases.operator import BaseOperator
from airflow.sdk.configuration import conf
from airflow.sdk.definitions.xcom_arg import XComArg
from airflow_events.listeners.base import commits
from airflow_events.listeners.serde import localized
from airflow_events.triggers.reference import is_importable

if TYPE_CHECKING:
    from airflow_events.operators.wait_for_event import WaitForEventOperator


def needs_worker_to_start(task: WaitForEventOperator) -> str | None:
    """
    Say why the wait starts on a worker, or return None if it starts in the triggerer.

    Mapped tasks start on workers in Airflow 3.3, whatever this says.
    """
    arguments = [getattr(task, field) for field in task.template_fields]
    literals = [task.default if task.has_default else None, *([] if task.arguments_as_text else arguments)]
    if not is_importable(task.listener):
        return f"the triggerer cannot import {task.listener.__qualname__}, which is defined beside the DAG"
    if any(XComArg.iter_xcom_references(arguments)):
        return "its arguments hold the output of another task"
    if not _kept_by_the_serialized_dag(literals):
        return "its arguments or its default hold a value that a serialized DAG does not keep"
    if _has_template(arguments) and _renders_only_on_workers(task):
        return "its templates may use the DAG's own macros, filters or environment, which only workers have"
    if not task.replay:
        return "replay=False needs to know of clears, which a trigger does not"
    if _runs_before(task):
        return "it has a pre_execute or an on_execute_callback, which only workers run"
    if conf.getboolean("triggerer", "queues_enabled", fallback=False):
        return "[triggerer] queues_enabled needs a queue, which the scheduler does not give to triggers"
    return None


def needs_worker_to_finish(task: WaitForEventOperator, *, started_on_worker: bool) -> str | None:
    """
    Say why the wait finishes on a worker, or return None if it finishes in the triggerer.

    Where a plugin listens to task states, which it would miss, the trigger adds to this that every wait
    finishes on a worker.
    """
    if why := needs_worker_to_record(task, started_on_worker=started_on_worker):
        return why
    if task.outlets:
        return "it has outlets, which only workers register"
    if _runs_after(task):
        return "it has a post_execute, which only workers run"
    if task.multiple_outputs:
        return "it has multiple_outputs, which only workers push"
    return None


def needs_worker_to_record(task: WaitForEventOperator, *, started_on_worker: bool) -> str | None:
    """Say why what was polled can be recorded only by a worker, or return None if the trigger can."""
    listener = task.listener
    if commits(listener) and not listener.repeatable_poll:
        return f"a second triggerer might poll another event of {listener.__qualname__}, and one is committed"
    if started_on_worker and (commits(listener) or not listener.repeatable_poll):
        return "it started on a worker, and what a trigger records is lost when such a task is cleared"
    if not task.replay:
        return "replay=False needs to know of clears, which a trigger does not"
    return None


def _kept_by_the_serialized_dag(value: Any) -> bool:
    from airflow.serialization.serialized_objects import BaseSerialization

    try:
        value = localized(value, timezone.utc)  # which zone it is makes no difference here
        return bool(BaseSerialization.deserialize(BaseSerialization.serialize(value)) == value)
    except Exception:
        return False


def _has_template(value: Any) -> bool:
    if isinstance(value, str):
        return "{{" in value or "{%" in value
    if isinstance(value, dict):
        return any(_has_template(item) for pair in value.items() for item in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_has_template(item) for item in value)
    return False


def _renders_only_on_workers(task: WaitForEventOperator) -> bool:
    dag = task.dag if task.has_dag() else None  # type: ignore[no-untyped-call]
    return dag is not None and any(
        getattr(dag, name, None)
        for name in ("user_defined_macros", "user_defined_filters", "jinja_environment_kwargs")
    )


def _runs_before(task: BaseOperator) -> bool:
    return bool(
        task.on_execute_callback
        or getattr(task, "_pre_execute_hook", None)
        or type(task).pre_execute is not BaseOperator.pre_execute
    )


def _runs_after(task: BaseOperator) -> bool:
    return bool(
        getattr(task, "_post_execute_hook", None) or type(task).post_execute is not BaseOperator.post_execute
    )
