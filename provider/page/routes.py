"""
The routes of the page: the waits and what starts runs as JSON, forgetting a record, and the page's own files.

Nobody sees a DAG that Airflow would not show them, and nobody gets anything without a login, the page's own
files included.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any, Literal

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.base_auth_manager import ResourceMethod
from airflow.api_fastapi.auth.managers.models.base_user import BaseUser
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.api_fastapi.core_api.security import GetUserDep, get_user, requires_access_dag
from airflow.models.dag import DagModel
from airflow_events import waits
from airflow_events.admission import in_turn
from airflow_events.doors import check_is_meant
from airflow_events.waits.tables import Name
from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response, status
from fastapi.exceptions import RequestValidationError
from sqlalchemy.orm import Session

router = APIRouter(tags=["Waits"])

_NOT_LOGGED_IN: dict[int | str, dict[str, Any]] = {
    401: {"description": "Not logged in"},
    403: {"description": "Not permitted"},
}
_WAIT = "/api/waits/{dag_id}/{run_id}/{task_id}/{map_index}"
Filter = Annotated[str | None, Query(max_length=250, pattern=r"^[^\x00]*$")]
MapIndex = Annotated[int, Path(ge=-1, lt=2**31, description="-1 for a task that is not mapped")]


def may_see_event(dag_id: Name, user: GetUserDep) -> bool:
    """Whether the user may read what the DAG's tasks return."""
    return _may(user, "GET", dag_id, DagAccessEntity.XCOM)


def may_edit(dag_id: Name, user: GetUserDep) -> bool:
    """Whether the user may edit the DAG's task instances."""
    return _may(user, "PUT", dag_id, DagAccessEntity.TASK_INSTANCE)


def _may(user: BaseUser, method: ResourceMethod, dag_id: str, entity: DagAccessEntity) -> bool:
    details = DagDetails(id=dag_id, team_name=DagModel.get_team_name(dag_id))
    return get_auth_manager().is_authorized_dag(method=method, user=user, access_entity=entity, details=details)


MaySeeEvent = Annotated[bool, Depends(may_see_event)]
MayEdit = Annotated[bool, Depends(may_edit)]


@dataclass(frozen=True)
class Wait:
    """
    One wait, and what the user may do with it.

    :param may_see_event: whether the user may read this DAG's XComs; if not, ``record`` has no event, and there is
        no ``error``.
    :param may_edit: whether the user may edit this DAG's task instances.
    """

    wait: waits.Detail
    may_see_event: bool
    may_edit: bool


def filters_are_known(request: Request) -> None:
    """Refuse a parameter that is misspelt or given twice: left out, it would list other waits."""
    given = [name for name, _ in request.query_params.multi_items()]
    described = request.app.openapi()["paths"][request.scope["route"].path]["get"]["parameters"]
    known = [parameter["name"] for parameter in described]
    wrong = [
        {
            "type": "extra_forbidden",
            "loc": ("query", name),
            "msg": f"no such parameter; there are {known}",
        }
        for name in sorted(set(given) - set(known))
    ] + [
        {"type": "given_twice", "loc": ("query", name), "msg": "given more than once"}
        for name in known
        if given.count(name) > 1
    ]
    if wrong:
        raise RequestValidationError(wrong)


@router.get(
    "/api/waits",
    summary="List the waits of a stage",
    responses=_NOT_LOGGED_IN,
    dependencies=[
        Depends(requires_access_dag("GET", DagAccessEntity.TASK_INSTANCE)),
        Depends(filters_are_known),
    ],
)
async def list_waits(
    user: GetUserDep,
    stage: waits.Stage = waits.Stage.OPEN,
    dag_id: Filter = None,
    run_id: Filter = None,
    task_id: Filter = None,
    listener: Annotated[Filter, Query(description="the listener's class name")] = None,
    text: Annotated[Filter, Query(description="part of any of these, in any case")] = None,
    order: waits.Order | None = None,
    descending: bool | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    offset: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
) -> waits.Page:
    """Return a page of waits of the DAGs that the user may see."""

    def work(session: Session) -> waits.Page:
        visible = get_auth_manager().get_authorized_dag_ids(user=user, method="GET", session=session)
        return waits.find(
            session,
            stage,
            dag_ids=visible,
            dag_id=dag_id,
            run_id=run_id,
            task_id=task_id,
            listener=listener,
            text=text,
            order=order,
            descending=descending,
            limit=limit,
            offset=offset,
        )

    return await in_turn(work)


@router.get(
    "/api/starts",
    summary="List what starts runs",
    responses=_NOT_LOGGED_IN,
    dependencies=[Depends(requires_access_dag("GET", DagAccessEntity.RUN))],
)
async def list_starts(user: GetUserDep) -> list[waits.Start]:
    """Return what starts runs of the DAGs that the user may see."""

    def work(session: Session) -> list[waits.Start]:
        visible = get_auth_manager().get_authorized_dag_ids(user=user, method="GET", session=session)
        return waits.starts(session, dag_ids=visible)

    return await in_turn(work)


@router.get(
    _WAIT,
    summary="Show one wait",
    responses={**_NOT_LOGGED_IN, 404: {"description": "No such task instance, or it is no wait"}},
    dependencies=[Depends(requires_access_dag("GET", DagAccessEntity.TASK_INSTANCE))],
)
async def show_wait(
    dag_id: Name,
    run_id: Name,
    task_id: Name,
    map_index: MapIndex,
    user: GetUserDep,
    may_see: MaySeeEvent,
    may_edit: MayEdit,
) -> Wait:
    """Return one wait in full."""

    def work(session: Session) -> waits.Detail | None:
        visible = get_auth_manager().get_authorized_dag_ids(user=user, method="GET", session=session)
        return waits.show(session, (dag_id, run_id, task_id, map_index), dag_ids=visible)

    detail = await in_turn(work)
    if detail is None:
        raise _no_wait(dag_id, run_id, task_id, map_index)
    return Wait(detail if may_see else detail.without_event(), may_see, may_edit)


@router.post(
    f"{_WAIT}/forget",
    summary="Forget the record of a wait",
    status_code=status.HTTP_204_NO_CONTENT,
    responses={
        **_NOT_LOGGED_IN,
        404: {"description": "No such task instance"},
        409: {"description": "Nothing is recorded, or the task is at work"},
        415: {"description": "Not `application/json`"},
    },
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": {}}}}},
    dependencies=[
        Depends(requires_access_dag("PUT", DagAccessEntity.TASK_INSTANCE)),
        Depends(check_is_meant),
    ],
)
async def forget_event(dag_id: Name, run_id: Name, task_id: Name, map_index: MapIndex, user: GetUserDep) -> None:
    """Forget the event that a wait recorded: its next try or clear takes another."""
    key, by = (dag_id, run_id, task_id, map_index), str(user.get_name())
    forgotten = await in_turn(lambda session: waits.forget(session, key, by=by))
    if forgotten is None:
        raise _no_wait(dag_id, run_id, task_id, map_index)
    if forgotten.refused:
        raise HTTPException(status.HTTP_409_CONFLICT, forgotten.refused)


_TYPES = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
}


@router.get(
    "/page/",
    summary="The page",
    response_class=Response,
    responses={**_NOT_LOGGED_IN, 200: {"content": {"text/html": {}}}},
    dependencies=[Depends(get_user)],
)
def page() -> Response:
    """Return the page: the list of waits, or, by its query, one wait."""
    return _file("index.html", "text/html")


@router.get(
    "/page/{name}",
    summary="A file of the page",
    response_class=Response,
    responses={
        **_NOT_LOGGED_IN,
        200: {"content": {kind: {} for kind in _TYPES.values()}},
        404: {"description": "No such file"},
    },
    dependencies=[Depends(get_user)],
)
def page_file(name: Literal["page.css", "page.js", "icon.svg"]) -> Response:
    """Return what the page is made of."""
    return _file(name, _TYPES[name])


def _file(name: str, media_type: str) -> Response:
    content = files(__package__).joinpath("static").joinpath(name).read_bytes()
    return Response(content, media_type=media_type, headers=_HEADERS)


def _no_wait(dag_id: str, run_id: str, task_id: str, map_index: int) -> HTTPException:
    return HTTPException(
        status.HTTP_404_NOT_FOUND,
        f"{dag_id}/{run_id}/{task_id}/{map_index} is not found, or does not wait for an event",
    )
