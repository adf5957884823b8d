"""The route of webhooks: the signature of the body is in the place of a login."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import logging
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

from airflow_events import settings
from airflow_events.admission import in_turn
from airflow_events.api import keys, senders, webhook_connections
from airflow_events.api.key_events import KEPT, Key, KeyAnswer, To, key_answer
from airflow_events.api.requests import ANY_JSON, TimeToLive, answers, parsed, raw_body
from airflow_events.api.signatures import HEADERS, is_valid
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, HTTPException, Path, Request, Response, status

log = logging.getLogger(__name__)

# Nobody has logged in here, and each look for a connection takes one of the database's, or asks a secrets backend.
_AT_ONCE = 2


@functools.cache
def _limit() -> CapacityLimiter:
    return CapacityLimiter(_AT_ONCE)


@dataclass(frozen=True)
class Delivery:
    """
    A webhook whose signature is valid.

    :param id: what tells it from others, also when it is sent again, and is signed.
    :param dags: to which it may go; None for all.
    :param wanted: whether the connection wants events of this type.
    """

    conn_id: str
    payload: Any
    id: str
    dags: list[str] | None
    wanted: bool


async def signed(
    request: Request,
    conn_id: Annotated[
        str, Path(max_length=250, pattern=r"^[^\x00]+$", description="The connection that has the secret.")
    ],
    key: Key,
) -> Delivery:
    """Return the webhook, which nobody without the connection's secret could have signed."""
    if not any(header in request.headers for header in HEADERS.values()):
        raise HTTPException(
            status.HTTP_401_UNAUTHORIZED, f"the body is not signed: no {' or '.join(HEADERS.values())}"
        )
    body = await raw_body(request)
    secret, extra = await to_thread.run_sync(webhook_connections.find, conn_id, limiter=_limit())
    scheme = extra.get("webhook") if isinstance(extra, dict) else None
    if not isinstance(scheme, str) or scheme not in HEADERS or not is_valid(scheme, secret, request.headers, body):
        raise _not_valid()
    said = _read(conn_id, extra)
    if not fnmatch.fnmatchcase(key, said.keys):
        raise _not_valid()
    payload = await parsed(body)
    if said.webhook == "stripe":
        fields = payload if isinstance(payload, dict) else {}
        kind, id_ = fields.get("type"), fields.get("id")
    else:  # what it calls a delivery is in a header, and that is not signed
        kind, id_ = request.headers.get("x-github-event"), None
    wanted = kind != "ping" and (said.events is None or kind in said.events)
    id_ = id_ if isinstance(id_, str) else hashlib.sha256(body).hexdigest()
    return Delivery(conn_id, payload, id_, said.dags, wanted)


def _not_valid() -> HTTPException:
    return HTTPException(status.HTTP_403_FORBIDDEN, "the signature is not valid here")


def _read(conn_id: str, extra: Any) -> webhook_connections.Said:
    """Read what a connection says; who has signed with its secret, and the log, are told what of it is wrong."""
    try:
        return webhook_connections.read(extra)
    except ValueError as error:
        log.error(
            "The extra of the connection %s cannot be read, and its webhooks are refused: %s", conn_id, error
        )
        raise HTTPException(
            status.HTTP_403_FORBIDDEN, f"the extra of the connection {conn_id} cannot be read: {error}"
        ) from None


router = APIRouter(dependencies=[Depends(signed)])


@router.post(
    "/webhooks/{conn_id}/keys/{key:path}",
    summary="Send a signed webhook to a key",
    response_model=KeyAnswer,
    response_description="The event is durable, and the waits that are named have it.",
    responses={
        **KEPT,
        204: {"description": "A ping, or an event of a type that the connection does not want."},
        **answers(400, 401, 403, 404, 413, 415, 422, 429, 503),
    },
    openapi_extra=ANY_JSON,
)
async def send_webhook(
    key: Key,
    delivery: Annotated[Delivery, Depends(signed)],
    response: Response,
    ttl: TimeToLive,
    to: To = "one",
) -> Any:
    """
    Do what the address by key does, for a body with the HMAC-SHA256 signature of GitHub or Stripe.

    Of a delivery that is repeated within `[events] http_keep`, whoever repeats it, the first counts.
    """
    if not delivery.wanted:
        return Response(status_code=status.HTTP_204_NO_CONTENT)
    event_id = uuid.uuid4().hex
    try:
        receipt = await in_turn(
            lambda session: keys.send(
                session,
                key,
                delivery.payload,
                by=f"webhook {delivery.conn_id}",
                dags=delivery.dags,
                sender=senders.Webhook(delivery.conn_id, key),
                to=to,
                event_id=event_id,
                idempotency_key=f"{delivery.conn_id}\n{delivery.id}",
                ttl=ttl,
                remembered=timedelta(seconds=settings.http_keep()),
            )
        )
    except keys.SentBefore as before:  # Stripe counts in the body how many have not taken it yet
        receipt = before.receipt
    return key_answer(receipt, response)
