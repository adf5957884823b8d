"""Events that somebody sends to Airflow's own API server."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from airflow_events.listeners.base import EventListener, is_template

LONGEST_KEY = 256


def check_key(key: Any) -> str:
    """
    Return ``key`` if it can be one; of a whole number, as which a native template may come, its text.

    :raises ValueError: it is empty or longer than 256 characters, has a line end, or is no text.
    """
    if type(key) is int:
        key = str(key)
    if not isinstance(key, str) or not 0 < len(key) <= LONGEST_KEY or "\n" in key or "\r" in key or "\0" in key:
        raise ValueError(f"a key is a text of 1 to {LONGEST_KEY} characters in one line, not {key!r:.100}")
    return key


def address_of(key: str) -> str:
    """
    Return the address of a key, by which the inbox finds its waits and its events: its SHA-256 in hex.

    Every database tells digests apart alike, whatever its collation makes of texts. Rows hold them: the form is
    frozen.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class HttpListener(EventListener):
    """
    An event that comes as a request to Airflow's API server (``docs/http-events.md``).

    The API server records the event and ends the task, in one transaction, so there is nothing to poll and
    nothing to commit; what came before the wait had begun is its event already when it begins. Which is why
    this takes no worker and, while it waits, does nothing.
    """

    recorded_from_outside: ClassVar[bool] = True

    @classmethod
    def address(cls, key: str | None = None, *, schema: Mapping[str, Any] | bool | None = None) -> str | None:
        return None if key is None else address_of(check_key(key))

    @classmethod
    def check_arguments(cls, key: Any = None, *, schema: Any = None) -> None:
        if key is not None and not is_template(key):
            check_key(key)
        if schema is not None:
            from airflow_events.listeners.support.schemas import check_schema  # of use for few

            if is_template(json.dumps(schema, default=str)):
                raise ValueError(
                    "schema: it is taken as it is written, and Airflow would render the '{{' or '{%' in it"
                )
            try:
                check_schema(schema)
            except ValueError as error:
                raise ValueError(f"schema: {error}") from None

    async def poll_for_event(
        self, key: str | None = None, *, schema: Mapping[str, Any] | bool | None = None
    ) -> NoReturn:
        """
        Wait until the API server ends the task.

        :param key: under which events can be sent to the wait beside its own address. Waits of several runs
            and DAGs may have the same. None: by its own address only.
        :param schema: a JSON Schema that events must fit; one that does not is refused, and the wait goes on.
            It is taken as it is written: a template in it is refused.
        :raises ValueError: the key is invalid.
        """
        if key is not None:
            check_key(key)
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def poll_in_a_test(
        self, key: str | None = None, *, schema: Mapping[str, Any] | bool | None = None
    ) -> Any:
        """Return what is sent to an address of this machine, which the output names."""
        from airflow_events.listeners.support import in_a_test, schemas

        if key is not None:
            check_key(key)

        def misfit(event: Any) -> str | None:
            return None if schema is None or schemas.fits(schema, event) else schemas.misfit(schema, event)

        return await in_a_test.event_over_http(misfit)
