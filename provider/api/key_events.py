"""The route by which an event is sent to a key."""

from __future__ import annotations

import uuid
from typing import Annotated, Literal

from airflow.api_fastapi.core_api.security import GetUserDep, get_user
from airflow_events.admission import in_turn
from airflow_events.api import keys, senders
from airflow_events.api.requests import (
    ANY_JSON,
    IdempotencyKey,
    Payload,
    TimeToLive,
    answers,
)
from airflow_events.doors import check_is_meant
from fastapi import APIRouter, Depends, HTTPException, Path, Query, Response, status
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

router = APIRouter(dependencies=[Depends(get_user), Depends(check_is_meant)])

Key = Annotated[
    str,
    Path(
        max_length=256,
        pattern="^[^\\x00\ufffd]+$",  # which the server puts in the place of what is not UTF-8
        description="What `HttpListener(key=...)` of the waits is, in UTF-8.",
    ),
]
To = Annotated[
    Literal["one", "all"],
    Query(
        description=(
            "`one`: the wait that has waited longest, or the first that begins. "
            "`all`: all that wait now, and those that begin within `ttl`, if there is one."
        )
    ),
]


class KeyAnswer(BaseModel):
    """What a sender to a key is told."""

    status: Literal["delivered", "kept"] = Field(
        description="`delivered`: the waits below have the event. `kept`: it is durable, and no wait has it yet."
    )
    event_id: str = Field(description="The event, as Airflow's audit log names it.")
    key: str
    waits: list[str] = Field(description="`dag_id/run_id/task_id/map_index` of each")


KEPT: dict[int | str, dict[str, object]] = {
    202: {"model": KeyAnswer, "description": "The event is durable, and no wait has it yet."}
}


async def reach_of(user: GetUserDep) -> tuple[senders.Dags, senders.User | None]:
    """Return the DAGs whose task instances the user may edit, and what tells the user later."""
    found = await in_turn(lambda session: senders.candidates(session, user))
    dags, sender = await run_in_threadpool(senders.reach_of, user, found)
    if dags is not None and not dags:
        raise HTTPException(status.HTTP_403_FORBIDDEN, "you may edit the task instances of no DAG")
    return dags, sender


Reach = Annotated[tuple[senders.Dags, senders.User | None], Depends(reach_of)]


@router.post(
    "/keys/{key:path}",
    summary="Send an event to a key",
    response_model=KeyAnswer,
    response_description="The event is durable, and the waits that are named have it.",
    responses={**KEPT, **answers(400, 401, 403, 404, 413, 415, 422, 429, 503)},
    openapi_extra=ANY_JSON,
)
async def send_to_key(
    key: Key,
    user: GetUserDep,
    reach: Reach,
    payload: Payload,
    response: Response,
    ttl: TimeToLive,
    to: To = "one",
    idempotency_key: IdempotencyKey = None,
) -> KeyAnswer:
    """
    Give the event to a wait that has the key, or to all, or keep it for those that begin.

    It goes to waits of DAGs whose task instances the sender may edit, now and when the wait gets it.
    """
    dags, sender = reach
    event_id = uuid.uuid4().hex
    receipt = await in_turn(
        lambda session: keys.send(
            session,
            key,
            payload,
            by=str(user.get_name()),
            dags=dags,
            sender=sender,
            to=to,
            event_id=event_id,
            idempotency_key=idempotency_key,
            ttl=ttl,
        ),
        again=idempotency_key is not None,
    )
    return key_answer(receipt, response)


def key_answer(receipt: keys.KeyReceipt, response: Response) -> KeyAnswer:
    """Tell a sender what became of the event."""
    delivered = receipt.status == "delivered"
    response.status_code = status.HTTP_200_OK if delivered else status.HTTP_202_ACCEPTED
    return KeyAnswer(status=receipt.status, event_id=receipt.event_id, key=receipt.key, waits=receipt.waits)
