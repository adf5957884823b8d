"""What starts runs: by which events, whether there is room for more, and which was the last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow.jobs.job import Job
from airflow.models.asset import AssetModel, AssetWatcherModel, DagScheduleAssetReference
from airflow.models.dag import DagModel
from airflow.models.dagrun import DagRun
from airflow.models.trigger import Trigger
from airflow_events.inbox.entries import RUN_ID_PREFIX, START_GROUP
from airflow_events.inbox.models import EventStart
from airflow_events.inbox.starts import Dag, dags_of
from airflow_events.waits.listing import Triggerer, triggerer_of
from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

# How old what a trigger says may be; it says it each half minute.
_LATELY = timedelta(minutes=2)


@dataclass(frozen=True)
class Start:
    """
    Events that start runs of a DAG.

    :param asset: its name, which is the listener and its arguments unless the author gave one.
    :param state: ``open``, ``full``, ``failing``, ``paused``, ``broken``, ``no trigger`` or ``no triggerer``.
    :param active: how many runs of the DAG are queued or running.
    :param up_to: how many there may be.
    :param last_event: when the last event started a run that is still there; None if none has.
    :param last_run: the id of that run.
    :param lag: how many messages nobody has acknowledged yet at the source, as it said in the last two minutes;
        None if it has not.
    :param trouble: what is wrong with the source, likewise, as where it is unreachable or refuses.
    """

    dag_id: str
    asset: str
    state: str
    active: int
    up_to: int
    last_event: datetime | None
    last_run: str | None
    triggerer: Triggerer | None
    lag: int | None = None
    trouble: str | None = None


def lags(session: Session) -> dict[str, int]:
    """Return how many messages are left that start runs, by DAG, where the source tells."""
    query = (
        select(DagScheduleAssetReference.dag_id, func.sum(EventStart.lag))
        .join(AssetModel, AssetModel.id == DagScheduleAssetReference.asset_id)
        .join(AssetWatcherModel, AssetWatcherModel.asset_id == AssetModel.id)
        .join(EventStart, EventStart.trigger_id == AssetWatcherModel.trigger_id)
        .where(AssetModel.group == START_GROUP, EventStart.lag.is_not(None), EventStart.told_at > _lately())
        .group_by(DagScheduleAssetReference.dag_id)
    )
    return {dag_id: int(lag or 0) for dag_id, lag in session.execute(query)}


def starts(session: Session, *, dag_ids: Collection[str] | None = None) -> list[Start]:
    """Return what starts runs, by DAG; of these DAGs, or of all."""
    query = (
        select(
            AssetModel.name,
            DagModel.dag_id,
            DagModel.is_paused,
            DagModel.has_import_errors,
            DagModel.max_active_runs,
            Trigger.id.label("trigger_id"),
            Trigger.encrypted_kwargs,
            EventStart.lag,
            EventStart.trouble,
            Job.id.label("job_id"),
            Job.hostname.label("job_hostname"),
            Job.state.label("job_state"),
            Job.latest_heartbeat,
        )
        .join(DagScheduleAssetReference, DagScheduleAssetReference.asset_id == AssetModel.id)
        .join(DagModel, DagModel.dag_id == DagScheduleAssetReference.dag_id)
        .outerjoin(AssetWatcherModel, AssetWatcherModel.asset_id == AssetModel.id)
        .outerjoin(Trigger, Trigger.id == AssetWatcherModel.trigger_id)
        .outerjoin(EventStart, and_(EventStart.trigger_id == Trigger.id, EventStart.told_at > _lately()))
        .outerjoin(Job, Job.id == Trigger.triggerer_id)
        .where(AssetModel.group == START_GROUP, DagModel.is_stale.is_(False))
        .order_by(DagModel.dag_id, AssetModel.name, Trigger.id)
    )
    if dag_ids is not None:
        query = query.where(DagModel.dag_id.in_(sorted(dag_ids)))
    rows = session.execute(query).all()
    found = sorted({row.dag_id for row in rows})
    active: dict[str, int] = {}
    if found:
        active = DagRun.active_runs_of_dags(dag_ids=found, exclude_backfill=True, session=session)
    last = _last(session, found)
    # Also those that whoever looks may not see: an event starts a run of all of them, or of none.
    together = dags_of(session, {row.trigger_id for row in rows if row.trigger_id is not None}, lock=False)
    return [
        _start(row, active.get(row.dag_id, 0), last[row.dag_id], together.get(row.trigger_id, ())) for row in rows
    ]


def _lately() -> datetime:
    return datetime.now(timezone.utc) - _LATELY


def _start(row: Any, active: int, last: Any, together: Collection[Dag]) -> Start:
    dag = Dag.of(row, active)
    up_to = None if row.trigger_id is None else _up_to(row.encrypted_kwargs)
    triggerer = triggerer_of(row)
    return Start(
        dag_id=row.dag_id,
        asset=row.name,
        state=_state(dag, up_to, row, triggerer, together),
        active=active,
        up_to=dag.max_active_runs if up_to is None else up_to,
        last_event=None if last is None else last.created_at or last.run_after,
        last_run=None if last is None else last.run_id,
        triggerer=triggerer,
        lag=row.lag,
        trouble=row.trouble,
    )


def _up_to(encrypted_kwargs: str) -> int | None:
    try:
        up_to: int | None = Trigger._decrypt_kwargs(encrypted_kwargs).get("up_to")
    except Exception:  # of another Fernet key: one row that cannot be read must not hide the others
        return None
    return up_to


def _state(dag: Dag, up_to: int | None, row: Any, triggerer: Triggerer | None, together: Collection[Dag]) -> str:
    if dag.is_paused:
        return "paused"
    if dag.is_broken:
        return "broken"
    if row.trigger_id is None:
        return "no trigger"
    if triggerer is None or not triggerer.alive:
        return "no triggerer"
    if row.trouble is not None:
        return "failing"
    return "open" if all(one.left(up_to) for one in (dag, *together)) else "full"


def _last(session: Session, dag_ids: list[str]) -> defaultdict[str, Any]:
    """Return the last run of each DAG that an event started, by the DAG's id; None if there is none."""
    found: defaultdict[str, Any] = defaultdict(lambda: None)
    if dag_ids:
        started = DagRun.run_id.startswith(RUN_ID_PREFIX, autoescape=True)
        latest = select(func.max(DagRun.id)).where(DagRun.dag_id.in_(dag_ids), started).group_by(DagRun.dag_id)
        columns = (DagRun.dag_id, DagRun.run_id, DagRun.created_at, DagRun.run_after)
        for row in session.execute(select(*columns).where(DagRun.id.in_(latest))):
            found[row.dag_id] = row
    return found
