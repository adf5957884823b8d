"""
An Airflow, its API server and a source in one process, for the project's own code to run against.

Every message between them is a step, before and after which another process may be stepped, or this one killed.
Nothing of the protocol is modelled: the trigger, the poll, the commit and the operator are the real ones, and so
are the transactions of the inbox, on Airflow's and the inbox's tables in a database of this process. What is
modelled is the way there (a request or its answer is lost and the request is asked again; a request arrives once
more, long after), what Airflow, a user and time do to a task instance, and the sources.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import functools
import json
import logging
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

from airflow import models
from airflow.jobs.scheduler_job_runner import SchedulerJobRunner
from airflow.models.base import Base
from airflow.models.dagrun import DagRun
from airflow.models.log import Log
from airflow.models.renderedtifields import RenderedTaskInstanceFields
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from airflow.models.xcom import XComModel
from airflow.sdk.exceptions import AirflowFailException, AirflowSensorTimeout, TaskDeferralError
from airflow.sdk.serde import deserialize
from airflow_events import EventListener, Wait, current_wait
from airflow_events.api import upkeep
from airflow_events.errors import CommitFailed, EventLost
from airflow_events.inbox import models as inbox
from airflow_events.inbox import transactions, waking
from airflow_events.inbox.database import in_transaction
from airflow_events.inbox.entries import Answer, Begin, Entry, Phase, Record, Status
from airflow_events.listeners.support.commit import release
from airflow_events.operators.wait_for_event import WaitForEventOperator
from airflow_events.triggers.event import GRACE, EventTrigger
from airflow_events.waits.detail import why_it_cannot_be_forgotten
from airflow_events.waits.forgetting import forget
from sqlalchemy import create_engine, delete, insert, select, update
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import StaticPool

PROCESS: contextvars.ContextVar[Process] = contextvars.ContextVar("process")
TIMEOUT = 100.0  # seconds, of a wait that has an end
NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
TRIED: Counter[str] = Counter()
"""How often what has happened in all schedules of this process, which shows what they reach."""
_DEFAULT = "default"
TAKEN = inbox.EventTaken.__table__
_TI, _TRIGGER, _WAIT = TaskInstance.__table__, Trigger.__table__, inbox.EventWait.__table__


class LoopOfSteps(asyncio.SelectorEventLoop):
    """An event loop in which only steps take place: time passes when it is told to, a thread is done at once."""

    now = 1e6

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def settle(self, work: Callable[[], object]) -> None:
        """Do ``work``, and go on until every process stands at its next step."""

        async def do() -> None:
            work()
            idle = 0
            while idle < 2:  # in the turn after an idle one the timers that are due go off
                await asyncio.sleep(0)
                idle = 0 if self._ready else idle + 1  # type: ignore[attr-defined]

        self.run_until_complete(do())


@dataclass(eq=False)
class Process:
    """A triggerer's part that runs one trigger, or a worker's that runs one task."""

    name: str
    task: Task
    ti: uuid.UUID
    trigger: EventTrigger | None = None  # None in a worker
    number: int = 0  # of the trigger's row
    gates: list[tuple[str, asyncio.Future[None]]] = field(default_factory=list)
    work: asyncio.Task[None] | None = None
    dead: bool = False
    is_cancelled: bool = False
    ones: dict[type[Any], Any] = field(default_factory=dict)
    notes: list[Any] = field(default_factory=list)  # of mutants

    @property
    def alive(self) -> bool:
        return not self.dead and (self.work is None or not self.work.done())

    @property
    def at(self) -> str | None:
        """Return the step that it is about to take; None if it takes none, for good or until time has passed."""
        return None if self.dead or not self.gates else self.gates[0][0]

    @property
    def is_current(self) -> bool:
        """Whether its task instance is still what it was started for, so that Airflow lets it run."""
        state = "running" if self.trigger is None else "deferred"
        return self.task.ti == self.ti and self.task.state == state and self.task.trigger == self.number

    def one(self, kind: type[Any]) -> Any:
        """Return what an event loop has one of, as the process would have it in a loop of its own."""
        if kind not in self.ones:
            self.ones[kind] = kind()
        return self.ones[kind]


class LostError(Exception):
    """A request, or its answer, has not arrived."""


async def step(name: str) -> None:
    """
    Let others go first.

    :raises LostError: what was sent is lost. Of a step at a source a ``ConnectionError`` is raised instead.
    """
    process = PROCESS.get()
    gate = (name, asyncio.get_running_loop().create_future())
    process.gates.append(gate)
    try:
        await gate[1]
    finally:
        process.gates.remove(gate)


class Database:
    """Airflow's tables and the inbox's, in memory."""

    @classmethod
    @functools.lru_cache(maxsize=1)
    def of_process(cls) -> Database:
        """Return the one of this process."""
        return cls()

    def __init__(self) -> None:
        models.import_all_models()
        engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
        Base.metadata.create_all(engine)
        inbox.Base.metadata.create_all(engine)
        self.connection = engine.connect()
        self.sessions = sessionmaker(engine, autocommit=False, autoflush=False, expire_on_commit=False)

    def empty(self) -> None:
        """Delete what an example may have left."""
        for model in (XComModel, Log, RenderedTaskInstanceFields, TaskInstance, Trigger, DagRun):
            self.connection.execute(delete(model.__table__))
        for table in inbox.Base.metadata.tables.values():
            self.connection.execute(delete(table))
        self.connection.commit()

    def execute(self, statement: Any) -> None:
        self.connection.execute(statement)
        self.connection.commit()

    def read(self, statement: Any) -> list[Any]:
        rows = self.connection.execute(statement).all()
        self.connection.commit()
        return list(rows)


@dataclass
class Event:
    claim: object | None = None  # the wait's id, or a lease
    deliveries: int = 0
    committed_by: str | None = None
    gone: bool = False


@dataclass(eq=False)
class Task:
    """A task instance, and what the model knows of its past. What it is now stands in the database."""

    wait: Wait
    ti: uuid.UUID
    state: str | None = None
    clears: int = 3
    row: Any = None  # of the inbox
    trigger: int = 0  # which trigger's row it is deferred to; two processes may run the same
    has_trigger: bool = False  # which Airflow starts in a triggerer
    waits_from: datetime = NOON  # its beginning, or the last clear
    marked: str | None = None  # the state that a user has given to it
    timed_out: bool = False
    touched: int = 0  # how often anything was done to it
    delivered: list[str] = field(default_factory=list)  # since it was forgotten, or was to wait for another
    all_delivered: set[str] = field(default_factory=set)
    tries: list[uuid.UUID] = field(default_factory=list)
    forgotten: set[str] = field(default_factory=set)  # the ids of records
    discarded: set[str] = field(default_factory=set)  # the names of events that a user did not want any more

    @property
    def name(self) -> str:
        return self.wait.id

    @property
    def event(self) -> str | None:
        """Return the name of the event that is recorded for it, or None."""
        return None if self.row is None or self.row.phase is None else json.loads(self.row.event)["name"]

    @property
    def has_ended(self) -> bool:
        """Whether it is over, by itself."""
        return not self.marked and (self.state == "success" or self.timed_out)


class _Operator(WaitForEventOperator):
    def _give_back(self, wait: Wait) -> None:
        """Whoever runs it gives back, in steps."""


class World:
    """
    Everything that outlives a process.

    :ivar problem: the first promise that was broken, if one was.
    """

    commits = True
    """Whether the source is to be told that it may forget an event."""
    exclusive = True
    """Whether an event is for one wait."""
    parks = False
    """Whether waits are parked."""

    def __init__(
        self,
        *,
        repeatable: bool = False,
        finish_on_worker: bool = False,
        replay: bool = True,
        timeout: float | None = None,
        default: bool = True,
        waits: int = 2,
        compare_and_set: bool = True,
    ) -> None:
        self.database = Database.of_process()
        self.database.empty()
        self.repeatable, self.compare_and_set = repeatable, compare_and_set
        self.finish_on_worker, self.replay, self.timeout = finish_on_worker, replay, timeout
        self.default = [{"name": _DEFAULT}] if default and timeout is not None else []
        self.events: dict[str, Event] = {}
        self.processes: list[Process] = []
        self.sent: list[Entry] = []  # what may arrive once more
        self.refused: set[tuple[str, str]] = set()  # by wait and event: the source has said that it is lost
        self.problem: str | None = None
        self.steps = 0
        self._seen_to = NOON  # when the API server last saw to the inbox
        self._answered: dict[int, tuple[Entry, str, int]] = {}
        self._ids = 0
        self.tasks = [self._new_task(number) for number in range(waits)]
        self.source = self.listener()
        self.look("the beginning")

    # --- Airflow's tables

    def _new_task(self, number: int) -> Task:
        task = Task(Wait("dag", f"run{number}", "task", run_start=NOON), self._new_id())
        task.tries.append(task.ti)
        run = {"dag_id": "dag", "run_id": f"run{number}", "run_type": "manual", "state": "running"}
        times = {"run_after": NOON, "start_date": NOON}
        self.database.execute(insert(DagRun.__table__).values(id=number + 1, **run, **times))
        self.database.execute(
            insert(_TI).values(
                id=task.ti,
                dag_id="dag",
                run_id=f"run{number}",
                task_id="task",
                map_index=-1,
                operator="WaitForEventOperator",
                pool="default_pool",
                pool_slots=1,
                span_status="not_started",
                try_number=0,
                max_tries=task.clears,
            )
        )
        return task

    def _new_id(self) -> uuid.UUID:
        self._ids += 1
        return uuid.UUID(int=self._ids)

    def set(self, task: Task, cause: str, **columns: Any) -> None:
        self.database.execute(update(_TI).where(_TI.c.run_id == task.wait.run_id).values(**columns))
        task.touched += 1
        self.look(cause)

    def look(self, cause: str) -> None:
        """Read what is in the tables, and judge what has changed."""
        tis = {row.run_id: row for row in self.database.read(_INSTANCES)}
        waits = {row.run_id: row for row in self.database.read(select(_WAIT))}
        for task in self.tasks:
            ti, row = tis[task.wait.run_id], waits.get(task.wait.run_id)
            was, task.state, task.clears = task.state, ti.state, ti.max_tries
            task.has_trigger = ti.trigger_id is not None
            before, task.row = task.row, row
            if row != before:
                self._judge_record(task, before, cause)
            if task.marked is not None and task.state != task.marked:
                self._broken(f"{task.name} was marked {task.marked} by a user, and is {task.state} by {cause}")
            if task.state != was and task.state == "success" and task.marked is None:
                self._succeeded(task)
            if task.state != was and ti.next_method == "__fail__":
                self._timed_out_by_airflow(task)

    def _judge_record(self, task: Task, before: Any, cause: str) -> None:
        row = task.row
        if before is not None and row.generation < before.generation:
            self._broken(f"the generation of {task.name} went back by {cause}")
        old = None if before is None or before.phase is None else before.record_id
        new = None if row.phase is None else row.record_id
        if old == new:
            return
        if new is not None:
            if old is not None:
                self._broken(f"{before.event} of {task.name} was overwritten with {row.event} by {cause}")
            if new in task.forgotten:
                self._broken(f"{row.event} of {task.name} was forgotten, and came back by {cause}")
            return
        assert before is not None
        name = json.loads(before.event)["name"]
        if cause == "begin" and not self.replay and before.record_clears != task.clears:
            self._discard(task, name)  # a user has cleared it, to wait for another
        elif cause == "lose" and (task.name, name) in self.refused:
            pass
        elif cause != "forget":
            self._broken(f"{name} is {task.name}'s no longer by {cause}")

    def _discard(self, task: Task, name: str) -> None:
        task.discarded.add(name)
        task.delivered.clear()

    def _succeeded(self, task: Task) -> None:
        pushed = self.database.read(select(XComModel.value).where(XComModel.run_id == task.wait.run_id))
        if len(pushed) != 1:
            self._broken(f"{task.name} has succeeded, and downstream there is {pushed}")
            return
        [(value,)] = pushed
        value = json.loads(value) if isinstance(value, str) else value
        self.deliver(task, value["name"])

    def deliver(self, task: Task, name: str) -> None:
        if name == _DEFAULT:
            self._ended_without_event(task)
            return
        TRIED["delivered"] += 1
        task.delivered.append(name)
        task.all_delivered.add(name)
        if task.event != name:
            self._broken(f"{task.name} has delivered {name}, and has {task.row and task.row.event}")
        elif task.row.phase != Phase.COMMITTED:
            self._broken(f"{task.name} has delivered {name}, whose commit is not noted")
        elif not self.replay and task.row.record_clears != task.clears:
            self._broken(f"{task.name} has delivered {name}, which it had before it was cleared")

    def _ended_without_event(self, task: Task) -> None:
        TRIED["ended without an event"] += 1
        task.timed_out = True
        if self.counts(task):
            self._broken(f"{task.name} has ended without its event, {task.event}")
        elif self.timeout is None or now() < task.waits_from + timedelta(seconds=self.timeout):
            self._broken(f"{task.name} has ended before its time was up")

    def _timed_out_by_airflow(self, task: Task) -> None:
        TRIED["ended by Airflow"] += 1
        if self.counts(task):
            self._broken(f"{task.name} was ended by Airflow although its event is recorded")

    def counts(self, task: Task) -> bool:
        """Whether it has an event that it is to deliver."""
        return task.event is not None and (self.replay or task.row.record_clears == task.clears)

    def _broken(self, problem: str) -> None:
        self.problem = self.problem or problem

    # --- the API server

    async def ask(self, entry: Entry) -> Answer:
        """Ask the inbox, as `airflow_events.triggers.inbox.Inbox` does, and again until an answer comes."""
        while True:
            self.sent = [*self.sent[-7:], entry]
            try:
                await step(f"ask {entry.operation}")
                answer = self.carry_out(entry)
                await step(f"answer {entry.operation}")
            except LostError:
                continue
            return answer

    def carry_out(self, entry: Entry) -> Answer:
        """Carry out what has reached the API server."""
        [answer] = transactions.carry_out([entry])
        TRIED[f"{entry.operation} {Status(answer.status).value}"] += 1
        task = next((task for task in self.tasks if str(task.ti) == entry.ti), None)
        if task is not None:
            self._answers_alike(entry, answer, task)
        self.look(entry.operation)
        if answer.status == Status.TAKEN:
            assert isinstance(entry, Record)
            self._judge_taken(json.loads(entry.event)["name"])
        return answer

    def _answers_alike(self, entry: Entry, answer: Answer, task: Task) -> None:
        """Whoever asks again, because an answer was lost, is answered as the first time."""
        _, status, touched = self._answered.get(id(entry), (None, "", -1))
        if touched == task.touched and status != answer.status and not isinstance(entry, Begin):
            self._broken(f"{entry.operation} of {task.name} was {status}, and when asked again {answer.status}")
        task.touched += touched != task.touched
        self._answered[id(entry)] = entry, answer.status, task.touched

    def _judge_taken(self, name: str) -> None:
        if not self.events[name].committed_by and not any(task.event == name for task in self.tasks):
            self._broken(f"{name} is nobody's, and whoever polled it was told that it is taken")

    def before_time_passes(self, seconds: float) -> None:
        """See to the inbox, as the API server does every few minutes, if that comes in this time."""
        if now() + timedelta(seconds=seconds) >= self._seen_to + timedelta(seconds=upkeep._PAUSE):
            self._seen_to = now()
            TRIED["timeouts taken away"] += upkeep.clear_timeouts()
            self.look("the API server")
        if self.parks:
            while self._wake():
                self.look("the API server")

    def _wake(self) -> int:
        woken = waking.wake_due()
        for task in self.tasks:
            task.touched += woken > 0
        TRIED["parked waits that were due"] += woken
        return woken

    def dies_with_waits_in_hand(self) -> None:
        """An API server takes the parked waits that are due, and is killed."""
        TRIED["left by an API server"] += len(in_transaction(waking._take))

    async def asend(self, message: Any) -> Any:
        """Answer what a trigger asks its supervisor."""
        await step("GetTaskStates")
        states = {task.wait.run_id: {"task": task.state} for task in self.tasks}
        await step("told the states")
        return SimpleNamespace(task_states={run_id: states[run_id] for run_id in message.run_ids})

    # --- the triggerer

    def start_triggerer(self, task: Task) -> Process:
        assert task.state == "deferred"
        trigger = EventTrigger(
            listener="model",
            finish_on_worker=self.finish_on_worker,
            timeout=self.timeout,
            default=self.default,
            replay=self.replay,
            wait=dataclasses.asdict(task.wait),
        )
        trigger.task_instance = SimpleNamespace(id=task.ti, task_id="task", try_number=1)  # type: ignore[assignment]
        process = Process(f"triggerer {len(self.processes)}", task, task.ti, trigger, task.trigger)
        return self._start(process, self._run_trigger(process))

    async def _run_trigger(self, process: Process) -> None:
        assert process.trigger is not None
        try:
            async for event in process.trigger.run():
                raise AssertionError(f"a trigger ends its task by itself, and fired {event}")
            raise AssertionError("a trigger that has returned fails its task")
        except asyncio.CancelledError:
            if not process.is_cancelled:  # it has left by itself; Airflow starts it again if it is to run
                return
            try:
                await process.trigger.on_kill()
            except Exception as error:
                self._broken(f"{process.name} failed when it was cancelled: {error!r}")
        except (ConnectionError, CommitFailed):
            await step("fail")
            if process.is_current:
                self.try_fails(process.task)
        except Exception as error:
            self._broken(f"{process.name} failed: {error!r}")

    def cancel(self, process: Process) -> None:
        """Take a trigger from its triggerer, as Airflow does when it is another's by now, or nobody's."""
        assert process.work is not None
        process.is_cancelled = True
        process.work.cancel()

    # --- the worker

    def start_worker(self, task: Task) -> Process:
        process = Process(f"worker {len(self.processes)}", task, task.ti, number=task.trigger)
        [(method, kwargs)] = self.database.read(
            select(_TI.c.next_method, _TI.c.next_kwargs).where(_TI.c.run_id == task.wait.run_id)
        )
        self.set(task, "a worker", state="running", next_method=None, next_kwargs=None)
        return self._start(process, self._run_worker(process, method, kwargs))

    async def _run_worker(self, process: Process, method: str, kwargs: Any) -> None:
        await step("resume")
        task = process.task
        ti = SimpleNamespace(dag_id="dag", run_id=task.wait.run_id, task_id="task", map_index=-1)
        context: Any = {"ti": ti, "dag_run": SimpleNamespace(start_date=NOON)}
        try:
            event = self._operator.resume_execution(method, deserialize(kwargs), context)
        except (AirflowSensorTimeout, AirflowFailException):
            event = None
        except TaskDeferralError:
            await step("fail")
            if process.is_current:
                self.try_fails(task)
            return
        except Exception as error:
            self._broken(f"{process.name} failed: {error!r}")
            return
        if method == "__fail__":
            await release(self.source, task.wait, None, (), {})
        await step("report")
        if not process.is_current:
            return
        if event is None:
            self._ended_without_event(task)
            self.set(task, "a worker", state="failed")
        else:
            self._push(task, event)
            self.set(task, "a worker", state="success")

    @functools.cached_property
    def _operator(self) -> WaitForEventOperator:
        default = {"default": self.default[0]} if self.default else {}
        return _Operator(task_id="task", listener=self.source, timeout=self.timeout, **default)

    def _push(self, task: Task, event: Any) -> None:
        number = self.tasks.index(task) + 1
        where = {"dag_id": "dag", "run_id": task.wait.run_id, "task_id": "task", "dag_run_id": number}
        what = {"key": "return_value", "value": event, "timestamp": now()}
        self.database.execute(insert(XComModel.__table__).values(**where, **what))

    def _start(self, process: Process, work: Any) -> Process:
        self.processes.append(process)
        context = contextvars.copy_context()
        context.run(PROCESS.set, process)
        process.work = context.run(asyncio.get_running_loop().create_task, work)
        return process

    # --- what Airflow and its users do

    def defer(self, task: Task) -> None:
        """Start the task in the triggerer, as the scheduler does."""
        assert task.state is None
        self.database.execute(delete(XComModel).where(XComModel.run_id == task.wait.run_id))
        longest = None if self.timeout is None else now() + timedelta(seconds=self.timeout + GRACE)
        task.trigger += 1
        trigger = self.tasks.index(task) * 1000 + task.trigger
        kwargs = json.dumps({"replay": self.replay})
        self.database.execute(
            insert(_TRIGGER).values(id=trigger, classpath="model", kwargs=kwargs, created_date=now())
        )
        task.timed_out = False
        self.set(
            task,
            "the scheduler",
            state="deferred",
            next_method="execute_complete",
            next_kwargs={},
            trigger_id=trigger,
            trigger_timeout=longest,
            try_number=_TI.c.try_number + 1,
            start_date=now(),
        )

    def _next_try(self, task: Task, cause: str, **columns: Any) -> None:
        task.ti, task.marked, task.timed_out = self._new_id(), None, False
        task.tries.append(task.ti)
        self.set(task, cause, id=task.ti, state=None, next_method=None, next_kwargs=None, **columns)

    def try_fails(self, task: Task) -> None:
        """The try has failed, and there will be another."""
        self._next_try(task, "a retry")

    def clear(self, task: Task) -> None:
        task.waits_from = now()
        if not self.replay:
            task.delivered.clear()
        self._next_try(task, "a clear", max_tries=_TI.c.max_tries + 1)

    def mark(self, task: Task, state: str) -> None:
        task.marked = state
        self.set(task, "a user", state=state, end_date=now())

    def may_be_forgotten(self, task: Task) -> bool:
        """Whether a user may forget its event: it has one, and is not at work."""
        return task.event is not None and why_it_cannot_be_forgotten(task.state, True) is None

    def forget(self, task: Task) -> None:
        """Forget the event of a wait."""
        if not self.may_be_forgotten(task):
            return
        TRIED["forgotten"] += 1
        task.forgotten.add(task.row.record_id)
        self._discard(task, task.event or "")
        with self.database.sessions() as session, session.begin():
            told = forget(session, ("dag", task.wait.run_id, "task", -1), by="a user")
        assert told is not None and told.refused is None
        task.touched += 1
        self.look("forget")

    def end_what_is_too_late(self) -> None:
        """End deferrals whose time has passed, as the scheduler does."""
        scheduler: Any = SimpleNamespace(log=logging.getLogger(__name__))
        before = [task.state for task in self.tasks]
        with self.database.sessions() as session, session.begin():
            SchedulerJobRunner.check_trigger_timeouts(scheduler, session=session)
        self.look("the scheduler")
        for task, was in zip(self.tasks, before, strict=True):
            task.touched += task.state != was

    # --- the source

    def listener(self) -> type[EventListener]:
        """Return what polls and commits."""
        raise NotImplementedError

    def publish(self, name: str) -> None:
        self.events[name] = Event()

    def expire(self, event: Event) -> None:
        if not event.committed_by:
            event.claim = None

    def source_problem(self) -> str | None:
        """Say what is committed and recorded for nobody, if anything is."""
        return None

    def is_committed(self, task: Task) -> bool:
        """Whether the source has forgotten the event of a wait."""
        return True

    def is_the_waits(self, task: Task) -> bool:
        """Whether the source will give the event that a wait has to no other."""
        return True

    # --- what is promised

    def violation(self) -> str | None:
        """Say which promise is broken, if one is."""
        return self.problem or self._twice() or self.source_problem()

    def _twice(self) -> str | None:
        for task in self.tasks:
            if len(set(task.delivered)) > 1:
                return f"{task.name} delivered {task.delivered}"
            if task.row is not None and task.row.phase == Phase.COMMITTED and not self.is_committed(task):
                return f"{task.event} of {task.name} is noted as committed, and is not"
        if self.exclusive:
            delivered = [name for task in self.tasks for name in task.all_delivered]
            if twice := {name for name in delivered if delivered.count(name) > 1}:
                return f"{twice} was delivered by two waits"
        return None


_INSTANCES = select(_TI.c.run_id, _TI.c.state, _TI.c.max_tries, _TI.c.next_method, _TI.c.trigger_id)


class ClaimsWorld(World):
    """Its source gives events to waits, each with a claim that expires, and compares and sets when it commits."""

    def listener(self) -> type[EventListener]:
        world = self

        class Claims(EventListener):
            async def poll_for_event(self) -> Any:
                return await world.poll(current_wait().id)

            async def event_checkpointed(self, event: Any) -> None:
                await step("commit")
                world.commit(current_wait().id, event)
                await step("committed")

            async def event_released(self, event: Any, *args: Any, **kwargs: Any) -> None:
                await step("release")
                world.release(current_wait().id, event)

        return Claims

    async def poll(self, me: str) -> dict[str, Any]:
        while True:
            await step("poll")
            free = [name for name, e in self.events.items() if not (e.claim or e.committed_by or e.gone)]
            if self.repeatable:
                mine = [name for name, e in self.events.items() if e.claim == me and not e.committed_by]
                if name := next(iter(mine + free), None):
                    self.events[name].claim = me
                    return {"name": name, "lease": me}
            elif free:
                lease = f"{me} {PROCESS.get().name}"
                self.events[free[0]].claim = lease
                return {"name": free[0], "lease": lease}

    def commit(self, me: str, message: dict[str, Any]) -> None:
        event = self.events[message["name"]]
        if event.committed_by != me and self.compare_and_set and event.claim != message["lease"]:
            TRIED["lost"] += 1
            self.refused.add((name_of(me), message["name"]))
            raise EventLost(message["name"])
        event.committed_by = me

    def release(self, me: str, message: dict[str, Any] | None) -> None:
        for name, event in self.events.items():
            mine = event.claim == me if self.repeatable else message and event.claim == message["lease"]
            if mine and not event.committed_by and (message is None or name == message["name"]):
                event.claim = None

    def source_problem(self) -> str | None:
        for name, event in self.events.items():
            if event.committed_by:
                task = next(task for task in self.tasks if task.name == name_of(event.committed_by))
                if task.event != name and name not in task.discarded:
                    return f"{name} is committed by {task.name}, which has {task.event}"
        return None

    def is_the_waits(self, task: Task) -> bool:
        return (
            self.is_committed(task) or self.events[task.event or ""].claim == json.loads(task.row.event)["lease"]
        )

    def is_committed(self, task: Task) -> bool:
        return name_of(self.events[task.event or ""].committed_by or "") == task.name


class AtLeastOnceWorld(World):
    """
    Its source knows nothing of waits: a queue, which gives out again what is not acknowledged.

    It does so at once, as it would if whoever has a message stood still; and each message a few times only, or a
    wait would never wait.
    """

    most_deliveries = 4

    def listener(self) -> type[EventListener]:
        world = self

        class Queue(EventListener):
            async def poll_for_event(self) -> Any:
                return await world.poll()

            def event_id(self, event: Any) -> str:
                return str(event["name"])

            async def event_checkpointed(self, event: Any) -> None:
                await step("commit")
                world.acknowledge(event["name"])
                await step("committed")

            async def event_released(self, event: Any, *args: Any, **kwargs: Any) -> None:
                await step("release")
                if event is not None:
                    world.expire(world.events[event["name"]])

        return Queue

    async def poll(self) -> dict[str, Any]:
        while True:
            await step("poll")
            there = [(e.deliveries, name) for name, e in self.events.items() if not (e.committed_by or e.gone)]
            deliveries, name = min(there, default=(self.most_deliveries, ""))
            if deliveries < self.most_deliveries:
                self.events[name].deliveries += 1
                return {"name": name}

    def expire(self, event: Event) -> None:
        event.deliveries = 0

    def acknowledge(self, name: str) -> None:
        self.events[name].committed_by = PROCESS.get().name

    def source_problem(self) -> str | None:
        for name, event in self.events.items():
            if event.committed_by and not any(name == task.event or name in task.discarded for task in self.tasks):
                return f"{name} is acknowledged by {event.committed_by}, and nobody has it"
        return None

    def is_committed(self, task: Task) -> bool:
        return bool(self.events[task.event or ""].committed_by)


class WatchedWorld(World):
    """Its source only shows its events: there is nothing to claim or to commit, and some go away in time."""

    commits = False
    exclusive = False

    def listener(self) -> type[EventListener]:
        world = self

        class Watch(EventListener):
            async def poll_for_event(self) -> Any:
                while True:
                    await step("poll")
                    if there := [name for name, event in world.events.items() if not event.gone]:
                        return {"name": there[0]}

        return Watch


class ForeseenWorld(WatchedWorld):
    """Its event is a moment, which the listener can tell ahead."""

    moment = NOON + timedelta(seconds=20)
    parks = True

    def listener(self) -> type[EventListener]:
        world = self

        class Moment(EventListener):
            def foresee(self) -> Any:
                return {"name": "moment"}, world.moment

            async def poll_for_event(self) -> Any:
                await step("poll")
                return {"name": "moment"}

        return Moment

    def deliver(self, task: Task, name: str) -> None:
        super().deliver(task, name)
        if now() < self.moment:
            self._broken(f"{task.name} has delivered {name} before it came")


def name_of(wait: str) -> str:
    """Return a wait's name without what its losses added."""
    return wait.partition("~")[0]


def now() -> datetime:
    return datetime.now(timezone.utc)
