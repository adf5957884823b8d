"""How a listener gets to the process that needs it: by name, or by value where a name will not do."""

from __future__ import annotations

import base64
import functools
import importlib
import operator
import os
import pickle
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from airflow.sdk.configuration import conf
from airflow_events import settings
from airflow_events.errors import ListenerUnavailable
from airflow_events.listeners.base import EventListener, check_listener
from airflow_events.triggers import pickling, steadiness

# Bytes of a pickle; each wait has its own in the serialized DAG.
_LONGEST = 64 * 1024
# For how many listeners a process keeps what it has pickled.
_KEPT = 64
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def is_importable(listener: type[EventListener]) -> bool:
    """
    Whether the triggerer can import ``listener`` by its name.

    It has installed packages, the plugins folder and the config folder on its path. It does not have
    the DAG bundles, so a class from a DAG file or a module beside it must travel by value.
    """
    if "<locals>" in listener.__qualname__:
        return False
    return not _Folders.configured().need_value(sys.modules.get(listener.__module__))


def name(listener: type[EventListener]) -> str:
    """Return the listener's name as `by_name` reads it, ``package.module:Class``."""
    return f"{listener.__module__}:{listener.__qualname__}"


def refer(listener: type[EventListener]) -> str | dict[str, str]:
    """
    Return what `load` takes in the triggerer: the listener's name, or itself where a name will not do.

    :raises ListenerUnavailable: it is to travel by value, and cannot.
    """
    return name(listener) if is_importable(listener) else by_value(listener)


def by_value(listener: type[EventListener]) -> dict[str, str]:
    """
    Return the listener itself, with the modules of its DAG bundle that it uses.

    It is the same text whoever makes it of the same source, unless `unsteady` says otherwise.

    :raises ListenerUnavailable: it refers to something that cannot be pickled.
    """
    made = _made(listener)
    return {"name": listener.__qualname__, "of": made.place, "python": _PYTHON, "pickle": made.text}


def scope(reference: Any, listener: type[EventListener]) -> str:
    """
    Return what the ids of a listener's events are unique in: the class that says them, by `identify`.

    A subclass that does not define `event_id` has its events in common with the class that does: what one of them
    has taken, a wait of the other does not get. Identities of events hold it: the form is frozen.
    """
    says = next(each for each in listener.__mro__ if "event_id" in vars(each))
    if says is not listener and _is_here(says):
        return name(says)
    return identify(reference)


def identify(reference: Any) -> str:
    """
    Return the name of a listener's class, and, of one that travels by value, where that is defined.

    Its form is frozen. References of earlier versions do not say where.
    """
    if isinstance(reference, str):
        return reference
    return f"{reference['of']}:{reference['name']}" if "of" in reference else str(reference["name"])


def unsteady(listener: type[EventListener]) -> str | None:
    """Say why a serialized DAG is not to hold the listener by value, or return None if it can."""
    try:
        return _made(listener).unsteady
    except ListenerUnavailable as error:
        return f"it cannot be pickled: {error}"


@dataclass(frozen=True)
class _Made:
    """A pickle, for as long as it would be made of the same objects: Airflow asks a dozen times for each wait."""

    text: str
    place: str
    unsteady: str | None
    names: tuple[tuple[str, str], ...]
    objects: tuple[Any, ...]

    def is_of_now(self, listener: type[EventListener]) -> bool:
        objects = _objects(listener, self.names)
        return len(objects) == len(self.objects) and all(map(operator.is_, objects, self.objects))


_kept: dict[type[EventListener], _Made] = {}


def _made(listener: type[EventListener]) -> _Made:
    if (made := _kept.get(listener)) is not None and made.is_of_now(listener):
        return made
    folders = _Folders.configured()
    need_value = functools.lru_cache(folders.need_value)
    try:
        pickled = pickling.pickled(listener, need_value)
    except Exception as error:
        raise ListenerUnavailable(
            f"{listener.__qualname__} is defined beside the DAG, so it goes to the triggerer as a "
            f"pickle, and it refers to something that cannot be pickled: {error}. "
            "Import that inside of its methods, or move the listener to an installed package"
        ) from error
    why = None
    if len(pickled.data) > _LONGEST:
        why = f"its pickle of {len(pickled.data) // 1024} KiB is too long for a serialized DAG"
    elif computed := steadiness.unsteady(pickled.values, need_value):
        why = f"its pickle may be another one whenever the DAG is parsed, with {computed}"
    names = tuple(pickled.names)
    if len(_kept) >= _KEPT:
        _kept.clear()
    text = base64.b85encode(pickled.data).decode("ascii")
    place = folders.place(sys.modules.get(listener.__module__))
    made = _kept[listener] = _Made(text, place, why, names, _objects(listener, names))
    return made


def _objects(listener: type[EventListener], names: Iterable[tuple[str, str]]) -> tuple[Any, ...]:
    """Return what a pickle is made of, as far as a module puts other objects in its place as it goes on."""
    found: list[Any] = [*vars(listener).values()]
    for module, name in names:
        value: Any = vars(sys.modules[module]).get(name) if module in sys.modules else None
        found.append(value)
        if type(value) in (list, tuple, set, frozenset):
            found += value
        elif type(value) is dict:
            found += [*value, *value.values()]
    return tuple(found)


def load(reference: Any) -> type[EventListener]:
    """
    Return the listener that `name` or `by_value` described.

    :raises ListenerUnavailable: it cannot be loaded in this process; the message says why.
    """
    if isinstance(reference, str):
        return _import(reference)
    return _unpickle(reference["name"], reference["python"], reference["pickle"])


def _is_here(listener: type[EventListener]) -> bool:
    """Whether a class can be found by its name in this process, as none can that came as a pickle."""
    found: Any = sys.modules.get(listener.__module__)
    for part in listener.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is listener


def display_name(reference: Any) -> str:
    """Return the listener's class name, without loading it."""
    return reference.rpartition(":")[2] if isinstance(reference, str) else str(reference["name"])


def _import(reference: str) -> type[EventListener]:
    module, _, qualname = reference.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
        return check_listener(found)
    except Exception as error:
        raise ListenerUnavailable(f"the listener {reference} cannot be imported here: {error!r}") from error


@functools.lru_cache(maxsize=256)
def _unpickle(qualname: str, python: str, pickled: str) -> type[EventListener]:
    if not settings.pickled_listeners():
        raise ListenerUnavailable(
            f"the listener {qualname} came as a pickle, which [events] pickled_listeners = False refuses"
        )
    if python != _PYTHON:
        raise ListenerUnavailable(
            f"the listener {qualname} was pickled by Python {python}, and this process is Python {_PYTHON}; "
            "run workers and triggerers on one minor version, or move the listener to an installed package"
        )
    try:
        return check_listener(pickle.loads(base64.b85decode(pickled)))
    except Exception as error:
        raise ListenerUnavailable(f"the listener {qualname} cannot be unpickled here: {error!r}") from error


@dataclass(frozen=True)
class _Folders:
    """
    Where modules lie that the triggerer cannot import, and where, inside of that, it can.

    :param storage: below which Airflow has the bundles that it fetches, each in a folder of its name; as it is
        configured, as are those of ``bundles``.
    :param bundles: folders of other bundles, and their names.
    """

    dags: frozenset[str]
    importable: frozenset[str]
    storage: str
    bundles: tuple[tuple[str, str], ...]

    @classmethod
    def configured(cls) -> _Folders:
        from airflow.dag_processing.bundles.base import get_bundle_storage_root_path

        dags, storage = conf.get("core", "dags_folder"), str(get_bundle_storage_root_path())
        bundles = [(dags, "")]
        for bundle in conf.getjson("dag_processor", "dag_bundle_config_list", fallback=[]) or []:
            if (path := (bundle.get("kwargs") or {}).get("path")) and isinstance(path, str):
                bundles.append((path, str(bundle.get("name", ""))))
        importable = (conf.get("core", "plugins_folder"), sys.prefix)
        folders = (storage, *(path for path, _ in bundles))
        return cls(_real(folders), _real(importable), storage, tuple(bundles))

    def need_value(self, module: ModuleType | None) -> bool:
        """Whether what the module defines must travel by value."""
        if module is None or module.__name__ == "__main__":
            return True
        if module.__name__.startswith("unusual_prefix_"):  # what Airflow calls the module of a DAG file
            return True
        file = getattr(module, "__file__", None)
        if not file:
            return False
        file = os.path.realpath(file)
        return _depth(file, self.dags) > _depth(file, self.importable)

    def place(self, module: ModuleType | None) -> str:
        """Name a module that goes by value, alike wherever its bundle lies, and whichever version that is."""
        file = getattr(module, "__file__", None)
        if not file:
            return "" if module is None else module.__name__
        file = os.path.realpath(file)
        if _depth(file, [storage := _real_path(self.storage)]):
            bundle, *path = os.path.relpath(file, storage).split(os.sep)
            before = {"versions": 2, "tracking_repo": 1}.get(path[0] if path else "", 0)
            return "/".join([bundle, *path[before:]])
        bundles = [(_real_path(path), name) for path, name in self.bundles]
        holding = [(folder, name) for folder, name in bundles if _depth(file, [folder])]
        folder, name = max(holding, key=lambda found: len(found[0]), default=(os.path.dirname(file), ""))
        return "/".join(filter(None, [name, *os.path.relpath(file, folder).split(os.sep)]))


@functools.lru_cache(maxsize=16)
def _real(folders: tuple[str | None, ...]) -> frozenset[str]:
    return frozenset(_real_path(folder) for folder in folders if folder)


def _real_path(folder: str) -> str:
    return os.path.realpath(os.path.expanduser(folder))


def _depth(file: str, folders: Iterable[str]) -> int:
    """Return the length of the deepest of ``folders`` that the file is in, or 0."""
    return max((len(folder) for folder in folders if file.startswith(folder + os.sep)), default=0)
