"""
The inbox for the triggerers of this deployment: what they ask in batches, and how this API server stands with it.

No user of Airflow gets in here, whatever they may do, and the public description has nothing of it: who asks has a
token that is signed with what only API servers and triggerers have.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

from airflow.utils.session import create_session
from airflow_events import inbox_token, settings
from airflow_events.api.requests import parse, read
from airflow_events.errors import InboxKeyMissing, InboxTokenRefused
from airflow_events.inbox.carrying_out import carry_out_each
from airflow_events.inbox.database import lacks_tables
from airflow_events.inbox.entries import Entry, as_json, entry_of
from airflow_events.provider_info import VERSION
from fastapi import APIRouter, Depends, Header, HTTPException, Request, Response, status
from sqlalchemy.exc import DBAPIError

log = logging.getLogger(__name__)

_T = TypeVar("_T")

MOST_ENTRIES = 1000
"""In one batch."""

# An API server has few connections to its database, and few threads; most are left to Airflow.
_AT_ONCE = 2
_WAITING = 8
_LONGEST_TURN = 25.0  # seconds until a batch is begun; who asks gives up soon after

_threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="airflow-events-inbox")
_room = threading.BoundedSemaphore(_AT_ONCE + _WAITING)


async def asker(authorization: Annotated[str | None, Header()] = None) -> str:
    """Return which process asks."""
    scheme, _, token = (authorization or "").strip().partition(" ")
    try:
        if scheme.lower() != "bearer":
            raise InboxTokenRefused("there is no token in the header Authorization")
        return inbox_token.check(token.strip())
    except InboxTokenRefused as refused:
        raise HTTPException(
            status.HTTP_401_UNAUTHORIZED, str(refused), headers={"WWW-Authenticate": "Bearer"}
        ) from None
    except InboxKeyMissing as missing:
        log.error("The inbox refuses all triggerers: %s", missing)
        raise HTTPException(status.HTTP_503_SERVICE_UNAVAILABLE, str(missing)) from None


router = APIRouter(prefix="/inbox", include_in_schema=False, dependencies=[Depends(asker)])


@router.post("")
async def ask(request: Request) -> Response:
    """Carry out a batch of entries, and answer each for itself."""
    raw = await read(request, settings.inbox_max_body(), "inbox_max_body")
    return Response(await _in_turn(lambda: _answers(raw)), media_type="application/json")


@router.get("")
async def stand() -> dict[str, str]:
    """Return the version of this package here, and of the tables in the database; empty if there are none."""
    return {"version": VERSION, "tables": await _in_turn(_tables)}


def _answers(raw: bytes) -> bytes:
    entries = _entries(parse(raw))
    try:
        answers = carry_out_each(entries)
    except DBAPIError as error:
        if lacks_tables(error):
            log.error(
                "The inbox lacks a table, or a column of one: `airflow db migrate` makes them", exc_info=error
            )
            raise HTTPException(
                status.HTTP_503_SERVICE_UNAVAILABLE,
                "the tables of the inbox are not there, or of another version: run `airflow db migrate`",
                headers={"Retry-After": "10"},
            ) from None
        raise
    return json.dumps({"answers": [as_json(answer) for answer in answers], "version": VERSION}).encode()


def _entries(body: Any) -> list[Entry]:
    told = body.get("entries") if isinstance(body, dict) else None
    if not isinstance(told, list):
        raise HTTPException(status.HTTP_422_UNPROCESSABLE_CONTENT, 'the body is not {"entries": [...]}')
    if len(told) > MOST_ENTRIES:
        raise HTTPException(
            status.HTTP_413_CONTENT_TOO_LARGE, f"there are {len(told)} entries, and at most {MOST_ENTRIES} at once"
        )
    entries = []
    for index, one in enumerate(told):
        try:
            entries.append(entry_of(one))
        except (ValueError, TypeError, AttributeError) as error:
            raise HTTPException(
                status.HTTP_422_UNPROCESSABLE_CONTENT,
                f"entry {index} cannot be read by version {VERSION}: {error}",
            ) from None
    return entries


def _tables() -> str:
    from airflow_events.inbox.manager import InboxDBManager

    with create_session(scoped=False) as session:
        manager = InboxDBManager(session)
        return manager.get_current_revision() or ""


async def _in_turn(work: Callable[[], _T]) -> _T:
    """
    Return what ``work`` returns, done in one of the inbox's threads.

    Who asks and hangs up asks the same again: a batch that has waited for too long is given up.
    """
    if not _room.acquire(blocking=False):
        raise _busy()
    came = time.monotonic()

    def when_it_is_its_turn() -> _T:
        if time.monotonic() - came > _LONGEST_TURN:
            raise _busy()
        return work()

    turn = _threads.submit(when_it_is_its_turn)
    turn.add_done_callback(lambda _: _room.release())
    return await asyncio.wrap_future(turn)


def _busy() -> HTTPException:
    return HTTPException(
        status.HTTP_503_SERVICE_UNAVAILABLE,
        "the inbox of this API server has enough to do; send the same again",
        headers={"Retry-After": "1"},
    )
