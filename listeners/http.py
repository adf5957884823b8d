"""Events that somebody sends to Airflow's own API server."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from airflow.sdk.execution_time.xcom import XCom
from airflow_events.listeners.base import EventListener, current_wait

# The key that a wait has is the value of one XCom, and part of the name of another, by which it is found.
KEY = "event_key"
LONGEST_KEY = 256
_LAST_IN_NAMES = "\uffff"


def key_entry(key: str) -> str:
    """
    Return the name of the XCom by which the waits with a key are found.

    MySQL has names without the characters beyond U+FFFF, by the collation that Airflow gives them there. A key
    with such a one goes by its digest.
    """
    if max(key) > _LAST_IN_NAMES:
        key = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{KEY}:{key}"


def check_key(key: Any) -> str:
    """
    Return ``key`` if it can be one.

    :raises ValueError: it is empty or longer than 256 characters, or is no text.
    """
    if not isinstance(key, str) or not 0 < len(key) <= LONGEST_KEY:
        raise ValueError(f"a key is a text of 1 to {LONGEST_KEY} characters, not {key!r:.100}")
    return key


class HttpListener(EventListener):
    """
    An event that comes as a request to Airflow's API server (``docs/http-events.md``).

    The API server records the event and ends the task, in one transaction, so there is nothing to poll and
    nothing to commit; what came before the wait had begun is its record already when it begins. Which is why
    this takes no worker and, while it waits, does nothing.
    """

    repeatable_poll: ClassVar[bool] = True
    recorded_from_outside: ClassVar[bool] = True

    async def poll_for_event(
        self, key: str | None = None, *, schema: Mapping[str, Any] | bool | None = None
    ) -> NoReturn:
        """
        Wait until the API server ends the task.

        :param key: under which events can be sent to the wait beside its own address. Waits of several runs
            and DAGs may have the same. None: by its own address only.
        :param schema: a JSON Schema that events must fit; one that does not is refused, and the wait goes on.
            It is taken as it is written: templates in it are not rendered.
        :raises ValueError: the key is none.
        """
        if key is not None:
            await _register(check_key(key))
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")


async def _register(key: str) -> None:
    wait = current_wait()
    of_wait = {
        "dag_id": wait.dag_id,
        "run_id": wait.run_id,
        "task_id": wait.task_id,
        "map_index": wait.map_index,
    }
    await XCom.aset(key=KEY, value=key, **of_wait)
    await XCom.aset(key=key_entry(key), value=key, **of_wait)
