"""
Events that are sent to a key, and find the waits that have it, now or later.

A wait tells its key, when it begins, by an XCom that is named after it, so those of a key are found by one
look-up. An event for which nobody waits is kept as an Airflow Variable, which is encrypted, and is in the
database that decides. Who sends keeps the event first and then matches, in one transaction; the API servers
match again every now and then, for waits that begin later. So there is one way by which an event reaches a
wait, whoever comes first.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from airflow.models.taskinstance import TaskInstance
from airflow.models.variable import Variable
from airflow.models.xcom import XComModel
from airflow.utils.sqlalchemy import with_row_locks
from airflow.utils.state import TaskInstanceState
from airflow_events import metrics, settings
from airflow_events.api import inbox
from airflow_events.api.refusals import NoSuchWait, Refusal, Unfit
from airflow_events.api.wait_rows import WaitRow, now
from airflow_events.listeners import serde
from airflow_events.listeners.base import Wait
from airflow_events.listeners.http import HttpListener, check_key, key_entry
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

log = logging.getLogger(__name__)

To = Literal["one", "all"]

# The names of the Variables. Those of kept events sort by the moment at which they came.
_KEPT = "airflow_events.kept."
_SENT = "airflow_events.sent."


@dataclass(frozen=True)
class KeyReceipt:
    """
    What a sender is told.

    :param status: ``delivered`` to ``waits``, or ``kept`` for those that begin.
    :param waits: `airflow_events.listeners.base.Wait.id` of each wait that has the event now.
    """

    status: inbox.Status
    event_id: str
    key: str
    waits: list[str]


@dataclass
class _Kept:
    """
    An event that is kept.

    :param dags: to which the sender may send; None for all.
    :param got: which waits a broadcast has reached, by their ids.
    """

    key: str
    event: str
    event_id: str
    to: To
    until: str
    by: str
    dags: list[str] | None
    got: list[str] = field(default_factory=list)


def send(
    session: Session,
    key: str,
    payload: Any,
    *,
    by: str,
    dags: Collection[str] | None,
    to: To = "one",
    event_id: str | None = None,
    idempotency_key: str | None = None,
    ttl: timedelta | None = None,
) -> KeyReceipt:
    """
    Give an event to the waits with a key.

    :param dags: to whose waits it may go; None for all, also those that do not exist yet.
    :param to: ``one``: the wait that has waited longest, or the first that begins; ``all``: those that wait
        now, and those that begin within ``ttl``.
    :param ttl: for how long the event is kept; None is ``[events] http_keep`` for one wait, and not at all
        for all.
    :raises Refusal: nothing was changed.
    """
    try:
        check_key(key)
    except ValueError as error:
        raise Unfit(str(error)) from error
    inbox.check_payload(payload)
    _drop_expired(session, _KEPT + _digest(key))
    sent = None if idempotency_key is None else _SENT + _digest(f"{key}\n{idempotency_key}")
    if sent is not None and (before := _sent_before(session, sent)) is not None:
        if before["digest"] != inbox.digest_of(payload):
            raise Unfit(f"the idempotency key {idempotency_key!r} was used with another payload before")
        return KeyReceipt(**before["receipt"])

    arrived = time.time()
    event_id = event_id or uuid.uuid4().hex
    keep = ttl or timedelta(seconds=settings.http_keep())
    kept = _Kept(
        key,
        serde.encode(payload),
        event_id,
        to,
        _text(now() + (keep if to == "one" or ttl else timedelta())),
        by,
        None if dags is None else sorted(dags),
    )
    _keep(session, kept)
    only_now = None if to == "one" or ttl else event_id
    reached, refused = _match(session, key, only_now=only_now, arrived={event_id: arrived})
    waits = reached.get(event_id, [])
    if not waits and (reason := refused.get(event_id)) is not None:
        raise reason
    if not waits and to == "all" and ttl is None:
        raise NoSuchWait(f"no wait has the key {key!r} now, and without a ttl an event for all is not kept")
    receipt = KeyReceipt("delivered" if waits else "kept", event_id, key, waits)
    if sent is not None:
        about = {"digest": inbox.digest_of(payload), "receipt": asdict(receipt)}
        _put(session, sent, about, until=_text(now() + keep))
    if receipt.status == "kept":
        metrics.once_committed(session, lambda: metrics.count(metrics.KEPT, listener=HttpListener.__qualname__))
    return receipt


def wanted(session: Session) -> list[str]:
    """Return the keys of kept events for which waits have begun."""
    return _waited_for(session, _kept_keys(session))


def match(session: Session, key: str) -> dict[str, list[str]]:
    """
    Give the kept events of a key to the waits that have begun since; return which waits each event reached.

    Any number of API servers may do it at once.
    """
    _drop_expired(session, _KEPT)
    return _match(session, key)[0]


def tidy(session: Session) -> None:
    """Drop the events that have lapsed, and what was noted for idempotency keys for long enough."""
    _drop_expired(session, _KEPT)
    _drop_expired(session, _SENT)


def _match(
    session: Session,
    key: str,
    *,
    only_now: str | None = None,
    arrived: Mapping[str, float] | None = None,
) -> tuple[dict[str, list[str]], dict[str, Refusal]]:
    """
    Give the kept events of a key to its waits, the oldest first.

    :param only_now: the event that is not kept any longer than this.
    :param arrived: when the event came that is sent just now, in seconds since the epoch.
    :return: by event: the waits that it reached, and why the last that did not want it did not.
    """
    reached: dict[str, list[str]] = {}
    refused: dict[str, Refusal] = {}
    rows = session.scalars(
        with_row_locks(
            select(Variable)
            .where(Variable.key.startswith(_KEPT + _digest(key), autoescape=True))
            .order_by(Variable.key),
            session,
            skip_locked=True,
            key_share=False,
        )
    ).all()
    for row in rows:
        if (kept := _read(row)) is None:
            continue
        event = serde.decode(kept.event)
        for wait in _waits(session, kept, lock=kept.to == "one"):
            waiting = _still_waiting(session, wait, key)
            if waiting is None:
                continue
            try:
                with session.begin_nested():  # so that a wait that refuses is left as it was
                    came = (arrived or {}).get(kept.event_id)
                    inbox.give(waiting, event, by=kept.by, event_id=kept.event_id, arrived=came)
            except Refusal as refusal:
                refused[kept.event_id] = refusal
                continue
            kept.got.append(wait.id)
            reached.setdefault(kept.event_id, []).append(wait.id)
            if kept.to == "one":
                break
        if kept.event_id == only_now or (kept.to == "one" and kept.got):
            session.delete(row)
        elif kept.event_id in reached:
            row.set_val(json.dumps(asdict(kept)))
        session.flush()
    return reached, refused


def _waits(session: Session, kept: _Kept, *, lock: bool) -> Iterator[Wait]:
    """
    Find the waits with a key that an event may go to, in the order in which they began.

    :param lock: pass over those that somebody else has locked, who is giving them an event. An event for all
        must wait for them instead, and takes them in an order in which no two senders wait for each other.
    """
    ti = TaskInstance
    query = (
        select(ti.dag_id, ti.run_id, ti.task_id, ti.map_index)
        .join(
            XComModel,
            (XComModel.dag_id == ti.dag_id)
            & (XComModel.run_id == ti.run_id)
            & (XComModel.task_id == ti.task_id)
            & (XComModel.map_index == ti.map_index),
        )
        .where(XComModel.key == key_entry(kept.key), ti.state == TaskInstanceState.DEFERRED)
    )
    if kept.dags is not None:
        query = query.where(ti.dag_id.in_(kept.dags))
    if not lock:
        query = query.order_by(ti.dag_id, ti.run_id, ti.task_id, ti.map_index)
        for found in session.execute(query).all():
            if (wait := Wait(*found)).id not in kept.got:
                yield wait
        return
    query = query.order_by(XComModel.timestamp, ti.id)
    for passed in itertools.count():
        one = with_row_locks(query.offset(passed).limit(1), session, of=ti, skip_locked=True, key_share=False)
        if (next_one := session.execute(one).one_or_none()) is None:
            return
        yield Wait(*next_one)


def _still_waiting(session: Session, wait: Wait, key: str) -> WaitRow | None:
    """Lock a wait and return it if it waits for this key; an XCom of an earlier try may name another."""
    try:
        row = WaitRow.lock(session, wait)
    except NoSuchWait:
        return None
    if not row.waiting or row.key != key:
        return None
    if (stored := row.record()) is not None:
        inbox.end_lapsed(row, stored)
        return None
    return row


def _waited_for(session: Session, keys: Iterable[str]) -> list[str]:
    """Return those of ``keys`` that waits may have."""
    names = {key_entry(key): key for key in keys}
    found: list[str] = []
    ordered = sorted(names)
    for start in range(0, len(ordered), 500):
        part = ordered[start : start + 500]
        entries = session.scalars(
            select(XComModel.key)
            .distinct()
            .join(
                TaskInstance,
                (XComModel.dag_id == TaskInstance.dag_id)
                & (XComModel.run_id == TaskInstance.run_id)
                & (XComModel.task_id == TaskInstance.task_id)
                & (XComModel.map_index == TaskInstance.map_index),
            )
            .where(XComModel.key.in_(part), TaskInstance.state == TaskInstanceState.DEFERRED)
        )
        found += [names[entry] for entry in entries]
    return found


def _kept_keys(session: Session) -> set[str]:
    names = session.scalars(select(Variable.key).where(Variable.key.startswith(_KEPT, autoescape=True)))
    by_digest = {name.split(".")[2]: name for name in names}
    for gone in _keys.keys() - by_digest.keys():
        _keys.pop(gone, None)
    for digest, name in by_digest.items():
        if digest not in _keys:
            row = session.scalar(select(Variable).where(Variable.key == name))
            if row is not None:
                kept = _read(row)
                _keys[digest] = None if kept is None else kept.key
    return {key for digest in by_digest if (key := _keys.get(digest)) is not None}


# The key of each digest, so that not all kept events need to be decrypted again and again. None: nobody can tell.
_keys: dict[str, str | None] = {}


def _read(row: Variable) -> _Kept | None:
    """Return what a Variable holds; None if that is no event, which must not hold up the others."""
    try:
        return _Kept(**json.loads(row.get_val()))
    except (TypeError, ValueError):
        log.exception(
            "The Variable %s cannot be read, and nobody gets the event that was kept in it: it was encrypted with "
            "another Fernet key, changed by hand, or written by another version of this provider",
            row.key,
        )
        return None


def _keep(session: Session, kept: _Kept) -> None:
    name = f"{_KEPT}{_digest(kept.key)}.{time.time_ns():020d}.{kept.event_id}"
    _put(session, name, asdict(kept), until=kept.until)


def _put(session: Session, name: str, value: Any, *, until: str) -> None:
    session.add(Variable(key=name, val=json.dumps(value), description=until))
    session.flush()


def _sent_before(session: Session, name: str) -> dict[str, Any] | None:
    row = session.scalar(select(Variable).where(Variable.key == name))
    if row is None:
        return None
    if row.description < _text(now()):
        session.delete(row)
        session.flush()
        return None
    return dict(json.loads(row.get_val()))


def _drop_expired(session: Session, prefix: str) -> None:
    """Drop what has lapsed: a write, with which the transaction begins, as SQLite needs it."""
    session.execute(
        delete(Variable)
        .where(Variable.key.startswith(prefix, autoescape=True), Variable.description < _text(now()))
        .execution_options(synchronize_session=False)
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _text(moment: datetime) -> str:
    """Write a moment such that the order of texts is that of moments; Airflow's page shows it."""
    return f"until {moment.isoformat(timespec='microseconds')}"
