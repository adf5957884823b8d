"""What an event or an argument may be made of, and how it is written down."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import datetime, tzinfo
from typing import Any

from airflow.sdk.serde import deserialize, serialize
from airflow_events.errors import EventNotSerializable

_PLAIN = (str, int, bool, type(None))


def encode(value: Any) -> str:
    """Write a checked value as JSON text, such that `decode` gives it back equal."""
    return json.dumps(serialize(value))


def decode(text: str) -> Any:
    """Read what `encode` wrote."""
    return deserialize(json.loads(text))


def check(value: Any, name: str = "event") -> None:
    """
    Check that Airflow stores ``value`` and gives it back, here and in downstream tasks.

    :param name: what the value is called in the message.
    :raises EventNotSerializable: it does not; the message names the place and the type.
    """
    for place, leaf in _leaves(value, name):
        if type(leaf) in _PLAIN:
            continue
        if type(leaf) is float:
            if not math.isfinite(leaf):
                raise EventNotSerializable(place, f"JSON has no {leaf}")
            continue
        try:
            returned = decode(encode(leaf))
        except Exception as error:
            raise EventNotSerializable(
                place, f"Airflow cannot store a {_name(leaf)} and give it back ({error})"
            ) from error
        if type(returned) is not type(leaf):
            raise EventNotSerializable(place, f"a {_name(leaf)} would come back as a {_name(returned)}")


def localized(value: Any, zone: tzinfo) -> Any:
    """
    Return ``value`` with a time zone for each naive datetime in it.

    Airflow writes a naive datetime down as if it were in the time zone of the process that writes.
    """
    if isinstance(value, datetime) and value.tzinfo is None:
        return value.replace(tzinfo=zone)
    if type(value) is dict:
        return {key: localized(item, zone) for key, item in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(localized(item, zone) for item in value)
    return value


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise EventNotSerializable(
                    f"{place}[{key!r}]", f"its key is a {_name(key)}, and keys must be strings"
                )
            yield from _leaves(item, f"{place}[{key!r}]")
        if reserved := {"__classname__", "__id__"} & value.keys():
            raise EventNotSerializable(place, f"Airflow reserves the key {sorted(reserved)[0]!r}")
    elif kind in (list, tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{place}[{index}]")
    elif kind in (set, frozenset):
        for item in value:
            yield from _leaves(item, f"{place}{{{item!r}}}")
    else:
        yield place, value


def _name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
