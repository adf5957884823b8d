"""Pickles of classes that are the same, byte by byte, in every process that makes them from the same source."""

from __future__ import annotations

import dis
import functools
import io
import pickle
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import cloudpickle

_DEPTH = 5000  # of Python's stack; a function that calls a function that calls … takes a dozen each
_CONSTANTS = (str, bytes, complex, tuple, frozenset)
# Of a module that goes by value: what the import system leaves there.
_OF_IMPORT = frozenset({"__builtins__", "__cached__", "__loader__", "__spec__"})
_LRU_CACHE: Any = type(functools.lru_cache(lambda: None))


@dataclass
class Pickled:
    """
    A pickle, and what has gone into it.

    :param modules: from which something went by value.
    :param values: that are neither functions nor classes, each by module, name of the class or empty, and name.
    :param names: that were looked for in modules, by module and name, found or not.
    """

    data: bytes = b""
    modules: dict[str, ModuleType] = field(default_factory=dict)
    values: dict[tuple[str, str, str], Any] = field(default_factory=dict)
    names: dict[tuple[str, str], None] = field(default_factory=dict)


def pickled(value: Any, by_value: Callable[[ModuleType | None], bool]) -> Pickled:
    """
    Pickle a class or a function.

    Two processes agree on each byte, whatever their hash seeds are, whether they have compiled the modules or read
    what others have compiled, and whatever else they have imported. What a module computes as it is imported is
    taken as it is.

    :param by_value: whether what a module defines goes by value, since the reader cannot import that module.
    """
    result = Pickled()
    stream = io.BytesIO()
    limit, registered = sys.getrecursionlimit(), cloudpickle.list_registry_pickle_by_value()
    sys.setrecursionlimit(max(limit, _DEPTH))
    try:
        _Pickler(stream, by_value, result).dump(value)
    finally:
        sys.setrecursionlimit(limit)
        for name in cloudpickle.list_registry_pickle_by_value() - registered:
            cloudpickle.unregister_pickle_by_value(sys.modules[name])
    result.data = stream.getvalue()
    return result


class _Pickler(pickle._Pickler):
    """
    `cloudpickle.Pickler`, with a say in what is done to strings, tuples and sets.

    That one is written in C, where equal strings are written once if they are one object, which hangs on where
    they came from, and sets are written as they happen to lie in memory.
    """

    # Not those of `pickle._Pickler.dispatch`, in which dill puts its own as soon as somebody imports it.
    dispatch: typing.ClassVar[dict[type, Any]] = {
        kind: getattr(pickle._Pickler, f"save_{name}")
        for kind, name in {
            type(None): "none", bool: "bool", int: "long", float: "float", bytes: "bytes", bytearray: "bytearray",
            str: "str", tuple: "tuple", list: "list", dict: "dict", types.FunctionType: "global", type: "type",
        }.items()
    }  # fmt: skip
    dispatch_table = cloudpickle.Pickler.dispatch_table
    _function_reduce = cloudpickle.Pickler._function_reduce
    _dynamic_function_reduce = cloudpickle.Pickler._dynamic_function_reduce
    _function_getnewargs = cloudpickle.Pickler._function_getnewargs

    def __init__(self, stream: io.BytesIO, by_value: Callable[[ModuleType | None], bool], result: Pickled) -> None:
        super().__init__(stream, protocol=5)
        self.globals_ref: dict[int, dict[str, Any]] = {}  # cloudpickle's
        self._by_value = by_value
        self._result = result
        self._constants: dict[Any, Any] = {}

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if type(obj) in _CONSTANTS and (key := _key(obj)) is not None:
            obj = self._constants.setdefault(key, obj)
        super().save(obj, save_persistent_id)  # type: ignore[misc]

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is _LRU_CACHE:
            limits = obj.cache_parameters()
            return cached, (obj.__wrapped__, limits["maxsize"], limits["typed"])
        if kind is functools.cached_property:  # which has a lock, before Python 3.12
            return functools.cached_property, (obj.func,), {"attrname": obj.attrname}
        if kind is ModuleType:
            return self._reduced_module(obj)
        if kind is typing.TypeVar:
            self._register(obj.__module__)
            make, arguments = self.dispatch_table[kind](obj)
            return (make, arguments) if make is getattr else (make, (*arguments[:-1], None))
        if isinstance(obj, type):
            return self._reduced_class(obj)
        if isinstance(obj, types.FunctionType):
            return self._reduced_function(obj)
        return NotImplemented

    def save_frozenset(self, obj: frozenset[Any]) -> None:
        self.save_reduce(frozenset, (self._sorted(obj),), obj=obj)  # type: ignore[attr-defined]

    def save_set(self, obj: set[Any]) -> None:
        self.write(pickle.EMPTY_SET)  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]
        if obj:
            self.write(pickle.MARK)  # type: ignore[attr-defined]
            for item in self._sorted(obj):
                self.save(item)
            self.write(pickle.ADDITEMS)  # type: ignore[attr-defined]

    dispatch[frozenset] = save_frozenset
    dispatch[set] = save_set

    def _reduced_class(self, cls: type) -> Any:
        self._register(cls.__module__)
        reduced = cloudpickle.Pickler.reducer_override(self, cls)
        if reduced is NotImplemented or len(reduced) < 6:
            return reduced
        make, arguments, (members, slots), *rest = reduced
        # Without the random id of a class: there is no other process that would know it.
        *arguments, _, extra = arguments
        if "_abc_impl" in members:
            members["_abc_impl"] = sorted(members["_abc_impl"], key=lambda one: (one.__module__, one.__qualname__))
        if "__static_attributes__" in members:  # of Python 3.13, made of a set
            members["__static_attributes__"] = tuple(sorted(members["__static_attributes__"]))
        for name, value in members.items():
            if not (name.startswith("__") and name.endswith("__")):
                self._note(cls.__module__, cls.__qualname__, name, value)
        return make, (*arguments, None, extra), (members, slots), *rest

    def _reduced_function(self, function: types.FunctionType) -> Any:
        self._register(function.__module__)
        reduced = cloudpickle.Pickler.reducer_override(self, function)
        if reduced is NotImplemented:
            return reduced
        make, arguments, (state, slots), *rest = reduced
        # cloudpickle takes each submodule that some attribute is named like and that happens to be imported.
        submodules = sorted(set(_submodules(function.__code__, slots["__globals__"])))
        slots["_cloudpickle_submodules"] = [sys.modules[name] for name in submodules if name in sys.modules]
        module = function.__globals__.get("__name__", "")
        for name, value in slots["__globals__"].items():
            self._note(module, "", name, value)
        self._result.names.update(((module, name), None) for name in _names(function.__code__))
        return make, arguments, (state, slots), *rest

    def _reduced_module(self, module: ModuleType) -> Any:
        if not self._register(module.__name__):
            return NotImplemented
        members = {name: value for name, value in vars(module).items() if name not in _OF_IMPORT}
        for name, value in members.items():
            if not (name.startswith("__") and name.endswith("__")):
                self._note(module.__name__, "", name, value)
                self._result.names[module.__name__, name] = None
        return ModuleType, (module.__name__,), members

    def _register(self, name: str | None) -> bool:
        """Let cloudpickle take what a module defines by value, if it is to; say whether."""
        module = sys.modules.get(name or "")
        if module is None or not self._by_value(module):
            return False
        if module.__name__ not in self._result.modules:
            self._result.modules[module.__name__] = module
            if module.__name__ in sys.modules:
                cloudpickle.register_pickle_by_value(module)
        return True

    def _note(self, module: str, cls: str, name: str, value: Any) -> None:
        if module in self._result.modules and not isinstance(value, _CODE):
            self._result.values.setdefault((module, cls, name), value)

    def _sorted(self, items: Iterable[Any]) -> list[Any]:
        return sorted(items, key=self._order)

    def _order(self, item: Any) -> bytes:
        stream = io.BytesIO()
        _Pickler(stream, self._by_value, self._result).dump(item)
        return stream.getvalue()


_CODE = (
    type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, ModuleType, staticmethod, classmethod,
    property, functools.cached_property, _LRU_CACHE, types.MemberDescriptorType, types.GetSetDescriptorType,
)  # fmt: skip


def cached(function: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    """Return a function with a cache; pickles name this one, so it stays where it is."""
    return functools.lru_cache(maxsize, typed)(function)


def _key(constant: Any) -> Any:
    """Return what tells constants apart that are not the same, or None if it is none all through."""
    kind = type(constant)
    if kind in (tuple, frozenset):
        keys = [_key(item) for item in constant]
        return None if None in keys else (kind, tuple(keys) if kind is tuple else frozenset(keys))
    if kind in (float, complex):
        return kind, repr(constant)  # 0.0 and -0.0 are equal
    return (kind, constant) if kind in (str, bytes, int, bool, type(None), type(...)) else None


def _names(code: types.CodeType) -> Iterator[str]:
    """Go through the names that code looks for, attributes among them."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _submodules(code: types.CodeType, names: Mapping[str, Any]) -> Iterator[str]:
    """Go through what may be a submodule that code reaches through its package, as ``xml.etree``."""
    at = ""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and at:
            at = f"{at}.{instruction.argval}"
            yield at
        elif instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            module = names.get(instruction.argval)
            at = module.__name__ if type(module) is ModuleType else ""
        elif instruction.opname not in ("CACHE", "PUSH_NULL", "EXTENDED_ARG"):
            at = ""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _submodules(constant, names)
