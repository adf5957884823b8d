"""Whether a module has the same values whenever and wherever it is imported, as far as its source shows."""

from __future__ import annotations

import ast
import builtins
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import importlib.util
import inspect
import json
import logging
import operator
import os
import pathlib
import re
import sys
import textwrap
import types
import typing
import uuid
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pendulum

# What may be called: of the same arguments they make the same. Not what asks for the time, chance or the process.
_STEADY_CALLS: tuple[object, ...] = (
    abs, all, any, bool, bytearray, bytes, chr, complex, dict, divmod, enumerate, filter, float, format, frozenset,
    int, len, list, map, max, min, object, ord, pow, range, reversed, round, set, slice, sorted, str, sum, tuple,
    zip,
    datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone, zoneinfo.ZoneInfo,
    pendulum.date, pendulum.datetime, pendulum.duration, pendulum.timezone,
    decimal.Decimal, fractions.Fraction, uuid.UUID,
    pathlib.Path, pathlib.PurePath, pathlib.PurePosixPath, pathlib.PosixPath,
    os.getenv, os.path.abspath, os.path.basename, os.path.dirname, os.path.expanduser, os.path.join,
    os.path.realpath,
    re.compile, re.escape, json.loads, json.dumps, textwrap.dedent, logging.getLogger,
    functools.partial, operator.attrgetter, operator.itemgetter, operator.methodcaller,
    collections.ChainMap, collections.Counter, collections.OrderedDict, collections.defaultdict, collections.deque,
    collections.namedtuple, types.MappingProxyType, types.SimpleNamespace,
    typing.cast, typing.NamedTuple, typing.NewType, typing.TypeVar, dataclasses.field, enum.Enum, enum.auto,
)  # fmt: skip
_STEADY = frozenset(map(id, _STEADY_CALLS))
# To these it makes no difference in which order a set goes through its items.
_ORDERLESS = frozenset(map(id, (set, frozenset, sorted, len, min, max, sum, any, all, bool)))
_MISSING = object()


def unsteady(values: Iterable[tuple[str, str, str]], by_value: Callable[[ModuleType], bool]) -> str | None:
    """
    Name a value that may be another one at the next import, with how it is computed; or return None.

    What cannot be seen in the source, such as what a decorator leaves, is taken for steady.

    :param values: each by its module, the class that it is an attribute of, or empty, and its name.
    :param by_value: whether a module's values travel with it; those of others are taken for steady.
    """
    sources = _Sources(by_value)
    for module, cls, name in values:
        if (expression := sources.unsteady(module, cls.replace("<locals>.", ""), name)) is not None:
            return f"{name} = {ast.unparse(expression):.80}"
    return None


class _Sources:
    """The sources of modules."""

    def __init__(self, by_value: Callable[[ModuleType], bool]) -> None:
        self._by_value = by_value
        self._seen: set[tuple[str, str, str]] = set()

    def unsteady(self, module: str, scope: str, name: str) -> ast.expr | None:
        """Return the expression that makes a value unsteady, or None."""
        if (module, scope, name) in self._seen or not self.has(module):
            return None
        self._seen.add((module, scope, name))
        source = _source(sys.modules[module])
        if not scope and name in source.imported:
            return self.unsteady(source.imported[name][0], "", source.imported[name][1])
        look = _Look(self, sys.modules[module])
        return next(filter(None, map(look.at, source.assigned.get((scope, name), ()))), None)

    def has(self, module: str) -> bool:
        """Whether a module is one of the DAG's own."""
        return module in sys.modules and self._by_value(sys.modules[module])


class _Source:
    """What a module binds at its top and in its classes, by scope and name."""

    def __init__(self, package: str, source: str) -> None:
        self.assigned: dict[tuple[str, str], list[ast.expr]] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        self._package = package
        self._read(ast.parse(source).body, "")

    def _read(self, body: Sequence[ast.stmt], scope: str) -> None:
        for statement in body:
            if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                self._read(statement.body, f"{scope}.{statement.name}".lstrip("."))
                continue
            for target, expression in _assignments(statement):
                self.assigned.setdefault((scope, target), []).append(expression)
            if isinstance(statement, ast.ImportFrom) and not scope:
                self._read_import(statement)
            for _, inner in ast.iter_fields(statement):
                if isinstance(inner, list) and inner and isinstance(inner[0], (ast.stmt, ast.ExceptHandler)):
                    for part in inner:
                        self._read(part.body if isinstance(part, ast.ExceptHandler) else [part], scope)

    def _read_import(self, statement: ast.ImportFrom) -> None:
        name = "." * statement.level + (statement.module or "")
        try:
            module = importlib.util.resolve_name(name, self._package)
        except ImportError:
            return
        for alias in statement.names:
            self.imported[alias.asname or alias.name] = (module, alias.name)


def _source(module: ModuleType) -> _Source:
    try:
        return _parsed(module.__package__ or "", inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return _parsed("", "")


@functools.lru_cache(maxsize=64)
def _parsed(package: str, source: str) -> _Source:
    return _Source(package, source)


class _Look:
    """A look at the expressions of a module."""

    def __init__(self, sources: _Sources, module: ModuleType) -> None:
        self._sources = sources
        self._module = module

    def at(self, node: ast.AST) -> ast.expr | None:
        """Return what is unsteady in an expression, or None."""
        if isinstance(node, ast.Lambda):
            return None
        if isinstance(node, ast.Name):
            value = self._value(node)
            return None if callable(value) or value is _MISSING else self._sources.unsteady(*self._at_top(node.id))
        if isinstance(node, (ast.Await, ast.Yield, ast.YieldFrom)):
            return node
        if isinstance(node, ast.Call) and not self._is_steady_call(node):
            return node
        if any(map(self._is_unordered, self._in_order(node))) and isinstance(node, ast.expr):
            return node
        return next(filter(None, map(self.at, ast.iter_child_nodes(node))), None)

    def _at_top(self, name: str) -> tuple[str, str, str]:
        return self._module.__name__, "", name

    def _is_steady_call(self, call: ast.Call) -> bool:
        called = self._value(call.func)
        if id(called) in _STEADY:
            return True
        if isinstance(called, type):  # of the DAG's own modules: a dataclass, say
            return self._sources.has(called.__module__)
        if isinstance(call.func, ast.Attribute):  # the method of a value, which is looked at in its turn
            return not isinstance(self._value(call.func.value), (type, ModuleType))
        return False

    def _in_order(self, node: ast.AST) -> Iterator[ast.AST]:
        """Go through what an expression takes in the order in which it comes."""
        if isinstance(node, ast.Call):
            if id(self._value(node.func)) not in _ORDERLESS:
                yield from node.args
            if isinstance(node.func, ast.Attribute) and node.func.attr == "pop":
                yield node.func.value
        elif isinstance(node, (ast.ListComp, ast.DictComp, ast.GeneratorExp)):
            yield from (generator.iter for generator in node.generators)
        elif isinstance(node, (ast.FormattedValue, ast.Starred)):
            yield node.value

    def _is_unordered(self, node: ast.AST) -> bool:
        if isinstance(node, (ast.Set, ast.SetComp)):
            return True
        if isinstance(node, ast.BinOp):
            return self._is_unordered(node.left) or self._is_unordered(node.right)
        if isinstance(node, ast.Call):
            return self._value(node.func) in (set, frozenset)
        return isinstance(self._value(node), (set, frozenset))

    def _value(self, node: ast.AST) -> Any:
        """Return what a name, or an attribute of one, stands for, as far as nothing has to be run for that."""
        if isinstance(node, ast.Name):
            return vars(self._module).get(node.id, getattr(builtins, node.id, _MISSING))
        if isinstance(node, ast.Attribute):
            base = self._value(node.value)
            if isinstance(base, (type, ModuleType)):
                found = inspect.getattr_static(base, node.attr, _MISSING)
                return getattr(base, node.attr, _MISSING) if found is _MISSING else found
        return _MISSING


def _assignments(statement: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """Go through the names that a statement binds, with the expression that they are bound to, or a part of it."""
    if isinstance(statement, ast.Assign):
        bound = [(target, statement.value) for target in statement.targets]
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)) and statement.value is not None:
        bound = [(statement.target, statement.value)]
    elif isinstance(statement, (ast.For, ast.AsyncFor)):
        bound = [(statement.target, ast.List([ast.Starred(statement.iter, ast.Load())], ast.Load()))]
    elif isinstance(statement, (ast.With, ast.AsyncWith)):
        bound = [(item.optional_vars, item.context_expr) for item in statement.items if item.optional_vars]
    else:
        return
    for target, expression in bound:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                yield node.id, expression
