"""
The transactions of the inbox, each for a batch.

One order, in all of them: the task instances are locked, by their ids; then the waits are read, and each entry is
held against what is there; then all that changes is written in a few statements; then tasks end. Whoever asks
twice, because an answer was lost, is answered the second time as the first.

What keeps an event from being lost or delivered twice are three things, all of them in here:

- the **fence**: an entry counts only if its try of the task is still deferred and its generation is the wait's;
- the **record**: a wait has one event at most, and keeps the first;
- the **unique key** of ``event_taken``: an event of a source, by its identity, is one wait's at most.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

from airflow.models.crypto import get_fernet
from airflow.models.renderedtifields import RenderedTaskInstanceFields
from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XComModel
from airflow.utils.state import TaskInstanceState
from airflow_events.inbox import hosts, legacy, sought, starts, tasks
from airflow_events.inbox.alarm import alarm
from airflow_events.inbox.database import begin_writing, in_transaction, once_committed
from airflow_events.inbox.entries import (
    Answer,
    Begin,
    End,
    Entry,
    Finish,
    Hosted,
    Join,
    Look,
    Lose,
    Park,
    Phase,
    Place,
    Places,
    Positions,
    Record,
    SetAside,
    Settle,
    StartRoom,
    StartRun,
    Status,
    Stored,
)
from airflow_events.inbox.models import (
    DIGEST_LENGTH,
    LATEST,
    SINGLE,
    EventPosition,
    EventTaken,
    EventWait,
    columns,
)
from airflow_events.inbox.taken import Taken, key_of, second_key, taken_of, write_taken
from airflow_events.inbox.tasks import Task
from airflow_events.listeners.support.positions import digest, united
from sqlalchemy import and_, bindparam, case, delete, func, insert, or_, select, tuple_, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement

log = logging.getLogger(__name__)

_E = TypeVar("_E", bound=Entry)

LARGEST_BATCH = 300
"""How many entries one transaction has at most."""

# How many places one page has at most, and how many characters all pages of a transaction; one place is on each.
_MOST_PLACES = 1000
_LARGEST_PAGES = 2_000_000
# Characters of a place beside its event.
_BESIDE = 300

# By how many seconds Airflow's own timeout of a deferral may be off before it is put right.
_ROUGHLY = 30.0
_KEY = (EventWait.dag_id, EventWait.task_id, EventWait.run_id, EventWait.map_index)


def carry_out(entries: Sequence[Entry]) -> list[Answer]:
    """
    Carry out entries of all kinds, each for itself, and answer in their order.

    :raises sqlalchemy.exc.DBAPIError: the database is unreachable, or refuses: some entries may have been carried
        out, and all of them can be asked again.
    """
    answers: dict[int, Answer] = {}
    for kind, work in _WORK:
        numbers = [number for number, entry in enumerate(entries) if type(entry) is kind]
        alone = [number for number in numbers if _has_outlets(entries[number])]
        others = [number for number in numbers if number not in set(alone)]
        for start in range(0, len(others), LARGEST_BATCH):
            some = others[start : start + LARGEST_BATCH]
            answers.update(zip(some, _together([entries[number] for number in some], work), strict=True))
        # An outlet that Airflow cannot register must harm its own task alone, and assets are locked in one order.
        for number in sorted(alone, key=lambda number: _assets(entries[number])):
            answers[number] = _alone(entries[number], work)
    return [answers[number] for number in range(len(entries))]


def _together(entries: Sequence[Any], work: Callable[[Session, Any], list[Answer]]) -> list[Answer]:
    return in_transaction(lambda session: work(session, entries))


def _alone(entry: Any, work: Callable[[Session, Any], list[Answer]]) -> Answer:
    try:
        return _together([entry], work)[0]
    except DBAPIError:
        raise
    except Exception as error:
        log.warning("The task of an entry could not be ended in the API server", exc_info=True)
        return Answer(Status.INVALID, f"{type(error).__name__}: {error}")


def _has_outlets(entry: Entry) -> bool:
    return isinstance(entry, (Record, Finish)) and entry.end is not None and bool(entry.end.outlets)


def _assets(entry: Entry) -> list[tuple[str, str]]:
    assert isinstance(entry, (Record, Finish)) and entry.end is not None
    return sorted((str(outlet.get("name")), str(outlet.get("uri"))) for outlet in entry.end.outlets)


def _are(places: Mapping[Task, set[int]]) -> Iterator[ColumnElement[bool]]:
    """Say which rows are those of these places, such that each database finds them by the primary key."""
    single = [task.key for task, wanted in places.items() if wanted == {SINGLE}]
    if single:
        yield and_(tuple_(*_KEY).in_(single), EventWait.place == SINGLE)
    for task, wanted in places.items():
        if wanted != {SINGLE}:
            yield and_(*_is(task), EventWait.place.in_(sorted(wanted)))


def _is(task: Task) -> list[ColumnElement[bool]]:
    return [column == value for column, value in zip(_KEY, task.key, strict=True)]


_NAMES = ("dag_id", "task_id", "run_id", "map_index", "place")
_COLUMNS = EventWait.__table__.columns
_EMPTY: dict[str, Any] = {
    **{name: None for name in columns(EventWait) if name not in _NAMES},
    "generation": 0,
    "clears": 0,
}


@dataclass
class _Batch:
    """
    What a transaction has locked and read, and what it is about to write.

    :param waits: the rows that the entries are about, by the task's id and the place, as they will be. The one
        with the place `SINGLE` is the task's own: of a list of waits the one that begins and ends.
    """

    session: Session
    now: datetime
    tasks: Mapping[uuid.UUID, Task]
    waits: dict[tuple[uuid.UUID, int], EventWait]
    _made: list[tuple[uuid.UUID, int]] = field(default_factory=list)
    _changes: dict[tuple[uuid.UUID, int], dict[str, Any]] = field(default_factory=dict)
    ends: list[tuple[Task, End]] = field(default_factory=list)
    _anchors: dict[bytes, int] = field(default_factory=dict)

    @classmethod
    def lock(cls, session: Session, entries: Sequence[Entry], *without: str) -> _Batch:
        """
        Lock the tasks of entries, and read their waits.

        :param without: columns that are not needed, and may be long.
        """
        ids = {id for entry in entries if (id := _uuid(entry.ti)) is not None}
        locked = tasks.lock(session, ids)
        waits = {}
        if locked:
            ids_of = {task.key: task.id for task in locked.values()}
            places: dict[Task, set[int]] = defaultdict(set)
            for entry in entries:
                if (id := _uuid(entry.ti)) in locked:
                    places[locked[id]].update({SINGLE, entry.place})
            columns = [column for column in _COLUMNS if column.name not in without]
            query = select(*columns).where(or_(*_are(places)))
            for row in session.execute(query):
                wait = EventWait(**row._mapping)  # of no session: what changes is written by statements of its own
                waits[ids_of[row.dag_id, row.task_id, row.run_id, row.map_index], row.place] = wait
        return cls(session, _now(), locked, waits)

    def task(self, entry: Entry) -> Task | None:
        """Return the task of an entry, if it is of this try."""
        id = _uuid(entry.ti)
        return None if id is None else self.tasks.get(id)

    def wait(self, task: Task, place: int) -> EventWait | None:
        """Return the row of a wait, or None."""
        return self.waits.get((task.id, place))

    def fenced(
        self, entry: Park | Join | Record | Finish | SetAside | Lose | Places
    ) -> tuple[Task | None, EventWait | None]:
        """Return the task and the wait of an entry; None for the task if the entry does not count."""
        task = self.task(entry)
        if task is None:
            return None, None
        head, wait = self.wait(task, SINGLE), self.wait(task, entry.place)
        if head is None or not task.is_deferred or head.generation != entry.generation:
            return None, wait
        return task, wait

    def change(self, task: Task, place: int, **values: Any) -> EventWait:
        """Change the row of a wait, which is made if there is none, and return it."""
        key = (task.id, place)
        if key not in self.waits:
            self.waits[key] = EventWait(**dict(zip(_NAMES, (*task.key, place), strict=True)), **_EMPTY)
            self._made.append(key)
        wait = self.waits[key]
        for name, value in values.items():
            setattr(wait, name, value)
        if key not in self._made:
            self._changes.setdefault(key, {}).update(values)
        return wait

    def end(self, task: Task, how: End, wait: EventWait | None) -> None:
        """Have a task ended, whose wait is as it was read."""
        if wait is not None and wait.host is not None and task.trigger_id is not None:
            self._anchors[wait.host] = task.trigger_id
        self.ends.append((task, how))

    def write(self) -> None:
        """Write all that has changed, in a few statements, and end the tasks that end."""
        if self._made:
            names = [*_NAMES, *_EMPTY]
            rows = [{name: getattr(self.waits[key], name) for name in names} for key in self._made]
            self.session.execute(insert(EventWait), rows)
        alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for key, values in self._changes.items():
            wait = self.waits[key]
            where = {f"at_{name}": getattr(wait, name) for name in _NAMES}
            alike.setdefault(tuple(sorted(values)), []).append(
                {**where, **{f"to_{name}": value for name, value in values.items()}}
            )
        for names_of, rows in alike.items():
            statement = (
                update(EventWait)
                .where(*(_COLUMNS[name] == bindparam(f"at_{name}") for name in _NAMES))
                .values({name: bindparam(f"to_{name}") for name in names_of})
            )
            self.session.connection().execute(statement, rows)
        hosts.hand_on(self.session, self._anchors, [task.id for task, _ in self.ends])
        tasks.end(self.session, self.ends, self.now)


def begin(session: Session, entries: Sequence[Begin]) -> list[Answer]:
    """
    Let waits begin, and answer what each has already; what the places of a list have, `places` answers.

    What an earlier edition recorded, as XComs or in the task state store, is taken over.
    """
    batch = _Batch.lock(session, entries)
    known = [
        (entry, task)
        for entry in entries
        if (task := batch.task(entry)) is not None and _may_begin(batch, entry, task)
    ]
    earlier = legacy.records(session, [task for entry, task in known if batch.wait(task, entry.place) is None])
    for entry, task in known:
        if batch.wait(task, entry.place) is None:
            batch.change(task, entry.place)
            for place, values in earlier.get(task.key, {}).items():
                of_list = {} if place == SINGLE else {"listener": entry.listener[:250], "since": batch.now}
                batch.change(task, place, **of_list, **values)
    _forget_places(session, [task for entry, task in known if _waits_for_others(batch, entry, task)])
    timeouts: list[tuple[Task, datetime | None]] = []
    answers = []
    for entry in entries:
        task = batch.task(entry)
        if task is None or not _may_begin(batch, entry, task):
            answers.append(_outlived(task))
        else:
            answers.append(_begin_one(batch, entry, task, timeouts))
    batch.write()
    if given_up := [answer.superseded.record_id for answer in answers if answer.superseded is not None]:
        # They are given back to their source, which delivers them again, to whoever waits then.
        _execute(session, delete(EventTaken).where(EventTaken.record_id.in_(sorted(given_up))))
    _set_timeouts(session, timeouts)
    _show(session, [(task, entry.rendered) for entry, task in known])
    _clear_xcoms(session, [task for entry, task in known if entry.rendered is not None])
    return answers


def _may_begin(batch: _Batch, entry: Begin, task: Task) -> bool:
    """
    Whether a trigger may work for a task.

    Of a try that is parked none may, and of one that is hosted the host alone: who asks has the trigger that it
    was parked by, in another process, and is about to be cancelled; were the wait to begin, nobody would work for
    it.
    """
    wait = batch.wait(task, SINGLE)
    if wait is None or wait.parked is None or wait.parked_try != str(task.id):
        return task.is_deferred and not entry.hosted
    return task.is_deferred and entry.hosted and wait.host is not None


def _begin_one(batch: _Batch, entry: Begin, task: Task, timeouts: list[tuple[Task, datetime | None]]) -> Answer:
    wait = batch.waits[task.id, entry.place]
    first, cleared = wait.since is None, wait.clears != task.clears
    deadline = wait.deadline
    if entry.timeout is None:
        deadline = None
    elif deadline is None or (cleared and not first):
        deadline = min(batch.now + timedelta(seconds=entry.timeout), LATEST)
    values: dict[str, Any] = {
        "listener": entry.listener[:250],
        "call": entry.call,
        "address": _bytes(entry.address),
        "generation": wait.generation + 1,
        "holder": entry.holder[:250],
        "wanted": entry.wanted,
        "since": wait.since or batch.now,
        "run_start": task.run_start if first else wait.run_start,
        "deadline": deadline,
        "clears": task.clears,
        **({} if entry.hosted else NOT_PARKED),
    }
    created = task.run_created or values["run_start"]
    values.update(sought.columns_of(entry.sought, created or values["since"]))
    answer = Answer(
        Status.DONE,
        generation=values["generation"],
        deadline=_iso(deadline),
        left=_seconds(deadline, batch.now),
        run_start=_iso(values["run_start"]),
        run_created=_iso(created),
    )
    if has_event(wait, task.clears, batch.now, replay=entry.replay):
        values["expires"] = None  # it is taken now, and does not expire any more
        timeouts.append((task, None))  # the event wins over the deadline
        if wait.phase == Phase.REJECTED:
            answer = replace(answer, status=Status.REJECTED, message=wait.reason or "", by=wait.sent_by or "")
        elif task.map_index >= 0 and wait.arguments and wait.arguments != _bytes(entry.arguments):
            answer = replace(answer, status=Status.CHANGED, message=wait.call or "")
        else:
            answer = replace(answer, stored=_stored(wait))
    else:
        values["arguments"] = _bytes(entry.arguments)
        if deadline is not None:
            latest = min(max(deadline, batch.now) + timedelta(seconds=entry.grace), LATEST)
            timeouts.append((task, _first(task.trigger_timeout, latest)))
        if wait.phase is not None:
            # Not to be replayed after a clear, or a rejection that a clear has undone, or expired.
            if wait.phase == Phase.RECORDED:
                answer = replace(answer, superseded=_stored(wait))
                values["lost"] = wait.record_id
            values.update(FORGOTTEN)
    wait = batch.change(task, entry.place, **values)
    return replace(answer, lost=wait.lost or "")


NOT_PARKED: Mapping[str, Any] = dict.fromkeys(("parked", "parked_try", "wake_at", "wake", "host", "hosted_at"))
"""What becomes of the columns of a parked wait, or of one with a host, when it begins again, or ends."""

FORGOTTEN: Mapping[str, Any] = dict.fromkeys(
    (
        "phase",
        "event",
        "record_id",
        "record_clears",
        "recorded_after",
        "recorded_at",
        "committed_at",
        "delivered_at",
        "sent_by",
        "reason",
        "expires",
        "receipt",
    )
)
"""What becomes of the columns of a wait's event when it has it no longer."""


def _waits_for_others(batch: _Batch, entry: Begin, task: Task) -> bool:
    """Whether a clear has made a wait, if it is a list, wait for other events than those that its places have."""
    wait = batch.waits[task.id, entry.place]
    return not entry.replay and entry.place == SINGLE and wait.since is not None and wait.clears != task.clears


def _forget_places(session: Session, tasks: Iterable[Task]) -> None:
    """
    Forget the events that the places of lists have from before a clear.

    Those that were recorded and not committed are still at their source, and nobody gives them back: there may be
    thousands. The source delivers them again when its lease of them is over, to whoever waits then.
    """
    rows = [
        {**{f"at_{name}": value for name, value in zip(_NAMES, task.key, strict=False)}, "at_clears": task.clears}
        for task in tasks
    ]
    if not rows:
        return
    earlier = and_(
        *(_COLUMNS[name] == bindparam(f"at_{name}") for name in _NAMES[:-1]),
        EventWait.place > SINGLE,
        EventWait.record_clears != bindparam("at_clears"),
    )
    uncommitted = select(EventWait.record_id).where(earlier, EventWait.phase == Phase.RECORDED.value)
    connection = session.connection()
    connection.execute(delete(EventTaken).where(EventTaken.record_id.in_(uncommitted)), rows)
    # What was not committed is claimed in the place's name, which is another from then on. MySQL assigns one after
    # the other.
    is_uncommitted = EventWait.phase == Phase.RECORDED.value
    lost = case((is_uncommitted, EventWait.record_id), else_=EventWait.lost)
    forgotten = [(_COLUMNS[name], value) for name, value in FORGOTTEN.items()]
    connection.execute(update(EventWait).where(earlier).ordered_values((_COLUMNS["lost"], lost), *forgotten), rows)


def has_event(wait: Any, clears: int, now: datetime, *, replay: bool = True) -> bool:
    """
    Whether the event that stands in a wait's row is what this try of it delivers, or ends with.

    :param wait: the row, or what has its columns ``phase``, ``record_clears`` and ``expires``.
    :param clears: `Task.clears`.
    :param replay: as `Begin.replay`.
    """
    if wait.phase is None:
        return False
    if wait.expires is not None and wait.expires < now:  # no beginning has taken it: that ends its time to live
        return False
    if wait.phase == Phase.REJECTED or not replay:
        return bool(wait.record_clears == clears)
    return True


def park(session: Session, entries: Sequence[Park]) -> list[Answer]:
    """Let waits go on without a trigger, whose row Airflow deletes then; but not one that has an event by now."""
    batch = _Batch.lock(session, entries, "call", "receipt", "event")
    parked: list[uuid.UUID] = []
    wakes: list[datetime] = []
    answers = []
    for entry in entries:
        answers.append(_park_one(batch, entry, parked, wakes))
    batch.write()
    if parked:
        _execute(session, update(TaskInstance).where(TaskInstance.id.in_(sorted(parked))).values(trigger_id=None))
    if wakes:
        once_committed(session, lambda: alarm.ring_at(min(wakes)))
    return answers


def _park_one(batch: _Batch, entry: Park, parked: list[uuid.UUID], wakes: list[datetime]) -> Answer:
    task, wait = batch.fenced(entry)
    if task is None or wait is None:
        return _outlived(batch.task(entry))
    if wait.phase is not None:
        return Answer(Status.HAS)
    at = None if entry.at is None else min(datetime.fromisoformat(entry.at), LATEST)
    if at is not None:
        wakes.append(at)
    kwargs = _encrypted(entry.kwargs)
    wake = None if entry.then is None else json.dumps(entry.then)
    batch.change(task, entry.place, parked=kwargs, parked_try=str(task.id), wake_at=at, wake=wake)
    parked.append(task.id)
    return Answer(Status.DONE)


def _encrypted(kwargs: str) -> str:
    """Return what a trigger was made of as Airflow keeps it, which makes no objects of it either."""
    return get_fernet().encrypt(kwargs.encode()).decode()


def join(session: Session, entries: Sequence[Join]) -> list[Answer]:
    """Let waits go on with their hosts; but not one that has an event by now."""
    batch = _Batch.lock(session, entries, "call", "receipt", "event")
    joining: dict[bytes, list[uuid.UUID]] = defaultdict(list)
    answers = []
    for entry in entries:
        task, wait = batch.fenced(entry)
        host = _bytes(entry.host)
        if task is None or wait is None or host is None:
            answers.append(_outlived(batch.task(entry)))
        elif wait.phase is not None:
            answers.append(Answer(Status.HAS))
        else:
            if wait.host is None or wait.parked_try != str(task.id):  # or else its answer was lost
                kwargs = _encrypted(entry.kwargs)
                joined = {"parked": kwargs, "parked_try": str(task.id), "host": host, "hosted_at": batch.now}
                batch.change(task, entry.place, **joined)
                joining[host].append(task.id)
            answers.append(Answer(Status.DONE))
    batch.write()
    hosts.take_in(session, joining)
    return answers


_LONGEST_REASON = 2000  # characters of why an event cannot be read
_MOST_HOSTED, _MOST_BRIEF = 300, 5000  # waits on a page
# For how long a transaction may go on after the moment that it notes as that of a wait's joining.
_OVERLAP = timedelta(seconds=5)


def hosted(session: Session, entries: Sequence[Hosted]) -> list[Answer]:
    """
    Answer which waits hosts have, and note what they tell.

    No wait is locked, since what they ask then is held against the fence.
    """
    return [_hosted(session, entry) for entry in entries]


def _hosted(session: Session, entry: Hosted) -> Answer:
    most = _MOST_BRIEF if entry.brief else _MOST_HOSTED
    host = bytes.fromhex(entry.host)
    if not hosts.is_anchored(session, host, entry.trigger):
        return Answer(Status.OUTLIVED, "the host has another trigger, or no waits any more")
    hosts.note(session, host, log_of=entry.log_of, trouble=entry.trouble, waits=entry.waits)
    of_it = hosts.waits_of(host)
    if entry.after:
        moment, _, last = entry.after.partition(" ")
        at = datetime.fromisoformat(moment)
        of_it.append(EventWait.hosted_at >= at)  # by itself, since an index serves it so
        if (id := _uuid(last)) is not None:
            of_it.append(or_(EventWait.hosted_at > at, TaskInstance.id > id))
    more = [] if entry.brief else [EventWait.parked, EventWait.deadline]
    found = session.execute(
        select(TaskInstance.id, EventWait.hosted_at, EventWait.parked_try, EventWait.generation, *more)
        .join(EventWait, hosts.of_task())
        .where(*of_it)
        .order_by(EventWait.hosted_at, TaskInstance.id)
        .limit(most)
    ).all()
    # The others were cleared since, and have a trigger again, with the arguments of now.
    joined = (row for row in found if row.parked_try == str(row.id))
    now = _now()
    told = tuple(
        (str(row.id), "", row.generation, None)
        if entry.brief
        else (str(row.id), _kwargs(row), row.generation, _seconds(row.deadline, now))
        for row in joined
    )
    if len(found) < most:  # what has joined may become visible later than what has joined after it
        return Answer(Status.DONE, hosted=told, after=(_now() - _OVERLAP).isoformat())
    return Answer(Status.DONE, hosted=told, after=f"{found[-1].hosted_at.isoformat()} {found[-1].id}", next=0)


def _seconds(until: datetime | None, now: datetime) -> float | None:
    return None if until is None else (until - now).total_seconds()


def _kwargs(row: Any) -> str:
    """Return the arguments of a wait's trigger; empty if they cannot be read, as those of the others can."""
    try:
        kept: str = row.parked
        # As Airflow reads them, but for the objects that they stand for: an API server may not have the classes.
        return kept if kept.startswith("{") else get_fernet().decrypt(kept.encode()).decode()
    except Exception:
        log.exception("What the hosted wait %s keeps cannot be read", row.id)
        return ""


def record(session: Session, entries: Sequence[Record]) -> list[Answer]:
    """Record events for waits, and end the tasks of those that have nothing to commit."""
    batch = _Batch.lock(session, entries, "call", "receipt")
    taken = taken_of(session, [entry.identity for entry in entries])
    answers = []
    for entry in entries:
        answer = _record_one(batch, entry, taken)
        answers.append(answer)
    batch.write()
    have = [entry for entry, answer in zip(entries, answers, strict=True) if answer.status == Status.DONE]
    # A list still waits for what its other places want.
    single = [entry for entry in have if entry.end is None and entry.place == SINGLE]
    _clear_timeouts(session, [task for entry in single if (task := batch.task(entry))])
    write_taken(session, taken, batch.now)
    return answers


def _record_one(batch: _Batch, entry: Record, taken: dict[bytes, Taken]) -> Answer:
    task, wait = batch.fenced(entry)
    if task is None:
        if wait is not None and wait.record_id == entry.record_id and wait.finished_by == entry.generation:
            return Answer(Status.DONE)  # it ended the task, and its answer was lost
        return _outlived(batch.task(entry))
    if wait is not None and wait.phase is not None:
        if wait.record_id == entry.record_id:
            return Answer(Status.DONE)
        if wait.phase == Phase.REJECTED:
            return Answer(Status.REJECTED, wait.reason or "", by=wait.sent_by or "")
        return Answer(Status.HAS, stored=_stored(wait))
    if entry.identity is not None:
        identity, content = _bytes(entry.identity), _bytes(entry.content)
        assert identity is not None and content is not None
        key = key_of(batch.session, taken, identity, content)
        known = taken.get(key)
        if known is not None and known.record_id != entry.record_id and known.set_aside is None:
            return Answer(Status.TAKEN, known.wait)
        if key != identity:
            log.warning(
                "The source of %s gives an id again, with another content than that of %s: it is a new event",
                task.name,
                taken[identity].wait,
            )
        taken[key] = Taken(
            content,
            entry.record_id,
            _name(task, entry),
            is_new=known is None or known.is_new,
            changed=True,
            committed=entry.committed,
        )
    head = batch.waits[task.id, SINGLE]
    values: dict[str, Any] = {
        "phase": (Phase.COMMITTED if entry.committed else Phase.RECORDED).value,
        "event": entry.event,
        "record_id": entry.record_id,
        "record_clears": task.clears,
        "recorded_after": entry.after or None,
        "recorded_at": batch.now,
        "committed_at": batch.now if entry.committed else None,
        "delivered_at": None,
    }
    if entry.place != SINGLE:
        values.update(
            since=head.since,
            run_start=head.run_start,
            listener=head.listener,
            arguments=_bytes(entry.arguments),
        )
    if entry.end is not None:
        values.update(finished_by=entry.generation, delivered_at=_delivered(entry.end, batch.now), **NOT_PARKED)
        batch.end(task, entry.end, head)
    batch.change(task, entry.place, **values)
    return Answer(Status.DONE)


def finish(session: Session, entries: Sequence[Finish]) -> list[Answer]:
    """Note that events are committed, and end their tasks; or end those whose wait ends without an event."""
    batch = _Batch.lock(session, entries, "call", "receipt", "event")
    committed: list[str] = []
    answers = []
    for entry in entries:
        answers.append(_finish_one(batch, entry, committed))
    batch.write()
    if committed:
        _execute(
            session,
            update(EventTaken)
            .where(EventTaken.record_id.in_(sorted(committed)), EventTaken.acknowledged_at.is_(None))
            .values(acknowledged_at=batch.now),
        )
    return answers


def _finish_one(batch: _Batch, entry: Finish, committed: list[str]) -> Answer:
    task, wait = batch.fenced(entry)
    if task is None:
        repeated = wait is not None and wait.finished_by == entry.generation and wait.record_id == entry.record_id
        return Answer(Status.DONE) if repeated else _outlived(batch.task(entry))
    phase = None if wait is None else wait.phase
    if entry.record_id is None:
        if wait is not None and phase == Phase.REJECTED:
            if entry.end is None or entry.end.state != "worker":
                return Answer(Status.REJECTED, wait.reason or "", by=wait.sent_by or "")
        elif phase is not None and (entry.end is None or entry.end.state != "failed"):
            return Answer(Status.HAS)
    elif wait is None or wait.record_id != entry.record_id:
        return _outlived(task)  # forgotten, or lost, meanwhile
    values: dict[str, Any] = {}
    if entry.record_id is not None and wait is not None:
        if entry.acknowledged:
            committed.append(entry.record_id)
        values = {"phase": Phase.COMMITTED.value, "committed_at": wait.committed_at or batch.now}
    if entry.end is not None:
        values.update(finished_by=entry.generation, **NOT_PARKED)
        if entry.record_id is not None:
            values["delivered_at"] = _delivered(entry.end, batch.now)
        batch.end(task, entry.end, wait)
    batch.change(task, entry.place, **values)
    return Answer(Status.DONE)


def set_aside(session: Session, entries: Sequence[SetAside]) -> list[Answer]:
    """Note which events cannot be read, and answer whose turn it is to fail for it."""
    batch = _Batch.lock(session, entries, "call", "receipt", "event")
    taken = taken_of(session, [entry.identity for entry in entries])
    answers = []
    for entry in entries:
        task, _ = batch.fenced(entry)
        identity = _bytes(entry.identity)
        if task is None or identity is None:
            answers.append(_outlived(batch.task(entry)))
        elif (known := taken.get(identity)) is None:
            why, name = entry.reason[:_LONGEST_REASON], _name(task, entry)
            taken[identity] = Taken(bytes(DIGEST_LENGTH), entry.ti, name, set_aside=why, changed=True)
            answers.append(Answer(Status.DONE))
        elif known.record_id == entry.ti:  # it asks again, and has not failed yet
            answers.append(Answer(Status.DONE))
        else:
            answers.append(Answer(Status.TAKEN, known.wait))
    write_taken(session, taken, batch.now)
    return answers


def settle(session: Session, entries: Sequence[Settle]) -> list[Answer]:
    """Note that the source has forgotten events which it had delivered again."""
    keys: set[bytes] = set()
    both: set[tuple[bytes, bytes]] = set()
    for entry in entries:
        identity, content = _bytes(entry.identity), _bytes(entry.content)
        if identity is None:
            continue
        if content is None:  # of an earlier version
            keys.add(identity)
        else:
            keys.add(second_key(identity, content))
            both.add((identity, content))
    is_one = or_(
        EventTaken.identity.in_(sorted(keys)), tuple_(EventTaken.identity, EventTaken.content).in_(sorted(both))
    )
    _execute(
        session,
        update(EventTaken).where(is_one, EventTaken.acknowledged_at.is_(None)).values(acknowledged_at=_now()),
    )
    return [Answer(Status.DONE)] * len(entries)


def lose(session: Session, entries: Sequence[Lose]) -> list[Answer]:
    """Take events from waits whose source has given them to another."""
    batch = _Batch.lock(session, entries, "call", "receipt", "event")
    lost: list[str] = []
    answers = []
    for entry in entries:
        task, wait = batch.fenced(entry)
        if task is None:
            answers.append(_outlived(batch.task(entry)))
        elif wait is not None and wait.record_id == entry.record_id:
            batch.change(task, entry.place, **FORGOTTEN, lost=entry.record_id)
            lost.append(entry.record_id)
            answers.append(Answer(Status.DONE, lost=entry.record_id))
        else:
            answers.append(Answer(Status.DONE, lost=(wait and wait.lost) or ""))
    batch.write()
    if lost:
        _execute(session, delete(EventTaken).where(EventTaken.record_id.in_(sorted(lost))))
    return answers


def places(session: Session, entries: Sequence[Places]) -> list[Answer]:
    """Answer what the places of lists have, a page for each list."""
    batch = _Batch.lock(session, entries)
    left = _LARGEST_PAGES
    answers = []
    for entry in entries:
        task, _ = batch.fenced(entry)
        if task is None:
            answers.append(_outlived(batch.task(entry)))
            continue
        answer, size = _page(session, task, entry, left)
        answers.append(answer)
        left -= size
    return answers


def _page(session: Session, task: Task, entry: Places, left: int) -> tuple[Answer, int]:
    """Return a page of about ``left`` characters at most, and how many it has."""
    of_list = (
        *_is(task),
        EventWait.place >= max(entry.start, 0),
        or_(EventWait.phase.is_not(None), EventWait.lost.is_not(None)),
    )
    limit = max(min(entry.limit, _MOST_PLACES), 1)
    lengths = session.execute(
        select(EventWait.place, func.length(EventWait.event).label("length"))
        .where(*of_list)
        .order_by(EventWait.place)
        .limit(limit + 1)
    ).all()
    size = shown = 0
    for row in lengths[:limit]:
        length = (row.length or 0) + _BESIDE
        if shown and size + length > left:
            break
        size += length
        shown += 1
    if not shown:
        return Answer(Status.DONE), 0
    rows = session.execute(
        select(*_COLUMNS).where(*of_list, EventWait.place <= lengths[shown - 1].place).order_by(EventWait.place)
    )
    found = tuple(_place(row) for row in rows)
    return Answer(Status.DONE, places=found, next=lengths[shown].place if shown < len(lengths) else None), size


def _place(row: Any) -> Place:
    return Place(
        record_id=row.record_id or "",
        phase=row.phase or "",
        event=row.event or "null",
        after=row.recorded_after or "",
        place=row.place,
        lost=row.lost or "",
        arguments=row.arguments.hex() if row.arguments else "",
    )


def look(session: Session, entries: Sequence[Look]) -> list[Answer]:
    """
    Answer whether waits are still those of whoever asks.

    Nothing is locked: what is asked next is held against the fence anyway.
    """
    ti = TaskInstance
    key = (ti.dag_id, ti.task_id, ti.run_id, ti.map_index)
    query = (
        select(ti.id, ti.state, EventWait.generation)
        .join(EventWait, and_(*(one == other for one, other in zip(_KEY, key, strict=True))))
        .where(ti.id.in_({_uuid(entry.ti) for entry in entries} - {None}), EventWait.place == SINGLE)
    )
    waits = {row.id: row for row in session.execute(query)}
    return [_looked_at(waits.get(_uuid(entry.ti)), entry.generation) for entry in entries]


def _looked_at(wait: Any, generation: int) -> Answer:
    still = wait is not None and wait.state == TaskInstanceState.DEFERRED and wait.generation == generation
    return Answer(Status.DONE) if still else Answer(Status.OUTLIVED, "another has begun it, or the try is over")


def positions(session: Session, entries: Sequence[Positions]) -> list[Answer]:
    """Note what is settled of sources, and answer what all have told of them."""
    begin_writing(session)
    keys = [digest(entry.source) for entry in entries]
    asked = select(EventPosition).where(EventPosition.source.in_(sorted(set(keys))))
    rows = {row.source: row for row in session.scalars(asked.order_by(EventPosition.source).with_for_update())}
    answers = []
    for key, entry in zip(keys, entries, strict=True):
        row = rows.get(key)
        settled = united({} if row is None else json.loads(row.positions), entry.settled, entry.begins)
        text = json.dumps(settled)
        if row is None:
            row = EventPosition(source=key, name=entry.source, owner=uuid.uuid4().hex)
            session.add(row)
            rows[key] = row
        if text != row.positions:
            row.positions, row.changed_at = text, _now()
        answers.append(Answer(Status.DONE, settled=settled, owner=row.owner))
    session.flush()
    return answers


_WORK: tuple[tuple[type[Entry], Callable[[Session, Any], list[Answer]]], ...] = (
    (Begin, begin),
    (Park, park),
    (Join, join),
    (Hosted, hosted),
    (Places, places),
    (Lose, lose),
    (Record, record),
    (SetAside, set_aside),
    (Finish, finish),
    (Settle, settle),
    (Look, look),
    (Positions, positions),
    (StartRoom, starts.room),
    (StartRun, starts.start),
)


def _name(task: Task, entry: Entry) -> str:
    return task.name if entry.place == SINGLE else f"{task.name}#{entry.place}"


def _stored(wait: EventWait) -> Stored:
    return Stored(wait.record_id or "", wait.phase or "", wait.event or "null", wait.recorded_after or "")


def _outlived(task: Task | None) -> Answer:
    if task is None:
        return Answer(Status.OUTLIVED, "the task instance is of another try by now, or is gone with its run")
    if not task.is_deferred:
        return Answer(Status.OUTLIVED, f"the task instance is {task.state or 'not deferred'}")
    return Answer(Status.OUTLIVED, "another triggerer works for the wait, or it is parked and none does")


def _delivered(end: End, now: datetime) -> datetime | None:
    return now if end.state == "success" else None


def _set_timeouts(session: Session, timeouts: Iterable[tuple[Task, datetime | None]]) -> None:
    """Let Airflow end a wait by itself some while after its deadline, if no triggerer does."""
    rows = [{"ti": task.id, "at": at} for task, at in timeouts if not _is_about(task.trigger_timeout, at)]
    if rows:
        statement = (
            update(TaskInstance).where(TaskInstance.id == bindparam("ti")).values(trigger_timeout=bindparam("at"))
        )
        session.connection().execute(statement, rows)


def _first(one: datetime | None, other: datetime) -> datetime:
    """Return the earlier one: Airflow may have been told to end the deferral sooner, by an execution_timeout."""
    return other if one is None else min(one, other)


def _is_about(one: datetime | None, other: datetime | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs((one - other).total_seconds()) < _ROUGHLY


def _clear_timeouts(session: Session, recorded: Iterable[Task]) -> None:
    """Keep Airflow from failing waits that have their events: the record wins over the deadline."""
    ids = sorted({task.id for task in recorded if task.trigger_timeout is not None})
    if ids:
        _execute(session, update(TaskInstance).where(TaskInstance.id.in_(ids)).values(trigger_timeout=None))


def _clear_xcoms(session: Session, begun: Sequence[Task]) -> None:
    """Delete what an earlier life of tasks has returned, as a worker does that starts a try."""
    keys = [(task.dag_run_id, task.task_id, task.map_index) for task in begun]
    if keys:
        columns = (XComModel.dag_run_id, XComModel.task_id, XComModel.map_index)
        _execute(session, delete(XComModel).where(tuple_(*columns).in_(keys)))


def _show(session: Session, rendered: Iterable[tuple[Task, Mapping[str, Any] | None]]) -> None:
    """Show the arguments of waits on Airflow's page, where rendered templates are."""
    shown = {task.key: fields for task, fields in rendered if fields is not None}
    if not shown:
        return
    table = RenderedTaskInstanceFields
    columns = (table.dag_id, table.task_id, table.run_id, table.map_index)
    _execute(session, delete(table).where(tuple_(*columns).in_(list(shown))))
    names = ("dag_id", "task_id", "run_id", "map_index")
    rows = [{**dict(zip(names, key, strict=True)), "rendered_fields": fields} for key, fields in shown.items()]
    session.execute(insert(table.__table__), rows)


def _execute(session: Session, statement: Any) -> None:
    session.execute(statement.execution_options(synchronize_session=False))


def _uuid(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _bytes(digest: str | None) -> bytes | None:
    return bytes.fromhex(digest) if digest else None


def _now() -> datetime:
    return datetime.now(timezone.utc)
