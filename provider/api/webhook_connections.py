"""What a connection says of the webhooks that its secret signs."""

from __future__ import annotations

from typing import Any, Literal

from airflow.models.connection import Connection
from airflow.sdk.exceptions import AirflowNotFoundException
from pydantic import BaseModel, ConfigDict, ValidationError

EXTRA = "airflow_events"
"""Where in a connection's extra it stands."""


class Said(BaseModel):
    """
    What a connection says about webhooks.

    :param keys: a shell pattern of the keys to which they may be sent.
    :param events: the types that are wanted; None for all.
    :param dags: to which they may go; None for all.
    """

    model_config = ConfigDict(strict=True, extra="forbid")  # a text is no list, and a word with a slip no field

    webhook: Literal["github", "stripe"]
    keys: str
    events: list[str] | None = None
    dags: list[str] | None = None


def find(conn_id: str) -> tuple[str, Any]:
    """Return a connection's secret, and what it says about webhooks; None if it says nothing, and is for none."""
    try:
        found = Connection.get_connection_from_secrets(conn_id)
    except AirflowNotFoundException:
        return "", None
    extra = found.extra_dejson
    return found.password or "", extra.get(EXTRA) if isinstance(extra, dict) else None


def read(extra: Any) -> Said:
    """
    Read what a connection says about webhooks.

    :raises ValueError: it cannot be read; the message says what of it, and why.
    """
    try:
        return Said.model_validate(extra)
    except ValidationError as error:
        [first, *_] = error.errors()
        raise ValueError(f"{EXTRA}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
