"""The trigger of a task that waits for many events."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk.execution_time.xcom import XCom
from airflow.triggers.base import TriggerEvent
from airflow_events.errors import ArgumentsChanged
from airflow_events.inbox.entries import Answer, Begin, End, Entry, Lose, Status
from airflow_events.listeners.base import EventListener, Wait, commits, describe
from airflow_events.triggers import outcome, reference
from airflow_events.triggers.calls import Calls, packed, result, unpacked
from airflow_events.triggers.event import _ENDED, _HOLDER, GRACE, EventTrigger, _by_a_worker, _now
from airflow_events.triggers.gathering import Gathering, Held
from airflow_events.triggers.inbox import Inbox
from airflow_events.triggers.polling import BeginAgain, TimeIsUp, next_look, seconds_until
from airflow_events.triggers.rendering import Rendering

if TYPE_CHECKING:
    import jinja2
    from airflow.sdk.definitions.context import Context

# Seconds between two lines of the log that say how many events have come.
_SAY_EVERY = 2.0
_LONGEST_PAUSE = 600.0
# Characters of arguments from which on reading them would hold up other triggers.
_LONG = 20_000
# How many arguments the page of the task instance shows.
_MOST_SHOWN = 100


class EventsTrigger(EventTrigger):
    """
    Wait for many events in the triggerer, each recorded and committed for itself, at its place in the list.

    What it shares with `EventTrigger` is described there: who starts it, its deadline, and how it ends the task.
    The wait that begins and ends is that of the task; the events are those of its places.

    :param calls: `Calls` as text, which may be `packed`; templates in it are rendered here if the trigger starts
        here.
    :param count: how many there are, for those who only want to show it.
    :param first: as of ``WaitForEventsOperator``.
    :param hand_over: of triggers of the first edition, and of no meaning any more; ``have`` likewise.
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
        self.calls = unpacked(calls)
        self.count = count
        self.first = first
        self._calls = Calls([], {})  # of `calls`, as soon as it runs
        self._gathering: Gathering | None = None
        self._said = 0
        self._said_at = 0.0

    def serialize(self) -> tuple[str, dict[str, Any]]:
        _, arguments = super().serialize()
        del arguments["listener_args"], arguments["listener_kwargs"]
        many = {"calls": packed(self.calls), "count": self.count, "first": self.first}
        return f"{__name__}.{type(self).__name__}", {**arguments, **many}

    def show_as_here(self) -> None:
        self._calls = Calls.decode(self.calls)
        super().show_as_here()

    def render_template_fields(self, context: Context, jinja_env: jinja2.Environment | None = None) -> None:
        rendering = Rendering(context, jinja_env)
        if self.wait is None and rendering.may_change(self.calls):
            calls = Calls.decode(self.calls)
            arguments = rendering.argument(list(calls.arguments), "arguments")
            self.calls = Calls(arguments, rendering.argument(dict(calls.common), "listener_kwargs")).encode()
        super().render_template_fields(context, jinja_env)

    async def run(self) -> AsyncIterator[TriggerEvent]:
        if len(self.calls) < _LONG:
            self._calls = Calls.prepared(self.calls)
        else:
            self._calls = await asyncio.to_thread(Calls.prepared, self.calls)
        async for event in super().run():
            yield event

    async def _pass(self, listener: type[EventListener], wait: Wait) -> bool:
        begun, wait = await self._begin(listener, wait)
        if begun.status == Status.REJECTED:
            return await self._end_without_event(_by_a_worker(outcome.Rejected(begun.message, begun.by)))
        if begun.status == Status.CHANGED or begun.stored is not None:  # of an earlier DAG: it waited for one
            if begun.stored is None or commits(listener):
                raise ArgumentsChanged.of_one(wait.id)
            await self._ask(self._entry(Lose, record_id=begun.stored.record_id))
            return False
        held = Held(Inbox.of_loop().ask, self._ti, self._generation, self._scope(listener))
        gathering = self._gathering = Gathering(listener, wait, self._calls, held, wanted=self._wanted)
        await gathering.read()
        if gathering.complete:
            self.log.info("All events of %s are recorded already; the wait is %s", self._call(), wait.id)
        else:
            self._announce(wait)
            if gathering.arrived:
                self.log.info("%s of %s events are there already", f"{gathering.arrived:,}", f"{self._wanted:,}")
            try:
                await self._gather(gathering)
            except BeginAgain:
                return False
            except TimeIsUp:
                return await self._end_late(gathering)
        if gathering.missing:  # as many as are wanted are there
            await gathering.release()
        return await self._end_without_event(await self._end(self._result(gathering)))

    def _beginning(self, listener: type[EventListener], wait: Wait) -> Begin:
        calls = self._calls
        arguments = list(calls.arguments[:_MOST_SHOWN])
        if len(calls) > _MOST_SHOWN:
            arguments.append(f"... and {len(calls) - _MOST_SHOWN:,} more")
        return Begin(
            self._ti,
            listener=reference.display_name(self.listener),
            call=self._call(),
            arguments=hashlib.sha256(self.calls.encode()).hexdigest(),
            rendered=self._to_show(arguments=arguments, listener_kwargs=calls.common),
            timeout=self.timeout,
            grace=GRACE,
            replay=self.replay,
            holder=_HOLDER,
            wanted=self._wanted,
        )

    async def _gather(self, gathering: Gathering) -> None:
        """
        Return when all is there that is wanted.

        :raises TimeIsUp: the deadline has passed, and what had come until then is recorded and committed.
        :raises BeginAgain: see `_begin_again`.
        """
        at_once, look_at = True, next_look()
        try:
            await gathering.begin(polling=self._remaining() > 0)
            self.log.info("%s events are waited for", f"{len(gathering.missing):,}")
            while not gathering.complete and gathering.error is None and (left := self._remaining()) > 0:
                await gathering.changed(min(left, self._say(gathering), seconds_until(look_at)))
                if seconds_until(look_at) <= 0:
                    await self._look()
                    look_at = next_look()
            at_once = False
        finally:
            await gathering.end(at_once=at_once, patiently=gathering.error is None)
        self._say(gathering, finally_=True)
        if gathering.complete:
            return
        if gathering.error is not None:
            await gathering.release(ended=False)
            raise gathering.error
        raise TimeIsUp

    def _remaining(self) -> float:
        return _LONGEST_PAUSE if self.deadline is None else (self.deadline - _now()).total_seconds()

    def _say(self, gathering: Gathering, *, finally_: bool = False) -> float:
        """Say how many events have come, if that is new, and return in how many seconds to come again."""
        if gathering.arrived == self._said:
            return _LONGEST_PAUSE
        now = asyncio.get_running_loop().time()
        if (since := now - self._said_at) < _SAY_EVERY and not finally_:
            return _SAY_EVERY - since
        self._said, self._said_at = gathering.arrived, now
        self.log.info("%s of %s events have arrived", f"{gathering.arrived:,}", f"{gathering.wanted:,}")
        return _LONGEST_PAUSE

    async def _end_late(self, gathering: Gathering) -> bool:
        assert self.deadline is not None
        count = len(gathering.events)
        self.log.info(
            "%s of %s events came until %s",
            f"{count:,}",
            f"{self._wanted:,}",
            self.deadline.isoformat(timespec="seconds"),
        )
        if self.default:
            self.log.info("Delivering the default in the place of what is missing")
            end = await self._end(self._result(gathering))
        elif self.soft_fail and not self.finish_on_worker:
            end = End(state="skipped")
        else:
            end = _by_a_worker(outcome.TimedOut(self.deadline, count))
        if not await self._end_without_event(end):
            return False
        await gathering.release()
        return True

    def _result(self, gathering: Gathering) -> list[Any]:
        return result(gathering.events, len(self._calls), self.first, self.default)

    # Airflow's writing of a long list is one piece of work, which would hold up other triggers.

    async def _on_worker(self, value: Any) -> End:
        payload = await asyncio.to_thread(outcome.encode, outcome.Arrived(value))
        return End(state="worker", payload=payload)

    async def _serialized(self, key: str, value: Any) -> Any:
        assert self.wait is not None
        where = {name: self.wait[name] for name in ("dag_id", "run_id", "task_id", "map_index")}
        return await asyncio.to_thread(XCom.serialize_value, value, key=key, **where)

    async def _in_a_test(self, listener: type[EventListener], wait: Wait) -> TriggerEvent:
        if self.timeout is not None:
            self.deadline = _now() + timedelta(seconds=self.timeout)
        held = Held(_nothing_is_recorded, "", 0, self._scope(listener))
        gathering = self._gathering = Gathering(listener, wait, self._calls, held, wanted=self._wanted)
        self._announce(wait)
        try:
            await self._gather(gathering)
        except TimeIsUp:
            if not self.default:
                assert self.deadline is not None
                return TriggerEvent(outcome.encode(outcome.TimedOut(self.deadline, len(gathering.events))))
        await gathering.release()
        return TriggerEvent(outcome.encode(outcome.Arrived(self._result(gathering))))

    def _begin_again(self) -> None:
        super()._begin_again()
        if self._gathering is not None:
            self._gathering.begin_again()

    async def _let_go(self) -> None:
        if self.wait is None or self.task_instance is None or self._has_ended or self._gathering is None:
            return
        await self._gathering.end(at_once=True)
        await self._gathering.release(ended=await self._state() in _ENDED)

    @property
    def _wanted(self) -> int:
        return len(self._calls) if self.first is None else self.first

    def _call(self) -> str:
        """Say how many events are wanted, and with what arguments the first of them."""
        if self.shown:
            return self.shown
        calls, name = self._calls, reference.display_name(self.listener)
        of = "" if self.first is None else f"{self.first:,} of "
        times = f"{name}, {of}{len(calls):,} times"
        if not len(calls):
            return times
        return f"{times}, the first of them {describe(name, *self._masked(*calls.of(0)))}"


async def _nothing_is_recorded(entry: Entry) -> Answer:
    """Answer in ``dag.test()``, where nothing outlives the process, as the inbox would."""
    return Answer(Status.DONE, lost=getattr(entry, "record_id", ""))
