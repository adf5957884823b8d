"""
What can be done to a wait from outside, each in the one transaction of the session that it is given.

The transaction is the promise: it has the lock of the wait's task instance from its beginning on, so of two
senders, on whatever API servers, one finds the other's event. When it is committed, the event is the wait's
record; if the wait had begun, the task has ended too, or is on its way to the worker that ends it. Nothing is
told to anybody before the commit, so a sender that got no answer sends the same again, with the same
idempotency key, and gets the answer that it missed.

Nothing here knows of HTTP: the routes, the command line and the page call it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from airflow.models.trigger import handle_event_submit
from airflow.triggers.base import TaskSuccessEvent, TriggerEvent
from airflow.utils.state import TaskInstanceState
from airflow_events import metrics
from airflow_events.api.refusals import HasEvent, Moving, Over, Refusal, TooEarly, Unfit
from airflow_events.api.wait_rows import WaitRow, now
from airflow_events.errors import EventNotSerializable
from airflow_events.listeners import serde
from airflow_events.listeners.base import Wait
from airflow_events.listeners.commit import Phase, Record, delivered
from airflow_events.listeners.http import HttpListener
from airflow_events.triggers import outcome
from airflow_events.triggers.event import airflow_has_listeners
from jsonschema import SchemaError
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY
from referencing.exceptions import Unresolvable
from sqlalchemy.orm import Session

Status = Literal["delivered", "kept"]


@dataclass(frozen=True)
class Receipt:
    """
    What a sender is told.

    :param status: ``delivered``: the wait has the event; ``kept``: it will have it when it begins.
    :param event_id: of the record.
    :param wait: `airflow_events.listeners.base.Wait.id`.
    """

    status: Status
    event_id: str
    wait: str


def send(
    session: Session,
    wait: Wait,
    payload: Any,
    *,
    by: str,
    event_id: str | None = None,
    idempotency_key: str | None = None,
    ttl: timedelta | None = None,
) -> Receipt:
    """
    Give an event to a wait.

    :param by: who sends it, for the audit log.
    :param event_id: to be given where the same call may be made again because the database did not confirm
        its commit; None makes one.
    :param idempotency_key: of two events with the same key the wait takes the first, and both senders get its
        receipt.
    :param ttl: for how long the event is kept for a wait that has not begun; None: as long as the run.
    :raises Refusal: nothing was changed; `airflow_events.api.refusals` has the reasons.
    """
    arrived = time.time()
    row = WaitRow.lock(session, wait)
    return give(row, payload, by=by, event_id=event_id, idempotency_key=idempotency_key, ttl=ttl, arrived=arrived)


def give(
    row: WaitRow,
    payload: Any,
    *,
    by: str,
    event_id: str | None = None,
    idempotency_key: str | None = None,
    ttl: timedelta | None = None,
    arrived: float | None = None,
) -> Receipt:
    """
    Do what `send` does, for a wait that is locked already.

    :param arrived: when the event came, in seconds since the epoch; None if it was kept until now.
    """
    event_id = event_id or uuid.uuid4().hex
    digest = digest_of(payload)
    if (stored := row.record()) is not None:
        return _given_before(row, stored, event_id, idempotency_key, digest)
    _may_take(row)
    fits(row, payload)
    receipt = Receipt("delivered" if row.waiting else "kept", event_id, row.wait.id)
    lapses = ttl is not None and not row.begun
    record = Record(
        payload,
        Phase.COMMITTED,
        event_id,
        until=now() + ttl if lapses and ttl is not None else None,
        receipt={**dataclasses.asdict(receipt), "key": idempotency_key, "digest": digest},
    )
    row.write(record)
    row.note("event sent", by, event_id=event_id, status=receipt.status)
    if row.waiting:
        end(row, payload, arrived)
    metrics.once_committed(row.session, lambda: _tell(row.wait, receipt, arrived))
    return receipt


def _tell(wait: Wait, receipt: Receipt, arrived: float | None) -> None:
    tags = {"dag_id": wait.dag_id, "listener": HttpListener.__qualname__}
    metrics.count(metrics.RECORDED, **tags)
    metrics.since(metrics.TO_RECORD, arrived, **tags)
    if receipt.status == "kept":
        metrics.count(metrics.KEPT, **tags)


def reject(session: Session, wait: Wait, reason: str, *, by: str) -> Status:
    """
    Fail a wait, without another try, for somebody has decided; a clear makes it wait anew.

    The task fails on a worker, where its callbacks are run and its log has the reason.

    :return: ``delivered`` if the wait had begun, ``kept`` if it will fail when it begins.
    :raises Refusal: it has an event, or cannot take one any more; or the reason is none.
    """
    check_reason(reason)
    row = WaitRow.lock(session, wait)
    if (stored := row.record()) is not None:
        if stored.phase is Phase.REJECTED and stored.event["reason"] == reason:
            return "delivered" if row.begun or row.ended else "kept"
        raise _has(row, stored)
    _may_take(row)
    rejection = {"reason": reason, "by": by, "generation": row.generation}
    row.write(Record(rejection, Phase.REJECTED, uuid.uuid4().hex))
    row.note("event rejected", by, reason=reason)
    if not row.waiting:
        return "kept"
    handle_event_submit(
        TriggerEvent(outcome.encode(outcome.Rejected())), task_instance=row.ti, session=row.session
    )
    return "delivered"


def end(row: WaitRow, event: Any, arrived: float | None = None) -> None:
    """
    End the task of a deferred wait whose event is recorded, or send it to the worker that does.

    :param arrived: as `give` has it.
    """
    assert row.trigger is not None
    if row.trigger.get("finish_on_worker") or airflow_has_listeners() or row.mapped_over:
        payload = outcome.encode(outcome.Arrived(event, arrived))
        handle_event_submit(TriggerEvent(payload), task_instance=row.ti, session=row.session)
        return
    if row.trigger.get("push", True) and event is not None:
        returns = bool(getattr(row.task, "returns_dag_result", False))
        row.set_xcom("return_value", event, dag_result=returns)
    handle_event_submit(TaskSuccessEvent(), task_instance=row.ti, session=row.session)
    metrics.once_committed(row.session, lambda: delivered(HttpListener, row.wait, arrived))


def end_lapsed(row: WaitRow, stored: Record) -> None:
    """
    End a deferred wait with the event that lapsed about when the wait began, if it has such a one.

    Should the trigger have found that it had lapsed, nobody else would end the wait; should it have taken it,
    this comes to the same.
    """
    if stored.lapsed:
        row.write(stored.taken())
        end(row, stored.event)


def fits(row: WaitRow, payload: Any) -> None:
    """
    Check a payload.

    :raises Unfit: it does not fit the wait's schema, or Airflow could not store it.
    :raises TooEarly: the schema is not known yet.
    """
    check_payload(payload)
    if "schema" not in row.wants:
        raise TooEarly(f"what {row.wait.id} takes is worked out when it begins, and it has not")
    schema = row.wants["schema"]
    if schema is None:
        return
    validator = validator_for(schema)
    try:
        validator.check_schema(schema)
    except SchemaError as error:
        raise Unfit(f"the schema of {row.wait.id} is no JSON Schema: {error.message}") from error
    # With the registry given, a reference to somewhere else is an error and not a download.
    try:
        misfit = best_match(validator(schema, registry=REGISTRY).iter_errors(payload))
    except Unresolvable as error:
        raise Unfit(f"the schema of {row.wait.id} refers to {error.ref!r}, which it does not have") from None
    if misfit is not None:
        raise Unfit(f"{misfit.json_path}: {misfit.message:.500}")


def check_payload(payload: Any) -> None:
    """
    Check that Airflow can store a payload.

    :raises Unfit: it cannot.
    """
    try:
        serde.check(payload, "payload")
        if _has_nul(payload):
            raise Unfit("the payload has a NUL character, which PostgreSQL does not store")
    except EventNotSerializable as error:
        raise Unfit(str(error)) from error
    except RecursionError as error:
        raise Unfit("the payload is nested too deeply") from error


def check_reason(reason: str) -> None:
    """
    Check why there will be no event.

    :raises Unfit: it is empty, or Airflow cannot store it.
    """
    if not reason.strip():
        raise Unfit("a rejection needs a reason")
    try:
        serde.check(reason, "reason")
    except EventNotSerializable as error:
        raise Unfit(str(error)) from error


def _has_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(_has_nul(item) for pair in value.items() for item in pair)
    return isinstance(value, list) and any(map(_has_nul, value))


def digest_of(payload: Any) -> str:
    """Return what tells two payloads apart."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _may_take(row: WaitRow) -> None:
    if row.ended:
        raise Over(f"{row.wait.id} has ended without an event: it is {row.ti.state or 'of a run that has ended'}")
    if row.resuming:
        raise Moving(f"{row.wait.id} is on its way to a worker")
    if row.ti.state == TaskInstanceState.RUNNING and row.has_earlier_record:
        raise Moving(f"{row.wait.id} is being started anew")
    if row.ti.state == TaskInstanceState.DEFERRED and not row.waiting:
        raise Moving(f"{row.wait.id} has no trigger")


def _given_before(
    row: WaitRow, stored: Record, event_id: str, idempotency_key: str | None, digest: str
) -> Receipt:
    receipt = stored.receipt or {}
    if row.waiting and stored.lapsed:  # done even for a sender who is refused
        end_lapsed(row, stored)
        row.session.commit()
    if receipt.get("event_id") == event_id:  # this very request, whose commit the database did not confirm
        return Receipt(receipt["status"], receipt["event_id"], receipt["wait"])
    if idempotency_key is None or receipt.get("key") != idempotency_key:
        raise _has(row, stored)
    if receipt["digest"] != digest:
        raise Unfit(f"the idempotency key {idempotency_key!r} was used with another payload before")
    return Receipt(receipt["status"], receipt["event_id"], receipt["wait"])


def _has(row: WaitRow, stored: Record) -> Refusal:
    if stored.phase is Phase.REJECTED:
        return Over(f"{row.wait.id} was rejected")
    return HasEvent(f"{row.wait.id} has another event")
