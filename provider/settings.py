"""Reading the ``[events]`` section of Airflow's configuration."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TypeVar

from airflow.sdk.configuration import conf
from airflow_events.provider_info import OPTIONS, SECTION

log = logging.getLogger(__name__)

_T = TypeVar("_T", bool, int, float, str)
_KINDS: dict[str, type] = {"boolean": bool, "integer": int, "float": float, "string": str}
_FOR_EVER = 1e9  # seconds, some thirty years: a database knows the moments that are so far away


def check(option: str) -> None:
    """
    Check that a value has been given that can be used.

    :raises Exception: it has not; the message names the option.
    """
    _read(option, _KINDS[OPTIONS[option]["type"]])


def _get(option: str, kind: type[_T]) -> _T:
    try:
        return _read(option, kind)
    except ValueError as wrong:  # neither a wait nor the API server is to end of it
        _tell(f"{wrong}; its default {OPTIONS[option]['default']} is used")
        return kind(OPTIONS[option]["default"])


def _read(option: str, kind: type[_T]) -> _T:
    default = OPTIONS[option]["default"]
    if kind is bool:
        return kind(conf.getboolean(SECTION, option, fallback=default == "True"))
    # What a command prints (`_cmd`), or a file has, ends with a line.
    value = str(conf.get(SECTION, option, fallback=default) or default).strip()
    if kind is str:
        return kind(value)
    number = -1.0
    with contextlib.suppress(ValueError):
        number = int(value or default) if kind is int else float(value or default)
    if not number >= 0:
        what = "whole number" if kind is int else "number"
        raise ValueError(f"[{SECTION}] {option} is {value!r}, and has to be a {what}, 0 or more")
    return kind(number if kind is int else min(number, _FOR_EVER))


@functools.cache
def _tell(wrong: str) -> None:
    """Say it once in each process."""
    log.error("%s", wrong)


def pickled_listeners() -> bool:
    """Whether listeners may travel to the triggerer as a pickle."""
    return _get("pickled_listeners", bool)


def commit_timeout() -> float:
    """For how many seconds a failing commit is tried again."""
    return _get("commit_timeout", float)


def unreachable_timeout() -> float:
    """For how many seconds a source that is unreachable is tried again."""
    return _get("unreachable_timeout", float)


def callback_secret() -> str:
    """Return what signed URLs are signed with; empty if there is nothing."""
    secret = _get("callback_secret", str) or str(conf.get("api", "secret_key", fallback=""))
    # Where nothing sets it, the Task SDK's configuration answers the name of what Airflow's own would make up.
    return "" if secret == "{SECRET_KEY}" else secret


def memory() -> float:
    """For how many seconds the inbox knows an event after its source has confirmed that it has forgotten it."""
    return _get("memory", float)


def migrate_on_start() -> bool:
    """Whether the API server migrates the tables of the inbox at its start."""
    return _get("migrate_on_start", bool)


def hosts() -> int:
    """Return how many triggers the waits of a kind share."""
    return max(_get("hosts", int), 1)


def http_keep() -> float:
    """For how many seconds an event for a key is kept, and an idempotency key remembered."""
    return _get("http_keep", float)


def http_most_kept_for_key() -> int:
    """How many events are kept for one key."""
    return _get("http_most_kept_for_key", int)


def http_most_kept_for_sender() -> int:
    """How many events of one sender are kept."""
    return _get("http_most_kept_for_sender", int)


def http_most_kept() -> int:
    """How many events are kept for all keys together."""
    return _get("http_most_kept", int)


def http_match_interval() -> float:
    """Seconds between two looks for waits that have begun."""
    return _get("http_match_interval", float)


def airflow_look_interval() -> float:
    """Seconds between two looks into Airflow's own database for those who wait for what happens there."""
    return _get("airflow_look_interval", float)


def http_max_body() -> int:
    """How many bytes the body of an HTTP event may have."""
    return _get("http_max_body", int)


def inbox_url() -> str:
    """Return the address of the inbox; if none is set, that of the API server as Airflow's executors have it."""
    if url := _get("inbox_url", str):
        return url.rstrip("/")
    base = conf.get("api", "base_url", fallback=None) or "/"
    if base.startswith("/"):
        base = f"http://localhost:8080{base}"
    server = conf.get("core", "execution_api_server_url", fallback=None) or base
    return f"{server.rstrip('/').removesuffix('/execution')}/events/inbox"


def api_url() -> str:
    """Return the address of this package's routes in the API server, as Airflow's own processes reach it."""
    return inbox_url().removesuffix("/inbox")


def send_from_tasks() -> bool:
    """Whether tasks may send events to keys by their own authority."""
    return _get("send_from_tasks", bool)


def inbox_secret() -> str:
    """Return what requests to the inbox are signed with; empty if it is Airflow's Fernet key."""
    return _get("inbox_secret", str)


def inbox_ca() -> str:
    """Return the path of the certificates that are trusted; empty if they are those of the system."""
    return _get("inbox_ca", str) or str(conf.get("api", "ssl_ca_file", fallback=None) or "")


def inbox_max_body() -> int:
    """How many bytes a request to the inbox may have."""
    return _get("inbox_max_body", int)


def directory_root() -> str:
    """Return what relative directories are relative to."""
    if root := _get("directory_root", str):
        return root
    from airflow.configuration import AIRFLOW_HOME

    return AIRFLOW_HOME


def directory_rescan_interval() -> float:
    """Seconds between two looks at a directory about which nothing was reported."""
    return _get("directory_rescan_interval", float)


def directory_claim_timeout() -> float:
    """Seconds after which an uncommitted claim on a file expires."""
    return _get("directory_claim_timeout", float)
