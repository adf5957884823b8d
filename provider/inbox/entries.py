"""
What can be asked of the inbox, and what it answers: plain data that crosses HTTP as JSON.

A trigger asks three things in a wait's life: `Begin`, `Record`, `Finish`. Besides: `Park` a wait that needs no
trigger any more, `SetAside` an event that the
wait cannot read, `Settle` an event that came again and is acknowledged now, `Lose` one that the source has given
to another wait; of a list of waits it asks what its `Places` have; and while it waits, it has a `Look` now and
then. Each of these but `Settle` names the try of the task instance and the generation of the wait that it is
for, so that what a process says that the wait has outlived is refused. A source's hub, which works for many waits,
exchanges `Positions`. A trigger that starts runs asks for `StartRoom`, and tells of an event by `StartRun`. Each
may be asked again when an answer was lost.

The form is frozen: API servers and triggerers of two versions talk to one another while a deployment is upgraded.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

_T = TypeVar("_T")

START_GROUP = "airflow-events"
"""The group of the assets whose watchers start runs."""
RUN_ID_PREFIX = "event__"
"""With it begin the ids of the runs that events start."""


class Phase(str, enum.Enum):
    """How far a recorded event has come. The values stand in Airflow's database: they are frozen."""

    RECORDED = "recorded"
    COMMITTED = "committed"
    REJECTED = "rejected"
    """There will be no event; ``reason`` says why, and ``sent_by`` by whom."""


@dataclass(frozen=True)
class Entry:
    """
    What all entries name.

    :param ti: the UUID of the task instance's try.
    :param place: in a list of waits, from 0 on; -1 for a wait for one event.
    """

    operation: ClassVar[str]
    ti: str
    place: int = -1


@dataclass(frozen=True)
class Begin(Entry):
    """
    A trigger works for the wait from now on, and nobody else.

    :param listener: its class name.
    :param call: listener and rendered arguments as the call that they are, with secrets masked.
    :param arguments: the digest of the rendered arguments, in hex.
    :param rendered: what the page of the task instance shows as rendered templates; None leaves what is there.
    :param timeout: seconds from the first beginning after a clear on; None for no end.
    :param grace: seconds after the deadline at which Airflow ends the wait if no triggerer has.
    :param replay: whether an event counts that was recorded before the last clear. If not, the wait forgets it,
        and a list those of all its places.
    :param address: the digest, in hex, of the key under which events can be sent to it, or None.
    :param holder: who asks, for the page.
    :param wanted: of a task that waits for many: how many events it wants, for the page.
    :param hosted: whether a host asks, for a wait that has joined it.
    :param sought: what the API server is to look for: `airflow_events.listeners.base.EventListener.sought`.
    """

    operation: ClassVar[str] = "begin"
    listener: str = ""
    call: str = ""
    arguments: str = ""
    rendered: Mapping[str, Any] | None = None
    timeout: float | None = None
    grace: float = 300.0
    replay: bool = True
    address: str | None = None
    holder: str = ""
    wanted: int | None = None
    hosted: bool = False
    sought: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class End:
    """
    How the task ends.

    :param state: ``success`` or ``skipped``; ``worker`` hands ``payload`` to ``execute_complete`` on a worker;
        ``failed`` fails the try there, with the lines in ``payload["traceback"]``, as if its trigger had raised.
    :param xcoms: by key, as the XCom backend has serialized them.
    :param dag_result: whether the return value is the DAG's result.
    :param mapped_length: how many tasks are mapped over the return value; None if none are.
    :param outlets: asset profiles, as Airflow's execution API takes them.
    :param payload: for the worker.
    """

    state: str = "success"
    xcoms: Mapping[str, Any] = field(default_factory=dict)
    dag_result: bool = False
    mapped_length: int | None = None
    outlets: tuple[Mapping[str, Any], ...] = ()
    payload: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Record(Entry):
    """
    An event is the wait's from now on.

    :param record_id: made by the asker, the same when it asks again.
    :param event: as `airflow_events.listeners.support.serde.encode` writes it.
    :param identity: the digest, in hex, of the source and the event's id; None if a redelivery cannot be told.
    :param content: the digest of the event, in hex, where there is an ``identity``.
    :param committed: whether the source has nothing to be told.
    :param after: the id of the recording that the wait had lost when it took this event.
    :param arguments: of a place in a list: the digest of the arguments that are there, in hex.
    :param end: ends the task in the same transaction; only where ``committed``.
    """

    operation: ClassVar[str] = "record"
    generation: int = 0
    record_id: str = ""
    event: str = ""
    identity: str | None = None
    content: str | None = None
    committed: bool = False
    after: str = ""
    arguments: str = ""
    end: End | None = None


@dataclass(frozen=True)
class Finish(Entry):
    """
    The task ends.

    :param record_id: of the event that was committed and is delivered; None if the wait ends without an event,
        which is refused if it has one.
    :param end: None notes the commit, and the task goes on: it waits for other events as well.
    :param acknowledged: whether the source has confirmed that it has forgotten the event. If not, it delivers it
        again, and the inbox knows whose it is until that is acknowledged.
    """

    operation: ClassVar[str] = "finish"
    generation: int = 0
    record_id: str | None = None
    end: End | None = None
    acknowledged: bool = True


@dataclass(frozen=True)
class Park(Entry):
    """
    The wait goes on without a trigger, as a row of the inbox: nobody has to poll for its event.

    :param kwargs: what its trigger was made of, with its arguments rendered, as
        `airflow_events.listeners.support.serde.encode` writes it. In the database it is encrypted, as triggers
        are.
    :param at: when the API server is to carry out ``then``, ISO 8601 in UTC; None for never.
    :param then: a `Record` or a `Finish` as `as_json` writes it, by which the wait ends.
    """

    operation: ClassVar[str] = "park"
    generation: int = 0
    kwargs: str = ""
    at: str | None = None
    then: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Join(Entry):
    """
    The wait goes on without a trigger of its own: one trigger, the host, polls for it and others like it.

    :param kwargs: as `Park.kwargs`.
    :param host: which host, a digest in hex.
    """

    operation: ClassVar[str] = "join"
    generation: int = 0
    kwargs: str = ""
    host: str = ""


@dataclass(frozen=True)
class Hosted(Entry):
    """
    A host wants to know which waits are its own; of no task instance.

    The answer is a page, in the order in which they came: `Answer.hosted`, and `Answer.after` for the next one; or
    `Status.OUTLIVED`, if the trigger is not the host's any more.

    :param ti: nobody's.
    :param host: as `Join.host`.
    :param trigger: the id of the trigger that asks.
    :param after: what the last page said; empty for the first page.
    :param brief: leaves out what their triggers were made of.
    :param log_of: in whose log the host logs, for whoever looks: a `Wait.id`, and its try.
    :param trouble: what is wrong with its sources now, likewise; empty if nothing is.
    :param waits: for how many it polls already, likewise.
    """

    operation: ClassVar[str] = "hosted"
    ti: str = ""
    host: str = ""
    trigger: int = 0
    after: str = ""
    brief: bool = False
    log_of: str = ""
    trouble: str = ""
    waits: int = 0


@dataclass(frozen=True)
class SetAside(Entry):
    """
    The wait cannot read an event, and its try fails for it, unless another has before.

    Nobody gets the event from then on but a wait that can read it.

    :param identity: as `Record.identity`.
    :param reason: why it cannot be read, for whoever looks.
    """

    operation: ClassVar[str] = "set_aside"
    generation: int = 0
    identity: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Settle(Entry):
    """
    The source has confirmed that it has forgotten an event of another wait, which it had delivered again.

    :param identity: as `Record.identity`; ``content`` likewise, None of earlier versions.
    """

    operation: ClassVar[str] = "settle"
    identity: str = ""
    content: str | None = None


@dataclass(frozen=True)
class Lose(Entry):
    """The source has given the event to another wait: it is this one's no longer, which waits on."""

    operation: ClassVar[str] = "lose"
    generation: int = 0
    record_id: str = ""


@dataclass(frozen=True)
class Places(Entry):
    """
    Somebody wants to know what the places of a list have.

    A list may be long, and its events too, so the answer is a page: `Answer.next` is where the next one begins.

    :param start: the first place on the page.
    :param limit: how many places are on it at most; there may be fewer.
    """

    operation: ClassVar[str] = "places"
    generation: int = 0
    start: int = 0
    limit: int = 1000


@dataclass(frozen=True)
class Look(Entry):
    """Who waits wants to know whether the wait is still its own, or outlived. It changes and locks nothing."""

    operation: ClassVar[str] = "look"
    generation: int = 0


@dataclass(frozen=True)
class Positions(Entry):
    """
    How far a source's log is settled; of no task instance. The answer says what all have told so far.

    :param ti: nobody's.
    :param source: what tells it from every other source.
    :param settled: by place, ranges of offsets that are never to be delivered again: ``[first, after the last]``.
    :param begins: where to begin in places that nobody has begun.
    """

    operation: ClassVar[str] = "positions"
    ti: str = ""
    source: str = ""
    settled: Mapping[str, Any] = field(default_factory=dict)
    begins: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StartRoom(Entry):
    """
    How many runs an event's source may start now; of no task instance. It locks nothing.

    :param ti: nobody's.
    :param trigger: the id of the trigger that asks: the runs are those of the DAGs that its assets start.
    :param up_to: how many runs of each of them there may be at once; None is the DAG's ``max_active_runs``.
    :param makes: what is made of events: a ``run`` of each, a run of a ``batch`` of them, or an ``asset_event`` of
        each for each of the trigger's assets.
    :param lag: how many messages nobody has acknowledged yet at the source, for whoever looks; None if it does not
        tell.
    :param trouble: what is wrong with the source, empty if nothing is; likewise.
    """

    operation: ClassVar[str] = "start_room"
    ti: str = ""
    trigger: int = 0
    up_to: int | None = None
    makes: str = "run"
    lag: int | None = None
    trouble: str = ""


@dataclass(frozen=True)
class Told:
    """
    An event that starts a run.

    :param event: in JSON shapes, as text: what the run has in its conf.
    :param identity: as `Record.identity`; ``content`` likewise.
    """

    event: str = ""
    identity: str | None = None
    content: str | None = None


@dataclass(frozen=True)
class StartRun(Entry):
    """
    Events start a run of each DAG that the trigger's assets start; without those that have started one already.

    :param ti: nobody's; ``trigger``, ``up_to`` and ``makes`` as of `StartRoom`.
    :param record_id: made by the asker, the same when it asks again.
    :param events: one, or those of a batch.
    :param key: of the event: no run is made while one of the same key is queued or running. None is no key.
    :param logical_date: of the run, as ISO 8601 with a time zone; None is for a run without one.
    """

    operation: ClassVar[str] = "start_run"
    ti: str = ""
    trigger: int = 0
    up_to: int | None = None
    makes: str = "run"
    record_id: str = ""
    events: tuple[Told, ...] = ()
    key: str | None = None
    logical_date: str | None = None


class Status(str, enum.Enum):
    """What became of an entry."""

    DONE = "done"
    """So it is now, or was already."""
    HAS = "has"
    """The wait has an event, and not the one that was told: a beginning, or `Answer.stored`, says which."""
    TAKEN = "taken"
    """
    The event is another wait's, which has recorded it: this is a redelivery, to be acknowledged and dropped. Of an
    event that cannot be read: a wait has failed for it already.
    """
    REJECTED = "rejected"
    """Somebody has rejected the wait."""
    CHANGED = "changed"
    """The wait has an event that was recorded for other arguments than it has now."""
    OUTLIVED = "outlived"
    """The wait is another's by now, or nobody's: the task has ended, was cleared, or has begun again elsewhere."""
    INVALID = "invalid"
    """The entry cannot be carried out; `Answer.message` says why."""
    FULL = "full"
    """There is no room for another run now: the event is not taken, and `Answer.message` says why."""
    BUSY = "busy"
    """A run with the event's key is active: the event is not taken, and `Answer.message` names the run."""


@dataclass(frozen=True, slots=True)
class Stored:
    """
    The event that a wait has.

    :param event: as `Record.event`.
    :param after: as `Record.after`.
    """

    record_id: str
    phase: str
    event: str
    after: str = ""


@dataclass(frozen=True)
class Place(Stored):
    """
    A place in a list that has an event, or has lost one.

    :param phase: empty if it has none.
    :param lost: the id of the recording that it has lost last; empty if none.
    :param arguments: the digest of the arguments that its event was recorded for, in hex.
    """

    place: int = 0
    lost: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """
    What the inbox says to an entry.

    :param generation: of a wait that has begun.
    :param deadline: ISO 8601 in UTC; None for no end.
    :param left: seconds until then, by the clock of the API server; of a wait that has begun.
    :param run_start: when the run started as the wait first began, ISO 8601 in UTC; None if nobody knows.
    :param run_created: when the run was created, likewise.
    :param lost: the id of the recording that the wait has lost last; empty if none.
    :param stored: the event that it has, or None.
    :param superseded: an event that it had before a clear, was not to be replayed, and was not committed: to be
        given back; or None.
    :param by: who has rejected it.
    :param places: those of a list that have or had something, in order.
    :param next: the first place of the next page of them; None if there is none.
    :param settled: of a source: see `Positions.settled`.
    :param owner: of a source: the id of this deployment, as far as that source is concerned.
    :param room: how many more runs events may start now.
    :param dags: the ids of the DAGs whose runs they are.
    :param hosted: of a host: its waits, each with the UUID of its try, `Park.kwargs`, its generation, and `left`.
    :param after: of a host: what to ask for the next page with, or, after the last, for what joins from now on.
    """

    status: str
    message: str = ""
    generation: int = 0
    deadline: str | None = None
    left: float | None = None
    run_start: str | None = None
    run_created: str | None = None
    lost: str = ""
    stored: Stored | None = None
    superseded: Stored | None = None
    by: str = ""
    places: tuple[Place, ...] = ()
    next: int | None = None
    settled: Mapping[str, Any] | None = None
    owner: str = ""
    room: int = 0
    dags: tuple[str, ...] = ()
    hosted: tuple[tuple[str, str, int, float | None], ...] = ()
    after: str = ""


_KINDS = (
    Begin,
    Park,
    Join,
    Hosted,
    Record,
    Finish,
    SetAside,
    Settle,
    Lose,
    Places,
    Look,
    Positions,
    StartRoom,
    StartRun,
)
ENTRIES: Mapping[str, type[Entry]] = {kind.operation: kind for kind in _KINDS}
_NESTED: Mapping[str, type[Any]] = {"end": End, "stored": Stored, "superseded": Stored}


def as_json(said: Entry | Answer) -> dict[str, Any]:
    """Write an entry or an answer in JSON shapes; what is as it is by default is left out."""
    shapes = {name: value for name, value in asdict(said).items() if value != _defaults(type(said)).get(name, ...)}
    return {"operation": said.operation, **shapes} if isinstance(said, Entry) else shapes


def entry_of(told: Mapping[str, Any]) -> Entry:
    """
    Read an entry that `as_json` wrote.

    :raises ValueError: it is not one.
    """
    told = dict(told)
    kind = ENTRIES.get(str(told.pop("operation", None)))
    if kind is None:
        raise ValueError(f"the operation is not one of {', '.join(ENTRIES)}")
    return _made(kind, told)


def answer_of(told: Mapping[str, Any]) -> Answer:
    """Read an answer that `as_json` wrote; fields of later versions are passed over."""
    return _made(Answer, {name: value for name, value in told.items() if name in _names(Answer)})


def _made(kind: type[_T], told: dict[str, Any]) -> _T:
    if unknown := told.keys() - _names(kind):
        raise ValueError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    for name, nested in _NESTED.items():
        if told.get(name) is not None:
            inner = dict(told[name])
            if "outlets" in inner:
                inner["outlets"] = tuple(inner["outlets"])
            told[name] = _made(nested, inner)
    if isinstance(told.get("hosted"), list):
        told["hosted"] = tuple(
            (str(ti), str(kwargs), int(number), None if left is None else float(left))
            for ti, kwargs, number, left in told["hosted"]
        )
    if "places" in told:
        told["places"] = tuple(_made(Place, dict(place)) for place in told["places"])
    if "events" in told:
        told["events"] = tuple(_made(Told, dict(one)) for one in told["events"])
    if "dags" in told:
        told["dags"] = tuple(told["dags"])
    try:
        return kind(**told)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _names(kind: type[Any]) -> set[str]:
    return {one.name for one in fields(kind)}


def _defaults(kind: type[Any]) -> dict[str, Any]:
    return {one.name: one.default for one in fields(kind)}
