"""What a message's bytes become, and which message a watch wants."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import date, timedelta
from typing import Any, Literal
from uuid import UUID

import jmespath
from airflow_events import settings
from airflow_events.errors import EventNotSerializable, EventUndecodable
from airflow_events.listeners.support import serde
from jmespath.functions import Functions

Format = Literal["json", "text", "bytes"]
OnUndecodable = Literal["fail", "skip", "dead_letter"]
FORMATS = ("json", "text", "bytes")
_NOWHERE = object()


def decode(raw: bytes | None, values: Format, where: str) -> Any:
    """
    Return the value of a message.

    :param raw: None is a message without a value, and stays None.
    :param values: ``json``; ``text``, which must be UTF-8; ``bytes``, as Base64 text, since Airflow stores no
        bytes.
    :param where: the message's coordinates, for the error.
    :raises EventUndecodable: it is not of that format.
    """
    if raw is None:
        return None
    if values == "bytes":
        return base64.b64encode(raw).decode()
    try:
        return raw.decode() if values == "text" else json_of(raw)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are kinds of ValueError
        raise EventUndecodable(where, values, str(error), raw[:200]) from error


def digest_of(*raw: bytes | None) -> str:
    """Return a digest of a message as its source has it, in hex: the same by whatever format it is read."""
    found = hashlib.sha256()
    for part in raw:
        found.update(b"-" if part is None else b"%d:%b" % (len(part), part))
    return found.hexdigest()[:32]


def text_of(raw: bytes) -> str:
    """Return metadata as text; what is no text that Airflow's database stores, as Base64: it has no format."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = "\0"
    return base64.b64encode(raw).decode() if "\0" in text else text


def named(name: str) -> str:
    """Return a header's name as it is stored: one that Airflow reserves gets an underscore more."""
    return f"_{name}" if name in serde.RESERVED else name


def checked(event: Any, where: str) -> Any:
    """
    Return an event as Airflow gives it back.

    What can be read and what can be stored is one question, with one answer for both: ``on_undecodable``.

    :param where: the message's coordinates, for the error.
    :raises EventUndecodable: Airflow, or its database, does not store it.
    """
    try:
        return serde.check(event, largest=settings.inbox_max_body)
    except EventNotSerializable as error:
        raise EventUndecodable(where, "storable", str(error), b"") from error


def unreadable(where: str, error: Exception) -> EventUndecodable:
    """Return what to say of a message that made its reader fail in a way that nobody foresaw."""
    return EventUndecodable(where, "readable", f"{type(error).__name__}: {error}", b"")


def json_of(raw: str | bytes) -> Any:
    """
    Read JSON, and nothing that only Python takes for it.

    :raises ValueError: it is none.
    """
    return json.loads(raw, parse_constant=_refuse)


def _refuse(constant: str) -> float:
    raise ValueError(f"JSON has no {constant}")


def seconds(duration: float | timedelta, name: str) -> float:
    """
    Return a duration in seconds.

    :param name: what the user calls it.
    :raises ValueError: it is no duration, not above zero, or without end.
    """
    try:
        found = duration.total_seconds() if isinstance(duration, timedelta) else float(duration)
    except (TypeError, ValueError):
        found = math.nan
    if not 0 < found < math.inf:
        raise ValueError(f"{name} is a time above zero, a timedelta or seconds, not {duration!r}")
    return found


def check_choices(
    values: str,
    on_undecodable: str = "fail",
    *,
    formats: tuple[str, ...] = FORMATS,
    name: str = "values",
    dead_letter: object = _NOWHERE,
) -> None:
    """
    Check what a user chose.

    :param formats: what there is to choose from.
    :param name: what the user calls it.
    :param dead_letter: where to messages go that cannot be read, None for nowhere; not given where they cannot.
    :raises ValueError: it is not to be had.
    """
    if values not in formats:
        raise ValueError(f"{name} is one of {', '.join(map(repr, formats))}, not {values!r}")
    choices = ("fail", "skip") if dead_letter is _NOWHERE else ("fail", "skip", "dead_letter")
    if on_undecodable not in choices:
        raise ValueError(f"on_undecodable is {' or '.join(map(repr, choices))}, not {on_undecodable!r}")
    if dead_letter is not _NOWHERE and (on_undecodable == "dead_letter") != bool(dead_letter):
        raise ValueError(
            f"on_undecodable='dead_letter' and dead_letter, which says where to, go together; these are "
            f"{on_undecodable!r} and {dead_letter!r}"
        )


def check_names(**names: Any) -> None:
    """
    Check what a user calls something at a source; a template without a value would name what nobody means.

    :param names: by the user's words for what they are of.
    :raises ValueError: one is empty, or no text.
    """
    for what, name in names.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{what} is a name, not {name!r}")


def expression(name: str, text: str) -> Callable[[Any], Any]:
    """
    Return what finds something in a value, by a JMESPath expression: null where it has a function that fails.

    :param name: what the user calls it.
    :raises ValueError: it is no expression, or calls a function that JMESPath has not, or not so.
    """
    try:
        compiled = jmespath.compile(text)
        _check_functions(compiled.parsed)
    except jmespath.exceptions.JMESPathError as error:
        raise ValueError(f"{name} is no JMESPath expression: {error}") from error
    search = compiled.search

    def find(value: Any) -> Any:
        try:
            return search(value)
        except Exception:  # a function that does not take such a value: a JMESPathError, or what Python raises
            return None

    return find


def _check_functions(expression: Any) -> None:
    """
    Check that the functions of a parsed expression are there, and take so many arguments.

    Else it would find nothing in any value, and its wait never end.
    """
    parts = [expression]
    while parts:
        part = parts.pop()
        parts += [child for child in part["children"] if isinstance(child, dict)]  # and no number of a slice
        if part["type"] == "function_expression":
            with contextlib.suppress(jmespath.exceptions.JMESPathTypeError):  # which null may be of
                Functions().call_function(part["value"], [None] * len(part["children"]))


class Match:
    """
    What a watch wants to see in an event's value.

    :param wanted: None matches every value. A mapping matches a value that has these fields; a dot leads into
        a nested one (``{"order.id": 42}``). What is no text and its text are the same, since a template renders
        to text: ``"42"`` matches 42, and ``"True"`` true. A string is a JMESPath expression
        (https://jmespath.org), which matches where it finds anything but null, false or something empty.
    :raises ValueError: the expression is none.
    :raises TypeError: another type.
    """

    __slots__ = ("_finds", "key")

    def __init__(self, wanted: Mapping[str, Any] | str | None) -> None:
        self.key: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        """The fields and what they must be; waits whose key is equal are found by one look-up."""
        self._finds: Callable[[Any], Any] | None = None
        if isinstance(wanted, str):
            self._finds = expression("match", wanted)
        elif isinstance(wanted, Mapping):
            fields = _one_of(tuple(sorted(wanted)))
            self.key = fields, tuple(_text(wanted[field]) for field in fields)
        elif wanted is not None:
            raise TypeError(f"match is a mapping, a JMESPath expression or None, not {wanted!r}")

    def matches(self, value: Any) -> bool:
        """Whether ``value`` is wanted."""
        if self.key is not None:
            return self.key[1] in keys_of(value, self.key[0])
        return self._finds is None or self._matches(value)

    def _matches(self, value: Any) -> bool:
        assert self._finds is not None
        found = self._finds(value)
        return found == 0 or bool(found) if not isinstance(found, bool) else found


@functools.lru_cache(maxsize=1024)
def _one_of(fields: tuple[str, ...]) -> tuple[str, ...]:
    """Return the one that is kept of equal fields: a hundred thousand waits have them."""
    return fields


def keys_of(value: Any, fields: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return what ``fields`` are in ``value``, as `Match.key` may have it; nothing if one is missing."""
    found: list[tuple[str, ...]] = []
    for field in fields:
        here = value
        for name in [field] if isinstance(value, dict) and field in value else field.split("."):
            if not isinstance(here, dict) or name not in here:
                return []
            here = here[name]
        found.append(_texts(here))
    return list(itertools.product(*found))


# As a template writes what JSON writes otherwise.
_AS_JSON = {"True": "true", "False": "false", "None": "null"}


def _text(value: Any) -> str:
    """Write a field such that it and its text are the same, as templates write it, and 1 and 1.0."""
    if isinstance(value, str):
        return _AS_JSON.get(value, value)
    if type(value) is int:  # which most are
        return str(value)
    if isinstance(value, date):  # a datetime is one
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    return json.dumps(value, sort_keys=True, default=str)


def _texts(value: Any) -> tuple[str, ...]:
    """Write a field of an event, a whole number also as a template writes it that had it with a point."""
    text = _text(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not text.lstrip("-").isdecimal():
        return (text,)
    with contextlib.suppress(OverflowError):
        return (text, str(float(value)))
    return (text,)


class Index:
    """Finds the waits that want a value: those with a mapping by one look-up for each set of fields."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[str, ...], dict[tuple[str, ...], dict[Any, None]]] = {}
        self._others: dict[Any, Match] = {}

    def add(self, wait: Any, match: Match) -> None:
        """Note a wait, which must be hashable."""
        if match.key is None:
            self._others[wait] = match
        else:
            fields, values = match.key
            self._by_key.setdefault(fields, {}).setdefault(values, {})[wait] = None

    def remove(self, wait: Any, match: Match) -> None:
        """Forget a wait, if it is there."""
        if match.key is None:
            self._others.pop(wait, None)
            return
        fields, values = match.key
        waits = self._by_key.get(fields, {}).get(values, {})
        waits.pop(wait, None)
        if not waits and fields in self._by_key:
            self._by_key[fields].pop(values, None)
            if not self._by_key[fields]:
                del self._by_key[fields]

    def find(self, value: Any) -> Iterator[Any]:
        """Return the waits that want ``value``."""
        for fields, by_values in list(self._by_key.items()):
            for values in keys_of(value, fields):
                yield from list(by_values.get(values, ()))
        for wait, match in list(self._others.items()):
            if match.matches(value):
                yield wait
