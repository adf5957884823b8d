"""The routes by which an event is sent to one wait."""

from __future__ import annotations

import uuid
from typing import Annotated, Literal

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import requires_access_dag
from airflow_events.admission import in_turn
from airflow_events.api import sending
from airflow_events.api.requests import (
    ANY_JSON,
    IdempotencyKey,
    Payload,
    TheWait,
    TimeToLive,
    UserName,
    answers,
    json_of,
)
from airflow_events.doors import check_is_meant
from fastapi import APIRouter, Depends, Response, status
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, StringConstraints, ValidationError

may_edit_tasks = Depends(requires_access_dag("PUT", DagAccessEntity.TASK_INSTANCE))

router = APIRouter(dependencies=[may_edit_tasks, Depends(check_is_meant)])

_OF_WAIT = "/dags/{dag_id}/runs/{run_id}/tasks/{task_id}"


class Answer(BaseModel):
    """What a sender is told."""

    status: Literal["delivered", "kept"] = Field(
        description="`delivered`: the wait has the event. `kept`: it will have it when it begins."
    )
    event_id: str = Field(description="The event, as Airflow's audit log names it.")
    wait: str = Field(description="`dag_id/run_id/task_id/map_index`")


class Rejection(BaseModel):
    """Why there will be no event."""

    reason: Annotated[str, StringConstraints(min_length=1, max_length=2000, pattern=r"^[^\x00]+$")]


def rejection_of(payload: Payload) -> Rejection:
    """Return what the body says; read by hand, so that it has the limits of an event's."""
    try:
        return Rejection.model_validate(payload)
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None


TheRejection = Annotated[Rejection, Depends(rejection_of)]


class Rejected(BaseModel):
    """What is told who rejects a wait."""

    status: Literal["delivered", "kept"] = Field(
        description="`delivered`: the task fails now. `kept`: it fails when it begins."
    )


KEPT: dict[int | str, dict[str, object]] = {
    202: {"model": Answer, "description": "The event is durable, and the wait has not begun."}
}


@router.post(
    _OF_WAIT,
    summary="Send an event to a wait",
    response_model=Answer,
    response_description="The event is durable, and the wait has it.",
    responses={**KEPT, **answers(400, 401, 403, 404, 409, 410, 413, 415, 422, 425, 503)},
    openapi_extra=ANY_JSON,
)
async def send(
    wait: TheWait,
    by: UserName,
    payload: Payload,
    response: Response,
    ttl: TimeToLive,
    idempotency_key: IdempotencyKey = None,
) -> Answer:
    """Record the event for the wait and, if it has begun, end the task with it, in one transaction."""
    event_id = uuid.uuid4().hex
    receipt = await in_turn(
        lambda session: sending.send(
            session, wait, payload, by=by, event_id=event_id, idempotency_key=idempotency_key, ttl=ttl
        )
    )
    return answer(receipt, response)


@router.post(
    f"{_OF_WAIT}/reject",
    summary="Reject a wait",
    response_description="The task fails.",
    responses={
        202: {"model": Rejected, "description": "The task fails when it begins."},
        **answers(400, 401, 403, 404, 409, 410, 413, 415, 422, 503),
    },
    openapi_extra=json_of(Rejection.model_json_schema(), "Why."),
)
async def reject(wait: TheWait, by: UserName, rejection: TheRejection, response: Response) -> Rejected:
    """Fail the wait with a reason, without another try. A clear makes it wait again."""
    outcome = await in_turn(lambda session: sending.reject(session, wait, rejection.reason, by=by))
    response.status_code = _code(outcome)
    return Rejected(status=outcome)


def answer(receipt: sending.Receipt, response: Response) -> Answer:
    """Tell a sender what became of the event."""
    response.status_code = _code(receipt.status)
    return Answer(status=receipt.status, event_id=receipt.event_id, wait=receipt.wait)


def _code(outcome: sending.Status) -> int:
    return status.HTTP_200_OK if outcome == "delivered" else status.HTTP_202_ACCEPTED
