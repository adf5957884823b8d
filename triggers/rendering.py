"""The arguments of a wait that starts in the triggerer, rendered there as a worker would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jinja2
from airflow.sdk._shared.secrets_masker import redact
from airflow.sdk.definitions._internal.templater import create_template_env
from airflow.sdk.definitions.context import render_template_as_native, render_template_to_string
from airflow_events.errors import UndefinedInTemplate
from airflow_events.listeners.support import serde

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context
    from airflow.triggers.base import BaseTrigger

# What a context has only if the run has a logical date.
_OF_LOGICAL_DATE = frozenset(
    {
        "ds",
        "ds_nodash",
        "ts",
        "ts_nodash",
        "ts_nodash_with_tz",
        "logical_date",
        "data_interval_start",
        "data_interval_end",
    }
)
# Jinja's, and ends of lines, which it makes one of and leaves out at the end; as they are and as they are in JSON.
_MARKS = ("{{", "{%", "{#", "\n", "\r", "\\n", "\\r")


def render(trigger: BaseTrigger, context: Context, jinja_env: jinja2.Environment | None = None) -> None:
    """
    Render the template fields of a trigger in place, as `BaseTrigger.render_template_fields` does, but strictly.

    :param context: as the triggerer makes it.
    :param jinja_env: None for one as the DAG has it on a worker.
    :raises UndefinedInTemplate: a template uses a name that there is not.
    """
    rendering = Rendering(context, jinja_env)
    for field in trigger.template_fields:
        setattr(trigger, field, rendering.argument(getattr(trigger, field), field))


class Rendering:
    """
    How a worker would render what a DAG has in its arguments.

    Airflow's triggers render in an environment of their own: undefined names become empty text, and
    ``render_template_as_native_obj`` is not looked at.
    """

    def __init__(self, context: Context, jinja_env: jinja2.Environment | None = None) -> None:
        dag: Any = context["dag"]
        own = getattr(context["task"], "render_template_as_native_obj", None)
        # On a worker the environment is the DAG's, and what is made of its output is the task's.
        self._native = bool(dag.render_template_as_native_obj if own is None else own)
        self._environment = jinja_env or create_template_env(native=bool(dag.render_template_as_native_obj))
        self._context = context
        self._zone = dag.timezone

    def argument(self, value: Any, place: str) -> Any:
        """
        Return ``value`` with the strings in it rendered, as a listener is given it.

        :param place: as of `of`.
        :raises UndefinedInTemplate: a template uses a name that there is not.
        :raises EventNotSerializable: what is rendered, of a DAG with native objects, Airflow does not store.
        """
        rendered = serde.localized(serde.simple(self.of(value, place)), self._zone)
        serde.check(rendered, place)
        return rendered

    def of(self, value: Any, place: str) -> Any:
        """
        Return ``value`` with the strings in it rendered; keys of dicts stay as they are.

        :param place: where it stands, as Python would write it: ``listener_args[0]``.
        :raises UndefinedInTemplate: a template uses a name that there is not.
        """
        if isinstance(value, str):
            return self._rendered(value, place)
        kind = type(value)
        if kind is dict:
            return {key: self.of(item, f"{place}[{key!r}]") for key, item in value.items()}
        if kind in (list, tuple):
            return kind(self.of(item, f"{place}[{index}]") for index, item in enumerate(value))
        if kind is set:
            return {self.of(item, place) for item in value}
        return value

    def may_change(self, text: str) -> bool:
        """
        Whether Jinja might do more to a string than to copy it, which takes it a millisecond.

        :param text: the string, or JSON with it.
        """
        return self._native or any(mark in text for mark in _MARKS)

    def _rendered(self, text: str, place: str) -> Any:
        if not self.may_change(text):
            return text
        as_text = render_template_as_native if self._native else render_template_to_string
        try:
            rendered = as_text(self._environment.from_string(text), self._context)
            if self._native:
                _raise_if_undefined(rendered)
        except jinja2.UndefinedError as error:
            raise UndefinedInTemplate(place, str(redact(text)), str(error), self._reason(str(error))) from error
        return rendered

    def _reason(self, message: str) -> str:
        name = message.split("'")[1] if message.count("'") > 1 else ""
        dag_run: Any = self._context.get("dag_run")
        if name in _OF_LOGICAL_DATE and dag_run is not None and dag_run.logical_date is None:
            return "the run has no logical date, from which it would follow"
        return ""


def _raise_if_undefined(value: Any) -> None:
    """Raise what text would have raised: a native template hands an undefined name on as an object."""
    if isinstance(value, jinja2.Undefined):
        str(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            _raise_if_undefined(key)
            _raise_if_undefined(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            _raise_if_undefined(item)
