"""Which templates render in the triggerer to what they render to on a worker."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import jinja2
import pendulum
from airflow.sdk.definitions._internal.templater import create_template_env
from jinja2 import meta, nodes

# What a context holds as a plain value: made of the same fields of the run by the same code in both processes.
_VALUES = frozenset(
    {
        "ds", "ds_nodash", "ts", "ts_nodash", "ts_nodash_with_tz",
        "logical_date", "data_interval_start", "data_interval_end",
        "run_id", "task_instance_key_str", "partition_key",
    }
)  # fmt: skip
# What it holds as an object that is another one in the triggerer, or asks the supervisor: these attributes are the
# same. `run_type` and `state`, for two, are enums that print differently.
_OF_TASK_INSTANCE = frozenset({"dag_id", "task_id", "run_id", "map_index", "try_number"})
_OBJECTS = {
    "dag": frozenset({"dag_id"}),
    "task": frozenset({"dag_id", "task_id"}),
    "ti": _OF_TASK_INSTANCE,
    "task_instance": _OF_TASK_INSTANCE,
    "dag_run": frozenset({"dag_id", "run_id", "conf", "partition_key"}),
    "macros": frozenset({"ds_add", "ds_format", "timedelta"}),  # not what depends on now, chance or the process
    "var": frozenset({"value", "json"}),
    "conn": frozenset(
        {
            "conn_id", "conn_type", "description", "host", "schema", "login", "password", "port", "extra",
            "extra_dejson",
        }
    ),
}  # fmt: skip
# Of the run, as datetimes. They are equal, and read the same as text, but their time zones are of two classes.
_MOMENTS = frozenset({"logical_date", "data_interval_start", "data_interval_end", "run_after", "start_date"})
_TEXT_OF_MOMENT = frozenset({"ds", "ds_nodash", "ts", "ts_nodash", "ts_nodash_with_tz", "string"})
_JINJA = frozenset({"range", "dict", "namespace", "cycler", "joiner"})  # and not lipsum, which is random
_RANDOM = frozenset({"random", "attr"})  # filters; "attr" hides the attribute that it takes
# Filters that take the name of an attribute, or of a filter.
_OF_NAMES = frozenset(
    {"map", "select", "reject", "selectattr", "rejectattr", "sort", "groupby", "unique", "min", "max", "sum"}
)
# Of datetimes, what depends on nothing but the datetime; not the time of the process, nor its time zone.
_PURE = frozenset(
    {
        "year", "month", "day", "hour", "minute", "second", "microsecond", "fold", "day_of_week", "day_of_year",
        "week_of_year", "week_of_month", "quarter", "days_in_month", "weekday", "isoweekday", "isocalendar",
        "toordinal", "timestamp", "int_timestamp", "float_timestamp", "add", "subtract", "start_of", "end_of",
        "next", "previous", "first_of", "last_of", "nth_of", "set", "on", "at", "replace", "date", "time",
        "strftime", "isoformat", "ctime", "format", "in_timezone", "in_tz", "offset", "offset_hours", "utcoffset",
        "timezone_name", "tzname", "is_utc", "is_dst", "is_leap_year", "is_long_year", "is_same_day",
        *(name for name in dir(pendulum.DateTime) if name.startswith("to_") and name.endswith("_string")),
    }
)  # fmt: skip
_IMPURE = frozenset(
    name
    for kind in (pendulum.DateTime, pendulum.Date, pendulum.Time)
    for name in dir(kind)
    if not name.startswith("_") and name not in _PURE
)
_LOADED = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


@dataclass(frozen=True)
class Uses:
    """
    What a template uses.

    :param otherwise: what the triggerer may render otherwise than a worker, as it stands there; None for nothing.
    :param names: of the context.
    :param filters: Jinja's, and tests.
    :param params: of the run; None stands for all of them.
    :param names_filters: whether the name of a filter, as of ``map``, is worked out as it is rendered.
    """

    otherwise: str | None = None
    names: frozenset[str] = frozenset()
    filters: frozenset[str] = frozenset()
    params: frozenset[str | None] = frozenset()
    names_filters: bool = False

    def uses_filter_of(self, names: Collection[str]) -> bool:
        """Whether it uses one of these filters, or might."""
        return not self.filters.isdisjoint(names) or (self.names_filters and bool(names))


def strings(value: Any) -> Iterator[str]:
    """Go through the strings that Airflow renders in an argument: keys of dicts are none of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from strings(item)


@functools.lru_cache(maxsize=4096)
def uses(template: str) -> Uses:
    """Return what a template uses, as far as it can be seen; in doubt the triggerer renders it otherwise."""
    environment = _environment()
    try:
        tree = environment.parse(template)
        filters = {node.name for node in tree.find_all(nodes.Filter)}
        tests = {node.name for node in tree.find_all(nodes.Test)}
        of_names = [node.args[0] for node in tree.find_all(nodes.Filter) if node.name in _OF_NAMES and node.args]
        named = {one.value for one in of_names if isinstance(one, nodes.Const) and isinstance(one.value, str)}
        names_filters = any(not isinstance(one, nodes.Const) for one in of_names)
        if unknown := (filters - environment.filters.keys()) | (tests - environment.tests.keys()):
            return Uses(f"the filter or test {min(unknown)}", filters=frozenset(filters | tests))
        names = meta.find_undeclared_variables(tree)
    except jinja2.TemplateError as error:
        return Uses(f"what Jinja does not take ({error.message})")
    look = _Look(names)
    look.at(tree)
    return Uses(
        look.otherwise, frozenset(names), frozenset(filters | tests | named), frozenset(look.params), names_filters
    )


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = create_template_env()
    environment.globals.clear()  # which would not count as names that are used
    return environment


class _Look:
    """A look at each node of a template, after which one knows what it uses."""

    def __init__(self, names: set[str]) -> None:
        self.otherwise: str | None = None
        self.params: set[str | None] = set()
        self._names = names

    def at(self, node: nodes.Node, *, as_text: bool = False) -> None:
        """
        Look at a node and at what is below it.

        :param as_text: whether it goes nowhere but into the text.
        """
        if isinstance(node, nodes.Keyword) and node.key in ("tz", "tzinfo"):
            self._note(f"the argument {node.key}")
        if isinstance(node, _LOADED):
            self._note(f"a template of another file ({type(node).__name__.lower()})")
        elif isinstance(node, (nodes.Name, nodes.Getattr, nodes.Getitem)):
            self._at_lookup(node, as_text=as_text)
        elif isinstance(node, nodes.Filter):
            self._at_filter(node)
        elif isinstance(node, nodes.Test):
            for child in node.iter_child_nodes():
                self.at(child, as_text=node.name in ("none", "defined", "undefined"))
        elif isinstance(node, nodes.Output):
            for output in node.nodes:
                self.at(output, as_text=True)
        else:
            for child in node.iter_child_nodes():
                self.at(child)

    def _at_filter(self, node: nodes.Filter) -> None:
        if node.name in _RANDOM:
            self._note(f"the filter {node.name}")
        elif node.name in _OF_NAMES:
            named = {const.value for const in node.find_all(nodes.Const) if isinstance(const.value, str)}
            if hidden := named & (_RANDOM | _IMPURE):
                self._note(f"the filter {node.name} of {min(hidden)}")
        for child in node.iter_child_nodes():
            self.at(child, as_text=child is node.node and node.name in _TEXT_OF_MOMENT)

    def _at_lookup(self, node: nodes.Expr, *, as_text: bool) -> None:
        """Look at a name with the attributes and items that are taken of it, ``dag_run.conf["path"]``."""
        path: list[str | None] = []
        while isinstance(node, (nodes.Getattr, nodes.Getitem)):
            if isinstance(node, nodes.Getattr):
                path.append(node.attr)
            elif isinstance(node.arg, nodes.Const):
                path.append(str(node.arg.value))
            elif isinstance(node.arg, nodes.Slice):
                self.at(node.arg)
                path.append("[:]")
            else:
                self.at(node.arg)
                path.append(None)
            node = node.node
        path.reverse()
        if not isinstance(node, nodes.Name):
            self.at(node)
            self._at_attributes("a value", path)
        elif node.ctx == "load":
            self._at_name(node.name, path, as_text=as_text)

    def _at_name(self, name: str, path: list[str | None], *, as_text: bool) -> None:
        first = path[0] if path else None
        shown = ".".join([name, *(part or "[…]" for part in path[:2])])
        if name not in self._names or name in _JINJA:
            self._at_attributes(name, path)
        elif name == "params":
            if not path:  # as a whole, in an order that a database may have changed
                self._note(shown)
            # Of a method, such as get, one does not know which param it takes.
            self.params.add(None if first is None or hasattr(dict, first) else first)
        elif name in _VALUES:
            self._at_attributes(name, path)
        elif name == "dag_run" and first in _MOMENTS:
            if len(path) == 1 and not as_text:
                self._note(shown)
            self._at_attributes(shown, path[1:])
        elif name == "conn":
            # Of a connection, the second; a method of it may do anything.
            if len(path) < 2 or path[1] not in _OBJECTS[name]:
                self._note(shown)
        elif first is None or first not in _OBJECTS.get(name, ()):
            self._note(shown)
        elif first == "conf" or name == "var":  # JSON, whose keys are the user's
            if name == "var" and len(path) < 2:
                self._note(shown)
        else:
            self._at_attributes(shown, path[1:])

    def _at_attributes(self, name: str, path: list[str | None]) -> None:
        for part in path:
            if part is None or part.startswith("_") or part in _IMPURE:
                self._note(f"{name}.{part or '[…]'}")

    def _note(self, what: str) -> None:
        self.otherwise = self.otherwise or what
