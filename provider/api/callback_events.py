"""The route of signed URLs."""

from __future__ import annotations

import time
import uuid
from datetime import datetime, timezone
from typing import Annotated

from airflow.models.taskinstance import TaskInstance
from airflow.models.taskinstancehistory import TaskInstanceHistory
from airflow_events.admission import in_turn
from airflow_events.api import sending
from airflow_events.api.callback import Token, TokenExpired, TokenInvalid, check
from airflow_events.api.events import KEPT, Answer, answer
from airflow_events.api.refusals import Over
from airflow_events.api.requests import ANY_JSON, IdempotencyKey, Payload, answers
from airflow_events.api.wait_rows import WaitRow
from airflow_events.listeners.base import Wait
from fastapi import APIRouter, Depends, HTTPException, Query, Response, status
from sqlalchemy import select
from sqlalchemy.orm import Session


def token_of(
    token: Annotated[str | None, Query(max_length=4096, description="As `callback_url` made it.")] = None,
) -> Token:
    """Return what the token of the address says, which nobody without the secret could have written."""
    if not token:
        raise HTTPException(status.HTTP_401_UNAUTHORIZED, "the URL has no token")
    try:
        return check(token)
    except TokenInvalid as error:
        raise HTTPException(status.HTTP_403_FORBIDDEN, str(error)) from None
    except TokenExpired as error:
        raise HTTPException(status.HTTP_410_GONE, str(error)) from None


TheToken = Annotated[Token, Depends(token_of)]

router = APIRouter(dependencies=[Depends(token_of)])


@router.post(
    "/callback",
    summary="Send an event to the wait that a signed URL is for",
    response_model=Answer,
    response_description="The event is durable, and the wait has it.",
    responses={**KEPT, **answers(400, 401, 403, 404, 409, 410, 413, 415, 422, 425, 503)},
    openapi_extra=ANY_JSON,
)
async def send_by_callback(
    token: TheToken, payload: Payload, response: Response, idempotency_key: IdempotencyKey = None
) -> Answer:
    """Do what the address by wait does, with the signature of the address in the place of a login."""
    event_id, arrived = uuid.uuid4().hex, time.time()

    def work(session: Session) -> sending.Receipt:
        sending.check_payload(payload)
        row = WaitRow.lock(session, token.wait)
        if token.made_by is not None and not _is_of_run(session, token.made_by, row.wait):
            raise Over("the run that the URL was made in is gone")
        cleared = _last_clear(session, row)
        if cleared is not None and token.issued < cleared:
            raise Over(f"{token.wait.id} was cleared after the URL was made")
        return sending.give(
            row, payload, by="callback", event_id=event_id, idempotency_key=idempotency_key, arrived=arrived
        )

    return answer(await in_turn(work), response)


def _is_of_run(session: Session, ti: uuid.UUID, wait: Wait) -> bool:
    """Whether a try of a task instance belongs to the run of a wait, and not to an earlier one of the same id."""
    tries = (
        select(table.dag_id).where(id_ == ti, table.dag_id == wait.dag_id, table.run_id == wait.run_id)
        for table, id_ in (
            (TaskInstance, TaskInstance.id),
            (TaskInstanceHistory, TaskInstanceHistory.task_instance_id),
        )
    )
    return any(session.execute(each).first() is not None for each in tries)


def _last_clear(session: Session, row: WaitRow) -> datetime | None:
    """
    Return when the wait was cleared last, or None if it never was since it first began.

    Airflow does not note it, but each try has an id (a UUID of version 7) that holds the moment at which the try
    was prepared, and the first try after a clear is the first with its ``max_tries``, which a clear raises. Who
    signs cannot know ``max_tries``.
    """
    wait, history = row.wait, TaskInstanceHistory
    tries = session.execute(
        select(history.task_instance_id, history.max_tries).where(
            history.dag_id == wait.dag_id,
            history.run_id == wait.run_id,
            history.task_id == wait.task_id,
            history.map_index == wait.map_index,
        )
    ).all()
    if not any((max_tries or 0) < row.ti.max_tries for _, max_tries in tries):
        return None
    ids = [row.ti.id, *(id_ for id_, max_tries in tries if max_tries == row.ti.max_tries)]
    return datetime.fromtimestamp(min(id_.int >> 80 for id_ in ids) / 1000, timezone.utc)
