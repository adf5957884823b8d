"""The listener contract: what a class must do so that a wait can use it as its source of events."""

from __future__ import annotations

import abc
import contextlib
import functools
import inspect
import types
import typing
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Any, ClassVar, Literal

import pendulum


@dataclass(frozen=True)
class Wait:
    """
    One task instance that waits for one event, or one place in the list of a task that waits for many.

    It is the same wait over all tries and clears of the task instance.

    :param map_index: ``-1`` for a task that is not mapped.
    :param run_start: when the run started, in UTC; None where Airflow does not know (a run that was
        marked as finished before it started).
    :param run_created: when the run was created, in UTC, from which on a watch looks: it may have been queued for
        long. None where nobody knows: ``run_start`` counts then.
    :param timezone: the DAG's time zone, as pendulum names it: ``UTC``, ``Europe/Berlin``, ``+02:00``.
    :param index: which of the events of its task it waits for; None if that is the only one.
    :param after: the id of the record whose event the wait has lost, the last one; empty if it has lost none.
    """

    dag_id: str
    run_id: str
    task_id: str
    map_index: int = -1
    run_start: datetime | None = None
    timezone: str = "UTC"
    index: int | None = None
    after: str = ""
    run_created: datetime | None = None

    @property
    def id(self) -> str:
        """
        The wait's name at a source: ``dag_id/run_id/task_id/map_index``, and ``#index`` if its task has many.

        A wait that has lost an event goes on under another name, with ``~`` and eight characters at its end. Where
        a listener holds events at the source under this name, a process that still has the lost record cannot
        commit by what the wait has taken since: the event would be committed with no record that says so.

        For such listeners its format is frozen: a wait that an upgrade renames loses what it holds.
        """
        name = f"{self.dag_id}/{self.run_id}/{self.task_id}/{self.map_index}"
        if self.index is not None:
            name += f"#{self.index}"
        return f"{name}~{self.after[:8]}" if self.after else name

    @property
    def tz(self) -> tzinfo:
        """The DAG's time zone, in which naive times are read."""
        if self.timezone[:1] in ("+", "-"):  # a fixed offset has no name that pendulum knows
            zone = datetime.fromisoformat(f"2000-01-01T00:00:00{self.timezone}").tzinfo
            assert zone is not None
            return zone
        return pendulum.timezone(self.timezone)


_current_wait: ContextVar[Wait] = ContextVar("airflow_events.current_wait")


def current_wait() -> Wait:
    """
    Return the wait that the listener works for.

    :raises LookupError: outside of a listener's methods.
    """
    try:
        return _current_wait.get()
    except LookupError:
        raise LookupError("current_wait() has an answer only while a listener works for a wait") from None


class working_for:
    """
    Make ``wait`` the answer of `current_wait`, for this context and the tasks started in it.

    No generator, since one is held by each open wait.
    """

    __slots__ = ("_token", "_wait")

    def __init__(self, wait: Wait) -> None:
        self._wait = wait

    def __enter__(self) -> None:
        self._token = _current_wait.set(self._wait)

    def __exit__(self, *_: object) -> None:
        _current_wait.reset(self._token)


class EventListener(abc.ABC):
    """
    Knows one source of events.

    A fresh instance, made without arguments, is used for each poll and each commit, and they may be
    in different processes: whatever the commit needs goes into the event.

    What a subclass owes (``docs/writing-a-listener.md`` has the long form):

    - An event that `poll_for_event` returned stays at the source until `event_checkpointed`.
    - `event_id` tells a redelivery from another event, or else `event_checkpointed` is a compare-and-set, which
      raises `airflow_events.errors.EventLost` when another wait has the event.
    - `event_checkpointed` may be called again for the same wait, also long after, and changes nothing then.
    - Events are made of what Airflow's serde takes: JSON shapes, datetimes, UUIDs, tuples, sets.
    """

    recorded_from_outside: ClassVar[bool] = False
    """
    True says that somebody else than the wait itself may record its event, at any moment, and end the task.
    When the time of such a wait is up, a worker looks for a record before it believes so.
    """

    hosted: ClassVar[bool] = False
    """
    True says that one trigger may poll for many waits at once, each with an instance of its own: the waits of the
    listener share a trigger then. What their polls log is in the log of one of them.
    """

    not_taken: ClassVar[Mapping[str, str]] = {}
    """Arguments that users may expect `poll_for_event` to take, and why it does not; for the error's text."""

    @abc.abstractmethod
    async def poll_for_event(self, *args: Any, **kwargs: Any) -> Any:
        """
        Return once the event is there.

        Runs in the triggerer's event loop, beside all other triggers, so it must not block. It is
        cancelled when the wait's time is up, when a user clears or marks the task, and when the
        triggerer shuts down; it then starts again elsewhere, from the beginning.

        What it raises fails the try; the task's ``retries`` decide what follows.
        """

    def foresee(self, *args: Any, **kwargs: Any) -> tuple[Any, datetime] | None:
        """
        Return the event and when it will come, if both follow from the arguments, as with a clock; or None.

        This promises, of a listener that has nothing to commit, that all polls of the wait return an equal
        event, whenever and wherever, and none before that moment. So none begins before it, and an open wait is
        an entry in a heap. Of a class that overrides `poll_for_event`, and not this, nothing is believed to be
        foreseen.

        :param args: what `poll_for_event` is called with; ``kwargs`` likewise.
        :return: the event, and a datetime with a time zone.
        """
        return None

    @classmethod
    def address(cls, *args: Any, **kwargs: Any) -> str | None:
        """
        Return the digest under which others can send events to the wait: a SHA-256 in hex; None if there is none.

        Of a listener that is `recorded_from_outside`.

        :param args: what `poll_for_event` is called with; ``kwargs`` likewise.
        :raises ValueError: the arguments name none that is valid.
        """
        return None

    @classmethod
    def sought(cls, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """
        Return what the API server is to look for in Airflow's own database; None if there is nothing.

        Of the listeners of `airflow_events.listeners.airflow`, which the API server knows. JSON shapes, which rows
        hold: ``kind``, ``of`` (the same for all waits with this `address`), and since when: ``since``, a moment in
        ISO 8601, or ``after``, seconds after the creation of the run, or neither (both are None).

        :param args: what `poll_for_event` is called with; ``kwargs`` likewise.
        :raises ValueError: the arguments are not in order.
        """
        return None

    @classmethod
    def check_arguments(cls, *args: Any, **kwargs: Any) -> None:
        """
        Refuse, as a DAG is parsed, arguments that no wait could wait with.

        :param args: what `poll_for_event` will be called with, with templates as they are written; ``kwargs``
            likewise. Not called while they hold outputs of other tasks.
        :raises ValueError: they are not in order, whatever the templates say.
        """

    def event_id(self, event: Any) -> str | None:
        """
        Return what tells ``event`` from every other, also when its source delivers it again.

        With it, a source that delivers at least once delivers exactly once here: an id is recorded for one wait at
        most. It is the source's own coordinates, such as cluster, topic, partition and offset, and holds whatever
        tells a source from another that this class can read. None means that a redelivery is a new event.

        A redelivery has to be equal to the first delivery: an id that comes with another content is taken for a
        new event. So an event holds nothing that differs between the two, such as a receipt or a count.
        """
        return None

    def event_content(self, event: Any) -> Any:
        """
        Return what of ``event`` is equal at each delivery, of an event with an `event_id`.

        It is all of it, unless a source shows a message to several waits at once: then what the event says of how
        it was read, such as by which connection, must not make a new event of it. Of a source that never gives an
        id again it may be the id.
        """
        return event

    async def poll_in_a_test(self, *args: Any, **kwargs: Any) -> Any:
        """
        Return the event in ``dag.test()``, of a listener that is `recorded_from_outside`: there is nobody outside.

        :raises NotImplementedError: there is none without an API server.
        """
        raise NotImplementedError(
            f"what {type(self).__name__} waits for an API server sees, and there is none in dag.test()"
        )

    async def event_checkpointed(self, event: Any) -> None:
        """
        Tell the source that it may forget ``event``, which is now recorded in Airflow's database.

        Not defining it means that there is nothing to tell.

        :raises AtRedelivery: only the process that received the event can, and that is another one: the source
            delivers it again, and it is acknowledged then. The wait goes on. Of events that have an `event_id`.
        :raises EventLost: the source has given the event to another wait. This wait drops its record
            and waits on. Any other exception makes the commit be tried again, for ``[events]
            commit_timeout`` seconds.
        """

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """
        Give back what the wait holds at the source and has not committed.

        Called for an event that was polled and is not recorded: the wait ended before, or has another event. Of
        a listener without `event_id` only when the wait has ended, since it may hold the event for whoever polls
        for the wait next. Of an event that is committed it changes nothing. It is a courtesy, which a crash
        leaves out: the source must deliver again by itself what was not acknowledged.

        :param event: what `poll_for_event` returned, or None if it had not returned.
        :param args: what `poll_for_event` was called with; ``kwargs`` likewise.
        """


def commits(listener: type[EventListener]) -> bool:
    """Whether the listener has something to commit."""
    return listener.event_checkpointed is not EventListener.event_checkpointed


def foresees(listener: type[EventListener]) -> bool:
    """Whether the listener can tell its event before it comes."""
    if commits(listener):
        return False
    by, *_ = (base for base in listener.__mro__ if {"poll_for_event", "foresee"} & vars(base).keys())
    return by is not EventListener and "foresee" in vars(by)


def releases(listener: type[EventListener]) -> bool:
    """Whether the listener can give a claim back."""
    return listener.event_released is not EventListener.event_released


_checked: weakref.WeakSet[type[EventListener]] = weakref.WeakSet()
"""Listeners that keep the contract's form: each open wait asks for its own several times."""


def check_listener(listener: object) -> type[EventListener]:
    """
    Return ``listener`` if it keeps the contract's outward form.

    :raises TypeError: it is not a class, not an `EventListener`, abstract, needs arguments to be made,
        or its methods are not async; the message says which.
    """
    if not inspect.isclass(listener):
        raise TypeError(f"a listener is a subclass of EventListener, not {listener!r}, which is {_kind(listener)}")
    name = listener.__qualname__
    if not issubclass(listener, EventListener):
        raise TypeError(f"a listener is a subclass of EventListener; {name} is not")
    if listener in _checked:
        return listener
    if missing := getattr(listener, "__abstractmethods__", None):
        raise TypeError(f"{name} does not define {', '.join(sorted(missing))}")
    try:
        inspect.signature(listener).bind()
    except TypeError as error:
        raise TypeError(
            f"{name} must be made without arguments ({error}); "
            "what it needs to know goes to poll_for_event, through wait_for_event's arguments"
        ) from None
    for method in ("poll_for_event", "event_checkpointed", "event_released"):
        if isinstance(inspect.getattr_static(listener, method), (staticmethod, classmethod)):
            raise TypeError(f"{name}.{method} must be an ordinary method, with self")
        if not inspect.iscoroutinefunction(getattr(listener, method)):
            raise TypeError(f"{name}.{method} must be an 'async def'")
    if inspect.iscoroutinefunction(listener.event_id):
        raise TypeError(f"{name}.event_id must be a 'def', and no 'async def'")
    _checked.add(listener)
    return listener


def check_arguments(listener: type[EventListener], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """
    Check that ``poll_for_event`` takes these arguments.

    :raises TypeError: it does not; the message has its signature, or why it does not.
    :raises ValueError: one is of a `Literal` type, and none of its values.
    """
    signature = inspect.signature(listener.poll_for_event)
    try:
        bound = signature.bind(None, *args, **kwargs).arguments
    except TypeError as error:
        for name in kwargs.keys() & listener.not_taken.keys():
            raise TypeError(f"{listener.__qualname__} takes no {name}: {listener.not_taken[name]}") from None
        raise TypeError(
            f"{listener.__qualname__}.poll_for_event{signature} does not take these arguments: {error}"
        ) from None
    for name, choices in _choices(inspect.unwrap(listener.poll_for_event)).items():
        said = bound.get(name)
        if isinstance(said, str) and not is_template(said) and said not in choices:
            known = ", ".join(map(repr, choices))
            raise ValueError(f"{listener.__qualname__}: {name} is one of {known}, not {said!r}")


@functools.lru_cache(maxsize=256)
def _choices(function: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """Return the values that parameters of a `Literal` type may have, as far as their types are known here."""
    found = {}
    for name, hint in function.__annotations__.items():
        alone = types.SimpleNamespace(__annotations__={name: hint})
        with contextlib.suppress(Exception):  # what its module imports for type checkers alone
            told = typing.get_type_hints(alone, globalns=function.__globals__)[name]
            if typing.get_origin(told) is Literal:
                found[name] = typing.get_args(told)
    return found


def is_template(value: Any) -> bool:
    """Whether it is a text with which Jinja would do more than copy it, line ends aside."""
    return isinstance(value, str) and ("{{" in value or "{%" in value or "{#" in value)


def describe(name: str, args: Any, kwargs: Any) -> str:
    """Write a listener and its arguments as the call that they are, shortened to a line."""
    arguments = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in kwargs.items()]
    text = ", ".join(a if len(a) <= 200 else f"{a[:197]}..." for a in arguments)
    return f"{name}({text})"


def _kind(value: object) -> str:
    return f"an instance of {type(value).__qualname__}"
