"""
Events that are sent to a key, and find the waits that have it, now or later.

A wait tells the address of its key when it begins, and an event for which nobody waits is kept under the same
address; both stand in the inbox. Who sends gives the event to a wait that is there, after those that were kept
before it, or keeps it, in one transaction. The API servers match what is kept every now and then, for waits that
begin later. Whoever gives an event has the lock of the wait that gets it, so nobody else gives it another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, Literal, NamedTuple

from airflow.models.taskinstance import TaskInstance
from airflow.utils.sqlalchemy import with_row_locks
from airflow.utils.state import TaskInstanceState
from airflow_events import metrics, settings
from airflow_events.api import sending, variables
from airflow_events.api.refusals import NoSuchWait, Refusal, TooMany, Unfit, Unreadable
from airflow_events.api.senders import Reaches, Sender
from airflow_events.api.wait_rows import WaitRow, name_of, now, until
from airflow_events.inbox.database import begin_writing, once_committed
from airflow_events.inbox.models import SINGLE, EventKept, EventSent, EventWait
from airflow_events.listeners.base import Wait
from airflow_events.listeners.http import HttpListener, address_of, check_key
from airflow_events.listeners.support import serde
from sqlalchemy import delete, exists, func, select
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement

log = logging.getLogger(__name__)

To = Literal["one", "all"]

# How many kept events a sender gives to waits before its own, at most; the others are for the API servers.
_FIRST = 10
# How many kept events are read at once: each may be as long as a body.
_AT_ONCE = 50


@dataclass(frozen=True)
class KeyReceipt:
    """
    What a sender is told.

    :param status: ``delivered`` to ``waits``, or ``kept`` for those that begin.
    :param waits: `airflow_events.listeners.base.Wait.id` of each wait that has the event now.
    """

    status: sending.Status
    event_id: str
    key: str
    waits: list[str]


class SentBefore(Unfit):
    """
    An idempotency key was used with another payload before, whose receipt this has.

    :param idempotency_key: None if the sender chose none.
    """

    def __init__(self, idempotency_key: str | None, receipt: KeyReceipt) -> None:
        super().__init__(f"the idempotency key {idempotency_key!r} was used with another payload before")
        self.receipt = receipt


def send(
    session: Session,
    key: str,
    payload: Any,
    *,
    by: str,
    dags: Collection[str] | None,
    sender: Sender | None = None,
    to: To = "one",
    event_id: str | None = None,
    idempotency_key: str | None = None,
    identity: bytes | None = None,
    ttl: timedelta | None = None,
    remembered: timedelta | None = None,
) -> KeyReceipt:
    """
    Give an event to the waits with a key.

    It takes as long as there are waits that can take it, however many events are kept.

    :param dags: to whose waits it may go; None for all, also those that do not exist yet.
    :param sender: who is asked, should the event be kept, whether it may still go to a wait; None: what ``dags``
        says counts as long as it is kept.
    :param to: ``one``: the wait that has waited longest, or the first that begins; ``all``: those that wait
        now, and those that begin within ``ttl``.
    :param idempotency_key: of the sender, as far as it may reach; the same again gets the first receipt again.
    :param identity: a digest in the place of ``idempotency_key``.
    :param ttl: for how long the event is kept; None is ``[events] http_keep`` for one wait, and not at all
        for all.
    :param remembered: for how long at least the same idempotency key gets the first receipt; None: as long as the
        event is kept.
    :raises SentBefore: the idempotency key was used with another payload.
    :raises Refusal: nothing was changed.
    """
    try:
        address = bytes.fromhex(address_of(check_key(key)))
    except ValueError as error:
        raise Unfit(str(error)) from error
    sending.check_payload(payload)
    begin_writing(session)
    arrived, keep = time.time(), ttl or timedelta(seconds=settings.http_keep())
    reach = None if dags is None else sorted(dags)
    sent = None
    identities = [] if identity is None else [identity]
    if idempotency_key is not None:
        # The first edition knew neither who had sent it nor to whom it might go.
        earlier = variables.identity_of(key, idempotency_key)
        identities = [_identity(by, reach, key, idempotency_key), earlier]
    if identities:
        content = bytes.fromhex(sending.digest_of(payload))
        if (before := _sent_before(session, identities)) is not None:
            receipt = KeyReceipt(**json.loads(before.receipt))
            if before.content != content:
                raise SentBefore(idempotency_key, receipt)
            return receipt
        # Another request with the same key waits here until this one is committed, and then finds it.
        expires = until(max(keep, remembered or keep))
        sent = EventSent(identity=identities[0], content=content, receipt="null", expires=expires)
        session.add(sent)
        session.flush()

    kept = EventKept(
        address=address,
        key=key,
        event=serde.encode(payload),
        event_id=event_id or uuid.uuid4().hex,
        to=to,
        sent_by=name_of(by),
        dags=None if reach is None else json.dumps(reach),
        reached="[]",
        kept_at=now(),
        expires=until(keep),
    )
    for_later = to == "all" and ttl is not None
    if for_later:
        _check_room(session, kept)
    free, busy = _free(session, address), set[str]()
    if free and to == "one":  # whoever came first
        _match(session, address, free, busy, most=_FIRST)
    given = _offer(session, kept, free, busy, skip_locked=to == "one", arrived=arrived)
    if not given.reached:
        if given.refusal is not None and not for_later and (given.is_sure or to == "all"):
            raise given.refusal
        if to == "all" and not for_later:
            raise NoSuchWait(f"no wait has the key {key!r} now, and without a ttl an event for all is not kept")
        if to == "one":
            if not keep:
                raise NoSuchWait(
                    f"no wait has the key {key!r} now, and with [events] http_keep = 0 nothing is kept"
                )
            _check_room(session, kept)
            for_later = True
    if for_later:
        kept.reached = json.dumps(given.reached)
        kept.sender = None if sender is None else sender.encrypted()
        session.add(kept)
    receipt = KeyReceipt("delivered" if given.reached else "kept", kept.event_id, key, given.reached)
    if sent is not None:
        sent.receipt = json.dumps(asdict(receipt))
    if receipt.status == "kept":
        once_committed(session, lambda: metrics.count(metrics.KEPT, listener=HttpListener.__qualname__))
    session.flush()
    return receipt


def wanted(session: Session) -> list[str]:
    """Return the keys of kept events for which waits have begun."""
    waited_for = exists().where(*can_take(EventWait.address == EventKept.address))
    found = session.execute(
        select(EventKept.address, func.max(EventKept.key))
        .where(EventKept.expires > now(), waited_for)
        .group_by(EventKept.address)
    ).all()
    _refused.forget_others({address for address, _ in found})
    return [key for _, key in found]


def match(session: Session, key: str) -> dict[str, list[str]]:
    """
    Give the kept events of a key to the waits that have begun since; return which waits each event reached.

    Any number of API servers may do it at once.
    """
    begin_writing(session)
    address = bytes.fromhex(address_of(key))
    return _match(session, address, _free(session, address), set())


class Begun(NamedTuple):
    """A wait that can take an event, and which beginning of which try of it."""

    wait: Wait
    ti: uuid.UUID
    generation: int


@dataclass
class _Given:
    """
    What became of an event that was offered to waits.

    :param reached: the ids of those that took it.
    :param refusal: why the last that did not want it did not.
    :param is_sure: whether those that did not take it never will.
    """

    reached: list[str] = field(default_factory=list)
    refusal: Refusal | None = None
    is_sure: bool = True


class _Refused:
    """
    Which kept events were refused by all the waits that could take one, as far as this process has seen.

    Without it, each pass would read and check again whatever is kept and fits no wait. It forgets all after some
    minutes: a DAG may have another schema by then.
    """

    _LONGEST = 300.0  # seconds

    def __init__(self) -> None:
        self._by_address: dict[bytes, tuple[frozenset[Begun], frozenset[str]]] = {}
        self._since = time.monotonic()

    def by(self, address: bytes) -> tuple[frozenset[Begun], frozenset[str]]:
        """Return which waits have refused which events, by their ``event_id``."""
        if time.monotonic() - self._since > self._LONGEST:
            self._by_address, self._since = {}, time.monotonic()
        return self._by_address.get(address, (frozenset(), frozenset()))

    def note(self, address: bytes, waits: Iterable[Begun], events: Iterable[str]) -> None:
        """Note that all of these waits have refused all of these events."""
        self._by_address[address] = frozenset(waits), frozenset(events)

    def forget_others(self, addresses: Collection[bytes]) -> None:
        """Forget what is of no use any more."""
        self._by_address = {key: value for key, value in self._by_address.items() if key in addresses}


_refused = _Refused()
reaches = Reaches()


def _match(
    session: Session, address: bytes, free: list[Begun], busy: set[str], *, most: int | None = None
) -> dict[str, list[str]]:
    """
    Give kept events of an address to its waits, the oldest first; return which waits each event reached.

    An event that another transaction gives just now is waited for: a later one would else go before it, should it
    be kept after all. No two wait for each other, since none waits for a wait's lock here, and all lock the events
    in the order of their ids.

    :param free: the waits; those that have got one are taken out.
    :param busy: as for `_offer`.
    :param most: how many events to look at; None for all.
    """
    kept_now = session.execute(
        select(EventKept.id, EventKept.event_id)
        .where(EventKept.address == address, EventKept.expires > now())
        .order_by(EventKept.id)
        .limit(most)
    ).all()
    had, refused = _refused.by(address)
    others = [wait for wait in free if wait not in had]
    # What all of them have refused is not for this pass.
    todo = [id for id, event_id in kept_now if others or event_id not in refused]
    refused_now = set() if others else {event_id for _, event_id in kept_now} & refused
    reached: dict[str, list[str]] = {}
    for start in range(0, len(todo), _AT_ONCE):
        if not free:
            break
        query = select(EventKept).where(EventKept.id.in_(todo[start : start + _AT_ONCE])).order_by(EventKept.id)
        for kept in session.scalars(with_row_locks(query, session, key_share=False)).all():
            given = _offer(session, kept, others if kept.event_id in refused else free, busy)
            if given.reached:
                reached[kept.event_id] = given.reached
                free[:] = [begun for begun in free if begun.wait.id not in given.reached]
                others = [begun for begun in others if begun.wait.id not in given.reached]
                if kept.to == "one":
                    session.delete(kept)
                    continue
                kept.reached = json.dumps([*json.loads(kept.reached), *given.reached])
            if given.is_sure:
                refused_now.add(kept.event_id)
    session.flush()
    if most is None:
        _refused.note(address, free, refused_now)
    return reached


def _offer(
    session: Session,
    kept: EventKept,
    waits: Iterable[Begun],
    busy: set[str],
    *,
    skip_locked: bool = True,
    arrived: float | None = None,
) -> _Given:
    """
    Give an event to those of ``waits`` that it may go to, or to the first of them that takes it.

    :param busy: the ids of waits that can be given nothing in this transaction, to which those are added that this
        event finds so. A later event finds them so as well, though they may be free by then: what they could have
        got is kept, and goes to them before it.
    :param skip_locked: pass over those that somebody else has locked, who is giving them an event. An event for
        all that wait now must wait for them instead, and takes them in the order in which the inbox locks them, so
        that no two wait for each other.
    :param arrived: when the event came, in seconds since the epoch; None if it was kept until now.
    """
    given = _Given()
    dags, had = None if kept.dags is None else set(json.loads(kept.dags)), set(json.loads(kept.reached))
    event = serde.decode(kept.event)
    if not skip_locked:
        waits = sorted(waits, key=lambda begun: begun.ti)
    for wait, _, generation in waits:
        if wait.id in had or (dags is not None and wait.dag_id not in dags):
            continue
        if arrived is None and not (may := reaches.has(kept.sender, wait.dag_id)):
            if may is None:  # whoever matches asks, and comes again
                busy.add(wait.id)
                given.is_sure = False
            else:
                said = "The kept event %s of %s is not given to %s: to that its sender may not send now"
                log.info(said, kept.event_id, kept.sent_by, wait.id)
            continue
        if wait.id in busy:
            given.is_sure = False
            continue
        try:
            with session.begin_nested():  # so that a wait that refuses is left as it was
                row = WaitRow.lock_if_free(session, wait) if skip_locked else WaitRow.lock(session, wait)
                if row is None or not can_still_take(row, kept.address, generation):
                    busy.add(wait.id)
                    given.is_sure = False
                    continue
                sending.give(row, event, by=kept.sent_by, event_id=kept.event_id, arrived=arrived)
        except NoSuchWait:
            given.is_sure = False
            continue
        except Unreadable:
            log.warning("%s cannot be given events", wait.id, exc_info=True)
            given.is_sure = False
            continue
        except Refusal as refusal:
            given.refusal = refusal
            given.is_sure = given.is_sure and isinstance(refusal, Unfit)
            continue
        given.reached.append(wait.id)
        if kept.to == "one":
            break
    return given


def _free(session: Session, address: bytes) -> list[Begun]:
    """Find the waits with an address that have begun and have no event, in the order in which they began."""
    ti = TaskInstance
    found = session.execute(
        select(ti.dag_id, ti.run_id, ti.task_id, ti.map_index, ti.id, EventWait.generation)
        .where(*can_take(EventWait.address == address))
        .order_by(EventWait.since, ti.id)
    )
    return [Begun(Wait(*row[:4]), row.id, row.generation) for row in found]


def can_take(which: ColumnElement[bool]) -> list[ColumnElement[bool]]:
    """Whether a wait with its task instance can take an event: with the address of this try, and with no other."""
    ti = TaskInstance
    return [
        which,
        EventWait.place == SINGLE,
        EventWait.phase.is_(None),
        EventWait.dag_id == ti.dag_id,
        EventWait.task_id == ti.task_id,
        EventWait.run_id == ti.run_id,
        EventWait.map_index == ti.map_index,
        EventWait.clears == ti.max_tries,
        ti.state == TaskInstanceState.DEFERRED,
    ]


def can_still_take(row: WaitRow, address: bytes, generation: int) -> bool:
    """Whether a wait that is locked can still take an event: with this address, and since this beginning."""
    is_same = row.row is not None and row.address == address and row.row.generation == generation
    return is_same and row.waiting and row.record() is None


def _identity(by: str, dags: list[str] | None, key: str, idempotency_key: str) -> bytes:
    """
    Return by what a sender's repeated event is recognised.

    The sender is part of it, and what it may reach, so that nobody reads another's receipt, nor swallows another's
    event. Rows hold it: the form is frozen.
    """
    return hashlib.sha256(json.dumps([by, dags, key, idempotency_key]).encode()).digest()


def _sent_before(session: Session, identities: Collection[bytes]) -> EventSent | None:
    query = select(EventSent).where(EventSent.identity.in_(identities)).order_by(EventSent.identity)
    found = None
    for row in session.scalars(with_row_locks(query, session, key_share=False)).all():
        if row.expires > now():
            found = row
        else:
            session.delete(row)
    session.flush()
    return found


class _Total:
    """How many events are kept in all: counted every some seconds, since that takes as long as they are many."""

    _LONGEST, _SHORTEST = 10.0, 1.0  # seconds

    def __init__(self) -> None:
        self._number = 0
        self._counted = float("-inf")

    def reaches(self, session: Session, most: int) -> bool:
        """Whether so many are kept, or will be with one more that is about to be."""
        age = time.monotonic() - self._counted
        if age > (self._SHORTEST if self._number >= most else self._LONGEST):
            number = session.scalar(select(func.count()).select_from(EventKept).where(EventKept.expires > now()))
            self._number, self._counted = number or 0, time.monotonic()
        if self._number >= most:
            return True
        self._number += 1
        return False


_total = _Total()


def _check_room(session: Session, kept: EventKept) -> None:
    """
    Check that one more event may be kept.

    :raises TooMany: it may not.
    """
    for option, most, which in (
        ("key", settings.http_most_kept_for_key(), EventKept.address == kept.address),
        ("sender", settings.http_most_kept_for_sender(), EventKept.sent_by == kept.sent_by),
    ):
        if _are(session, most, which):
            over = delete(EventKept).where(which, EventKept.expires <= now())
            session.execute(over.execution_options(synchronize_session=False))
            if _are(session, most, which):
                said = f"{most} events are kept for this {option}, and no more"
                raise TooMany(f"{said} ([events] http_most_kept_for_{option})")
    if _total.reaches(session, in_all := settings.http_most_kept()):
        raise TooMany(f"{in_all} events are kept for all keys, and no more ([events] http_most_kept)")


def _are(session: Session, many: int, which: ColumnElement[bool]) -> bool:
    """Whether there are so many kept events, without a look at more."""
    some = select(EventKept.id).where(which).limit(many).subquery()
    return (session.scalar(select(func.count()).select_from(some)) or 0) >= many
