"""What an event or an argument may be made of, and how it is written down."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from enum import Enum
from pathlib import PurePath
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pendulum
from airflow.sdk.serde import deserialize, serialize
from airflow_events.errors import EventNotSerializable
from airflow_events.listeners.support.timestamps import in_zone

# By these Airflow tells its own dicts from others; a payload that has them would be taken for a class.
RESERVED = frozenset({"__classname__", "__id__", "__type", "__var"})

_KNOWN = frozenset({"builtins", "datetime", "decimal", "uuid", "pendulum", "airflow", "zoneinfo"})

# Time zones that Airflow stores whatever they say; of others it needs a name.
_ZONES = (pendulum.Timezone, pendulum.FixedTimezone, ZoneInfo)
_SETS = ("builtins.set", "builtins.frozenset")

_LONGEST_XCOM_KEY = 512  # characters
# Bytes up to which every inbox takes an event, and that a request to it has besides the event.
_LARGE, _ROOM = 100_000, 20_000

DEEPEST = 95
"""
How many levels of lists and objects a value may have as it is stored.

MySQL stores JSON of 100 levels, and a worker reads a value back by a parser that stops at 200. What is left is for
what it is stored and read back in: the answer of Airflow's API, and a list of such values.
"""


def encode(value: Any) -> str:
    """Write a checked value as JSON text, the same in each process, such that `decode` gives it back equal."""
    text = json.dumps(serialize(value))
    return json.dumps(_with_sets_in_order(json.loads(text))) if any(name in text for name in _SETS) else text


def _with_sets_in_order(shapes: Any) -> Any:
    """Return what Airflow made of a value with the items of sets sorted, whose order is each process's own."""
    if isinstance(shapes, list):
        return [_with_sets_in_order(item) for item in shapes]
    if not isinstance(shapes, dict):
        return shapes
    shapes = {key: _with_sets_in_order(item) for key, item in shapes.items()}
    if shapes.get("__classname__") in _SETS:
        shapes["__data__"].sort(key=json.dumps)
    return shapes


def as_json(value: Any) -> Any:
    """Return a checked value in JSON shapes, such that `decode` of their text gives it back equal."""
    return json.loads(encode(value))


def decode(text: str) -> Any:
    """Read what `encode` wrote."""
    return deserialize(json.loads(text))


def check(value: Any, name: str = "event", *, largest: Callable[[], int] | None = None) -> Any:
    """
    Check that Airflow stores ``value`` and gives it back, here and in downstream tasks; return what it gives back.

    :param name: what the value is called in the message.
    :param largest: says how many bytes a request to the inbox may have, which it is to be recorded by. It is asked
        of large values only; None where it is not recorded.
    :raises EventNotSerializable: it does not; the message names the place and the type.
    """
    try:
        for place, leaf in _leaves(value, _Place(None, "{}", name)):
            if reason := _refused(leaf):
                raise EventNotSerializable(str(place), reason)
        # Airflow reads some dicts as something else; this is for those that _leaves does not know of.
        text = encode(value)
        is_too_deep, returned = is_deeper(json.loads(text), DEEPEST), decode(text)
    except EventNotSerializable:
        raise
    except RecursionError:
        is_too_deep, returned = True, None
    except Exception as error:
        raise EventNotSerializable(name, f"Airflow cannot read back what it would store ({error})") from error
    if is_too_deep:
        raise EventNotSerializable(
            name, f"it is nested too deeply: Airflow reads back {DEEPEST} levels of lists and objects"
        )
    if returned != value:
        raise EventNotSerializable(name, f"it would come back as {returned!r:.200}")
    if (
        largest is not None
        and len(text) > _LARGE
        and (size := len(json.dumps(text))) > (most := largest()) - _ROOM
    ):
        raise EventNotSerializable(
            name, f"it takes {size:,} bytes, and a request to the inbox {most:,} ([events] inbox_max_body)"
        )
    return returned


def is_xcom_key(key: Any) -> bool:
    """Whether an XCom can have the key, in each of Airflow's databases."""
    # MySQL takes those for one that differ by spaces at their ends.
    is_one = isinstance(key, str) and key == key.rstrip(" ")
    return is_one and len(key) <= _LONGEST_XCOM_KEY and max(key, default="") < "\U00010000"


def arguments_digest(args: Any, kwargs: Any) -> str:
    """
    Name the arguments of a wait, so that a change of them is seen: SHA-256, in hexadecimal.

    It is the same wherever they were rendered, in whatever process and by whatever version of Airflow. A list and
    a tuple of the same items are one, as are sets whatever their order, and datetimes of the same moment. Frozen,
    since records bear it.

    :param args: checked, and `localized`; ``kwargs`` likewise.
    """
    text = json.dumps([_plain(args), _plain(kwargs)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Return a value in JSON shapes that are the same for values that a listener cannot tell apart."""
    kind = type(value)
    if kind is dict:
        return {"{}": {key: _plain(item) for key, item in value.items()}}
    if kind in (list, tuple):
        return [_plain(item) for item in value]
    if kind in (set, frozenset):
        return {"set": sorted((_plain(item) for item in value), key=lambda item: json.dumps(item, sort_keys=True))}
    if isinstance(value, datetime) and value.tzinfo is not None:
        return {"at": datetime.isoformat(value.astimezone(timezone.utc), timespec="microseconds")}
    if isinstance(value, timedelta):
        return {"seconds": value.total_seconds()}
    if kind in (str, int, float, bool, type(None)):
        return value
    stored = as_json(value)
    if isinstance(stored, dict):
        stored.pop("__version__", None)  # of Airflow's format
    return {"other": stored}


def is_deeper(shapes: Any, levels: int) -> bool:
    """Whether JSON shapes have more levels of lists and objects than so many."""
    inner = [shapes]
    for _ in range(levels):
        inner = [
            item
            for one in inner
            if isinstance(one, (list, dict))
            for item in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, (list, dict)) for one in inner)


def _refused(leaf: Any) -> str | None:
    """Say why Airflow would not store a leaf and give it back, or return None if it would."""
    kind = type(leaf)
    if leaf is None or kind is bool:
        return None
    if kind is str:
        if "\0" in leaf:
            return f"{leaf!r:.50} holds a NUL, which PostgreSQL does not store"
        return None if _is_unicode(leaf) else f"{leaf!r:.50} is no valid Unicode"
    if kind is int:
        return None if -(2**63) <= leaf < 2**64 else "it is an integer of more than 64 bits"
    if kind is float:
        if not math.isfinite(leaf):
            return f"JSON has no {leaf}"
        # PostgreSQL gives a float without a fraction back as an integer, which Airflow then cannot read.
        is_small = -(2.0**63) <= leaf < 2.0**64
        return None if is_small else f"PostgreSQL makes an integer of more than 64 bits of {leaf!r}"
    if kind is datetime:  # keeps its type; whether it comes back equal is seen of the whole value
        return None if _has_known_zone(leaf) else f"Airflow does not store the time zone of {leaf!r}; take UTC"
    try:
        returned = decode(encode(leaf))
    except Exception as error:
        why = str(error).partition(". ")[0]
        return f"Airflow cannot store a {_name(leaf)} and give it back ({why})"
    if type(returned) is not kind:
        return f"a {_name(leaf)} would come back as a {_name(returned)}"
    return None


def _has_known_zone(moment: datetime) -> bool:
    """Whether Airflow stores a datetime's time zone, if it has one."""
    if moment.tzinfo in (None, timezone.utc) or isinstance(moment.tzinfo, _ZONES):
        return True
    try:
        return bool(decode(encode(moment)) == moment)
    except Exception:
        return False


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def localized(value: Any, zone: tzinfo) -> Any:
    """
    Return ``value`` with a time zone for each naive datetime in it.

    Airflow writes a naive datetime down as if it were in the time zone of the process that writes.
    """
    if isinstance(value, datetime) and value.tzinfo is None:
        return in_zone(value, zone)
    if type(value) is dict:
        return {key: localized(item, zone) for key, item in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(localized(item, zone) for item in value)
    return value


def simple(value: Any) -> Any:
    """
    Return an argument with what stands for something simpler as that.

    A path is its text, a member of an Enum its value, a duration of pendulum's a timedelta, a moment in a time
    zone that Airflow does not store, such as +02:00, the same in UTC, and the outputs of a mapped task, which
    Airflow reads one by one, a list.
    """
    kind = type(value)
    if kind is dict:
        return {key: simple(item) for key, item in value.items()}
    if kind in (list, tuple, set, frozenset):
        return kind(simple(item) for item in value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Enum):
        return simple(value.value)
    if isinstance(value, timedelta) and kind is not timedelta:
        return timedelta(seconds=value.total_seconds())
    if isinstance(value, datetime) and not _has_known_zone(value):
        return value.astimezone(timezone.utc)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, range, list, tuple)):
        return [simple(item) for item in value]
    return value


def as_json_has_it(value: Any) -> Any:
    """Return a date, a time or a datetime in ISO 8601, and a timedelta in seconds; anything else as it is."""
    if isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    return value.total_seconds() if isinstance(value, timedelta) else value


def classes(value: Any) -> Iterator[tuple[str, type[Any]]]:
    """Return the class of each leaf that is of one, and no type of Python's or Airflow's own, and where it is."""
    for place, leaf in _leaves(value, _Place(None, "")):
        if type(leaf).__module__.partition(".")[0] not in _KNOWN:
            yield str(place), type(leaf)


class _Place(NamedTuple):
    """Where something is in a value. Its text is made where it is needed, and not for each of a million items."""

    within: _Place | None
    form: str
    step: Any = None

    def __str__(self) -> str:
        parts: list[str] = []
        place: _Place | None = self
        while place is not None:
            parts.append(place.form.format(place.step))
            place = place.within
        return "".join(reversed(parts))


def _leaves(value: Any, place: _Place) -> Iterator[tuple[_Place, Any]]:
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            here = _Place(place, "[{!r}]", key)
            if type(key) is not str:
                raise EventNotSerializable(str(here), f"its key is a {_name(key)}, and keys must be strings")
            if reason := _refused(key):
                raise EventNotSerializable(str(here), f"of its key: {reason}")
            yield from _leaves(item, here)
        if reserved := RESERVED & value.keys():
            raise EventNotSerializable(str(place), f"Airflow reserves the key {sorted(reserved)[0]!r}")
    elif kind in (list, tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, _Place(place, "[{}]", index))
    elif kind in (set, frozenset):
        for item in value:
            yield from _leaves(item, _Place(place, "{{{!r}}}", item))
    else:
        yield place, value


def _name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
