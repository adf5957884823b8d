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
import logging
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from airflow.configuration import conf
from airflow.sdk.bases.xcom import BaseXCom
from airflow.sdk.execution_time.xcom import XCom
from airflow.utils.state import TaskInstanceState
from airflow_events import metrics
from airflow_events.api.refusals import HasEvent, Misfit, Moving, Over, Refusal, TooEarly, Unfit
from airflow_events.api.wait_rows import WaitRow, name_of, until
from airflow_events.errors import EventNotSerializable
from airflow_events.inbox.database import once_committed
from airflow_events.inbox.entries import End, Phase
from airflow_events.inbox.models import EventWait
from airflow_events.listeners.base import Wait
from airflow_events.listeners.support import schemas, serde
from airflow_events.listeners.support.commit import delivered, recorded
from airflow_events.triggers import outcome
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

log = logging.getLogger(__name__)

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
    :param idempotency_key: of two events of one sender with the same key the wait takes the first, whose receipt
        is the answer to both.
    :param ttl: for how long the event is kept for a wait that has not begun; None: as long as the run.
    :raises Refusal: nothing was changed; `airflow_events.api.refusals` has the reasons.
    """
    arrived = time.time()
    check_payload(payload)
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
    Do what `send` does, for a wait that is locked already, and a payload that is checked.

    :param arrived: when the event came, in seconds since the epoch; None if it was kept until now.
    """
    event_id = event_id or uuid.uuid4().hex
    digest = digest_of(payload)
    if (stored := row.record()) is not None:
        return _given_before(row, stored, by, event_id, idempotency_key, digest)
    _may_take(row)
    fits(row, payload)
    return deliver(
        row, payload, by=by, event_id=event_id, idempotency_key=idempotency_key, ttl=ttl, arrived=arrived
    )


def deliver(
    row: WaitRow,
    payload: Any,
    *,
    by: str,
    event_id: str,
    idempotency_key: str | None = None,
    ttl: timedelta | None = None,
    arrived: float | None = None,
) -> Receipt:
    """Do what `give` does, to a wait that has no event, may take one, and wants this one."""
    digest = digest_of(payload)
    receipt = Receipt("delivered" if row.waiting else "kept", event_id, row.wait.id)
    row.write(
        Phase.COMMITTED,
        event_id,
        by=by,
        event=serde.encode(payload),
        expires=None if ttl is None or row.begun else until(ttl),
        receipt=json.dumps({**dataclasses.asdict(receipt), "key": idempotency_key, "digest": digest}),
    )
    row.note("event sent", by, event_id=event_id, status=receipt.status)
    if row.waiting:
        _end(row, payload, arrived)
    once_committed(row.session, lambda: _tell(row, receipt, arrived))
    return receipt


def _tell(row: WaitRow, receipt: Receipt, arrived: float | None) -> None:
    recorded(row.listener, row.wait, arrived)
    if receipt.status == "kept":
        metrics.count(metrics.KEPT, dag_id=row.wait.dag_id, listener=row.listener.__qualname__)


def reject(session: Session, wait: Wait, reason: str, *, by: str) -> Status:
    """
    Fail a wait, without another try, for somebody has decided; a clear makes it wait again.

    The task fails on a worker, where its callbacks are run and its log has the reason.

    :return: ``delivered`` if the wait had begun, ``kept`` if it will fail when it begins.
    :raises Refusal: it has an event, or cannot take one any more; or the reason is none.
    """
    check_reason(reason)
    row = WaitRow.lock(session, wait)
    if (stored := row.record()) is not None:
        if stored.phase == Phase.REJECTED and stored.reason == reason:
            return "delivered" if row.begun or row.ended else "kept"
        raise _has(row, stored)
    _may_take(row)
    row.write(Phase.REJECTED, uuid.uuid4().hex, by=by, reason=reason)
    row.note("event rejected", by)
    if not row.waiting:
        return "kept"
    row.end(End("worker", payload=outcome.encode(outcome.Rejected(reason, by))))
    return "delivered"


def _end(row: WaitRow, event: Any, arrived: float | None) -> None:
    """End the task of a deferred wait whose event is recorded, or send it to the worker that does."""
    on_worker = End("worker", payload=outcome.encode(outcome.Arrived(event, arrived)))
    how = _ending(row, event) or on_worker
    if not how.outlets:
        row.end(how)
    else:
        try:
            with row.session.begin_nested():  # which undoes what an outlet that cannot be registered leaves
                row.end(how)
        except DBAPIError:
            raise
        except Exception:
            log.warning("An outlet of %s cannot be registered here; a worker does", row.wait.id, exc_info=True)
            how = on_worker
            row.end(how)
    if how.state == "success":
        once_committed(row.session, lambda: delivered(row.listener, row.wait, arrived))


def _ending(row: WaitRow, event: Any) -> End | None:
    """Return how the task succeeds here; None if a worker has to do it, or has to say why it cannot succeed."""
    asked = row.trigger
    assert asked is not None
    if asked.get("finish_on_worker"):
        return None
    values: dict[str, Any] = {}
    if asked.get("push", True) and event is not None:
        if XCom is not BaseXCom:  # whose values may go elsewhere, and rows are locked here
            return None
        if asked.get("multiple_outputs"):
            if not isinstance(event, dict) or not all(key and serde.is_xcom_key(key) for key in event):
                return None
            values.update(event)
        values[BaseXCom.XCOM_RETURN_KEY] = event
    length = None
    if row.mapped_over:
        can_be = values and isinstance(event, (list, dict))
        if not can_be or len(event) > conf.getint("core", "max_map_length"):
            return None
        length = len(event)
    return End(
        xcoms={key: serde.as_json(value) for key, value in values.items()},
        dag_result=bool(getattr(row.operator, "returns_dag_result", False)),
        mapped_length=length,
        outlets=tuple(asked.get("outlets") or ()),
    )


def fits(row: WaitRow, payload: Any) -> None:
    """
    Check a payload against the wait's schema.

    :raises Unfit: it does not fit.
    :raises TooEarly: the schema is not known yet.
    """
    if "schema" not in row.wants:
        raise TooEarly(f"{row.wait.id} has not begun; which events it takes is not known yet")
    schema = row.wants["schema"]
    if schema is None:
        return
    try:
        does_fit = schemas.fits(schema, payload)
    except ValueError as error:
        raise Unfit(f"the schema of {row.wait.id}: {error}") from None
    if not does_fit:
        raise Misfit(schema, payload)


def check_payload(payload: Any) -> None:
    """
    Check that Airflow can store a payload and give it back.

    :raises Unfit: it cannot.
    """
    try:
        serde.check(payload, "payload")
    except EventNotSerializable as error:
        raise Unfit(str(error)) from error


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


def digest_of(payload: Any) -> str:
    """Return what tells two payloads apart."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _may_take(row: WaitRow) -> None:
    if row.ended:
        state = row.task.state or "of a run that has ended"
        raise Over(f"{row.wait.id} has ended without an event: it is {state}")
    if row.resuming:
        raise Moving(f"{row.wait.id} is being handed to a worker")
    if row.task.state == TaskInstanceState.DEFERRED and not row.waiting:
        raise Moving(f"{row.wait.id} has no trigger")


def _given_before(
    row: WaitRow, stored: EventWait, by: str, event_id: str, idempotency_key: str | None, digest: str
) -> Receipt:
    receipt = json.loads(stored.receipt or "{}")
    told = {name: receipt.get(name) for name in ("status", "event_id", "wait")}
    if receipt.get("event_id") == event_id:  # this very request, whose commit the database did not confirm
        return Receipt(**told)
    # Another sender's key says nothing; the first edition did not note whose it was.
    is_theirs = stored.sent_by in (name_of(by), None)
    if idempotency_key is None or receipt.get("key") != idempotency_key or not is_theirs:
        raise _has(row, stored)
    if receipt["digest"] != digest:
        raise Unfit(f"the idempotency key {idempotency_key!r} was used with another payload before")
    return Receipt(**told)


def _has(row: WaitRow, stored: EventWait) -> Refusal:
    if stored.phase == Phase.REJECTED:
        return Over(f"{row.wait.id} was rejected")
    return HasEvent(f"{row.wait.id} has another event")
