"""
Runs that events start, or asset events: how many there is room for, and one for each event.

A trigger of an asset's watcher polls for them (`airflow_events.triggers.starts`). It does not know whose runs it
starts: the DAGs are those that Airflow schedules by the trigger's assets at this moment. If there are several, an
event starts a run of each, and there is room if each has room.

What keeps an event from starting two runs are two unique keys: that of ``event_taken``, which waits share, and
Airflow's own of the run id, which follows from the event. Both are written in one transaction. An asset event has
the first of them alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow.assets.manager import asset_manager
from airflow.configuration import conf as settings
from airflow.models.asset import AssetModel, AssetWatcherModel, DagScheduleAssetReference
from airflow.models.dag import DagModel
from airflow.models.dag_version import DagVersion
from airflow.models.dagbag import DBDagBag
from airflow.models.dagrun import DagRun
from airflow.sdk.exceptions import ParamValidationError
from airflow.serialization.definitions.dag import SerializedDAG
from airflow.utils.sqlalchemy import with_row_locks
from airflow.utils.state import DagRunState
from airflow.utils.types import DagRunTriggeredByType, DagRunType
from airflow_events.inbox.database import begin_writing, once_committed
from airflow_events.inbox.entries import RUN_ID_PREFIX, Answer, StartRoom, StartRun, Status, Told
from airflow_events.inbox.models import EventSent, EventStart
from airflow_events.inbox.taken import Taken, key_of, taken_of, write_taken
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

log = logging.getLogger(__name__)

# For how many asset events there is always room.
_MOST_ASSET_EVENTS = 64

# How many characters of what is wrong with a source are kept; and after how long it is noted that a trigger lives.
_LONGEST = 2000
_TELL_AGAIN = timedelta(seconds=30)

# For how long a request may be repeated whose answer was lost.
_ASKED_AGAIN = timedelta(days=1)

_NOBODYS = Answer(Status.OUTLIVED, "the trigger's assets start no DAG any more")


@dataclass
class Dag:
    """
    A DAG that events start.

    :param active: how many of its runs are queued or running, backfills left out, as Airflow counts them.
    """

    id: str
    is_paused: bool
    is_broken: bool
    max_active_runs: int
    active: int = 0

    @classmethod
    def of(cls, row: Any, active: int = 0) -> Dag:
        """Return that of a row with the columns of `DagModel`."""
        most = row.max_active_runs
        return cls(
            row.dag_id,
            bool(row.is_paused),
            bool(row.has_import_errors),
            settings.getint("core", "max_active_runs_per_dag") if most is None else most,
            active,
        )

    @property
    def takes(self) -> bool:
        """Whether it takes events at all."""
        return not self.is_paused and not self.is_broken

    def left(self, up_to: int | None) -> int:
        """Return for how many runs there is room."""
        if not self.takes:
            return 0
        return max((self.max_active_runs if up_to is None else up_to) - self.active, 0)

    def why_full(self) -> str:
        """Say why there is no room."""
        if self.is_paused:
            return f"{self.id} is paused"
        if self.is_broken:
            return f"the file of {self.id} has import errors"
        return f"{self.id} has {self.active} active runs"


_Dags = dict[int, list[Dag]]  # by the trigger's id


@dataclass
class _Batch:
    """What a transaction has locked and read, and what it is about to write."""

    session: Session
    now: datetime
    dags: _Dags
    taken: dict[bytes, Taken]
    _serialized: dict[str, SerializedDAG] = field(default_factory=dict)

    def serialized(self, dag_id: str) -> SerializedDAG:
        """
        Return the latest version of a DAG.

        :raises LookupError: there is none.
        """
        if dag_id not in self._serialized:
            version = DagVersion.get_latest_version(dag_id, session=self.session)
            dag = None if version is None else _dag_bag().get_dag(version.id, session=self.session)
            if dag is None:
                raise LookupError(f"{dag_id} is not serialized")
            self._serialized[dag_id] = dag
        return self._serialized[dag_id]

    @classmethod
    def lock(cls, session: Session, entries: Sequence[StartRun]) -> _Batch:
        begin_writing(session)
        dags = dags_of(session, {entry.trigger for entry in entries}, lock=True)
        taken = taken_of(session, [told.identity for entry in entries for told in entry.events])
        return cls(session, datetime.now(timezone.utc), dags, taken)

    def key_of(self, told: Told, new: Mapping[bytes | int, Told]) -> bytes:
        """Return under which key the row of an event is, or is to be, beside those that are new, too."""
        identity = _bytes(told.identity)
        other = new.get(identity)
        meanwhile = None if other is None else _bytes(other.content)
        return key_of(self.session, self.taken, identity, _bytes(told.content), meanwhile)


def room(session: Session, entries: Sequence[StartRoom]) -> list[Answer]:
    """Answer for how many events there is room, and keep what triggers say of their sources, for whoever looks."""
    dags = dags_of(session, {entry.trigger for entry in entries}, lock=False)
    _note(session, {entry.trigger: entry for entry in entries if dags.get(entry.trigger)})
    return [_answer(Answer(Status.DONE), dags.get(entry.trigger), entry) for entry in entries]


def _note(session: Session, said: Mapping[int, StartRoom]) -> None:
    now = datetime.now(timezone.utc)
    rows = session.scalars(select(EventStart).where(EventStart.trigger_id.in_(said)))
    known = {row.trigger_id: row for row in rows}
    for trigger, entry in sorted(said.items()):
        row, trouble = known.get(trigger), entry.trouble[:_LONGEST] or None
        if row is None:
            if entry.lag is not None or trouble is not None:
                session.add(EventStart(trigger_id=trigger, lag=entry.lag, trouble=trouble, told_at=now))
        elif (row.lag, row.trouble) != (entry.lag, trouble) or row.told_at < now - _TELL_AGAIN:
            row.lag, row.trouble, row.told_at = entry.lag, trouble, now


def start(session: Session, entries: Sequence[StartRun]) -> list[Answer]:
    """Make runs, or asset events, as far as there is room, of events that have made none and are no wait's."""
    batch = _Batch.lock(session, entries)
    answers = [_start_one(batch, entry) for entry in entries]
    write_taken(session, batch.taken, batch.now)
    return [
        _answer(said, batch.dags.get(entry.trigger), entry) for entry, said in zip(entries, answers, strict=True)
    ]


def _start_one(batch: _Batch, entry: StartRun) -> Answer:
    dags, make = batch.dags.get(entry.trigger), _MAKERS.get(entry.makes)
    if not dags:
        return _NOBODYS
    if make is None:
        return Answer(Status.INVALID, f"this API server does not make {entry.makes!r} of events")
    new: dict[bytes | int, Told] = {}  # by key, since a batch may have what has come again meanwhile
    others: set[str] = set()
    for number, told in enumerate(entry.events):
        if not told.identity:
            new[number] = told
            continue
        key = batch.key_of(told, new)
        known = batch.taken.get(key)
        if known is not None and known.record_id == entry.record_id:
            return Answer(Status.DONE)  # its answer was lost
        if known is not None and known.set_aside is None:
            others.add(known.wait)
            continue
        if key != (identity := _bytes(told.identity)):
            of = batch.taken[identity].wait if identity in batch.taken else "the same batch"
            log.warning("An id comes again, with another content than that of %s: it is a new event", of)
        new[key] = told
    if not new:
        return Answer(Status.TAKEN, ", ".join(sorted(others)))
    made = make(batch, entry, list(new.values()), dags)
    if isinstance(made, Answer):
        return made
    for named, told in new.items():
        if isinstance(named, bytes):
            known = batch.taken.get(named)
            is_new = known is None or known.is_new
            batch.taken[named] = Taken(_bytes(told.content), entry.record_id, made, is_new=is_new, changed=True)
    return Answer(Status.DONE)


def _make_runs(batch: _Batch, entry: StartRun, new: list[Told], dags: list[Dag]) -> Answer | str:
    """Make a run of each DAG, and return what they are called; or return why there are none."""
    run_id = run_id_of(entry, new)
    name = ", ".join(f"{dag.id}/{run_id}" for dag in dags)
    if _is_there(batch.session, [dag.id for dag in dags], run_id):  # of what is forgotten, or has no id
        return Answer(Status.TAKEN, name) if new[0].identity else Answer(Status.DONE)
    if (busy := _active(batch.session, dags, entry)) is not None:
        return Answer(Status.BUSY, busy)
    if not _left(dags, entry):
        return Answer(Status.FULL)
    events = [json.loads(told.event) for told in new]
    conf: dict[str, Any] = {"events": events} if entry.makes == "batch" else {"event": events[0]}
    if entry.key is not None:
        conf["key"] = entry.key

    def make() -> None:
        logical_date = _free(batch.session, dags, entry.logical_date)
        for dag in dags:
            _create_run(batch, dag.id, run_id, conf, logical_date)

    if refused := _carefully(batch.session, make):
        return refused
    for dag in dags:
        dag.active += 1
    return name


def _make_asset_events(batch: _Batch, entry: StartRun, new: list[Told], dags: list[Dag]) -> Answer | str:
    """Make an event of each of the trigger's assets, and return what they are called; or why there are none."""
    if not _left(dags, entry):
        return Answer(Status.FULL)
    watched = select(AssetModel).join(AssetWatcherModel, AssetWatcherModel.asset_id == AssetModel.id)
    watched = watched.where(AssetWatcherModel.trigger_id == entry.trigger).order_by(AssetModel.id)
    # Of an event without an id nothing else tells that it is asked again, as its answer was lost.
    of_it = json.dumps(["asset_event", entry.record_id]).encode()
    asked = None if new[0].identity else hashlib.sha256(of_it).digest()
    if asked is not None and batch.session.get(EventSent, asked) is not None:
        return Answer(Status.DONE)
    # As Airflow has them of what a trigger yields.
    extra = {"from_trigger": True, "payload": json.loads(new[0].event)}
    names: list[str] = []
    callbacks: list[Callable[[], None]] = []

    def make() -> None:
        for asset in batch.session.scalars(watched).all():
            asset_manager.register_asset_change(
                asset=asset.to_serialized(), extra=extra, session=batch.session, callback_sink=callbacks
            )
            names.append(f"asset {asset.name}")
        if asked is not None:
            expires = batch.now + _ASKED_AGAIN
            batch.session.add(EventSent(identity=asked, content=asked, receipt="null", expires=expires))
        batch.session.flush()

    if refused := _carefully(batch.session, make):
        return refused
    for callback in callbacks:
        once_committed(batch.session, callback)
    return ", ".join(names)


_MAKERS: Mapping[str, Callable[[_Batch, StartRun, list[Told], list[Dag]], Answer | str]] = {
    "run": _make_runs,
    "batch": _make_runs,
    "asset_event": _make_asset_events,
}


def run_id_of(entry: StartRun, events: Sequence[Told]) -> str:
    """
    Return the id of the run that events start; it is frozen.

    It follows from their identities and contents, or, of an event that has none, from its recording; before that
    it has a digest of the event's key, if it has one.
    """
    named = [entry.makes, *([told.identity, told.content] for told in events)]
    if not all(told.identity for told in events):
        named = ["record", entry.record_id]
    return f"{_prefix(entry)}{hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]}"


def _prefix(entry: StartRun) -> str:
    """Return how the ids of runs with the same key begin."""
    if entry.key is None:
        return RUN_ID_PREFIX
    return f"{RUN_ID_PREFIX}{hashlib.sha256(entry.key.encode()).hexdigest()[:16]}_"


def _active(session: Session, dags: list[Dag], entry: StartRun) -> str | None:
    """Say which run of the event's key is queued or running; None if none is, or it has no key."""
    if entry.key is None:
        return None
    query = select(DagRun.dag_id, DagRun.run_id).where(
        DagRun.dag_id.in_([dag.id for dag in dags]),
        DagRun.state.in_((DagRunState.QUEUED, DagRunState.RUNNING)),
        DagRun.run_id.startswith(_prefix(entry), autoescape=True),
    )
    found = session.execute(query.limit(1)).first()
    return None if found is None else f"{found.dag_id}/{found.run_id} is active"


def _free(session: Session, dags: list[Dag], wanted: str | None) -> datetime | None:
    """Return the first microsecond, from the one that is wanted on, that is the logical date of no run yet."""
    if wanted is None:
        return None
    moment = datetime.fromisoformat(wanted)
    query = select(DagRun.logical_date).where(
        DagRun.dag_id.in_([dag.id for dag in dags]),
        DagRun.logical_date.between(moment, moment + timedelta(seconds=1)),
    )
    taken = set(session.scalars(query))
    while moment in taken:
        moment += timedelta(microseconds=1)
    return moment


def _carefully(session: Session, make: Callable[[], None]) -> Answer | None:
    """
    Make what is to be made of an event, or nothing; return an answer that says why it cannot be made.

    :raises DBAPIError: the transaction is to be done again.
    """
    transaction = session.get_transaction()
    refused = None
    try:
        with session.begin_nested():
            make()
    except DBAPIError:
        raise
    # The DAG has a param whose name is event, which this one does not fit; or had not begun at its logical date.
    except (ParamValidationError, _NoTasks) as error:
        refused = Answer(Status.REJECTED, str(error))
    except Exception as error:
        log.warning("Nothing could be made of an event", exc_info=True)
        refused = Answer(Status.INVALID, f"{type(error).__name__}: {error}")
    if session.get_transaction() is not transaction:
        # Airflow rolls back where it cannot make task instances, and with them all that was done before.
        raise RuntimeError("Airflow has given up the transaction in which it was to make something of an event")
    return refused


class _NoTasks(ValueError):
    """Airflow would make a run without a task, which succeeds."""


def _check_date(dag: SerializedDAG, moment: datetime) -> None:
    """
    Check that a run of this logical date has tasks: Airflow makes those that it lies in the start and end date of.

    :raises _NoTasks: it has none.
    """
    spans = [(task.start_date, task.end_date) for task in dag.tasks]
    if spans and not any((not start or start <= moment) and (not end or moment <= end) for start, end in spans):
        raise _NoTasks(
            f"the logical date {moment.isoformat()} is before start_date, or after end_date, of {dag.dag_id}"
        )


def _create_run(
    batch: _Batch, dag_id: str, run_id: str, conf: dict[str, Any], logical_date: datetime | None
) -> None:
    dag = batch.serialized(dag_id)
    if logical_date is not None:
        _check_date(dag, logical_date)
    dag.create_dagrun(
        run_id=run_id,
        logical_date=logical_date,
        data_interval=None if logical_date is None else (logical_date, logical_date),
        run_after=batch.now,
        conf=conf,
        run_type=DagRunType.ASSET_TRIGGERED,
        triggered_by=DagRunTriggeredByType.ASSET,
        state=DagRunState.QUEUED,
        session=batch.session,
    )


@functools.cache
def _dag_bag() -> DBDagBag:
    return DBDagBag(load_op_links=False)


def dags_of(session: Session, triggers: Collection[int], *, lock: bool) -> _Dags:
    """
    Return the DAGs that triggers start, without those that are gone.

    :param lock: lock them, in the order of their ids, so that nobody is paused, and no run made for another event,
        until the end of the transaction.
    """
    query = (
        select(
            AssetWatcherModel.trigger_id,
            DagModel.dag_id,
            DagModel.is_paused,
            DagModel.has_import_errors,
            DagModel.max_active_runs,
        )
        .join(DagScheduleAssetReference, DagScheduleAssetReference.asset_id == AssetWatcherModel.asset_id)
        .join(DagModel, DagModel.dag_id == DagScheduleAssetReference.dag_id)
        .where(AssetWatcherModel.trigger_id.in_(sorted(triggers)), DagModel.is_stale.is_(False))
        .order_by(DagModel.dag_id)
    )
    rows = session.execute(with_row_locks(query, session, of=DagModel, key_share=False) if lock else query).all()
    dags = {row.dag_id: Dag.of(row) for row in rows}
    if dags:
        active = DagRun.active_runs_of_dags(dag_ids=dags, exclude_backfill=True, session=session)
        for dag_id, number in active.items():
            dags[dag_id].active = number
    found: _Dags = {}
    for row in rows:
        some = found.setdefault(row.trigger_id, [])
        if dags[row.dag_id] not in some:  # it may be scheduled by two assets of one trigger
            some.append(dags[row.dag_id])
    return found


def _is_there(session: Session, dag_ids: Collection[str], run_id: str) -> bool:
    """Whether one of the DAGs has a run of this id."""
    query = select(DagRun.id).where(DagRun.dag_id.in_(sorted(dag_ids)), DagRun.run_id == run_id)
    return session.scalar(query.limit(1)) is not None


def _bytes(digest: str | None) -> bytes:
    return bytes.fromhex(digest or "")


def _left(dags: list[Dag], entry: StartRoom | StartRun) -> int:
    """Return for how many events there is room."""
    if entry.makes != "asset_event":
        return min(dag.left(entry.up_to) for dag in dags)
    # Airflow keeps asset events for the DAGs that take them, however many there are.
    return _MOST_ASSET_EVENTS if any(dag.takes for dag in dags) else 0


def _answer(said: Answer, dags: list[Dag] | None, entry: StartRoom | StartRun) -> Answer:
    """Return an answer with how much room is left, and why there is none."""
    if not dags:
        return _NOBODYS
    left = _left(dags, entry)
    message = said.message
    if not left and not message:
        message = ", ".join(dag.why_full() for dag in dags if not dag.takes or not dag.left(entry.up_to))
    return Answer(said.status, message, room=left, dags=tuple(dag.id for dag in dags))
