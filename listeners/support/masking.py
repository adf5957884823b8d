"""What of a wait's arguments is shown: secrets masked as Airflow masks them, and in what it does not look into."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from airflow.sdk._shared.secrets_masker import should_hide_value_for_key
from airflow_events.listeners.base import EventListener

_MASK = "***"
# From the first colon after the scheme to the last @ of the login, in which people leave /, ? and # as they are;
# or a login without a colon that is as long as a token. What follows a colon and begins as a port does, is one.
_IN_URL = re.compile(r"(://[^\s/?#:@]*:)(?!\d+(?:[/?#]|\s|$))\S*(?=@)|(://)[^\s/?#:@]{16,}(?=@)")
# Of a URL's query, or of a connection string.
_ASSIGNED = re.compile(r"(?<![^\s?&;,])(\w+)(\s*=\s*)('[^']*'|[^\s&;,]+)")


def masked_call(
    listener: type[EventListener] | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    redact: Callable[..., Any],
) -> tuple[list[Any], dict[str, Any]]:
    """
    Return arguments as they may be shown.

    :param listener: by whose ``poll_for_event`` positional arguments have names; None if it cannot be had here.
    :param redact: Airflow's masker, of which workers and API servers have one each.
    """
    names = () if listener is None else _positional(listener.poll_for_event)
    names += (None,) * (len(args) - len(names))
    shown = [masked(value, redact, name) for value, name in zip(args, names, strict=False)]
    return shown, {name: masked(value, redact, name) for name, value in kwargs.items()}


def masked(value: Any, redact: Callable[..., Any], name: str | None = None) -> Any:
    """Return one value as it may be shown, with passwords in URLs and connection strings masked, too."""
    return _within(redact(value, name))


def _within(value: Any) -> Any:
    if isinstance(value, str):
        return _ASSIGNED.sub(_assigned, _IN_URL.sub(lambda found: f"{found[1] or found[2]}{_MASK}", value))
    if isinstance(value, dict):
        return {key: _within(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_within, value))
    return value


def _assigned(found: re.Match[str]) -> str:
    name, sign, _ = found.groups()
    return f"{name}{sign}{_MASK}" if should_hide_value_for_key(name) else found[0]


@functools.lru_cache(maxsize=256)
def _positional(poll: Callable[..., Any]) -> tuple[str | None, ...]:
    parameters = list(inspect.signature(poll).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)
