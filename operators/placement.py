"""
Where a wait starts and where it finishes: the whole rule.

A wait starts in the triggerer if everything that it needs is known to the scheduler and comes out there as it
would on a worker. It finishes there too, unless something is to run then that only workers run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta, timezone, tzinfo
from typing import TYPE_CHECKING, Any

import jinja2
from airflow.sdk.bases.operator import BaseOperator
from airflow.sdk.configuration import conf
from airflow.sdk.definitions._internal.abstractoperator import DEFAULT_POOL_NAME
from airflow.sdk.definitions._internal.mixins import ResolveMixin
from airflow.sdk.definitions._internal.types import is_arg_set
from airflow.sdk.definitions.param import Param, ParamsDict
from airflow.sdk.definitions.xcom_arg import XComArg
from airflow_events.listeners.base import EventListener, foresees, is_template
from airflow_events.listeners.support.serde import localized, simple
from airflow_events.operators import templates
from airflow_events.triggers import reference

if TYPE_CHECKING:
    from airflow.sdk.definitions.dag import DAG
    from airflow_events.operators.wait_for_event import WaitForEventOperator

# What a subclass may define that only workers call, before the wait and after it.
_BEFORE = ("execute", "render_template_fields", "render_template", "get_template_env")
_AFTER = ("execute_complete", "resume_execution")
# Values that Airflow gives back in a class of its own, equal, and that read the same.
_MOMENTS = (date, time, timedelta, tzinfo)

# Characters of a trigger's arguments, which take a third more encrypted (`Trigger.encrypted_kwargs`). MySQL has 64
# KB for them, and a scheduler that made a longer row would end, as would each after it.
_LONGEST = 44_000


@dataclass(frozen=True)
class Placement:
    """
    Where a wait starts and finishes.

    :param starts_on_worker_because: why it starts on a worker; None if it starts in the triggerer.
    :param finishes_on_worker_because: likewise, of its end.
    """

    starts_on_worker_because: str | None
    finishes_on_worker_because: str | None


def placement(task: WaitForEventOperator) -> Placement:
    """
    Say where a wait starts and finishes.

    Mapped tasks start on workers in Airflow 3.3, whatever this says.
    """
    return Placement(_starts_on_worker_because(task), _finishes_on_worker_because(task))


def resolves_at_run_time(value: Any) -> bool:
    """Whether an argument holds what Airflow puts another value in the place of: an output, a mapped argument."""
    if isinstance(value, dict):
        return any(map(resolves_at_run_time, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(resolves_at_run_time, value))
    if isinstance(value, Sequence) and type(value).__module__.startswith("airflow.sdk."):
        return True  # on a worker: outputs of a mapped task, zipped ones and so on, which are read one by one
    return isinstance(value, ResolveMixin) or any(XComArg.iter_xcom_references(value))


def _starts_on_worker_because(task: WaitForEventOperator) -> str | None:
    arguments = [getattr(task, field) for field in task.template_fields]
    if not reference.is_importable(task.listener) and (why := reference.unsteady(task.listener)):
        return f"the triggerer cannot import {task.listener.__qualname__}, and {why}"
    if resolves_at_run_time(arguments):
        return "its arguments hold the output of another task, or what is known at run time alone"
    literals = [task.default if task.has_default else None, *([] if task.arguments_as_text else arguments)]
    if not _kept_by_the_serialized_dag(simple(literals)):
        return "its arguments or its default hold a value that a serialized DAG does not keep"
    if why := _rendered_on_worker_because(task, arguments):
        return why
    if missing := _params_without_value(task):
        return f"its param {missing} has no default, and Airflow's triggerer crashes on it"
    if checked := _param_with_schema(task):
        return f"its param {checked} has a schema, which only workers validate"
    if task.map_index_template:
        return "it has a map_index_template, which only workers render"
    if _runs_before(task):
        return "it has a pre_execute or an on_execute_callback, which only workers run"
    if method := _own_method(task, _BEFORE):
        return f"its class defines {method}, which only workers call"
    if task.max_active_tis_per_dag is not None or task.max_active_tis_per_dagrun is not None:
        return "it has a max_active_tis_per_dag or max_active_tis_per_dagrun, which are enforced only for workers"
    if task.pool != DEFAULT_POOL_NAME:
        return "it has a pool, whose slots are enforced only for workers"
    if (length := task.trigger_length) > _LONGEST:
        return (
            f"its arguments are too long for a trigger in MySQL: {length:,} characters, and at most {_LONGEST:,}"
        )
    if conf.getboolean("triggerer", "queues_enabled", fallback=False):
        return "[triggerer] queues_enabled needs a queue, which the scheduler does not give to triggers"
    return None


def keeps_what_is_rendered(listener: type[EventListener]) -> bool:
    """Whether the arguments of a wait that begins in the triggerer are kept as they were rendered there first."""
    is_parked = listener.recorded_from_outside or foresees(listener)
    return is_parked or (listener.hosted and reference.is_importable(listener))


def _finishes_on_worker_because(task: WaitForEventOperator) -> str | None:
    if _runs_after(task):
        return "it has a post_execute, which only workers run"
    if task.outlets and _runs_before(task):
        return "it has outlets, to whose events a pre_execute or an on_execute_callback may add, on workers alone"
    if task.on_success_callback:
        return "it has an on_success_callback, which only workers run"
    if task.soft_fail and task.on_skipped_callback:
        return "it has an on_skipped_callback, which only workers run"
    if method := _own_method(task, _AFTER):
        return f"its class defines {method}, which only workers call"
    if task.operator_extra_links:
        return "it has operator_extra_links, which only workers write"
    return None


def _kept_by_the_serialized_dag(value: Any) -> bool:
    from airflow.serialization.serialized_objects import BaseSerialization

    try:
        value = localized(value, timezone.utc)  # which zone it is makes no difference here
        return _alike(BaseSerialization.deserialize(BaseSerialization.serialize(value)), value)
    except Exception:
        return False


def _alike(returned: Any, value: Any) -> bool:
    """Whether two values are equal, and of the same types as far as a listener would see that."""
    if isinstance(value, _MOMENTS):
        return bool(returned == value)
    if type(returned) is not type(value):
        return False
    if isinstance(value, dict):
        return list(returned) == list(value) and all(_alike(returned[key], value[key]) for key in value)
    if isinstance(value, (list, tuple)):
        return len(returned) == len(value) and all(map(_alike, returned, value))
    return bool(returned == value)


def _rendered_on_worker_because(task: WaitForEventOperator, arguments: Any) -> str | None:
    """Say why arguments must be rendered on a worker, or return None if the triggerer can."""
    dag = task.dag if task.has_dag() else None  # type: ignore[no-untyped-call]
    texts = list(templates.strings(arguments))
    if texts and dag is not None and dag.jinja_environment_kwargs:
        return "the DAG has a Jinja environment of its own, which only workers have"
    if any(text.endswith(tuple(task.template_ext)) for text in texts):
        return "an argument names a file with a template, which only workers have"
    used = [templates.uses(text) for text in texts if is_template(text)]
    if not used:
        return None
    if dag is not None and dag.template_undefined is not jinja2.StrictUndefined:
        return "the DAG has a template_undefined of its own, which only workers have"
    own_names = {*((dag and dag.user_defined_macros) or ())}
    own_filters = {*((dag and dag.user_defined_filters) or ())}
    if any(found.names & own_names or found.uses_filter_of(own_filters) for found in used):
        return "its templates use the DAG's own macros or filters, which only workers have"
    for found in used:
        if found.otherwise:
            return f"its templates use {found.otherwise}, which the triggerer may not render as a worker does"
        if found.names & {"var", "conn"} and (why := _asks_otherwise_because(task)):
            return f"its templates use a Variable or a connection, and {why}"
        if param := _param_not_kept(task, found.params):
            return f"its templates use the param {param}, whose value a serialized DAG does not keep"
    return None


def _asks_otherwise_because(task: WaitForEventOperator) -> str | None:
    """Say why the triggerer does not read Variables and connections as a worker does, or return None."""
    if task.arguments_as_text or not keeps_what_is_rendered(task.listener):
        return "each triggerer that takes the wait over would read them again"
    if conf.getboolean("core", "multi_team", fallback=False):
        return "[core] multi_team shows a triggerer others than a worker of the team"
    if conf.get("secrets", "backend", fallback="") or conf.get("workers", "secrets_backend", fallback=""):
        return "a secrets backend would hold up the triggerer's other waits"
    return None


def _params(task: WaitForEventOperator) -> Iterator[tuple[str, Param]]:
    dag: DAG | None = task.dag if task.has_dag() else None  # type: ignore[no-untyped-call]
    for params in (dag.params if dag is not None else None, task.params):
        if isinstance(params, ParamsDict):
            yield from ((name, params.get_param(name)) for name in params)


def _params_without_value(task: WaitForEventOperator) -> str | None:
    """
    Name a param that has no value.

    Even if the run gives it one, Airflow cannot make a trigger's context of it, and the error ends the triggerer's
    process (`TriggerRunner.create_triggers`).
    """
    return next((name for name, param in _params(task) if not is_arg_set(param.value)), None)


def _param_with_schema(task: WaitForEventOperator) -> str | None:
    """Name a param of the task's own that has a schema; those of the DAG are checked as a run is made."""
    found = {name: param.schema for name, param in _params(task)}  # the task's own last
    of_dag = task.dag.params if task.has_dag() else None  # type: ignore[no-untyped-call]
    checked = {name: of_dag.get_param(name).schema for name in of_dag} if isinstance(of_dag, ParamsDict) else {}
    return next((name for name, schema in found.items() if schema and schema != checked.get(name)), None)


def _param_not_kept(task: WaitForEventOperator, names: frozenset[str | None]) -> str | None:
    for name, param in _params(task):
        if (None in names or name in names) and not (
            type(param) is Param and _kept_by_the_serialized_dag(param.value) and _has_one_order(param.value)
        ):
            return name
    return None


def _has_one_order(value: Any) -> bool:
    """Whether no dict in it could come back from a database in another order."""
    if isinstance(value, dict):
        return len(value) < 2 and all(_has_one_order(item) for item in value.values())
    return not isinstance(value, (list, tuple)) or all(_has_one_order(item) for item in value)


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


def _own_method(task: BaseOperator, names: tuple[str, ...]) -> str | None:
    """Name a method, one of ``names``, that neither Airflow nor this package defines."""
    for name in names:
        if not getattr(type(task), name).__module__.startswith(("airflow.sdk.", "airflow_events.")):
            return name
    return None
