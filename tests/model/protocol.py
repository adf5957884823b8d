"""
An Airflow and a source in memory, for the project's own trigger, record and commit code to run against.

Every message between them is a step, before and after which another process may be stepped, or this one killed.
Nothing of the protocol is modelled: `EventTrigger`, `XComRecord`, `WorkerRecord` and `settle` are the real ones.
What is modelled is Airflow (XComs that anybody may write; a task state store that refuses a task instance that
is outlived; an event that resumes only the trigger's own, deferred task instance) and a source with claims that
lapse.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from airflow.sdk.execution_time import comms
from airflow.triggers.base import TaskSuccessEvent
from airflow_events import EventListener, Wait, current_wait
from airflow_events.errors import EventLost
from airflow_events.listeners import commit
from airflow_events.operators.record import WorkerRecord
from airflow_events.triggers import outcome
from airflow_events.triggers.event import EventTrigger
from airflow_events.triggers.record import LOST_KEY, RECORD_KEY

PROCESS: contextvars.ContextVar[Process] = contextvars.ContextVar("process")


class LoopOfSteps(asyncio.SelectorEventLoop):
    """An event loop in which only steps take place: no timer goes off, and a thread is done at once."""

    def time(self) -> float:
        return 1e6

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


@dataclass(eq=False)
class Process:
    """A triggerer's part that runs one trigger, or a worker's that runs one task."""

    name: str
    gates: list[tuple[str, asyncio.Future[None]]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    dead: bool = False
    ones: dict[type[Any], Any] = field(default_factory=dict)

    @property
    def at(self) -> str | None:
        """Return the step that it is about to take, or None if it has ended or was killed."""
        return None if self.dead or not self.gates else self.gates[0][0]

    def one(self, kind: type[Any]) -> Any:
        """Return what an event loop has one of, as the process would have it in a loop of its own."""
        if kind not in self.ones:
            self.ones[kind] = kind()
        return self.ones[kind]


async def step(name: str) -> None:
    """Let others go first."""
    process = PROCESS.get()
    gate = (name, asyncio.get_running_loop().create_future())
    process.gates.append(gate)
    try:
        await gate[1]
    finally:
        process.gates.remove(gate)


@dataclass
class Event:
    claim: object | None = None  # the wait's id, or a lease
    committed_by: str | None = None
    gone: bool = False


@dataclass
class Task:
    """A task instance: a wait."""

    wait: Wait
    state: str = "deferred"
    trigger: int = 0  # which trigger it is deferred to; two processes may run the same
    told: str = ""  # what the worker that deferred it knew to be lost
    instance: int = 0  # its id in Airflow, another for each try
    arrived: Any = None
    xcoms: dict[str, str] = field(default_factory=dict)
    store: dict[str, Any] = field(default_factory=dict)
    delivered: list[str] = field(default_factory=list)

    @property
    def record(self) -> commit.Record | None:
        stored, lost = (json.loads(self.xcoms.get(key, "null")) for key in (RECORD_KEY, LOST_KEY))
        return commit.Record.from_dict(stored) if stored and stored["id"] != lost else None


class World:
    """Everything that outlives a process."""

    def __init__(
        self, *, repeatable: bool, finish_on_worker: bool, waits: int = 2, compare_and_set: bool = True
    ) -> None:
        self.repeatable, self.compare_and_set = repeatable, compare_and_set
        self.finish_on_worker = finish_on_worker
        self.events: dict[str, Event] = {}
        self.tasks = [Task(Wait("dag", f"run{number}", "task")) for number in range(waits)]
        self.processes: list[Process] = []
        world = self

        class Source(EventListener):
            repeatable_poll = repeatable

            async def poll_for_event(self):
                return await world.poll(current_wait().id)

            async def event_checkpointed(self, event):
                await step("commit")
                world.commit(current_wait().id, event)
                await step("committed")

            async def event_released(self, event, *args, **kwargs):
                await step("release")
                world.release(current_wait().id, event)

        self.source = Source

    # --- the source

    async def poll(self, me: str) -> dict[str, Any]:
        while True:
            await step("poll")
            free = [name for name, event in self.events.items() if not (event.claim or event.committed_by)]
            if self.repeatable:
                mine = [name for name, e in self.events.items() if e.claim == me and not e.committed_by]
                if name := next(iter(mine + free), None):
                    self.events[name].claim = me
                    return {"name": name, "lease": me}
            elif free:
                lease = f"{me} {len(self.processes)} {PROCESS.get().name}"
                self.events[free[0]].claim = lease
                return {"name": free[0], "lease": lease}

    def commit(self, me: str, message: dict[str, Any]) -> None:
        event = self.events[message["name"]]
        if event.committed_by != me and self.compare_and_set and event.claim != message["lease"]:
            raise EventLost(message["name"])
        event.committed_by = me

    def lapse(self, event: Event) -> None:
        if not event.committed_by:
            event.claim = None

    def release(self, me: str, message: dict[str, Any] | None) -> None:
        for name, event in self.events.items():
            mine = event.claim == me if self.repeatable else message and event.claim == message["lease"]
            if mine and not event.committed_by and (message is None or name == message["name"]):
                event.claim = None

    # --- Airflow

    async def asend(self, message: Any) -> Any:
        """Answer what the triggerer asks its supervisor."""
        await step(type(message).__name__ + f" {getattr(message, 'key', '')}".rstrip())
        answer = self._answer(message)
        await step("answered")
        return answer

    def _answer(self, message: Any) -> Any:
        if isinstance(message, comms.GetTaskStates):
            [run_id] = message.run_ids
            state = next(task.state for task in self.tasks if task.wait.run_id == run_id)
            return SimpleNamespace(task_states={run_id: {"task": state}})
        task = next(task for task in self.tasks if task.wait.run_id == message.run_id)
        if isinstance(message, comms.SetXCom):
            task.xcoms[message.key] = json.dumps(message.value)
            return None
        assert isinstance(message, comms.GetXCom)
        value = json.loads(task.xcoms.get(message.key, "null"))
        return comms.XComResult(key=message.key, value=value)

    def start_triggerer(self, task: Task) -> None:
        self._start(f"triggerer {len(self.processes)}", self._run_trigger(task, task.trigger))

    async def _run_trigger(self, task: Task, trigger_id: int) -> None:
        trigger = EventTrigger(
            listener="model",
            finish_on_worker=self.finish_on_worker,
            wait=dataclasses.asdict(dataclasses.replace(task.wait, after=task.told)),
        )
        trigger.task_instance = SimpleNamespace(task_id="task", try_number=trigger_id + 1)  # type: ignore[assignment]
        async for event in trigger.run():
            await step("submit")
            if task.state != "deferred" or task.trigger != trigger_id:
                return
            if isinstance(event, TaskSuccessEvent):
                self._succeed(task, json.loads(task.xcoms["return_value"]))
            else:
                task.state, task.arrived = "scheduled", event.payload

    def start_worker(self, task: Task) -> None:
        task.state, task.instance = "running", task.instance + 1
        self._start(f"worker {len(self.processes)}", self._run_worker(task, task.instance))

    async def _run_worker(self, task: Task, instance: int) -> None:
        arrived = outcome.decode(task.arrived)
        assert isinstance(arrived, outcome.Arrived)
        record = SteppedWorkerRecord(FakeTaskInstance(task), FakeStore(task, instance))  # type: ignore[arg-type]
        wait = dataclasses.replace(task.wait, after=record.after)
        try:
            event = await commit.settle(self.source, wait, record, arrived.event)
        except EventLost:
            await step("defer")
            if task.instance == instance:
                self.retry(task, after=record.after)
            return
        except OutlivedError:
            return
        await step("report")
        if task.instance == instance and task.state == "running":
            self._succeed(task, event)

    def retry(self, task: Task, after: str = "") -> None:
        """Begin another try, or go on after a clear: deferred to a new trigger, under a new id."""
        task.state, task.trigger, task.instance = "deferred", task.trigger + 1, task.instance + 1
        task.told = after

    def violation(self) -> str | None:
        """Say which promise is broken, if one is."""
        return violation(self)

    def _succeed(self, task: Task, event: dict[str, Any]) -> None:
        task.state = "success"
        task.delivered.append(event["name"])

    def _start(self, name: str, work: Any) -> None:
        process = Process(name)
        self.processes.append(process)
        context = contextvars.copy_context()
        context.run(PROCESS.set, process)
        process.task = context.run(asyncio.get_running_loop().create_task, work)


class WatchedWorld(World):
    """Its source only shows its events: there is nothing to claim or to commit, and some go away in time."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        world = self

        class Watch(EventListener):
            repeatable_poll = True

            async def poll_for_event(self) -> Any:
                while True:
                    await step("poll")
                    if there := [name for name, event in world.events.items() if not event.gone]:
                        return {"name": there[0]}

        self.source = Watch

    def violation(self) -> str | None:
        for task in self.tasks:
            if len(set(task.delivered)) > 1:
                return f"{task.wait.id} delivered {task.delivered}"
            if task.delivered and (task.record is None or task.record.event["name"] != task.delivered[0]):
                return f"{task.wait.id} delivered {task.delivered[0]}, and has {task.record}"
        return None


class OutlivedError(Exception):
    """Airflow's refusal of what comes from a task instance that is outlived."""


@dataclass
class FakeTaskInstance:
    task: Task
    task_id: str = "task"
    map_index: int = -1
    max_tries: int = 3

    def xcom_push(self, key: str, value: Any) -> None:
        self.task.xcoms[key] = json.dumps(value)

    def xcom_pull(self, *, task_ids: str, key: str, map_indexes: int) -> Any:
        return json.loads(self.task.xcoms.get(key, "null"))


@dataclass
class FakeStore:
    task: Task
    instance: int

    def get(self, key: str) -> Any:
        return self.task.store.get(key)

    def set(self, key: str, value: Any, *, retention: Any) -> None:
        self._fence()
        self.task.store[key] = value

    def delete(self, key: str) -> None:
        self._fence()
        self.task.store.pop(key, None)

    def _fence(self) -> None:
        if self.task.instance != self.instance:
            raise OutlivedError


class SteppedWorkerRecord(WorkerRecord):
    """The worker's record, with a step before and after each of its methods."""

    async def read(self) -> commit.Record | None:
        await step("read")
        return await super().read()

    async def write(self, record: commit.Record) -> None:
        await step(f"write {record.phase.value}")
        await super().write(record)
        await step("written")

    async def drop(self, record: commit.Record) -> None:
        await step("drop")
        await super().drop(record)


def name_of(wait: str) -> str:
    """Return a wait's name without what its losses added."""
    return wait.partition("~")[0]


def violation(world: World) -> str | None:
    """Say which promise is broken, if one is."""
    for name, event in world.events.items():
        if len({task.wait.id for task in world.tasks if name in task.delivered}) > 1:
            return f"{name} was delivered by two waits"
        if event.committed_by:
            task = next(task for task in world.tasks if task.wait.id == name_of(event.committed_by))
            if task.record is None or task.record.event["name"] != name:
                return f"{name} is committed by {task.wait.id}, which has {task.record}"
    for task in world.tasks:
        if len(set(task.delivered)) > 1:
            return f"{task.wait.id} delivered {task.delivered}"
        for name in task.delivered:
            if name_of(world.events[name].committed_by or "") != task.wait.id:
                return f"{task.wait.id} delivered {name}, which it has not committed"
    return None
