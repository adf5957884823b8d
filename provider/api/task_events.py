"""
The route by which a task sends events to keys, by its own authority.

No user of Airflow gets in here, and the public description has nothing of it. The task's id is that of its try:
who outlives the try is refused.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Literal

from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow.state import TaskScope, get_state_backend
from airflow.utils.state import TaskInstanceState
from airflow_events import settings, task_proof
from airflow_events.admission import in_turn
from airflow_events.api import keys, senders
from airflow_events.api.key_events import KeyAnswer, key_answer
from airflow_events.api.requests import Payload
from airflow_events.listeners.base import Wait
from fastapi import APIRouter, Depends, Header, HTTPException, Response, status
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

_TEN_YEARS = 10 * 365 * 86400.0


@dataclass(frozen=True)
class Sender:
    """
    A task instance that is running.

    :param run_made: when its run was made: another run may get its id, once it is deleted.
    """

    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    run_made: str

    @property
    def name(self) -> str:
        """Who sends, for the audit log of those who get it."""
        return f"task {Wait(self.dag_id, self.run_id, self.task_id, self.map_index).id}"


class Sent(BaseModel):
    """
    An event, and to whom it goes.

    :param name: what tells it from all that the task sends to this key, in every try.
    """

    model_config = ConfigDict(extra="forbid")

    key: str
    event: Any
    to: Literal["one", "all"]
    ttl: Annotated[float, Field(gt=0, le=_TEN_YEARS)] | None
    name: Annotated[str, Field(min_length=1, max_length=250)]


class TaskAnswer(KeyAnswer):
    """What a task is told."""

    differs: bool = Field(
        default=False,
        description="An earlier try has sent another event in its place, which is the one that counts.",
    )


async def sender_of(ti: uuid.UUID, authorization: Annotated[str | None, Header()] = None) -> Sender:
    """Return the task that sends, which only it can have proved."""
    scheme, _, proof = (authorization or "").strip().partition(" ")
    if scheme.lower() != "bearer" or not proof:
        raise HTTPException(status.HTTP_401_UNAUTHORIZED, "there is no proof in the header Authorization")
    if not settings.send_from_tasks():
        raise HTTPException(status.HTTP_403_FORBIDDEN, "tasks may not send events ([events] send_from_tasks)")
    sender = await in_turn(lambda session: _sender(session, ti, proof))
    if sender is None:
        raise HTTPException(status.HTTP_401_UNAUTHORIZED, "no task that is running has given this proof")
    return sender


def _sender(session: Session, ti: uuid.UUID, proof: str) -> Sender | None:
    query = (
        select(TaskInstance, DagRun.created_at)
        .join(DagRun, (DagRun.dag_id == TaskInstance.dag_id) & (DagRun.run_id == TaskInstance.run_id))
        .where(TaskInstance.id == ti, TaskInstance.state == TaskInstanceState.RUNNING)
    )
    if (found := session.execute(query).one_or_none()) is None:
        return None
    task, run_made = found
    of_task = {name: getattr(task, name) for name in ("dag_id", "run_id", "task_id", "map_index")}
    stored = get_state_backend().get(TaskScope(**of_task), task_proof.STATE, session=session)
    if stored is None or not task_proof.is_of(proof, json.loads(stored)):
        return None
    return Sender(**of_task, run_made=run_made.isoformat() if run_made else "")


TheSender = Annotated[Sender, Depends(sender_of)]

router = APIRouter(prefix="/tasks", include_in_schema=False, dependencies=[Depends(sender_of)])


def sent_of(payload: Payload) -> Sent:
    """Return what the body says; read by hand, so that it has the limits of an event's."""
    try:
        return Sent.model_validate(payload)
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None


@router.post("/{ti}/events", response_model=TaskAnswer)
async def send_from_task(
    sender: TheSender, sent: Annotated[Sent, Depends(sent_of)], response: Response
) -> KeyAnswer:
    """Give an event to the waits with a key, once for all tries of the task."""
    event_id = uuid.uuid4().hex

    def work(session: Session) -> keys.KeyReceipt:
        return keys.send(
            session,
            sent.key,
            sent.event,
            by=sender.name,
            dags=senders.dags_of_task(session, sender.dag_id),
            sender=senders.Task(sender.dag_id),
            to=sent.to,
            event_id=event_id,
            identity=_identity(sender, sent),
            remembered=timedelta(seconds=settings.http_keep()),
            ttl=None if sent.ttl is None else timedelta(seconds=sent.ttl),
        )

    try:
        return key_answer(await in_turn(work), response)
    except keys.SentBefore as before:
        return TaskAnswer(**key_answer(before.receipt, response).model_dump(), differs=True)


def _identity(sender: Sender, sent: Sent) -> bytes:
    """Return what is the same for an event in every try of its task. Rows hold it: the form is frozen."""
    named = ["task", sender.run_made, sender.name, sent.key, sent.name]
    return hashlib.sha256(json.dumps(named).encode()).digest()
