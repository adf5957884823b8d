"""What all routes do with a request: who sends it, its body, its one transaction, and how it is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any

from airflow.api_fastapi.core_api.security import GetUserDep
from airflow_events import settings
from airflow_events.doors import check_is_json
from airflow_events.listeners.base import Wait
from airflow_events.waits.tables import Name
from fastapi import Depends, Header, HTTPException, Query, Request, status
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

_SHORT = 10_000  # bytes

_MapIndex = Annotated[
    int, Query(ge=-1, lt=2**31, description="Which one of a mapped task; -1 for a task that is not mapped.")
]

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        description=(
            "A text of the sender's choice. The same again gets the first answer again, and delivers nothing. "
            "Send one, and a request without an answer can be sent again without harm."
        ),
    ),
]


def wait_of(dag_id: Name, run_id: Name, task_id: Name, map_index: _MapIndex = -1) -> Wait:
    """Return the wait that the address names."""
    return Wait(dag_id, run_id, task_id, map_index)


def user_name(user: GetUserDep) -> str:
    """Return who is logged in."""
    return str(user.get_name())


TheWait = Annotated[Wait, Depends(wait_of)]
UserName = Annotated[str, Depends(user_name)]


def time_to_live(
    ttl: Annotated[
        float | None,
        Query(gt=0, le=10 * 365 * 86400, description="For how many seconds to keep an event that comes early."),
    ] = None,
) -> timedelta | None:
    """Return for how long an event is to be kept."""
    return None if ttl is None else timedelta(seconds=ttl)


TimeToLive = Annotated[timedelta | None, Depends(time_to_live)]


async def raw_body(request: Request) -> bytes:
    """Read the body of an event."""
    return await read(request, settings.http_max_body(), "http_max_body")


async def read(request: Request, limit: int, option: str) -> bytes:
    """
    Read a body of JSON, and no more of it than is allowed.

    :param limit: in bytes.
    :param option: of ``[events]``, that sets it.
    """
    check_is_json(request.headers)
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise HTTPException(
                    status.HTTP_413_CONTENT_TOO_LARGE,
                    f"the body is larger than {limit} bytes ([events] {option})",
                )
            parts.append(part)
    except ClientDisconnect:
        raise HTTPException(status.HTTP_400_BAD_REQUEST, "the sender hung up") from None
    return b"".join(parts)


def parse(raw: bytes) -> Any:
    """Return what a body says."""
    try:
        return json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise HTTPException(
            status.HTTP_422_UNPROCESSABLE_CONTENT, f"the body is not valid JSON: {error or 'nested too deeply'}"
        ) from None


async def json_body(request: Request) -> Any:
    """Return the body."""
    return await parsed(await raw_body(request))


async def parsed(raw: bytes) -> Any:
    """Return what a body says; a long one is read outside the event loop."""
    return parse(raw) if len(raw) < _SHORT else await run_in_threadpool(parse, raw)


Payload = Annotated[Any, Depends(json_body)]


def json_of(schema: dict[str, Any], description: str) -> dict[str, Any]:
    """Describe a body for OpenAPI. FastAPI cannot know it: bodies are read by hand, because they have a limit."""
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "description": description, "content": content}}


ANY_JSON = json_of({}, "The event: any JSON.")


def _refuse(constant: str) -> float:
    raise ValueError(f"there is no {constant}")


REFUSALS: Mapping[int, str] = {
    400: "The request broke off.",
    401: "Not logged in.",
    403: "Logged in, or addressed, without the permission.",
    404: "There is no such run or task, or it does not wait for HTTP events; or nobody waits for the key, of an "
    "event for all without a ttl.",
    409: "The wait has another event already.",
    410: "The wait has ended without an event, or was rejected; or the URL has expired.",
    413: "The body is larger than `[events] http_max_body`.",
    415: "The body is not `application/json`.",
    422: "The body is not valid JSON, does not fit the wait's schema, or cannot be stored; or the idempotency key "
    "was used with another body.",
    425: "What the wait takes is not known before it begins. `Retry-After` says when to try again.",
    429: "As many events are kept as `[events] http_most_kept_for_key`, `http_most_kept_for_sender` or "
    "`http_most_kept` allows. `Retry-After` says when to try again.",
    503: "The wait is between two states, or the database is busy. `Retry-After` says when to try again.",
}


def answers(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Describe refusals for OpenAPI."""
    detail = {"type": "object", "properties": {"detail": {}}, "required": ["detail"]}
    return {
        code: {"description": REFUSALS[code], "content": {"application/json": {"schema": detail}}}
        for code in codes
    }
