"""Reading the ``[events]`` section of Airflow's configuration."""

from __future__ import annotations

from typing import TypeVar

from airflow.sdk.configuration import conf
from airflow_events.provider_info import OPTIONS, SECTION

_T = TypeVar("_T", bool, int, float, str)


def _get(option: str, kind: type[_T]) -> _T:
    default = OPTIONS[option]["default"]
    if kind is bool:
        return kind(conf.getboolean(SECTION, option, fallback=default == "True"))
    return kind(conf.get(SECTION, option, fallback=default) or default or kind())


def pickled_listeners() -> bool:
    """Whether listeners may travel to the triggerer as a pickle."""
    return _get("pickled_listeners", bool)


def commit_timeout() -> float:
    """For how many seconds a failing commit is tried again."""
    return _get("commit_timeout", float)


def commit_memory() -> float:
    """For how many seconds a source keeps who committed an event."""
    return _get("commit_memory", float)


def unreachable_timeout() -> float:
    """For how many seconds a source that is away is tried again."""
    return _get("unreachable_timeout", float)


def callback_secret() -> str:
    """Return what callback addresses are signed with; empty if there is nothing."""
    return _get("callback_secret", str) or str(conf.get("api", "secret_key", fallback=""))


def http_keep() -> float:
    """For how many seconds an event for a key is kept, and an idempotency key remembered."""
    return _get("http_keep", float)


def http_match_interval() -> float:
    """Seconds between two looks for waits that have begun."""
    return _get("http_match_interval", float)


def http_max_body() -> int:
    """How many bytes the body of an HTTP event may have."""
    return _get("http_max_body", int)


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
    """Seconds after which an uncommitted claim on a file lapses."""
    return _get("directory_claim_timeout", float)
