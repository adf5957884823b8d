"""
Promises 1 to 4 over thousands of schedules: two waits, several triggerers on each trigger, workers, crashes
between any two steps, claims that lapse, clears.

And that the model sees what it should: mutants of the protocol are caught.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from datetime import datetime, timezone

import pytest
import time_machine
from airflow.sdk.execution_time import task_runner
from airflow_events.listeners import commit
from airflow_events.listeners.commit import Record, settle
from airflow_events.listeners.shared import OnePerLoop
from airflow_events.triggers import event as event_trigger
from airflow_events.triggers import lookups, reference
from airflow_events.triggers.lookups import Lookups
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from protocol import PROCESS, Event, LoopOfSteps, WatchedWorld, World

MOST_PROCESSES = 25
pick = st.integers(0, 99)
NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
TICK = 0.0004  # seconds for a step: two of them may be in the same millisecond, which is how finely records tell


def drawn_uuid():
    return uuid.UUID(int=random.getrandbits(128))  # which Hypothesis seeds


class Protocol(RuleBasedStateMachine):
    repeatable = True
    finish_on_worker = False
    compare_and_set = True
    world_class = World
    turns = 25
    rounds = 400

    @initialize()
    def begin(self):
        # Whatever a schedule depends on is drawn by Hypothesis, or it could not play it again: so neither the
        # clock, nor the speed of this machine, nor a random id is part of one.
        self.time = time_machine.travel(NOON, tick=False)
        self.clock = self.time.start()
        self.loop = LoopOfSteps()
        self.world = self.world_class(
            repeatable=self.repeatable,
            finish_on_worker=self.finish_on_worker,
            compare_and_set=self.compare_and_set,
        )
        self.before = (
            task_runner.__dict__.get("SUPERVISOR_COMMS"),
            OnePerLoop.__dict__["of_loop"],
            reference.load,
            uuid.uuid4,
        )
        task_runner.SUPERVISOR_COMMS = self.world
        # What is of the loop dies with a process, and no other waits for it.
        OnePerLoop.of_loop = classmethod(lambda kind: PROCESS.get().one(kind))
        uuid.uuid4 = drawn_uuid
        reference.load = lambda name: self.world.source
        for _ in range(3):
            self.publish()

    def teardown(self):
        if not hasattr(self, "world"):
            return
        try:
            if self.world.violation() is None:
                self.finish()
        finally:
            task_runner.SUPERVISOR_COMMS, OnePerLoop.of_loop, reference.load, uuid.uuid4 = self.before
            self.loop.run_until_complete(self.end_all())
            self.loop.close()
            self.time.stop()

    async def end_all(self):
        """Judgement is over; what the killed processes would still do is of no interest."""
        for _ in range(5):
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            for _ in range(self.turns):
                await asyncio.sleep(0)
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.exception()

    def in_loop(self, work):
        async def do():
            work()
            for _ in range(self.turns):  # until every process stands at its next step
                await asyncio.sleep(0)

        self.clock.shift(TICK)
        self.loop.run_until_complete(do())

    @property
    def alive(self):
        return [process for process in self.world.processes if process.at]

    def one(self, items, number):
        return items[number % len(items)]

    @rule()
    def publish(self):
        if len(self.world.events) < 6:
            self.world.events[f"e{len(self.world.events)}"] = Event()

    @precondition(lambda self: len(self.alive) < 4 and len(self.world.processes) < MOST_PROCESSES)
    @rule(number=pick)
    def a_triggerer_takes_the_trigger(self, number):
        if waiting := [task for task in self.world.tasks if task.state == "deferred"]:
            self.in_loop(lambda: self.world.start_triggerer(self.one(waiting, number)))

    @precondition(lambda self: any(task.state == "scheduled" for task in self.world.tasks))
    @rule(number=pick)
    def a_worker_starts(self, number):
        scheduled = [task for task in self.world.tasks if task.state == "scheduled"]
        self.in_loop(lambda: self.world.start_worker(self.one(scheduled, number)))

    def go_on(self, number, steps):
        process = self.one(self.alive, number)
        for _ in range(steps):
            if process.at:
                self.in_loop(lambda: process.gates[0][1].set_result(None))
            self.promises_hold()

    def go_on_until(self, process, at):
        for _ in range(100):
            if process.at == at:
                return
            self.in_loop(lambda: process.gates[0][1].set_result(None))
            self.promises_hold()
        raise AssertionError(f"{process.name} does not come to {at!r}")

    # Several rules for the same, since Hypothesis chooses among rules: most of what happens is that work goes on.
    @precondition(lambda self: self.alive)
    @rule(number=pick, steps=st.integers(1, 4))
    def some_steps(self, number, steps):
        self.go_on(number, steps)

    @precondition(lambda self: self.alive)
    @rule(number=pick, steps=st.integers(5, 25))
    def many_steps(self, number, steps):
        self.go_on(number, steps)

    @precondition(lambda self: self.alive)
    @rule(number=pick, steps=st.integers(1, 25))
    def steps(self, number, steps):
        self.go_on(number, steps)

    @precondition(lambda self: self.alive)
    @rule(number=pick, steps=st.integers(1, 25))
    def steps_and_then_it_is_killed(self, number, steps):
        process = self.one(self.alive, number)
        self.go_on(number, steps)
        process.dead = True

    @precondition(lambda self: any(task.state == "running" for task in self.world.tasks))
    @rule(number=pick)
    def airflow_misses_a_heartbeat(self, number):
        """The worker may be dead, or go on."""
        self.world.retry(self.one([task for task in self.world.tasks if task.state == "running"], number))

    @rule(number=pick)
    def a_user_clears(self, number):
        task = self.one(self.world.tasks, number)
        if number < 33 and task.trigger < 9:  # not too often, or nothing else happens
            self.world.retry(task)

    @rule(number=pick)
    def a_claim_lapses(self, number):
        # A triggerer that stands still right between reading and writing the record, for longer than claims
        # live, is what docs/what-a-crash-leaves.md lists as left open.
        if number > 33 or any(self.about_to_write(process) for process in self.alive):
            return
        self.world.lapse(self.one(list(self.world.events.values()), number))

    def about_to_write(self, process):
        return process.at is not None and (
            process.at.startswith(("SetXCom event_record", "write")) or process.at == "answered"
        )

    @invariant()
    def promises_hold(self):
        if hasattr(self, "world"):
            assert self.world.violation() is None, self.world.violation()

    def finish(self):
        """Left alone, with enough events, every wait ends in success: nothing hangs, nothing is lost."""
        self.in_the_end(publish=self.world.tasks)

    def in_the_end(self, publish):
        for process in self.world.processes:
            process.dead = True
        for event in self.world.events.values():
            event.gone = True
        for task in publish:
            self.world.events[f"last {task.wait.id}"] = Event()
        for task in self.world.tasks:
            if task.state == "running":
                self.world.retry(task)
        for _ in range(self.rounds):
            for task in self.world.tasks:
                if task.state == "deferred" and not self.alive:
                    self.in_loop(lambda task=task: self.world.start_triggerer(task))
                if task.state == "scheduled" and not self.alive:
                    self.in_loop(lambda task=task: self.world.start_worker(task))
            for process in self.alive:
                self.in_loop(lambda process=process: process.gates[0][1].set_result(None))
            assert self.world.violation() is None, self.world.violation()
            if all(task.state == "success" for task in self.world.tasks):
                return
        raise AssertionError(f"{[task.state for task in self.world.tasks]}, {[p.at for p in self.alive]}")


class Watched(Protocol):
    """A source with nothing to commit, whose first try polls before it has looked for a record."""

    world_class = WatchedWorld
    turns = 40

    @initialize()
    def begin(self):
        self.background_before = lookups.background
        # Its work is stepped with the process, and dies with it.
        lookups.background = lambda work, name: asyncio.create_task(work, name=name)
        super().begin()

    def teardown(self):
        try:
            super().teardown()
        finally:
            lookups.background = self.background_before

    def a_claim_lapses(self, number):
        """There is none."""

    @rule(number=pick)
    def an_event_goes_away(self, number):
        if number < 50 and not any(self.about_to_write(process) for process in self.alive):
            self.one(list(self.world.events.values()), number).gone = True

    def finish(self):
        self.in_the_end(publish=[task for task in self.world.tasks if task.record is None])


class OnWorkers(Protocol):
    """As where a plugin listens to task states."""

    finish_on_worker = True


class Leased(OnWorkers):
    repeatable = False


MODEL = settings(
    max_examples=300,
    stateful_step_count=120,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)
MUTANT = settings(MODEL, max_examples=3000, phases=[Phase.generate], report_multiple_bugs=False)


@pytest.mark.parametrize("machine", [Protocol, OnWorkers, Leased, Watched])
def test_the_promises_hold(machine):
    run_state_machine_as_test(machine, settings=MODEL)


async def commit_before_record(listener, wait, store, event, **kwargs):
    """The mutant that every peer is: the source forgets the event first."""
    record = await store.read()
    if record is None:
        await commit.commit(listener, wait, event)
        record = Record(event, commit.Phase.COMMITTED)
        await store.write(record)
    return record.event


async def deliver_before_commit(listener, wait, store, event, **kwargs):
    """The mutant that leaves the commit to a later time, which may not come."""
    record = await store.read()
    if record is None:
        record = Record(event, commit.Phase.RECORDED)
        await store.write(record)
    return record.event


async def poll_wins_over_record(listener, wait, store, event, **kwargs):
    """The mutant that does not look whether the wait has an event."""

    class Blind:
        write, drop, after = store.write, store.drop, wait.after

        async def read(self):
            return None

    return await settle(listener, wait, Blind(), event, **kwargs)


@pytest.mark.parametrize(
    ("machine", "mutant"),
    [
        (Protocol, commit_before_record),
        (Protocol, deliver_before_commit),
        (Protocol, poll_wins_over_record),
        (Leased, commit_before_record),
        (Leased, deliver_before_commit),
        # Leased ends on a worker, whose trigger has looked already.
    ],
)
def test_a_mutant_of_the_order_is_caught(machine, mutant, monkeypatch):
    monkeypatch.setattr(event_trigger, "settle", mutant)
    monkeypatch.setattr(commit, "settle", mutant)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=MUTANT)


def test_a_mutant_that_never_looks_for_a_record_before_it_polls_is_caught(monkeypatch):
    monkeypatch.setattr(Lookups, "add", lambda self, look: None)
    with pytest.raises(AssertionError, match="deferred"):  # it hangs
        run_state_machine_as_test(Watched, settings=MUTANT)


def with_a_claim(machine, task):
    """Return the process that is about to record and commit what was claimed for ``task``."""
    machine.in_loop(lambda: machine.world.start_triggerer(task))
    if machine.finish_on_worker:
        machine.go_on_until(machine.world.processes[-1], None)
        machine.in_loop(lambda: machine.world.start_worker(task))
    else:
        machine.go_on_until(machine.world.processes[-1], "GetTaskStates")
    return machine.world.processes[-1]


@pytest.mark.parametrize("machine", [Protocol, OnWorkers, Leased])
@pytest.mark.parametrize("compare_and_set", [True, False])
def test_a_source_without_compare_and_set_is_caught(machine, compare_and_set, monkeypatch):
    """A claim lapses; another wait claims and commits the event, and then the first goes on to commit it."""
    monkeypatch.setattr(machine, "compare_and_set", compare_and_set)
    machine = machine()
    machine.begin()
    try:
        late, other = machine.world.tasks
        first = with_a_claim(machine, late)
        machine.world.lapse(machine.world.events["e0"])
        machine.go_on_until(with_a_claim(machine, other), None)
        assert other.delivered == ["e0"]
        if compare_and_set:
            machine.go_on_until(first, None)
            assert other.delivered == ["e0"]
        else:
            with pytest.raises(AssertionError, match="e0"):
                machine.go_on_until(first, None)
    finally:
        machine.teardown()


def test_nobody_commits_what_was_lost_and_then_claimed_anew():
    """One triggerer loses the event and claims it again, and dies; another still has the lost record."""
    machine = Protocol()
    machine.begin()
    try:
        [task, _] = machine.world.tasks
        for _ in range(2):
            machine.in_loop(lambda: machine.world.start_triggerer(task))
        first, second = machine.world.processes
        machine.go_on_until(first, "commit")
        machine.go_on_until(second, "commit")
        assert task.record.event["name"] == "e0"
        machine.world.lapse(machine.world.events["e0"])
        machine.go_on_until(first, "GetTaskStates")
        assert machine.world.events["e0"].claim is not None
        first.dead = True
        machine.go_on_until(second, "GetTaskStates")
        assert machine.world.events["e0"].committed_by is None
    finally:
        machine.teardown()
    assert task.delivered == ["e0"]


@pytest.mark.parametrize("listening", [False, True])
def test_where_a_plugin_listens_to_task_states_a_wait_ends_on_a_worker(listening):
    from airflow.listeners.listener import get_listener_manager

    plugin = object()
    if listening:
        get_listener_manager().pm.register(plugin)
    machine = Protocol()
    machine.begin()
    try:
        [task, _] = machine.world.tasks
        machine.in_loop(lambda: machine.world.start_triggerer(task))
        while machine.alive:
            machine.go_on(0, 1)
        assert task.state == ("scheduled" if listening else "success")
    finally:
        machine.teardown()
        if listening:
            get_listener_manager().pm.unregister(plugin)
