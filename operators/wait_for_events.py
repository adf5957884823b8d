"""``wait_for_events``, and the operator behind it: one task that waits for many events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.definitions.xcom_arg import XComArg
from airflow.sdk.exceptions import AirflowFailException, AirflowSensorTimeout, AirflowSkipException
from airflow.sdk.execution_time.context import NEVER_EXPIRE, TaskStateStoreAccessor
from airflow_events.errors import ArgumentsChanged, EventLost, EventNotSerializable, UnknownOutcome
from airflow_events.listeners import serde
from airflow_events.listeners.base import EventListener, Wait, check_arguments, check_listener, commits, releases
from airflow_events.listeners.commit import release, settle
from airflow_events.operators.route import needs_worker_to_record
from airflow_events.operators.wait_for_event import MISSING, OfTask, WaitForEventOperator, timezone_name
from airflow_events.triggers import outcome
from airflow_events.triggers.calls import Calls, result
from airflow_events.triggers.event import EventTrigger
from airflow_events.triggers.events import EventsTrigger, progress, recorded
from airflow_events.triggers.journal import EventRecord, Journal
from airflow_events.triggers.record import PROGRESS_KEY

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context

# How many events a worker records and commits at the same time.
_SETTLING = 64


class WaitForEventsOperator(WaitForEventOperator):
    """
    Wait for many events, and return them as a list, in the order of the arguments.

    One task instance and one trigger wait for all of them. Each event is recorded and committed for itself, as
    that of `WaitForEventOperator` is, in the name of its place in the list, and stays recorded whatever dies, is
    tried again or is cleared: the wait goes on with what is missing.

    :param listener: the class that knows the source. Its poll must be repeatable if it has something to commit.
    :param arguments: a list with the arguments of each poll, or the output of another task that is one. Of each
        item: a mapping is keyword arguments, a list or tuple positional ones, and anything else the only one.
    :param listener_kwargs: keyword arguments that all polls have in common.
    :param first: deliver as soon as so many have come, as pairs of index and event, in the order of the arguments.
        What else was claimed goes back to its source. None waits for all.
    :param timeout: as of `WaitForEventOperator`, for all of them together. What has come by then stays recorded.
    :param soft_fail: likewise.
    :param default: when the time is over, deliver this in the place of each event that has not come.
    :param replay: likewise; if False, a clear waits anew for all of them.
    """

    template_fields: Sequence[str] = ("arguments", "listener_kwargs")
    template_fields_renderers: ClassVar[dict[str, str]] = {"arguments": "json", "listener_kwargs": "json"}
    trigger_class: ClassVar[type[EventTrigger]] = EventsTrigger
    arguments_as_text: ClassVar[bool] = True
    _have: Sequence[int] = ()  # the indexes that a worker knows to be recorded
    _made: tuple[Any, Calls, str] | None = None  # from which arguments, and as text, as soon as that is needed

    def __init__(
        self,
        *,
        listener: type[EventListener],
        arguments: Sequence[Any] | XComArg,
        listener_kwargs: Mapping[str, Any] | XComArg | None = None,
        first: int | None = None,
        timeout: timedelta | float | None = None,
        soft_fail: bool = False,
        default: Any = MISSING,
        replay: bool = True,
        retries: int = 3,
        retry_delay: timedelta | float = timedelta(seconds=10),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            listener=listener,
            listener_kwargs=listener_kwargs,
            timeout=timeout,
            soft_fail=soft_fail,
            default=default,
            replay=replay,
            retries=retries,
            retry_delay=retry_delay,
            **kwargs,
        )
        self.arguments = arguments if isinstance(arguments, XComArg) else _listed(arguments)
        if first is not None and (isinstance(first, bool) or not isinstance(first, int) or first < 1):
            raise ValueError(f"first is a number of events of at least 1, or None for all, not {first!r}")
        if first is not None and self.has_default:
            raise ValueError("default stands in the place of a missing event, and with first= nothing is missing")
        self.first = first
        self._check_arguments()

    @classmethod
    def partial(cls, **kwargs: Any) -> Any:
        if "listener" in kwargs:
            _refuse(check_listener(kwargs["listener"]))
        return super().partial(**kwargs)

    def execute(self, context: Context) -> Any:
        return self._go_on(context, {})

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        match outcome.decode(event):
            case outcome.Arrived(value):
                return value
            case outcome.Batch(arrived):
                return self._go_on(context, arrived)
            case outcome.Gathered():
                if found := self._in_time(context):
                    return found[0]
                self._defer(context)  # forgotten since
                return None
            case outcome.TimedOut(deadline):
                if found := self._in_time(context):
                    return found[0]
                return self._time_is_up(deadline, context)
            case other:
                raise UnknownOutcome(f"{type(other).__name__} is for a task that waits for one event")

    def _go_on(self, context: Context, arrived: Mapping[int, Any]) -> Any:
        """Record and commit what has arrived, and deliver, or wait for what is missing."""
        events = asyncio.run(self._settle(context, arrived))
        wanted = self._wanted
        context["ti"].xcom_push(PROGRESS_KEY, progress(len(events), wanted))
        if len(events) >= wanted:
            return result(events, len(self._calls), self.first)
        if events:
            self.log.info("%s of %s events are recorded and committed", f"{len(events):,}", f"{wanted:,}")
        deadline = self._record(context).noted_deadline() if arrived else None
        if deadline is not None and deadline <= datetime.now(deadline.tzinfo):
            return self._time_is_up(deadline, context)
        self._have = sorted(events)
        self._defer(context)
        return None

    async def _settle(self, context: Context, arrived: Mapping[int, Any]) -> dict[int, Any]:
        """Return all events that a worker has recorded and committed, after it has done so with ``arrived``."""
        calls, wait = self._calls, self._wait(context)
        journal = Journal(self._pages(context))
        await journal.read()
        events = self._recorded_by(journal)
        left = [
            index
            for index in range(len(calls))
            if index not in events and journal.records.of(index, calls.digest(index)) is not None
        ]
        others = [index for index in sorted(arrived) if index not in events and index not in left]
        room = max(self._wanted - len(events) - len(left), 0)
        at_once = asyncio.Semaphore(_SETTLING)

        async def one(index: int, event: Any) -> None:
            args, kwargs = calls.of(index)
            # The trigger, which polled, cannot read this journal.
            store = EventRecord(journal, index, calls.digest(index), renames=False)
            async with at_once:
                try:
                    of_index = replace(wait, index=index)
                    await settle(self.listener, of_index, store, event, args=args, kwargs=kwargs)
                except EventLost as lost:
                    self.log.warning("Event %d went to another wait, and is waited for anew: %s", index, lost)

        def event_of(index: int) -> Any:
            record = journal.records.of(index, calls.digest(index))
            return arrived[index] if record is None else record.event

        work = [one(index, event_of(index)) for index in [*left, *others[:room]]]
        failures = [done for done in await asyncio.gather(*work, return_exceptions=True) if done is not None]
        if failures:
            raise failures[0]
        for index in others[room:]:
            args, kwargs = calls.of(index)
            await release(self.listener, replace(wait, index=index), arrived[index], args, kwargs)
        return self._recorded_by(journal)

    def _recorded_by(self, journal: Journal) -> dict[int, Any]:
        try:
            return recorded(journal, self._calls, self.listener)
        except ArgumentsChanged as error:
            raise AirflowFailException(str(error)) from error

    def _in_time(self, context: Context) -> list[Any]:
        events = self._events(context)
        return [result(events, len(self._calls), self.first)] if len(events) >= self._wanted else []

    def _events(self, context: Context) -> dict[int, Any]:
        """Return all events that are recorded and committed, by whomever."""
        by_trigger = self._recorded_by(self._journal_of_trigger(context))
        return {**by_trigger, **asyncio.run(self._settle(context, {}))}

    def _journal_of_trigger(self, context: Context) -> Journal:
        journal = Journal(PulledPages(context["ti"]))
        asyncio.run(journal.read())
        return journal

    def _release(self, context: Context, event: Any | None) -> None:
        """Give back what is claimed for the indexes of which no event is recorded."""
        if not releases(self.listener):
            return
        calls, wait, events = self._calls, self._wait(context), self._events(context)
        after = self._journal_of_trigger(context).records.after
        at_once = asyncio.Semaphore(_SETTLING)

        async def one(index: int) -> None:
            args, kwargs = calls.of(index)
            async with at_once:
                of_index = replace(wait, index=index, after=after(index))
                await release(self.listener, of_index, event, args, kwargs)

        async def all_of_them() -> None:
            await asyncio.gather(*(one(index) for index in range(len(calls)) if index not in events))

        asyncio.run(all_of_them())

    def _time_is_up(self, deadline: datetime, context: Context) -> Any:
        events = self._events(context)
        message = (
            f"{len(events):,} of {self._wanted:,} events of {self.listener.__qualname__} came until "
            f"{deadline.isoformat(timespec='seconds')}"
        )
        if self.has_default:
            self.log.info("%s; delivering the default in the place of each that is missing", message)
            return result(events, len(self._calls), self.first, [self.default])
        if self.soft_fail:
            raise AirflowSkipException(message)
        raise AirflowSensorTimeout(f"{message}; a clear of the task waits for the others")

    @property
    def _calls(self) -> Calls:
        if self._made is None or self._made[0] is not self.arguments:
            zone = Wait("", "", "", timezone=timezone_name(self)).tz
            arguments = serde.localized(_listed(self.arguments), zone)
            assert isinstance(self.listener_kwargs, Mapping), "rendered by now"
            calls = Calls(arguments, serde.localized(dict(self.listener_kwargs), zone))
            self._made = (self.arguments, calls, "")
        return self._made[1]

    @property
    def _wanted(self) -> int:
        count = len(self._calls)
        if self.first is not None and self.first > count:
            raise AirflowFailException(f"first={self.first}, and the list has {count} items")
        return count if self.first is None else self.first

    def _pages(self, context: Context) -> StorePages:
        ti = context["ti"]
        return StorePages(context["task_state_store"], "" if self.replay else f"{ti.max_tries}:")

    def _trigger_arguments(self, *, started_on_worker: bool) -> dict[str, Any]:
        calls = self._calls
        assert self._made is not None
        if not self._made[2]:
            self._made = (self._made[0], calls, calls.encode())
        told = super()._trigger_arguments(started_on_worker=started_on_worker)
        del told["listener_args"], told["listener_kwargs"]
        return {
            **told,
            "calls": self._made[2],
            "count": len(calls),
            "first": self.first,
            "hand_over": needs_worker_to_record(self, started_on_worker=started_on_worker) is not None,
            "have": list(self._have),
        }

    def _starts_in_triggerer(self) -> bool:
        return "first" in vars(self) and super()._starts_in_triggerer()

    def _check_arguments(self) -> None:
        _refuse(self.listener)
        if "first" not in vars(self):  # the constructor of the operator for one event is still at work
            return
        if isinstance(self.arguments, XComArg) or isinstance(self.listener_kwargs, XComArg):
            return
        if self.first is not None and self.first > len(self.arguments):
            raise ValueError(f"first={self.first}, and the list has {len(self.arguments)} items")
        given = [*self.arguments, *self.listener_kwargs.values()]
        if not any(XComArg.iter_xcom_references(given)):
            for name in self.template_fields:
                try:
                    serde.check(getattr(self, name), name)
                except EventNotSerializable as error:
                    raise TypeError(f"{self.task_id}: {error}") from error
        calls = Calls(self.arguments, self.listener_kwargs)
        for index, argument in enumerate(self.arguments):
            if not isinstance(argument, XComArg):
                args, kwargs = calls.of(index)
                try:
                    check_arguments(self.listener, args, kwargs)
                except TypeError as error:
                    raise TypeError(f"{self.task_id}: arguments[{index}]: {error}") from None
        if self.has_default:
            serde.check(self.default, "default")


@dataclass(frozen=True)
class StorePages:
    """
    The journal's values in the task state store, which a worker reaches, and which keeps them over all tries.

    It refuses what is written by a worker that its task has outlived.

    :param generation: a prefix of the names, if what was recorded before a clear does not count.
    """

    store: TaskStateStoreAccessor
    generation: str = ""

    async def get(self, name: str) -> Any:
        stored = self.store.get(self.generation + name)
        return None if stored is None else serde.decode(json.dumps(stored))

    async def set(self, name: str, value: Any) -> None:
        self.store.set(self.generation + name, serde.as_json(value), retention=NEVER_EXPIRE)


@dataclass(frozen=True)
class PulledPages:
    """The journal's values that a trigger has written, as a worker reads them."""

    ti: Any

    async def get(self, name: str) -> Any:
        return self.ti.xcom_pull(task_ids=self.ti.task_id, key=name, map_indexes=self.ti.map_index)

    async def set(self, name: str, value: Any) -> None:
        raise NotImplementedError("a worker has pages of its own")


class _WaitForEvents(OfTask):
    """
    ``wait_for_events(listener, arguments, **common)``: a task that waits for many events, and its output, a list.

    What is for the task goes to `override`::

        paid = wait_for_events.override(task_id="paid", timeout=timedelta(days=1))(
            KafkaWatchListener, [{"match": {"order": order}} for order in orders], topic="payments"
        )

    :param arguments: as of `WaitForEventsOperator`; ``common`` is its ``listener_kwargs``.
    """

    def __call__(
        self, listener: type[EventListener], arguments: Sequence[Any] | XComArg, /, **common: Any
    ) -> XComArg:
        return self._output(
            WaitForEventsOperator,
            "wait_for_events",
            listener=listener,
            arguments=arguments,
            listener_kwargs=common,
        )


wait_for_events = _WaitForEvents()


def _listed(arguments: Any) -> list[Any]:
    if isinstance(arguments, (str, bytes, Mapping)) or not hasattr(arguments, "__iter__"):
        raise TypeError(f"arguments is a list with the arguments of each poll, not {arguments!r:.200}")
    return arguments if isinstance(arguments, list) else list(arguments)


def _refuse(listener: type[EventListener]) -> None:
    if commits(listener) and not listener.repeatable_poll:
        raise TypeError(
            f"{listener.__qualname__} has something to commit, and its poll is not repeatable: a second "
            "triggerer, or the same one started again, would take other events, and what the first one holds "
            "would be nobody's. Use WaitForEventOperator with it, mapped over the arguments"
        )
    if listener.recorded_from_outside:
        raise TypeError(
            f"an event of {listener.__qualname__} is sent to a task and ends it. Use WaitForEventOperator "
            "with it, mapped over the arguments"
        )


__all__ = ["WaitForEventsOperator", "wait_for_events"]
