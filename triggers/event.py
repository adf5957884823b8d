"""The trigger of a wait: one way for an event, from the poll to the task's success."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import socket
import traceback
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk._shared.secrets_masker import redact
from airflow.sdk.bases.xcom import BaseXCom
from airflow.sdk.configuration import conf
from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.comms import GetTaskStates, XComResult
from airflow.sdk.execution_time.xcom import XCom
from airflow.triggers.base import BaseTrigger, TriggerEvent
from airflow_events import metrics, settings
from airflow_events.errors import (
    ArgumentsChanged,
    CommitFailed,
    EventLost,
    EventUndecodable,
    InboxRefused,
    ListenerUnavailable,
)
from airflow_events.inbox.entries import (
    Answer,
    Begin,
    End,
    Entry,
    Finish,
    Join,
    Look,
    Lose,
    Park,
    Phase,
    Record,
    SetAside,
    Settle,
    Status,
    as_json,
)
from airflow_events.listeners.base import EventListener, Wait, commits, describe, releases, working_for
from airflow_events.listeners.support import serde
from airflow_events.listeners.support.commit import (
    Superseded,
    acknowledge,
    delivered,
    recorded,
    release,
    release_later,
    tags,
)
from airflow_events.listeners.support.masking import masked, masked_call
from airflow_events.listeners.support.queue import QueueListener
from airflow_events.triggers import outcome, reference, stalls
from airflow_events.triggers.inbox import Inbox
from airflow_events.triggers.joining import Joined
from airflow_events.triggers.polling import BeginAgain, Found, Poll, TimeIsUp, foreseen_by
from airflow_events.triggers.rendering import render

if TYPE_CHECKING:
    import jinja2
    from airflow.sdk.definitions.context import Context

log = logging.getLogger(__name__)

# In which states the task instance is nobody's to wait for any more.
_ENDED = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})
# Seconds after the deadline at which the scheduler ends a wait that no triggerer has ended.
GRACE = 300.0

# Seconds. What comes before them is waited for here: it is over before Airflow has seen that a wait is parked.
_SOON = 5.0

# Seconds for which an event that another wait has is acknowledged in its place.
_LONGEST_TO_SETTLE = 10.0

# Seconds before a source is polled again that gives a message once more which was passed over, and of how many
# such messages a process knows.
_AGAIN, _REMEMBERED = 5.0, 10_000
_passed_over: dict[str, None] = {}

# Clocks that are no further apart are taken to agree, but for the time that an answer takes.
_CLOCKS_APART = timedelta(seconds=2)

# What tells digests of hosts from others.
_HOST = "host"

_HOLDER = f"{socket.gethostname()}:{os.getpid()}"

# What outlives its trigger, which asyncio itself would not keep.
_letting_go: set[asyncio.Future[None]] = set()


class Outlived(Exception):
    """The wait is another's by now, or nobody's."""


class EventTrigger(BaseTrigger):
    """
    Wait for one event in the triggerer.

    Its life is a loop of one pass: **begin** (the inbox answers what the wait has already), **park** if nobody has
    to poll, or **poll**, **record** (the inbox decides whose the event is), **commit** (the source is told to
    forget it), **finish** (the inbox ends the task). Whatever else comes in between, such as an event that went to
    another wait, ends the pass, and the next one begins with what the inbox says then. Two triggerers may run it
    at once: the one that began last is the wait's.

    Started by the scheduler it learns from Airflow for which wait it works, and started by a worker, from the
    worker, through the same parameters. They are frozen, since they stand in trigger rows that an upgrade finds.

    :param listener: as `airflow_events.triggers.reference` writes it.
    :param listener_args: for ``poll_for_event``; rendered here if the trigger starts here.
    :param finish_on_worker: why a worker is handed the event instead of ending the task here; True of earlier
        versions, False if it ends here.
    :param timeout: seconds from the first try on, None for no end.
    :param soft_fail: when the time is up, skip the task.
    :param default: when the time is up, deliver this: a list of one item, or empty for none.
    :param push: whether the event becomes the task's return value.
    :param multiple_outputs: whether each item of the event becomes an XCom, too.
    :param outlets: the task's outlets, as Airflow's execution API takes them.
    :param replay: whether a clear delivers the event again.
    :param wait: `Wait` as a dict, in a wait that a worker started.
    :param mapped_over: whether a task is mapped over the return value; likewise.
    :param shown: listener and arguments as the worker that rendered them masks them, for it may know secrets that
        are not known here; empty if they were not rendered by a worker.
    :param dag_result: whether the return value is the DAG's result; likewise.
    :param deadline: of a trigger that a worker of the first edition started: when its time is up.
    """

    shown = ""

    def __init__(
        self,
        *,
        listener: str | dict[str, str],
        listener_args: list[Any] | None = None,
        listener_kwargs: dict[str, Any] | None = None,
        finish_on_worker: bool | str = False,
        timeout: float | None = None,
        soft_fail: bool = False,
        default: list[Any] | None = None,
        push: bool = True,
        multiple_outputs: bool = False,
        outlets: list[dict[str, Any]] | None = None,
        replay: bool = True,
        wait: dict[str, Any] | None = None,
        mapped_over: bool = False,
        shown: str = "",
        dag_result: bool = False,
        deadline: datetime | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.logger()  # the class's, which its instances then share: one of its own is 1 KB
        self.listener = listener
        self.listener_args = listener_args or []
        self.listener_kwargs = listener_kwargs or {}
        self.finish_on_worker = finish_on_worker
        self.timeout = timeout if deadline is None else max((deadline - _now()).total_seconds(), 0.0)
        self.soft_fail = soft_fail
        self.default = default or []
        self.push = push
        self.multiple_outputs = multiple_outputs
        self.outlets = outlets or []
        self.replay = replay
        self.wait = wait
        self.mapped_over = mapped_over
        if shown:  # or the class's: a 31st attribute of an instance is 1 KB
            self.shown = shown
        self.deadline: datetime | None = None  # by the clock of this machine
        self._started_here = False
        self._dag_result = dag_result
        self._generation = 0
        self._after = ""  # of the wait, as it polls
        self._poll: Poll | None = None  # which holds the event, while it is not recorded
        self._recording: asyncio.Future[Answer] | None = None
        self._left_over: list[Any] = []  # what was polled although the wait has another event
        self._stood_still = False  # since it was asked to begin
        self._outlived = ""  # what a look was told, if the wait is another's by now
        self._has_ended = False

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            f"{__name__}.{type(self).__name__}",
            {
                "listener": self.listener,
                "listener_args": self.listener_args,
                "listener_kwargs": self.listener_kwargs,
                "finish_on_worker": self.finish_on_worker,
                "timeout": self.timeout,
                "soft_fail": self.soft_fail,
                "default": self.default,
                "push": self.push,
                "multiple_outputs": self.multiple_outputs,
                "outlets": self.outlets,
                "replay": self.replay,
                "wait": self.wait,
                "mapped_over": self.mapped_over,
                "shown": self.shown,
                **({"dag_result": True} if self._dag_result else {}),
            },
        )

    def show_as_here(self) -> None:
        """Have the call shown wherever it is as this process masks it."""
        self.shown = self._call()

    def render_template_fields(self, context: Context, jinja_env: jinja2.Environment | None = None) -> None:
        """Render the arguments, and take from the context what a worker would have told."""
        # Airflow calls this for tasks that start in the triggerer. If a worker deferred one of them again, it
        # has rendered the arguments and told the wait.
        if self.wait is not None:
            return
        render(self, context, jinja_env)
        ti, task = context["ti"], context["task"]
        self.wait = {
            "dag_id": ti.dag_id,
            "run_id": ti.run_id,
            "task_id": ti.task_id,
            "map_index": ti.map_index if ti.map_index is not None else -1,
            "run_start": context["dag_run"].start_date,
            "timezone": getattr(context["dag"].timezone, "name", "UTC"),
        }
        self._started_here = True
        self.mapped_over = next(iter(task.iter_mapped_dependants()), None) is not None
        self._dag_result = bool(getattr(task, "returns_dag_result", False))
        _let_go_of_the_dag(context)

    async def run(self) -> AsyncIterator[TriggerEvent]:
        if self.wait is None:
            raise RuntimeError(
                "the DAG was changed while this wait was open, and its waits begin on a worker now: its arguments "
                "are not available here; the next try, or a clear, starts on a worker and keeps the recorded event"
            )
        listener = reference.load(self.listener)
        if self.task_instance is None:  # dag.test(), where there is no API server
            yield await self._in_a_test(listener, Wait(**self.wait))
            return
        try:
            await self.until_ended()
        except Outlived as outlived:
            self.log.warning("This process does not own the wait any more: %s", outlived)
            await self._give_back_all()
        except Exception as error:
            await self._give_back_all()  # the next try may have another triggerer
            said = "".join(traceback.format_exception(error))
            if said == storable(said):
                raise
            # A triggerer that told its supervisor so would end, and so would each after it that had this trigger.
            raise RuntimeError(storable(said)) from None
        leave()

    async def _give_back_all(self) -> None:
        try:
            await self.on_kill()
        except Exception:
            self.log.warning("What this process held could not be given back", exc_info=True)

    async def until_ended(self) -> None:
        """
        Return when the task has ended, or the wait goes on elsewhere.

        :raises Outlived: this trigger is not the wait's any more; should it be again, this may be called again.
        :raises Exception: the try fails.
        """
        assert self.wait is not None
        listener = reference.load(self.listener)
        self._outlived = ""
        with stalls.told_to(self._begin_again):
            while not self._has_ended:
                self._has_ended = await self._pass(listener, Wait(**self.wait))

    async def _pass(self, listener: type[EventListener], wait: Wait) -> bool:
        """
        Go from the beginning of the wait to the end of the task; return whether the task has ended.

        :raises Outlived: this trigger is not the wait's any more.
        :raises ArgumentsChanged: the wait's event was recorded for other arguments.
        """
        begun, wait = await self._begin(listener, wait)
        if begun.status == Status.CHANGED:
            raise ArgumentsChanged.of_mapped(wait.id, begun.message)
        if begun.status == Status.REJECTED:
            return await self._end_without_event(_by_a_worker(outcome.Rejected(begun.message, begun.by)))
        if (given_up := begun.superseded) is not None:
            self.log.info("Waiting for another event than that of before the clear (replay=False)")
            before = dataclasses.replace(wait, after=given_up.after)
            await self._release(listener, before, serde.decode(given_up.event))
        if (stored := begun.stored) is not None:
            self.log.info("The event of %s is %s already; the wait is %s", self._call(), stored.phase, wait.id)
            event, record_id, to_commit = (
                serde.decode(stored.event),
                stored.record_id,
                stored.phase == Phase.RECORDED,
            )
            wait = dataclasses.replace(wait, after=stored.after)
        else:
            until = None if begun.deadline is None else datetime.fromisoformat(begun.deadline)
            del begun  # of all that is held while a wait is open there is one for each
            self._announce(wait)
            if (left := await self._leave(listener, wait, until)) is not None:
                return left == Status.DONE
            # With nothing to commit, whoever records an event ends the task with it.
            look = self._look if commits(listener) else None
            self._poll = Poll(
                listener, wait, self.listener_args, self.listener_kwargs, self.deadline, look, self._take_found()
            )
            try:
                event = await self._poll.run()
            except BeginAgain:
                return False
            except TimeIsUp:
                return await self._time_is_up(listener, wait)
            except EventUndecodable as error:
                if await fails_for(error, self._scope(listener), self._ask, self._entry):
                    raise
                return False
            record_id, to_commit = uuid.uuid4().hex, commits(listener)
            if not await self._record(listener, wait, event, record_id):
                return False
            if not to_commit:
                return True
        acknowledged = False  # what was noted as committed before, its source may have yet to confirm
        if to_commit:
            try:
                acknowledged = await acknowledge(listener, wait, event, self._check)
            except Superseded as superseded:
                raise Outlived(str(superseded)) from None
            except EventLost as lost:
                self.log.warning("The event went to another wait, and this one continues: %s", lost)
                metrics.count(metrics.LOST, **tags(listener, wait))
                await self._ask(self._entry(Lose, record_id=record_id))
                self._recording = None
                return False
            metrics.count(metrics.COMMITTED, **tags(listener, wait))
            self.log.info("The event is recorded%s", " and committed" if acknowledged else "")
        for left_over in self._left_over:
            # Only now: should it be the same event in another form, it is committed, and this changes nothing.
            await self._release(listener, wait, left_over)
        end = await self._end(event)
        await self._ask(self._entry(Finish, record_id=record_id, end=end, acknowledged=acknowledged))
        self._tell_delivery(listener, wait, end)
        return True

    async def _begin(self, listener: type[EventListener], wait: Wait) -> tuple[Answer, Wait]:
        """Have the wait begin, and return what the inbox says, and the wait as it is then."""
        if self._outlived:
            raise Outlived(self._outlived)
        self._stood_still = True
        while self._stood_still:  # what it was told before that may not hold any more
            self._stood_still = False
            begun = await self._ask(self._beginning(listener, wait))
        self._generation, self._after = begun.generation, begun.lost
        self.deadline = _by_this_clock(begun)
        times = {"run_start": begun.run_start, "run_created": begun.run_created}
        known: dict[str, Any] = {name: datetime.fromisoformat(said) for name, said in times.items() if said}
        return begun, dataclasses.replace(wait, after=begun.lost, **known)

    def _beginning(self, listener: type[EventListener], wait: Wait) -> Begin:
        with working_for(wait):
            address = listener.address(*self.listener_args, **self.listener_kwargs)
            sought = listener.sought(*self.listener_args, **self.listener_kwargs)
        shown = self._masked(self.listener_args, self.listener_kwargs)
        return Begin(
            self._ti,
            listener=reference.display_name(self.listener),
            call=self._call(),
            arguments=serde.arguments_digest(self.listener_args, self.listener_kwargs),
            rendered=self._to_show(listener_args=shown[0], listener_kwargs=shown[1]),
            timeout=self.timeout,
            grace=GRACE,
            replay=self.replay,
            address=address,
            holder=_HOLDER,
            sought=sought,
        )

    def _to_show(self, **fields: Any) -> dict[str, Any] | None:
        """Return rendered fields as Airflow's page shows them; None where a worker has seen to that."""
        if not self._started_here:
            return None
        return {name: masked(_shown(value), redact, name) for name, value in fields.items()}

    async def _leave(self, listener: type[EventListener], wait: Wait, until: datetime | None) -> str | None:
        """
        Let the wait go on without this trigger: parked, if nobody has to poll for its event, or with a host.

        :param until: the wait's deadline by the clock of the inbox.
        :return: `Status.DONE` or, if it has an event by now and is to begin again, `Status.HAS`; None if it stays.
        """
        if (said := await self._park(listener, wait, until)) is not None:
            return said
        if not self._may_be_hosted(listener):
            return None
        # The waits on one queue are one host's, so that a single triggerer asks for its messages.
        of = serde.arguments_digest(self.listener_args, self.listener_kwargs) if commits(listener) else wait.id
        host = _digest([_HOST, reference.identify(self.listener), zlib.crc32(of.encode()) % settings.hosts()])
        kwargs = {**self.serialize()[1], "wait": {**(self.wait or {}), "run_created": wait.run_created}}
        answer = await self._ask(self._entry(Join, kwargs=serde.encode(kwargs), host=host))
        if answer.status == Status.DONE:
            Joined.of_loop().tell(host)
            self.log.info("The wait continues in a trigger that it shares with others, and this one ends")
        return answer.status

    def _may_be_hosted(self, listener: type[EventListener]) -> bool:
        if not listener.hosted or not isinstance(self.listener, str):
            return False
        # A host's trigger is of no team and of no queue.
        return not any(
            conf.getboolean(*option, fallback=False)
            for option in (("core", "multi_team"), ("triggerer", "queues_enabled"))
        )

    async def _park(self, listener: type[EventListener], wait: Wait, until: datetime | None) -> str | None:
        """Do what `_leave` does for waits that nobody polls for."""
        # What an XCom backend stores, it stores when the event is there, and in a triggerer.
        if commits(listener) or XCom is not BaseXCom:
            return None
        end: Entry | None = None
        at = until
        foreseen = foreseen_by(listener, wait, self.listener_args, self.listener_kwargs)
        if foreseen is not None and (at is None or foreseen[1] <= at):
            event, at = serde.check(foreseen[0]), foreseen[1]
            if self.outlets or (at - _now()).total_seconds() < _SOON:
                return None
            end = await self._recorded_at_once(listener, wait, event)
        elif not (listener.recorded_from_outside or foreseen is not None):
            return None
        elif at is not None:
            end = self._entry(Finish, end=await self._end_in_time(at))
        answer = await self._ask(
            self._entry(
                Park,
                kwargs=serde.encode(self.serialize()[1]),
                at=None if at is None else at.isoformat(),
                then=None if end is None else as_json(end),
            )
        )
        if answer.status == Status.DONE:
            self.log.info("The wait is parked: the API server will end it, and this trigger ends")
        return answer.status

    async def _recorded_at_once(self, listener: type[EventListener], wait: Wait, event: Any) -> Record:
        """Return what records an event that has nothing to commit, and ends the task with it."""
        told = recording(listener, self._scope(listener), wait, event)
        record: Record = self._entry(Record, record_id=uuid.uuid4().hex, **told, end=await self._end(event))
        return record

    def _take_found(self) -> Found | None:
        """Return, once, what the poll has come to before it began; None if it is to be made."""
        return None

    async def _record(self, listener: type[EventListener], wait: Wait, event: Any, record_id: str) -> bool:
        """
        Have the event recorded, and the task ended with it if there is nothing to commit.

        :return: False if the event is not the wait's, and it is to begin again.
        """
        entry = self._entry(
            Record,
            record_id=record_id,
            **recording(listener, self._scope(listener), wait, event),
            end=None if commits(listener) else await self._end(event),
        )
        # Should this be cancelled meanwhile, `on_kill` finds out what became of it.
        self._recording = asyncio.ensure_future(Inbox.of_loop().ask(entry))
        try:
            answer = await answer_to_record(listener, wait, event, self._recording)
        except EventUndecodable as error:
            self._recording = self._poll = None
            release_later(listener, wait, event, self.listener_args, self.listener_kwargs)
            if await fails_for(error, self._scope(listener), self._ask, self._entry):
                raise
            return False
        except Exception:
            self._recording = None
            await self._give_back(listener, wait, event)
            raise
        if answer.status == Status.DONE:
            recorded(listener, wait, self._arrived)
            if entry.end is not None:
                self.log.info("The event is recorded, and the task has ended")
                self._tell_delivery(listener, wait, entry.end)
            return True
        self._recording = None
        await self._purge(entry.end)
        if answer.status == Status.TAKEN:
            arguments = self.listener_args, self.listener_kwargs
            await settle(listener, wait, event, arguments, entry, answer, self._ask)
        elif answer.status == Status.HAS:
            self._left_over.append(event)
            self._poll = None  # it may be the same event, which must not be given back before it is committed
        elif answer.status == Status.REJECTED:
            await self._release(listener, wait, event)
        else:
            self._poll = None
            await self._give_back(listener, wait, event)
            checked(entry, answer)
            raise Outlived(answer.message)
        return False

    async def _give_back(self, listener: type[EventListener], wait: Wait, event: Any) -> None:
        """Give back an event that is not recorded; one without an id may be held for the wait, and is kept."""
        if id_of(listener, wait, event) is None:
            self._left_over.append(event)  # should the wait be this trigger's again
        else:
            await self._release(listener, wait, event)

    def _tell_delivery(self, listener: type[EventListener], wait: Wait, end: End) -> None:
        if end.state != "worker":  # which tells it itself
            delivered(listener, wait, self._arrived)

    async def _time_is_up(self, listener: type[EventListener], wait: Wait) -> bool:
        assert self.deadline is not None
        self.log.info("No event came until %s", self.deadline.isoformat(timespec="seconds"))
        if self.default:
            self.log.info("Delivering the default")
        if not await self._end_without_event(await self._end_in_time(self.deadline)):
            return False
        await self._release(listener, wait, None)
        return True

    async def _end_in_time(self, deadline: datetime) -> End:
        """Return what ends the task when its time is up."""
        if self.default:
            return await self._end(self.default[0])
        if self.soft_fail and not self.finish_on_worker:
            return End(state="skipped")
        return _by_a_worker(outcome.TimedOut(deadline))

    async def _end_without_event(self, end: End) -> bool:
        """End the task, unless the wait has an event by now: the record wins over the deadline."""
        answer = await self._ask(self._entry(Finish, end=end))
        return answer.status == Status.DONE

    async def _end(self, value: Any) -> End:
        """Return what ends the task with ``value``; a worker does it where only that gives the right error."""
        if self.finish_on_worker:
            self.log.info("A worker ends the task, because %s", outcome.why_on_worker(self.finish_on_worker))
            return await self._on_worker(value)
        length = None
        if self.mapped_over:
            can_be = self.push and isinstance(value, (list, tuple, dict))
            if not can_be or len(value) > conf.getint("core", "max_map_length"):
                self.log.info("A worker fails the task: nothing can be mapped over its value")
                return await self._on_worker(value)
            length = len(value)
        values: dict[str, Any] = {}
        if self.push and value is not None:
            if self.multiple_outputs:
                if not isinstance(value, Mapping) or not all(map(serde.is_xcom_key, value)):
                    self.log.info("A worker fails the task: its value cannot be taken apart (multiple_outputs)")
                    return await self._on_worker(value)
                values.update(value)
            values[BaseXCom.XCOM_RETURN_KEY] = value
        return End(
            xcoms={key: await self._serialized(key, item) for key, item in values.items()},
            dag_result=self._dag_result,
            mapped_length=length,
            outlets=tuple(self.outlets),
        )

    async def _on_worker(self, value: Any) -> End:
        return _by_a_worker(outcome.Arrived(value, self._arrived))

    async def _serialized(self, key: str, value: Any) -> Any:
        """Return a value as the deployment's XCom backend stores it, which workers have and API servers do not."""
        assert self.wait is not None
        where = {name: self.wait[name] for name in ("dag_id", "run_id", "task_id", "map_index")}
        serialize = functools.partial(XCom.serialize_value, value, key=key, **where)
        return serialize() if XCom is BaseXCom else await asyncio.to_thread(serialize)

    async def _purge(self, end: End | None) -> None:
        """Remove again what an XCom backend has stored for an end that was refused."""
        if end is None or XCom is BaseXCom:
            return
        for key, value in end.xcoms.items():
            try:
                await asyncio.to_thread(XCom.purge, XComResult(key=key, value=value))
            except Exception:
                self.log.warning("The XCom backend could not remove %s, which nobody needs", key, exc_info=True)

    async def _ask(self, entry: Entry) -> Answer:
        return checked(entry, await Inbox.of_loop().ask(entry))

    def _entry(self, kind: Any, **told: Any) -> Any:
        return kind(self._ti, generation=self._generation, **told)

    async def _in_a_test(self, listener: type[EventListener], wait: Wait) -> TriggerEvent:
        """Wait in ``dag.test()``, where nothing outlives the process: nothing is recorded."""
        if self.timeout is not None:
            self.deadline = _now() + timedelta(seconds=self.timeout)
        self._announce(wait)
        try:
            if listener.recorded_from_outside:
                with working_for(wait):
                    polling = listener().poll_in_a_test(*self.listener_args, **self.listener_kwargs)
                    task = asyncio.create_task(polling)
                await asyncio.wait({task}, timeout=self.timeout)
                if not task.done():
                    task.cancel()
                    raise TimeIsUp
                event = task.result()
            else:
                self._poll = Poll(listener, wait, self.listener_args, self.listener_kwargs, self.deadline)
                event = await self._poll.run()
        except TimeIsUp:
            assert self.deadline is not None
            return TriggerEvent(outcome.encode(outcome.TimedOut(self.deadline)))
        if commits(listener):
            await acknowledge(listener, wait, event)
        return TriggerEvent(outcome.encode(outcome.Arrived(event)))

    def _begin_again(self) -> None:
        """
        Begin again, since this process stood still for a while.

        Another triggerer may have had the trigger meanwhile, and may have died after it recorded an event, for
        which this poll would wait in vain.
        """
        self._stood_still = True
        if self._poll is not None:
            self._poll.begin_again()

    async def _look(self) -> None:
        """
        Begin again if another process has begun the wait since.

        It may have been late, of a triggerer that had the trigger before, and dead by now: what it has recorded
        would be waited for in vain. Neither knows whose the trigger is, since Airflow does not tell them.
        """
        if self.task_instance is None:  # dag.test(), where nobody else is
            return
        try:
            answer = await Inbox.of_loop().ask(self._entry(Look))
        except InboxRefused:  # by an API server of an earlier version, which knows no looks
            return
        if answer.status == Status.OUTLIVED:
            self._outlived = answer.message
            self._begin_again()

    async def _check(self) -> None:
        """
        Raise if the wait is another's by now: whoever has it may not want this event any more.

        :raises Superseded: so it is.
        """
        await self._look()
        if self._outlived:
            raise Superseded(self._outlived)

    async def on_kill(self) -> None:
        """
        Give back what is held at the source and not recorded.

        Airflow calls this when a user ends or clears the task, and when it has moved the trigger to another
        triggerer. In the last two cases the wait goes on, and keeps what may be held in its name: what has no id.
        """
        # In a task of its own, since Airflow cancels the trigger again each second while it is not gone.
        letting_go = asyncio.ensure_future(self._let_go())
        _letting_go.add(letting_go)
        letting_go.add_done_callback(_letting_go.discard)
        await asyncio.shield(letting_go)

    async def _let_go(self) -> None:
        if self.wait is None or self.task_instance is None or self._has_ended:
            return
        listener, wait = reference.load(self.listener), dataclasses.replace(Wait(**self.wait), after=self._after)
        if self._recording is not None:  # what is recorded stays the wait's, for a clear
            with contextlib.suppress(InboxRefused):  # it is larger than the API server takes, and given back
                answer = await self._recording
                if answer.status in (Status.DONE, Status.TAKEN):
                    await self._let_go_of_recorded(listener, wait)
                    return
        event = None
        if self._poll is not None:
            await self._poll.end()
            event = self._poll.event
        if not releases(listener):
            return
        held, self._left_over = self._left_over, []
        for one in [*held, event]:
            if one is not None:
                await self._give_back(listener, wait, one)
        may_hold = self._left_over or (self._poll is not None and event is None)
        if may_hold and not _knows_by_id(listener) and await self._state() in _ENDED:
            for one in self._left_over or [None]:
                await self._release(listener, wait, one)

    async def _let_go_of_recorded(self, listener: type[EventListener], wait: Wait) -> None:
        """Have an event delivered again that is recorded and not acknowledged: by its id it is known then."""
        event = None if self._poll is None else self._poll.event
        if event is not None and commits(listener) and id_of(listener, wait, event) is not None:
            await self._release(listener, wait, event)

    async def _release(self, listener: type[EventListener], wait: Wait, event: Any) -> None:
        await release(listener, wait, event, self.listener_args, self.listener_kwargs)

    async def _state(self) -> str | None:
        """Return the task instance's state; ``removed`` if it, or its run, was deleted."""
        assert self.wait is not None
        wait = Wait(**self.wait)
        asked = GetTaskStates(
            dag_id=wait.dag_id,
            run_ids=[wait.run_id],
            task_ids=[wait.task_id],
            map_index=wait.map_index if wait.map_index >= 0 else None,
        )
        answer: Any = await task_runner.SUPERVISOR_COMMS.asend(asked)
        states = answer.task_states.get(wait.run_id, {})
        name = wait.task_id if wait.map_index < 0 else f"{wait.task_id}_{wait.map_index}"
        state: str | None = states.get(name, "removed")
        return state

    @property
    def _ti(self) -> str:
        assert self.task_instance is not None
        return str(self.task_instance.id)

    @property
    def _arrived(self) -> float | None:
        return None if self._poll is None else self._poll.arrived

    def _scope(self, listener: type[EventListener]) -> str:
        """Return what an event's id is unique in."""
        return reference.scope(self.listener, listener)

    def _call(self) -> str:
        return self.shown or describe(
            reference.display_name(self.listener), *self._masked(self.listener_args, self.listener_kwargs)
        )

    def _masked(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments of ``poll_for_event`` as they may be shown."""
        try:
            listener = reference.load(self.listener)
        except ListenerUnavailable:
            listener = None
        return masked_call(listener, args, kwargs, redact)

    def _announce(self, wait: Wait) -> None:
        self.log.info(
            "Waiting for an event of %s since %s, until %s; the wait is %s",
            self._call(),
            _now().isoformat(timespec="seconds"),
            self.deadline.isoformat(timespec="seconds") if self.deadline else "it comes",
            wait.id,
        )


def _by_this_clock(begun: Answer) -> datetime | None:
    """Return when a wait's time is up by the clock of this machine, since not all machines' are right."""
    if begun.deadline is None:
        return None
    deadline = datetime.fromisoformat(begun.deadline)
    if begun.left is None:
        return deadline
    here = _now() + timedelta(seconds=begun.left)
    return here if abs(here - deadline) > _CLOCKS_APART else deadline


def leave() -> NoReturn:
    """
    End a trigger whose wait does not need it any more, as if Airflow had cancelled it.

    If it returned, Airflow would call that a failure, and fail whatever task has the trigger's id by then. And if
    it stayed until Airflow removes it: SQLite gives the id of a trigger that is deleted to the next one, and a
    triggerer that has one of that id starts no other (`TriggerRunnerSupervisor.update_triggers`). Should the
    trigger still be this triggerer's, Airflow starts it again.

    :raises asyncio.CancelledError: always.
    """
    raise asyncio.CancelledError


def by_a_worker_fails(error: BaseException) -> End:
    """Return what fails a try with what was raised."""
    return End(
        state="failed", payload={"traceback": [storable(part) for part in traceback.format_exception(error)]}
    )


def storable(text: str) -> str:
    """Return a text as Airflow can store it, and tell its supervisor: without NULs and halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _by_a_worker(told: outcome.Outcome) -> End:
    return End(state="worker", payload=outcome.encode(told))


def checked(entry: Entry, answer: Answer) -> Answer:
    """
    Return an answer to an entry that counted.

    :raises Outlived: the wait is another's by now, or nobody's.
    :raises RuntimeError: the API server could not carry it out, and will not when it is asked again.
    """
    if answer.status == Status.OUTLIVED:
        raise Outlived(answer.message)
    if answer.status == Status.INVALID:
        raise RuntimeError(f"the API server could not carry out {entry.operation!r}: {answer.message}")
    return answer


def recording(listener: type[EventListener], scope: str, wait: Wait, event: Any) -> dict[str, Any]:
    """
    Return what a `Record` says of an event that was polled for ``wait``.

    :param scope: what the event's id is unique in.
    """
    with working_for(wait):
        text, name, content = serde.encode(event), listener().event_id(event), listener().event_content(event)
    of_content = text if content is event else serde.encode(content)
    return {
        "event": text,
        "identity": None if name is None else identity(scope, name),
        "content": None if name is None else hashlib.sha256(of_content.encode()).hexdigest(),
        "committed": not commits(listener),
        "after": wait.after,
    }


async def answer_to_record(
    listener: type[EventListener], wait: Wait, event: Any, asked: asyncio.Future[Answer]
) -> Answer:
    """
    Return the answer to the `Record` of an event; what was asked goes on if this is cancelled.

    :raises EventUndecodable: no wait can record the event, since it is larger than the API server or its database
        takes, say; it has an id, and must not stop its queue.
    :raises InboxRefused: likewise, of an event that has none.
    """
    try:
        answer = await asyncio.shield(asked)
        if answer.status != Status.INVALID:
            return answer
        reason, refused = answer.message, None
    except InboxRefused as error:
        reason, refused = str(error), error
    event_id = id_of(listener, wait, event) if commits(listener) else None
    if event_id is not None:
        undecodable = EventUndecodable(event_id, "storable", reason, b"")
        undecodable.event_id = event_id
        raise undecodable
    if refused is not None:
        raise refused
    return answer


def id_of(listener: type[EventListener], wait: Wait, event: Any) -> str | None:
    """Return what tells an event from every other; None if nothing does."""
    with working_for(wait):
        return listener().event_id(event)


def identity(scope: str, event_id: str) -> str:
    """Return the digest under which the inbox knows an event, in hex; it is frozen."""
    return _digest([scope, event_id])


async def fails_for(
    error: EventUndecodable,
    scope: str,
    ask: Callable[[Entry], Awaitable[Answer]],
    entry: Callable[..., Entry],
) -> bool:
    """
    Whether a wait is to fail for a message that it cannot read: the first one does, and the others go on.

    :param entry: makes the wait's entry.
    """
    if error.event_id is None:
        return True
    known_by = identity(scope, error.event_id)
    answer = await ask(entry(SetAside, identity=known_by, reason=str(error)))
    if answer.status != Status.TAKEN:
        return True
    if known_by in _passed_over:  # its listener does not pass over it by itself, and would be asked again at once
        await asyncio.sleep(_AGAIN)
        return False
    _passed_over[known_by] = None
    if len(_passed_over) > _REMEMBERED:
        del _passed_over[next(iter(_passed_over))]
    log.info("Passed over, since %s has failed for it: %s", answer.message, error)
    return False


async def settle(
    listener: type[EventListener],
    wait: Wait,
    event: Any,
    arguments: tuple[Any, Any],
    entry: Record,
    answer: Answer,
    ask: Callable[[Entry], Awaitable[Answer]],
) -> None:
    """
    Acknowledge an event that its source has delivered again, and tell the inbox if the source confirms it.

    One that cannot be acknowledged now is given back after a while: until then it is in nobody's way.

    :param arguments: positional ones and those by name, with which it was polled.
    :param entry: by which it was to be recorded; ``answer`` says which wait has it.
    """
    log.info(
        "The source has redelivered an event that is recorded for %s already; it is acknowledged", answer.message
    )
    try:
        is_confirmed = await acknowledge(listener, wait, event, longest=_LONGEST_TO_SETTLE)
    except EventLost:
        return
    except CommitFailed as failed:  # this wait waits on for one of its own
        log.warning("It cannot be acknowledged now, and will be delivered once more: %s", failed)
        release_later(listener, wait, event, *arguments)
        return
    if is_confirmed:
        await ask(Settle(entry.ti, identity=entry.identity or "", content=entry.content))


def _knows_by_id(listener: type[EventListener]) -> bool:
    """Whether nothing is held in the name of a wait, but each message by its id."""
    return getattr(listener, "event_released", None) is QueueListener.event_released


def _let_go_of_the_dag(context: Context) -> None:
    """
    Drop the DAG that Airflow's runner builds for each trigger which starts in the triggerer.

    It keeps it as long as the trigger runs, by the context and by the task instance, and needs it for the
    rendering alone (`TriggerRunner.create_triggers`, ``run_trigger``). In a DAG of 300 tasks it is 1.7 MB.
    """
    ti = context["ti"]
    context.clear()  # type: ignore[attr-defined]
    ti.task = None  # type: ignore[assignment]


def _digest(value: Any) -> str:
    text = json.dumps(serde.as_json(value), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _shown(value: Any) -> Any:
    """Return arguments as Airflow shows rendered templates: JSON shapes, and text for what is none."""
    if isinstance(value, Mapping):
        return {str(key): _shown(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_shown(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _now() -> datetime:
    return datetime.now(timezone.utc)
