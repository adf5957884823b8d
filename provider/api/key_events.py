"""The route by which an event is sent to a key."""

from __future__ import annotations

import uuid
from typing import Annotated, Literal

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.base_user import BaseUser
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.api_fastapi.core_api.security import GetUserDep, get_user
from airflow.models.dag import DagModel
from airflow_events.admission import in_turn
from airflow_events.api import keys
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
from sqlalchemy import select
from sqlalchemy.orm import Session
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


async def allowed_dags(user: GetUserDep) -> frozenset[str] | None:
    """Return the DAGs whose task instances the user may edit, or None if these are all."""
    candidates, teams, all_dags = await in_turn(lambda session: _dags(session, user))
    allowed = await run_in_threadpool(_allowed, user, candidates, teams)
    if not allowed:
        raise HTTPException(status.HTTP_403_FORBIDDEN, "you may edit the task instances of no DAG")
    return None if allowed >= all_dags else allowed


def _dags(session: Session, user: BaseUser) -> tuple[set[str], dict[str, str | None], set[str]]:
    """Return which DAGs the user may edit, the teams of these, and all DAGs there are."""
    candidates = get_auth_manager().get_authorized_dag_ids(user=user, method="PUT", session=session)
    teams = DagModel.get_dag_id_to_team_name_mapping(list(candidates), session=session)
    return candidates, teams, set(session.scalars(select(DagModel.dag_id)))


def _allowed(user: BaseUser, candidates: set[str], teams: dict[str, str | None]) -> frozenset[str]:
    manager = get_auth_manager()
    return frozenset(
        dag_id
        for dag_id in candidates
        if manager.is_authorized_dag(
            method="PUT",
            access_entity=DagAccessEntity.TASK_INSTANCE,
            details=DagDetails(id=dag_id, team_name=teams.get(dag_id)),
            user=user,
        )
    )


AllowedDags = Annotated[frozenset[str] | None, Depends(allowed_dags)]


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
    dags: AllowedDags,
    payload: Payload,
    response: Response,
    ttl: TimeToLive,
    to: To = "one",
    idempotency_key: IdempotencyKey = None,
) -> KeyAnswer:
    """
    Give the event to a wait that has the key, or to all, or keep it for those that begin.

    It goes to waits of DAGs whose task instances the sender may edit, now.
    """
    event_id = uuid.uuid4().hex
    receipt = await in_turn(
        lambda session: keys.send(
            session,
            key,
            payload,
            by=str(user.get_name()),
            dags=dags,
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
