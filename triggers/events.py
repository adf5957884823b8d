"""The trigger of a task that waits for many events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.comms import SetXCom
from airflow.sdk.execution_time.xcom import XCom
from airflow.triggers.base import TaskSkippedEvent, TriggerEvent
from airflow_events.errors import ArgumentsChanged
from airflow_events.listeners.base import EventListener, Wait, commits
from airflow_events.listeners.commit import Phase, Record
from airflow_events.triggers import outcome, reference, stalls
from airflow_events.triggers.calls import Calls, result
from airflow_events.triggers.event import EventTrigger, _now, _PollAnew, _TimeIsUp
from airflow_events.triggers.gathering import Gathering
from airflow_events.triggers.journal import Journal
from airflow_events.triggers.record import PROGRESS_KEY, XComRecord

if TYPE_CHECKING:
    import jinja2
    from airflow.sdk.definitions.context import Context

# Seconds between two notes of how many events have come.
_SHOW_EVERY = 2.0
# Seconds for which events that a worker must record are held as claims, so that many go to one worker.
HOLD = 600.0
_LONGEST_PAUSE = 600.0
# Characters of arguments from which on reading them would hold up other triggers.
_LONG = 20_000
# How many records are looked at in one turn of the event loop.
_AT_ONCE = 500


class _TaskHasEnded(Exception):
    """The task is nobody's to wait for any more."""


@dataclass(frozen=True)
class XComPages:
    """The journal's values among the XComs of a task that waits in the triggerer."""

    wait: Wait

    async def get(self, name: str) -> Any:
        return await XCom.aget_one(key=name, **self._task)

    async def set(self, name: str, value: Any) -> None:
        await XCom.aset(key=name, value=value, **self._task)

    @property
    def _task(self) -> dict[str, Any]:
        wait = self.wait
        return {
            "dag_id": wait.dag_id,
            "run_id": wait.run_id,
            "task_id": wait.task_id,
            "map_index": wait.map_index,
        }


class XComRecordOfMany(XComRecord):
    """The record of a task whose result is long; to make an XCom of it takes a while, in one piece."""

    async def deliver(self, value: Any, *, mapped_length: int | None = None, dag_result: bool = False) -> None:
        # All of it in a thread, by XCom.set, might come after the trigger was cancelled, and would wait for an
        # answer in vain where the triggerer shuts down meanwhile.
        message = await asyncio.to_thread(self._message, value, mapped_length, dag_result)
        await task_runner.SUPERVISOR_COMMS.asend(message)

    def _message(self, value: Any, mapped_length: int | None, dag_result: bool) -> SetXCom:
        """Return what `XCom.aset` sends."""
        stored: Any = XCom.serialize_value(value, key=XCom.XCOM_RETURN_KEY, **self._key)
        return SetXCom(
            key=XCom.XCOM_RETURN_KEY,
            value=stored,
            dag_result=dag_result,
            mapped_length=mapped_length,
            **self._key,
        )


def progress(arrived: int, wanted: int, uncommitted: int = 0) -> dict[str, Any]:
    """Return what the page shows of a wait while it waits."""
    phase = Phase.RECORDED if uncommitted else Phase.COMMITTED
    return {"phase": phase.value, "arrived": arrived, "of": wanted, "uncommitted": uncommitted}


def recorded(journal: Journal, calls: Calls, listener: type[EventListener]) -> dict[int, Any]:
    """
    Return the events that are recorded and committed, by index, of calls that are as they were then.

    :raises ArgumentsChanged: an event was recorded for other arguments than those at its index now, and its
        source has forgotten it, or will, for that.
    """
    records = _records(journal, calls, listener)
    return {index: record.event for index, record in records if record and record.phase is Phase.COMMITTED}


async def recorded_in_turns(journal: Journal, calls: Calls, listener: type[EventListener]) -> dict[int, Any]:
    """Return what `recorded` does, without holding up other triggers while it goes through thousands."""
    events = {}
    for number, (index, record) in enumerate(_records(journal, calls, listener)):
        if record and record.phase is Phase.COMMITTED:
            events[index] = record.event
        if number % _AT_ONCE == _AT_ONCE - 1:
            await asyncio.sleep(0)
    return events


def _records(journal: Journal, calls: Calls, listener: type[EventListener]) -> Iterator[tuple[int, Record | None]]:
    """Go through the indexes of which something is recorded, with what is recorded for the call of now."""
    for index in journal.records:
        record = None
        changed = True
        if index < len(calls):
            call = calls.digest(index)
            changed = journal.records.calls(index) != {call}
            record = journal.records.of(index, call)
        if changed and commits(listener):
            raise ArgumentsChanged(index, len(calls))
        yield index, record


class EventsTrigger(EventTrigger):
    """
    Wait for many events in the triggerer, each recorded and committed for itself.

    What it shares with `EventTrigger` is described there: who starts it, its deadline, and how it ends the task.

    :param calls: `Calls` as text; templates in it are rendered here if the trigger starts here.
    :param count: how many there are, for those who only want to show it.
    :param first: as of ``WaitForEventsOperator``.
    :param hand_over: leave the recording to a worker: what has been polled goes to one when it is complete, or
        when the first of it has been held for ten minutes.
    :param have: the indexes of the events that a worker has recorded.
    :param finish_on_worker: let a worker end the task.
    """

    def __init__(
        self,
        *,
        calls: str,
        count: int,
        first: int | None = None,
        hand_over: bool = False,
        have: Iterable[int] = (),
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.calls = calls
        self.count = count
        self.first = first
        self.hand_over = hand_over
        self.have = list(have)
        self._gathering: Gathering | None = None
        self._shown: tuple[int, int] | None = None
        self._shown_at = 0.0

    def serialize(self) -> tuple[str, dict[str, Any]]:
        _, arguments = super().serialize()
        del arguments["listener_args"], arguments["listener_kwargs"]
        many = {
            "calls": self.calls,
            "count": self.count,
            "first": self.first,
            "hand_over": self.hand_over,
            "have": self.have,
        }
        return f"{__name__}.{type(self).__name__}", {**arguments, **many}

    def render_template_fields(self, context: Context, jinja_env: jinja2.Environment | None = None) -> None:
        if self.wait is None and ("{{" in self.calls or "{%" in self.calls):
            environment = jinja_env or self.get_template_env()
            calls = Calls.decode(self.calls)
            arguments, common = (
                self._rendered(value, context, environment) for value in (list(calls.arguments), calls.common)
            )
            self.calls = Calls(arguments, common).encode()
        super().render_template_fields(context, jinja_env)

    def _rendered(self, value: Any, context: Context, environment: jinja2.Environment) -> Any:
        """Render what has a template in it; Airflow would compile one for each of thousands of strings."""
        if isinstance(value, str):
            has_template = "{{" in value or "{%" in value
            return self.render_template(value, context, environment) if has_template else value
        if isinstance(value, dict):
            return {key: self._rendered(item, context, environment) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._rendered(item, context, environment) for item in value)
        return value

    async def run(self) -> AsyncIterator[TriggerEvent]:
        assert self.wait is not None, "a trigger is started by the scheduler or by WaitForEventsOperator"
        wait = Wait(**self.wait)
        listener = reference.load(self.listener)
        if len(self.calls) < _LONG:
            calls = Calls.prepared(self.calls)
        else:
            calls = await asyncio.to_thread(Calls.prepared, self.calls)
        wanted = len(calls) if self.first is None else self.first
        if self.task_instance is None:  # dag.test(), which gives a trigger no way to Airflow's database
            gathering = self._gathering = Gathering(listener, wait, calls, wanted=wanted, journal=None)
            await self._gather(gathering)
            yield await _batch(gathering)
            return

        record = XComRecordOfMany(wait)

        async def check() -> None:
            if await self._has_ended(wait):
                raise _TaskHasEnded

        journal = None if self.hand_over else Journal(XComPages(wait), check)
        with stalls.told_to(self._poll_anew):
            while True:
                self._again = False
                events = {}
                if journal is not None:
                    try:
                        await journal.read()
                    except _TaskHasEnded:
                        self.log.warning("The task has ended meanwhile; nothing is waited for")
                        return
                    events = await recorded_in_turns(journal, calls, listener)
                gathering = Gathering(
                    listener, wait, calls, wanted=wanted, journal=journal, have=[*self.have, *events]
                )
                self._gathering = gathering
                try:
                    if gathering.complete:
                        self.log.info("All events of %s are recorded already; the wait is %s", self._call, wait.id)
                    else:
                        await self._wait_for_many(gathering, record)
                except _TimeIsUp:
                    if gathering.complete:
                        pass
                    elif self.hand_over and gathering.arrived:
                        self.log.info("The time is up; %d events go to a worker first", len(gathering.arrived))
                    else:
                        await gathering.release()
                        yield await self._end_of_time(gathering, record)
                        return
                except _PollAnew:
                    continue
                except _TaskHasEnded:
                    self.log.warning("The task has ended meanwhile; what is not recorded goes back to the source")
                    await gathering.release()
                    return
                if journal is None:
                    yield await _batch(gathering)
                    return
                await self._show(gathering, finally_=True)
                if gathering.missing:  # the first k are there
                    await gathering.release()
                if self._ends_on_worker:
                    yield TriggerEvent(outcome.encode(outcome.Gathered()))
                    return
                events = await recorded_in_turns(journal, calls, listener)
                yield await self._deliver(record, result(events, len(calls), self.first))
                return

    async def _wait_for_many(self, gathering: Gathering, record: XComRecord) -> None:
        """Gather until the deadline, which is counted over all tries."""
        assert self.task_instance is not None
        if self.timeout is not None:
            self.deadline = await record.deadline(
                timedelta(seconds=self.timeout), self.task_instance.try_number, self._retries, _now()
            )
        self._announce(gathering.wait)
        if gathering.have:
            self.log.info("%s of %s events are there already", f"{len(gathering.have):,}", f"{self.count:,}")
        try:
            await self._gather(gathering)
        except (_TimeIsUp, _PollAnew, _TaskHasEnded):
            raise
        except Exception:
            await self._show(gathering, finally_=True)
            if self.timeout is not None:
                await record.hand_over_deadline()
            raise

    async def _gather(self, gathering: Gathering) -> None:
        """
        Return when all is there that is wanted, or when it is time to hand over what is.

        :raises _TimeIsUp: the deadline has passed.
        :raises _PollAnew: see `_poll_anew`.
        """
        loop = asyncio.get_running_loop()
        at_once = True
        try:
            await gathering.begin()
            self.log.info("%s events are waited for", f"{len(gathering.missing):,}")
            while not gathering.complete:
                if gathering.error is not None:
                    break
                if self._again:
                    break
                pause = min(self._remaining(), _LONGEST_PAUSE)
                if self.hand_over and gathering.first_arrived is not None:
                    pause = min(pause, gathering.first_arrived + HOLD - loop.time())
                if pause <= 0:
                    break
                await gathering.changed(min(pause, await self._show(gathering)))
            at_once = False
        finally:
            await gathering.end(at_once=at_once)
        if gathering.complete:
            return
        if gathering.error is not None:
            raise gathering.error
        if self._again:
            raise _PollAnew
        if self._remaining() <= 0:
            raise _TimeIsUp

    async def _show(self, gathering: Gathering, *, finally_: bool = False) -> float:
        """Note how many events have come, if that is new, and return in how many seconds to come again."""
        if self.task_instance is None:
            return _LONGEST_PAUSE
        uncommitted = 0 if gathering.journal is None else gathering.journal.records.uncommitted
        arrived = len(gathering.have) + (len(gathering.arrived) if self.hand_over else uncommitted)
        if (arrived, uncommitted) == (self._shown or (0, 0)):
            return _LONGEST_PAUSE
        now = asyncio.get_running_loop().time()
        if (since := now - self._shown_at) < _SHOW_EVERY and not finally_:
            return _SHOW_EVERY - since
        self._shown, self._shown_at = (arrived, uncommitted), now
        self.log.info("%s of %s events have arrived", f"{arrived:,}", f"{gathering.wanted:,}")
        told = progress(arrived, gathering.wanted, uncommitted)
        await XComPages(gathering.wait).set(PROGRESS_KEY, told)
        return _LONGEST_PAUSE

    async def _end_of_time(self, gathering: Gathering, record: XComRecord) -> TriggerEvent:
        assert self.deadline is not None
        self.log.info(
            "%s of %s events came until %s",
            f"{len(gathering.have):,}",
            f"{self.count:,}",
            self.deadline.isoformat(timespec="seconds"),
        )
        on_worker = self._ends_on_worker or self.hand_over
        if on_worker or not (self.soft_fail or self.default):
            return TriggerEvent(outcome.encode(outcome.TimedOut(self.deadline)))
        if not self.default:
            return TaskSkippedEvent()
        assert gathering.journal is not None
        self.log.info("Delivering the default in the place of what is missing")
        events = await recorded_in_turns(gathering.journal, gathering.calls, gathering.listener)
        return await self._deliver(record, result(events, len(gathering.calls), self.first, self.default))

    async def _let_go(self) -> None:
        if self.wait is None or self.task_instance is None or self._gathering is None:
            return
        await self._gathering.end(at_once=True)
        if await self._has_ended(Wait(**self.wait)):
            await self._gathering.release()

    def _poll_anew(self) -> None:
        self._again = True
        if self._gathering is not None:
            self._gathering.wake()

    @property
    def _call(self) -> str:
        assert self._gathering is not None
        return self._gathering.calls.describe(reference.display_name(self.listener))


async def _batch(gathering: Gathering) -> TriggerEvent:
    """Return what hands over to a worker what has been polled."""
    batch = outcome.Batch(dict(gathering.arrived))
    return TriggerEvent(await asyncio.to_thread(outcome.encode, batch))
