"""The trigger of a wait: polls, and ends the task where no worker is needed for it."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import greenback
from airflow.sdk.configuration import conf
from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.comms import GetTaskStates
from airflow.triggers.base import BaseTrigger, TaskSkippedEvent, TaskSuccessEvent, TriggerEvent
from airflow_events.errors import EventLost
from airflow_events.listeners import serde
from airflow_events.listeners.base import EventListener, Wait, commits, describe, working_for
from airflow_events.listeners.clock import Clock
from airflow_events.listeners.commit import Phase, Record, delivered, record_of, recorded, release, settle
from airflow_events.triggers import outcome, reference, stalls
from airflow_events.triggers.foreseen import Foreseen, foresee
from airflow_events.triggers.lookups import Lookups
from airflow_events.triggers.record import RECORD_KEY, XComRecord
from airflow_events.triggers.requests import Requests
from airflow_events.triggers.watchdog import Steps

if TYPE_CHECKING:
    import jinja2
    from airflow.sdk.definitions.context import Context

log = logging.getLogger(__name__)

# In which states the task instance is nobody's to wait for any more.
_ENDED = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})
# Seconds. Waiting in steps bounds by how much a deadline is late after the clock was set forward.
_LONGEST_PAUSE = 600.0
# Seconds that a cancelled poll has to end.
_LONGEST_GOODBYE = 10.0


class _TimeIsUp(Exception):
    """The wait's deadline has passed."""


class _PollAnew(Exception):
    """The poll was ended in order to begin again."""


# What outlives its trigger, which asyncio itself would not keep.
_letting_go: set[asyncio.Future[None]] = set()


class EventTrigger(BaseTrigger):
    """
    Wait for one event in the triggerer.

    Started by the scheduler it learns from Airflow for which wait it works, and started by a worker, from
    the worker, through the same parameters. Two triggerers may run it at once; what they may do to each
    other is bounded by `airflow_events.listeners.commit.settle`.

    :param listener: as `airflow_events.triggers.reference` writes it.
    :param listener_args: for ``poll_for_event``; rendered here if the trigger starts here.
    :param finish_on_worker: hand the event to a worker instead of ending the task here.
    :param timeout: seconds from the first try on, None for no end. Of a wait that starts here.
    :param deadline: the same as a moment, in a wait that a worker started.
    :param soft_fail: when the time is up, skip the task.
    :param default: when the time is up, deliver this: a list of one item, or empty for none.
    :param push: whether the event becomes the task's return value.
    :param wait: `Wait` as a dict, in a wait that a worker started.
    :param mapped_over: whether a task is mapped over the return value; likewise.
    """

    def __init__(
        self,
        *,
        listener: str | dict[str, str],
        listener_args: list[Any] | None = None,
        listener_kwargs: dict[str, Any] | None = None,
        finish_on_worker: bool = False,
        timeout: float | None = None,
        deadline: datetime | None = None,
        soft_fail: bool = False,
        default: list[Any] | None = None,
        push: bool = True,
        wait: dict[str, Any] | None = None,
        mapped_over: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.logger()  # the class's, which its instances then share: one of its own is 1 KB
        self.listener = listener
        self.listener_args = listener_args or []
        self.listener_kwargs = listener_kwargs or {}
        self.finish_on_worker = finish_on_worker
        self.timeout = timeout
        self.deadline = deadline
        self.soft_fail = soft_fail
        self.default = default or []
        self.push = push
        self.wait = wait
        self.mapped_over = mapped_over
        self._dag_result = False
        self._retries = 0
        self._after = ""  # of the wait, as it polls
        self._arrived: float | None = None  # when it was polled, in seconds since the epoch
        self._recording = False
        self._foreseen: Foreseen | None = None
        self._again = False
        self._reads_later = False  # whether it polls before it looks for what is recorded
        self._unread = False  # whether it has still to look
        self._poll_task: asyncio.Task[Any] | None = None  # which holds the event, while it is not recorded

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            f"{__name__}.{type(self).__name__}",
            {
                "listener": self.listener,
                "listener_args": self.listener_args,
                "listener_kwargs": self.listener_kwargs,
                "finish_on_worker": self.finish_on_worker,
                "timeout": self.timeout,
                "deadline": self.deadline,
                "soft_fail": self.soft_fail,
                "default": self.default,
                "push": self.push,
                "wait": self.wait,
                "mapped_over": self.mapped_over,
            },
        )

    def render_template_fields(self, context: Context, jinja_env: jinja2.Environment | None = None) -> None:
        """Render the arguments, and take from the context what a worker would have told."""
        # Airflow calls this for tasks that start in the triggerer. If a worker deferred one of them again, it
        # has rendered the arguments and told the wait.
        if self.wait is not None:
            return
        super().render_template_fields(context, jinja_env)
        ti, task = context["ti"], context["task"]
        self.wait = {
            "dag_id": ti.dag_id,
            "run_id": ti.run_id,
            "task_id": ti.task_id,
            "map_index": ti.map_index if ti.map_index is not None else -1,
            "run_start": context["dag_run"].start_date,
            "timezone": getattr(context["dag"].timezone, "name", "UTC"),
        }
        self._retries = task.retries or 0
        self.mapped_over = next(iter(task.iter_mapped_dependants()), None) is not None
        self._dag_result = bool(getattr(task, "returns_dag_result", False))
        _let_go_of_the_dag(context)

    async def run(self) -> AsyncIterator[TriggerEvent]:
        assert self.wait is not None, "a trigger is started by the scheduler or by WaitForEventOperator"
        wait = Wait(**self.wait)
        listener = reference.load(self.listener)
        if self.task_instance is None:  # dag.test(), which gives a trigger no way to Airflow's database
            self._announce(wait)
            yield TriggerEvent(outcome.encode(outcome.Arrived(await self._poll(listener, wait))))
            return

        record = XComRecord(wait)
        self._foreseen = foresee(listener, wait, self.listener_args, self.listener_kwargs)
        first_try = self.task_instance.try_number == 1
        # Of what is foreseen there is no record before the first try ends.
        nothing_yet = first_try and self._foreseen is not None
        self._reads_later = self._foreseen is None and _may_poll_unread(listener)
        self._unread = self._reads_later and first_try
        with stalls.told_to(self._poll_anew):
            while True:
                self._arrived = record.arrived = None
                stored = None if nothing_yet or self._unread else await record.read()
                if record.to_come is not None and not self._foresees(record.to_come):
                    await record.drop(record.to_come)  # for its moment would come, and this is another event
                    continue
                if wait.after != record.after:
                    wait = dataclasses.replace(wait, after=record.after)
                self._after = record.after
                if stored is not None:
                    self.log.info(
                        "The event of %s is %s already; the wait is %s",
                        self._call,
                        stored.phase.value,
                        wait.id,
                    )
                    if stored.phase is Phase.REJECTED:  # whether a clear has undone that, a worker knows
                        yield TriggerEvent(outcome.encode(outcome.Rejected()))
                        return
                    event = stored.event
                else:
                    try:
                        await self._begin(wait, record)
                        if self._foreseen is not None:
                            await self._until_it_comes(self._foreseen, listener, wait)
                        event = await self._poll(listener, wait)
                    except _TimeIsUp:
                        if await record.read() is not None:  # by a second triggerer, just in time
                            continue
                        await self._release(listener, wait)
                        yield await self._time_is_up(listener, record)
                        return
                    except _PollAnew:
                        continue
                    except Exception:
                        if self.timeout is not None:
                            await record.hand_over_deadline()
                        raise
                    record.arrived = self._arrived
                    if commits(listener) and await self._has_ended(wait):
                        self.log.warning("The task has ended meanwhile; its event goes back to the source")
                        await self._release(listener, wait)
                        return
                if self._ends_on_worker:
                    yield TriggerEvent(outcome.encode(outcome.Arrived(event, self._arrived)))
                    return
                if stored is None and self._foreseen is not None:
                    yield await self._deliver_foreseen(listener, wait, record, event)
                    return
                try:
                    event = await self._settle(listener, wait, record, event)
                except EventLost as lost:
                    self.log.warning("The event went to another wait, and this one waits on: %s", lost)
                    continue
                result = await self._deliver(record, event)
                if isinstance(result, TaskSuccessEvent):
                    delivered(listener, wait, self._arrived)
                yield result
                return

    async def _begin(self, wait: Wait, record: XComRecord) -> None:
        """Find out the deadline, which is counted over all tries, and say what is waited for."""
        assert self.task_instance is not None
        if self.timeout is not None:
            self.deadline = await record.deadline(
                timedelta(seconds=self.timeout), self.task_instance.try_number, self._retries, _now()
            )
        self._announce(wait)

    async def on_kill(self) -> None:
        """
        Give back what is claimed and not recorded, once a user has ended the task.

        Airflow calls this too when the user clears the task, and when it has moved the trigger to another
        triggerer; the wait goes on then, and keeps its claim.
        """
        # In a task of its own, since Airflow cancels the trigger again each second while it is not gone.
        letting_go = asyncio.ensure_future(self._let_go())
        _letting_go.add(letting_go)
        letting_go.add_done_callback(_letting_go.discard)
        await asyncio.shield(letting_go)

    async def _let_go(self) -> None:
        if self.wait is None or self.task_instance is None:
            return
        wait = dataclasses.replace(Wait(**self.wait), after=self._after)
        # What is recorded stays the wait's, for a clear, unless the record has gone with the run.
        if self._recording and await self._state(wait) != "removed":
            return
        if self._poll_task is not None:
            await asyncio.wait({self._poll_task}, timeout=_LONGEST_GOODBYE)
        if (state := await self._state(wait)) not in _ENDED:
            return
        await self._release(reference.load(self.listener), wait)
        ahead = self._foreseen.record if self._foreseen is not None else None
        if ahead is not None and state not in ("success", "removed"):
            await XComRecord(wait).drop(ahead)
            await XComRecord(wait).undeliver()

    def _poll_anew(self) -> None:
        """
        Begin again, since this process stood still for a while.

        Another triggerer may have had the trigger meanwhile, and may have died after it took or recorded an
        event, for which this poll would wait in vain.
        """
        if self._poll_task is not None and not self._poll_task.done():
            self._unread = self._reads_later
            self._again = True
            self._poll_task.cancel()

    async def _see_whether_recorded(self) -> None:
        """Begin again if an event is recorded already, since the source may have forgotten it."""
        assert self.wait is not None
        if await XComRecord(Wait(**self.wait)).read() is not None:
            self._poll_anew()
            self._unread = False

    @property
    def _ends_on_worker(self) -> bool:
        return self.finish_on_worker or airflow_has_listeners()

    @property
    def _call(self) -> str:
        return describe(reference.display_name(self.listener), self.listener_args, self.listener_kwargs)

    def _announce(self, wait: Wait) -> None:
        self.log.info(
            "Waiting for an event of %s since %s, until %s; the wait is %s",
            self._call,
            _now().isoformat(timespec="seconds"),
            self.deadline.isoformat(timespec="seconds") if self.deadline else "it comes",
            wait.id,
        )

    async def _poll(self, listener: type[EventListener], wait: Wait) -> Any:
        """
        Return the event, checked.

        :raises _TimeIsUp: the deadline has passed, and no event came while the poll ended.
        :raises _PollAnew: see `_poll_anew`.
        """
        self._again = False
        loop = asyncio.get_running_loop()
        with working_for(wait):  # all the while, since the poll's context is then no copy of this one
            poll = self._poll_task = asyncio.create_task(
                poll_once(
                    listener,
                    self.listener_args,
                    self.listener_kwargs,
                    blocking_threshold(),
                    portal=greenback.has_portal(),
                )
            )
            if self._unread:
                self._unread = False
                Lookups.of_loop().add(self._see_whether_recorded)
            try:
                while not poll.done() and self._remaining() > 0:
                    # What asyncio.wait does, in a quarter of its memory.
                    woken = loop.create_future()
                    wake = functools.partial(_wake, woken)
                    poll.add_done_callback(wake)
                    alarm = None
                    if self.deadline is not None:
                        alarm = loop.call_later(min(self._remaining(), _LONGEST_PAUSE), wake)
                    try:
                        await woken
                    finally:
                        poll.remove_done_callback(wake)
                        if alarm is not None:
                            alarm.cancel()
            finally:
                if self._reads_later:
                    Lookups.of_loop().discard(self._see_whether_recorded)
                # A task of its own, so that a listener which swallows its cancellation cannot end the wait.
                if not poll.done():
                    poll.cancel()
                    await asyncio.wait({poll}, timeout=_LONGEST_GOODBYE)
        if poll.done() and not poll.cancelled():
            event = poll.result()
            self._arrived = time.time()
            return as_recorded(event)
        if self._again:
            raise _PollAnew
        if self._remaining() > 0:
            raise RuntimeError(f"{listener.__qualname__}.poll_for_event cancelled itself")
        raise _TimeIsUp

    def _foresees(self, record: Record) -> bool:
        return self._foreseen is not None and self._foreseen.event == record.event

    async def _until_it_comes(self, foreseen: Foreseen, listener: type[EventListener], wait: Wait) -> None:
        """
        Return when an event that is foreseen can be polled, without a poll that waits meanwhile.

        :raises _TimeIsUp: the deadline has passed before.
        """
        clock = Clock.of_loop()
        while (now := _now()) < foreseen.at:
            if self.deadline is not None and self.deadline <= now:
                raise _TimeIsUp
            write_at = self._to_be_written_at(foreseen)
            if write_at is not None and write_at <= now:
                ahead = record_of(listener, wait, foreseen.event, foreseen.at)
                await foreseen.write(functools.partial(self._write_ahead, XComRecord(wait)), ahead)
                continue
            await clock.until(min(moment for moment in (foreseen.at, self.deadline, write_at) if moment))

    def _remaining(self) -> float:
        return (self.deadline - _now()).total_seconds() if self.deadline else _LONGEST_PAUSE

    async def _settle(self, listener: type[EventListener], wait: Wait, record: XComRecord, event: Any) -> Any:
        self._recording = True  # from here on the claim may stand in a record, which the next try needs
        try:
            event = await settle(
                listener,
                wait,
                record,
                event,
                args=self.listener_args,
                kwargs=self.listener_kwargs,
                arrived=self._arrived,
            )
        except EventLost:
            self._recording = False  # and so a user who ends the wait later releases what it claims then
            raise
        self._recording = False
        self._poll_task = None
        self.log.info("The event is recorded and committed")
        return event

    async def _deliver_foreseen(
        self, listener: type[EventListener], wait: Wait, record: XComRecord, event: Any
    ) -> TriggerEvent:
        """Return what ends the task, and records the event in the same transaction unless that was done ahead."""
        result = await self._deliver(record, event)
        if isinstance(result, TaskSuccessEvent):
            if self._is_written(event):
                self.log.info("The event is recorded, which was done ahead of it")
            else:
                result.xcoms = {RECORD_KEY: record_of(listener, wait, event).as_xcom()}
                self.log.info("The event is recorded as the task succeeds")
            recorded(listener, wait, self._arrived)
            delivered(listener, wait, self._arrived)
        return result

    async def _deliver(self, record: XComRecord, value: Any) -> TriggerEvent:
        """Return what ends the task with ``value``; a worker does it where only that gives the right error."""
        mapped_length = None
        if self.mapped_over:
            if not isinstance(value, (list, tuple, dict)) or len(value) > conf.getint("core", "max_map_length"):
                return TriggerEvent(outcome.encode(outcome.Arrived(value)))
            mapped_length = len(value)
        if self.push and value is not None and not self._is_written(value):
            await record.deliver(value, mapped_length=mapped_length, dag_result=self._dag_result)
        return TaskSuccessEvent()

    def _is_written(self, event: Any) -> bool:
        """Whether the record and the return value were written ahead, of this event."""
        return self._foreseen is not None and self._foreseen.is_written and self._foreseen.event == event

    async def _write_ahead(self, store: XComRecord, record: Record) -> None:
        await store.write(record)
        if self.push and record.event is not None:
            await store.deliver(record.event, dag_result=self._dag_result)

    def _to_be_written_at(self, foreseen: Foreseen) -> datetime | None:
        """Return when to write ahead of the event; None if that is not to be."""
        return None if self.mapped_over or self._ends_on_worker else foreseen.to_be_written_at(self.deadline)

    async def _time_is_up(self, listener: type[EventListener], record: XComRecord) -> TriggerEvent:
        assert self.deadline is not None
        self.log.info("No event came until %s", self.deadline.isoformat(timespec="seconds"))
        on_worker = self._ends_on_worker or listener.recorded_from_outside
        if on_worker or not (self.soft_fail or self.default):
            return TriggerEvent(outcome.encode(outcome.TimedOut(self.deadline)))
        if self.default:
            self.log.info("Delivering the default")
            return await self._deliver(record, self.default[0])
        return TaskSkippedEvent()

    async def _release(self, listener: type[EventListener], wait: Wait) -> None:
        poll = self._poll_task
        polled = poll is not None and poll.done() and not poll.cancelled() and poll.exception() is None
        event = poll.result() if poll is not None and polled else None
        await release(listener, wait, event, self.listener_args, self.listener_kwargs)

    async def _has_ended(self, wait: Wait) -> bool:
        return await self._state(wait) in _ENDED

    async def _state(self, wait: Wait) -> str | None:
        """Return the task instance's state; ``removed`` if it, or its run, was deleted."""
        asked = GetTaskStates(
            dag_id=wait.dag_id,
            run_ids=[wait.run_id],
            task_ids=[wait.task_id],
            map_index=wait.map_index if wait.map_index >= 0 else None,
        )
        async with Requests.of_loop().turn(self._arrived):
            answer: Any = await task_runner.SUPERVISOR_COMMS.asend(asked)
        states = answer.task_states.get(wait.run_id, {})
        name = wait.task_id if wait.map_index < 0 else f"{wait.task_id}_{wait.map_index}"
        state: str | None = states.get(name, "removed")
        return state


def _may_poll_unread(listener: type[EventListener]) -> bool:
    """
    Whether a wait can poll before it has looked for a record, in its first try and after a stall.

    It is seldom there: another triggerer had the trigger, and died right after it recorded the event. So the look
    can take its time, where a poll takes nothing from the source that the record would then make superfluous.
    """
    return listener.repeatable_poll and not commits(listener) and not listener.recorded_from_outside


def _let_go_of_the_dag(context: Context) -> None:
    """
    Drop the DAG that Airflow's runner builds for each trigger which starts in the triggerer.

    It keeps it as long as the trigger runs, by the context and by the task instance, and needs it for the
    rendering alone (`TriggerRunner.create_triggers`, ``run_trigger``). In a DAG of 300 tasks it is 1.7 MB.
    """
    ti = context["ti"]
    context.clear()  # type: ignore[attr-defined]
    ti.task = None  # type: ignore[assignment]


def _now() -> datetime:
    return datetime.now(timezone.utc)


def blocking_threshold() -> float:
    """Return for how many seconds a step of a poll may take before that is logged."""
    return float(conf.getfloat("triggerer", "blocked_main_thread_warning_threshold", fallback=0.2))


def poll_once(
    listener: type[EventListener], args: Any, kwargs: Any, threshold: float, *, portal: bool
) -> Steps[Any]:
    """
    Return what a fresh listener polls, to be awaited; that it blocks the loop is logged.

    :param threshold: for longer than so many seconds.
    :param portal: whether it can make Airflow's synchronous calls.
    """
    poll = listener().poll_for_event(*args, **kwargs)
    return Steps(poll, threshold, _complaint(listener.__qualname__), portal=portal)


@functools.lru_cache(maxsize=256)
def _complaint(listener: str) -> Callable[[float], None]:
    return functools.partial(
        log.warning,
        "%s.poll_for_event has blocked the triggerer for %.2f seconds, and with it every other trigger; use the "
        "source's async client, or asyncio.to_thread",
        listener,
    )


def _wake(woken: asyncio.Future[None], *_: object) -> None:
    if not woken.done():
        woken.set_result(None)


def as_recorded(event: Any) -> Any:
    """
    Return an event as it will be read from the record, so that a replay delivers what the first delivery did.

    :raises EventNotSerializable: it cannot be recorded.
    """
    return serde.check(event)


def airflow_has_listeners() -> bool:
    """Whether a plugin listens to task states, which it would miss if the task ended here."""
    from airflow.listeners.listener import get_listener_manager

    return bool(get_listener_manager().has_listeners)
