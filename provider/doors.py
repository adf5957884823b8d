"""What every route for users does, whatever it is for: who means a change, and whose turn it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar
from urllib.parse import urlsplit

from airflow.configuration import conf
from airflow_events.inbox.database import in_transaction
from anyio import CapacityLimiter, to_thread
from fastapi import HTTPException, Request, status
from sqlalchemy.orm import Session

_T = TypeVar("_T")

# An API server has 15 connections to its database, unless told otherwise, and Airflow's own routes need some.
# Its event loop even stands still while it waits for one to see who is logged in.
_AT_ONCE = 4
# A look at waits is work of the processor, which all threads of a process share, Airflow's own requests too; and
# who sends an event does not wait for those who look.
_LOOKS_AT_ONCE = 2


@functools.cache
def _limit(at_once: int) -> CapacityLimiter:
    return CapacityLimiter(at_once)


async def in_turn(work: Callable[[Session], _T], *, again: bool = True) -> _T:
    """
    Do what `in_transaction` does, in a thread, few at once.

    Who waits for a turn has neither a thread nor a connection, and the connection is given back with the end of
    the transaction, whatever the event loop has to do meanwhile.
    """
    return await to_thread.run_sync(lambda: in_transaction(work, again=again), limiter=_limit(_AT_ONCE))


async def look(work: Callable[[Session], _T]) -> _T:
    """Do what `in_turn` does, for those who only look: their turns are others."""
    return await to_thread.run_sync(lambda: in_transaction(work), limiter=_limit(_LOOKS_AT_ONCE))


def check_is_json(headers: Mapping[str, str]) -> None:
    """Refuse what is said to be something else than JSON, or is not said to be anything."""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise HTTPException(
            status.HTTP_415_UNSUPPORTED_MEDIA_TYPE,
            f"the body is {media_type or 'of no type'}, and must be application/json",
        )


def check_is_meant(request: Request) -> None:
    """
    Refuse a change that a page from elsewhere may have asked for, with the cookie that the browser adds.

    Such a page can neither say that a body is JSON nor send a token, unless Airflow allows it to, and cannot
    change what the browser says of where it is from.
    """
    headers = request.headers
    check_is_json(headers)
    if headers.get("authorization", "").partition(" ")[0].lower() == "bearer":
        return
    if (site := headers.get("sec-fetch-site")) is not None:
        is_from_here = site == "same-origin"
    else:  # an older browser, or one that does not trust the connection
        here = {headers.get("host"), urlsplit(conf.get("api", "base_url", fallback="") or "").netloc}
        is_from_here = urlsplit(headers.get("origin", "")).netloc in here - {None, ""}
    if not is_from_here:
        raise HTTPException(
            status.HTTP_403_FORBIDDEN,
            "a cookie alone changes nothing: send a token (Authorization: Bearer), or the Origin of this Airflow",
        )
