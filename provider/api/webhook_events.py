"""The route of webhooks: the signature of the body is in the place of a login."""

from __future__ import annotations

import fnmatch
import uuid
from dataclasses import dataclass
from typing import Annotated, Any

from airflow.models.connection import Connection
from airflow.sdk.exceptions import AirflowNotFoundException
from airflow_events.api import keys
from airflow_events.api.key_events import KEPT, Key, KeyAnswer, To, key_answer
from airflow_events.api.requests import ANY_JSON, TimeToLive, answers, in_transaction, parse, raw_body
from airflow_events.api.signatures import HEADERS, is_valid
from fastapi import APIRouter, Depends, HTTPException, Path, Request, Response, status
from starlette.concurrency import run_in_threadpool

_EXTRA = "airflow_events"


@dataclass(frozen=True)
class Delivery:
    """
    A webhook whose signature is valid.

    :param id: what its sender calls it, also when it sends it again; None if it does not say.
    :param dags: to which it may go; None for all.
    :param wanted: whether the connection wants events of this type.
    """

    conn_id: str
    payload: Any
    id: str | None
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
    secret, extra = await run_in_threadpool(_secret_of, conn_id)
    scheme = str(extra.get("webhook", ""))
    may = scheme in HEADERS and fnmatch.fnmatchcase(key, str(extra.get("keys", "")))
    if not may or not is_valid(scheme, secret, request.headers, body):
        raise HTTPException(status.HTTP_403_FORBIDDEN, "the signature is not valid here")
    payload = parse(body)
    kind, id_ = request.headers.get("x-github-event"), request.headers.get("x-github-delivery")
    if scheme == "stripe":
        fields = payload if isinstance(payload, dict) else {}
        kind, id_ = fields.get("type"), fields.get("id")
    events = extra.get("events")
    wanted = kind != "ping" and (events is None or kind in events)
    return Delivery(conn_id, payload, None if id_ is None else str(id_), extra.get("dags"), wanted)


def _secret_of(conn_id: str) -> tuple[str, dict[str, Any]]:
    """Return a connection's secret, and what it says about webhooks: nothing, and it is for none."""
    try:
        found = Connection.get_connection_from_secrets(conn_id)
    except AirflowNotFoundException:
        return "", {}
    extra = found.extra_dejson.get(_EXTRA)
    return found.password or "", extra if isinstance(extra, dict) else {}


router = APIRouter(dependencies=[Depends(signed)])


@router.post(
    "/webhooks/{conn_id}/keys/{key:path}",
    summary="Send a signed webhook to a key",
    response_model=KeyAnswer,
    response_description="The event is durable, and the waits that are named have it.",
    responses={
        **KEPT,
        204: {"description": "A ping, or an event of a type that the connection does not want."},
        **answers(400, 401, 403, 404, 413, 415, 422, 503),
    },
    openapi_extra=ANY_JSON,
)
def send_webhook(
    key: Key,
    delivery: Annotated[Delivery, Depends(signed)],
    response: Response,
    ttl: TimeToLive,
    to: To = "one",
) -> Any:
    """
    Do what the address by key does, for a body with the HMAC-SHA256 signature of GitHub or Stripe.

    Of a delivery that its sender repeats, the first counts.
    """
    if not delivery.wanted:
        return Response(status_code=status.HTTP_204_NO_CONTENT)
    event_id = uuid.uuid4().hex
    receipt = in_transaction(
        lambda session: keys.send(
            session,
            key,
            delivery.payload,
            by=f"webhook {delivery.conn_id}",
            dags=delivery.dags,
            to=to,
            event_id=event_id,
            idempotency_key=None if delivery.id is None else f"{delivery.conn_id}\n{delivery.id}",
            ttl=ttl,
        ),
        again=delivery.id is not None,
    )
    return key_answer(receipt, response)
