"""
The JSON Schemas that events must fit.

Who may send an event chooses what is judged, so a judgement has to end soon, whatever that is. jsonschema-rs sees
to it: its patterns take linear time, items are told apart by their hashes, and a schema that refers to itself
judges nothing twice. What it cannot bound, such as patterns with references back, is refused as a DAG is parsed.
Nothing is fetched from anywhere.
"""

from __future__ import annotations

import functools
import json
from typing import Any, NoReturn

import jsonschema_rs
from airflow_events.listeners.support.serde import is_deeper

# To say what is wrong takes longer than to see that something is: seconds for what is long, and with references
# exponentially in the depth.
_LONGEST = 10_000  # characters of JSON
_DEEPEST_WITH_REFERENCES = 5
_LONGEST_REASON = 500


def check_schema(schema: Any) -> None:
    """
    Check that events can be judged by a schema.

    :raises ValueError: it is not a valid JSON Schema, refers to something else, or has a pattern that takes more
        than linear time.
    """
    _validator(_text(schema))


def fits(schema: Any, payload: Any) -> bool:
    """
    Whether a payload fits a schema; milliseconds, also for the largest.

    :param payload: as `airflow_events.listeners.support.serde.check` takes it.
    :raises ValueError: as of `check_schema`.
    """
    return bool(_validator(_text(schema)).is_valid(payload))


def misfit(schema: Any, payload: Any) -> str:
    """Say what of a payload does not fit a schema, in a line; of a long or deep one only that it does not."""
    is_deep = _refers(schema) and is_deeper(payload, _DEEPEST_WITH_REFERENCES)
    if is_deep or len(json.dumps(payload)) > _LONGEST:
        return "$: it does not fit the schema"
    try:
        _validator(_text(schema)).validate(payload)
    except jsonschema_rs.ValidationError as error:
        return _said(error)
    return "$: it fits the schema by now"


def _text(schema: Any) -> str:
    return json.dumps(schema, sort_keys=True)


@functools.lru_cache(maxsize=128)
def _validator(schema: str) -> Any:
    try:
        return jsonschema_rs.validator_for(
            json.loads(schema),
            # As in other libraries a format says what is meant, and refuses nothing.
            validate_formats=False,
            pattern_options=jsonschema_rs.RegexOptions(),
            retriever=_refuse,
        )
    except jsonschema_rs.ValidationError as error:
        raise ValueError(f"it is not a valid JSON Schema that events can be judged by: {_why(error)}") from None


def _why(error: jsonschema_rs.ValidationError) -> str:
    more = " that takes linear time: none with look-around, references back, or too many repetitions"
    return _said(error) + (more if error.message.endswith(' is not a "regex"') else "")


def _said(error: jsonschema_rs.ValidationError) -> str:
    return f"{_path(error.instance_path)}: {error.message:.{_LONGEST_REASON}}"


def _path(path: Any) -> str:
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def _refuse(uri: str) -> NoReturn:
    raise ValueError("it is not fetched")


def _refers(schema: Any) -> bool:
    text = _text(schema)
    return any(f'"{name}"' in text for name in ("$ref", "$dynamicRef", "$recursiveRef"))
