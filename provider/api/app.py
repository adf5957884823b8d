"""
The FastAPI app that Airflow's API server mounts at ``/events``.

Airflow mounts apps of plugins without any authentication of their own; each router here brings its own.
"""

from __future__ import annotations

import logging
from typing import Any

from airflow.api_fastapi.core_api.security import get_user
from airflow_events.admission import Admission
from airflow_events.api import callback_events, events, inbox_routes, key_events, task_events, webhook_events
from airflow_events.api.refusals import Refusal
from airflow_events.inbox.database import is_of_a_value
from airflow_events.page import routes as page
from airflow_events.provider_info import VERSION
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnection

log = logging.getLogger(__name__)

ROUTERS = (
    events.router,
    key_events.router,
    callback_events.router,
    webhook_events.router,
    task_events.router,
    inbox_routes.router,
    page.router,
)


def create_app() -> FastAPI:
    """Make the app."""
    app = FastAPI(
        title="Airflow events",
        version=VERSION,
        description="Send events to Airflow runs that wait for them.",
        # Served below, behind the login.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    for router in ROUTERS:
        app.include_router(router)
    # The triggerers have turns of their own.
    app.add_middleware(Admission, apart=inbox_routes.router.prefix)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(DBAPIError, _database_busy)
    app.add_exception_handler(NoConnection, _database_busy)
    app.add_exception_handler(RequestValidationError, _invalid)

    @app.get("/openapi.json", include_in_schema=False, dependencies=[Depends(get_user)])
    def openapi(request: Request) -> dict[str, Any]:
        # Where Airflow has mounted it, which may be below a path of its own.
        return {**app.openapi(), "servers": [{"url": request.scope["root_path"]}]}

    return app


def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse({"detail": str(error)}, error.status, headers)


def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Say what is wrong as FastAPI does, without what was sent: that may be long, or no text to be sent back."""
    assert isinstance(error, RequestValidationError)
    shown = [{name: one[name] for name in ("type", "loc", "msg")} for one in error.errors()]
    return JSONResponse({"detail": shown}, 422)


def _database_busy(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, DBAPIError) and is_of_a_value(error):
        told = "the database cannot hold, or look for, a text or a number in this"
        return JSONResponse({"detail": [{"type": "value_error", "loc": ["database"], "msg": told}]}, 422)
    log.error("The database refused the transaction of a request to %s", request.url.path, exc_info=error)
    return JSONResponse({"detail": "the database refused; send the same again"}, 503, headers={"Retry-After": "2"})
