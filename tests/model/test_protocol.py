"""
The promises over thousands of schedules: two waits, several triggerers on each trigger, workers, crashes between
any two steps, requests and answers that are lost or come again, claims that expire, retries, clears, marks, time.

And that the model sees what it should: mutants of the protocol are caught.

The same schedules are tried each time. With MODEL_EXAMPLES in the environment others are, that many times as many.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import random
import uuid
from types import SimpleNamespace

import pytest
import time_machine
from airflow import settings as airflow_settings
from airflow.sdk.execution_time import task_runner
from airflow_events.api import upkeep
from airflow_events.inbox import tasks, transactions
from airflow_events.inbox.entries import Answer, Begin, Status
from airflow_events.inbox.models import SINGLE
from airflow_events.listeners.support.commit import commit
from airflow_events.listeners.support.shared import OnePerLoop
from airflow_events.operators.wait_for_event import WaitForEventOperator
from airflow_events.triggers import event as event_trigger
from airflow_events.triggers import polling, reference, stalls
from airflow_events.triggers.event import GRACE, EventTrigger
from airflow_events.triggers.polling import Poll
from airflow_events.waits import tables
from examples import of_examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from protocol import (
    NOON,
    PROCESS,
    TAKEN,
    TIMEOUT,
    TRIED,
    AtLeastOnceWorld,
    ClaimsWorld,
    ForeseenWorld,
    LoopOfSteps,
    LostError,
    WatchedWorld,
)
from sqlalchemy import delete, insert, select

MOST_PROCESSES = 25
TICK = 0.0004  # seconds for a step
pick = st.integers(0, 99)


def drawn_uuid():
    return uuid.UUID(int=random.getrandbits(128))  # which Hypothesis seeds


class Protocol(RuleBasedStateMachine):
    """What goes on in one schedule."""

    world_class = ClaimsWorld
    repeatable = True
    compare_and_set = True
    rounds = 200
    mutant = None
    has_begun = False

    @initialize(
        two=st.booleans(),
        on_worker=st.booleans(),
        replay=st.booleans(),
        timed=st.booleans(),
        default=st.booleans(),
        left=st.booleans(),
        look_every=st.sampled_from([5.0, 300.0]),
    )
    def begin(
        self, two=False, on_worker=False, replay=True, timed=False, default=True, left=False, look_every=300.0
    ):
        """
        Begin with a triggerer for each wait.

        :param two: with two of them.
        :param left: in the end the last triggerer of each wait goes on, and is not killed.
        :param look_every: seconds; the shorter, the more looks come between other things.
        """
        # Whatever a schedule depends on is drawn by Hypothesis, or it could not play it again: so neither the
        # clock, nor the speed of this machine, nor a random id is part of one.
        TRIED["schedules"] += 1
        self.left = left
        self.time = time_machine.travel(NOON, tick=False)
        self.clock = self.time.start()
        self.loop = LoopOfSteps()
        self.patch = pytest.MonkeyPatch()
        logging.disable(logging.CRITICAL)
        self.world = self.world_class(
            repeatable=self.repeatable,
            compare_and_set=self.compare_and_set,
            finish_on_worker=on_worker,
            replay=replay,
            timeout=TIMEOUT if timed else None,
            default=default,
        )
        self.patch.setattr(airflow_settings, "NonScopedSession", self.world.database.sessions)
        self.patch.setattr(task_runner, "SUPERVISOR_COMMS", self.world, raising=False)
        self.patch.setattr(event_trigger, "Inbox", SimpleNamespace(of_loop=lambda: self.world))
        # What is of the loop dies with a process, and no other waits for it.
        self.patch.setattr(OnePerLoop, "of_loop", classmethod(lambda kind: PROCESS.get().one(kind)))
        self.patch.setattr(uuid, "uuid4", drawn_uuid)
        self.patch.setattr(polling, "_LOOK_EVERY", look_every)
        self.patch.setattr(polling, "_LOOKS_APART", 1.0)
        for kind in EventTrigger, WaitForEventOperator:
            self.patch.setattr(kind, "log", logging.getLogger("model"))
        if self.mutant is not None:
            self.mutant(self.patch, self.world)
        self.patch.setattr(reference, "load", lambda name: self.world.source)
        self.publish()
        for task in self.world.tasks:
            for _ in range(1 + two):
                self.start(task)
        self.has_begun = True

    def teardown(self):
        if not hasattr(self, "world"):
            return
        try:
            # What keeps it from beginning, such as a mutant of what is no longer there, does not count as caught.
            if self.has_begun and self.world.violation() is None:
                self.in_the_end()
        finally:
            self.loop.run_until_complete(self.end_all())
            self.loop.close()
            stalls._told.clear()
            self.patch.undo()
            logging.disable(logging.NOTSET)
            self.time.stop()

    async def end_all(self):
        """Judgement is over; what the killed processes would still do is of no interest."""
        for _ in range(5):
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            for _ in range(10):
                await asyncio.sleep(0)
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.exception()

    # --- how a schedule goes on

    def do(self, work, seconds=TICK):
        TRIED["steps"] += 1
        self.world.before_time_passes(seconds)
        self.clock.shift(seconds)
        self.loop.now += seconds
        self.loop.settle(work)
        self.promises_hold()

    def step(self, process, error=None):
        gate = process.gates[0][1]
        self.do(lambda: gate.set_result(None) if error is None else gate.set_exception(error))

    def start(self, task):
        if task.state is None:
            self.world.defer(task)
        # As the time passes, an API server may have ended a parked wait.
        self.do(lambda: task.state == "deferred" and self.world.start_triggerer(task))
        return self.world.processes[-1]

    @property
    def alive(self):
        """The processes that can be stepped."""
        return [process for process in self.world.processes if process.at]

    def one(self, items, number):
        return items[number % len(items)]

    def tasks(self, *states):
        return [task for task in self.world.tasks if task.state in states]

    @invariant()
    def promises_hold(self):
        if hasattr(self, "world"):
            assert self.world.violation() is None, self.world.violation()

    @precondition(lambda self: len(self.world.events) < 6)
    @rule()
    def publish(self):
        self.world.publish(f"e{len(self.world.events)}")

    @precondition(lambda self: self.tasks(None, "deferred") and len(self.alive) < 4)
    @precondition(lambda self: len(self.world.processes) < MOST_PROCESSES)
    @rule(number=pick)
    def a_triggerer_takes_the_trigger(self, number):
        self.start(self.one(self.tasks(None, "deferred"), number))

    @precondition(lambda self: self.tasks("scheduled") and len(self.world.processes) < MOST_PROCESSES)
    @rule(number=pick)
    def a_worker_starts(self, number):
        self.do(lambda: self.world.start_worker(self.one(self.tasks("scheduled"), number)))

    def go_on(self, number, steps):
        process = self.one(self.alive, number)
        for _ in range(steps):
            if process.at:
                self.step(process)
        return process

    def go_on_until(self, process, at):
        for _ in range(100):
            if process.at == at:
                return
            self.step(process)
        raise AssertionError(f"{process.name} does not come to {at!r}")

    # Several rules for the same, since Hypothesis chooses among rules: most of what happens is that work goes on.
    @precondition(lambda self: self.alive)
    @rule(order=st.lists(st.integers(0, 3), min_size=2, max_size=12))
    def all_go_on(self, order):
        for number in order:
            if self.alive:
                self.step(self.one(self.alive, number))

    @precondition(lambda self: len(self.alive) > 1)
    @rule(order=st.lists(st.integers(0, 3), min_size=2, max_size=12))
    def several_go_on(self, order):
        self.all_go_on(order)

    @precondition(lambda self: self.alive)
    @rule(number=pick, steps=st.integers(1, 8))
    def one_goes_on(self, number, steps):
        self.go_on(number, steps)

    @precondition(lambda self: self.alive)
    @rule(number=pick, steps=st.integers(0, 8))
    def one_goes_on_and_is_killed(self, number, steps):
        self.go_on(number, steps).dead = True

    # --- what is on its way

    @precondition(lambda self: any(process.at.startswith(("ask", "answer")) for process in self.alive))
    @rule(number=pick)
    def a_request_or_its_answer_is_lost(self, number):
        asking = [process for process in self.alive if process.at.startswith(("ask", "answer"))]
        self.step(self.one(asking, number), LostError())

    @precondition(lambda self: self.world.sent)
    @rule(number=pick)
    def a_request_comes_once_more(self, number):
        if number < 50:
            entry = self.world.sent.pop(number % len(self.world.sent))
            self.do(lambda: self.world.carry_out(entry))

    @precondition(lambda self: any(process.at.startswith("commit") for process in self.alive))
    @rule(number=pick)
    def the_source_does_not_answer(self, number):
        committing = [process for process in self.alive if process.at.startswith("commit")]
        self.step(self.one(committing, number), ConnectionError())

    # --- what Airflow does

    @property
    def outlived(self):
        """The processes whose trigger was taken from them, or is nobody's any more."""
        newest = {process.task: process for process in self.world.processes}
        triggerers = [process for process in self.world.processes if process.alive and process.trigger is not None]
        return [p for p in triggerers if not p.is_current or newest[p.task] is not p]

    @precondition(lambda self: self.outlived)
    @rule(number=pick)
    def airflow_cancels_a_trigger(self, number):
        self.do(lambda: self.world.cancel(self.one(self.outlived, number)))

    @rule(number=pick)
    def a_try_fails(self, number):
        """Its process may be dead, or go on."""
        if number < 20 and (tasks := self.tasks("deferred", "scheduled", "running")):
            self.do(lambda: self.world.try_fails(self.one(tasks, number)))

    @rule(seconds=st.sampled_from([9, 9, 35, 120, 450]), cancelled=st.booleans())
    def time_passes(self, seconds, cancelled):
        if cancelled:
            for process in self.outlived:
                self.do(lambda process=process: self.world.cancel(process))
        self.do(lambda: None, seconds)

    @precondition(lambda self: self.world.timeout is not None)
    @rule()
    def the_scheduler_ends_what_is_too_late(self):
        self.do(self.world.end_what_is_too_late)

    @precondition(lambda self: any(p.alive and p.trigger for p in self.world.processes))
    @rule(number=pick)
    def a_process_stood_still(self, number):
        if number < 30:
            process = self.one([p for p in self.world.processes if p.alive and p.trigger], number)
            self.do(process.trigger._begin_again)

    # --- what users do

    @rule(number=pick)
    def a_user_clears(self, number):
        task = self.one(self.world.tasks, number)
        if number < 33 and task.trigger < 9:  # not too often, or nothing else happens
            self.do(lambda: self.world.clear(task))

    @rule(number=pick, state=st.sampled_from(["failed", "success"]))
    def a_user_marks(self, number, state):
        task = self.one(self.world.tasks, number)
        if number < 20:
            self.do(lambda: self.world.mark(task, state))

    @precondition(lambda self: any(self.world.may_be_forgotten(task) for task in self.world.tasks))
    @rule(number=pick)
    def a_user_forgets_the_event(self, number):
        if number < 50:
            self.do(lambda: self.world.forget(self.one(self.world.tasks, number)))

    # --- what the source does

    @precondition(lambda self: self.claimed)
    @rule(number=pick)
    def a_claim_expires(self, number):
        self.world.expire(self.one(self.claimed, number))

    @property
    def claimed(self):
        events = self.world.events.values()
        return [event for event in events if (event.claim or event.deliveries) and not event.committed_by]

    # --- and in the end

    def in_the_end(self):
        """Left alone, with enough events, every wait ends in success: nothing hangs, nothing is lost."""
        world = self.world
        world.sent.clear()
        if self.left:
            for process in self.outlived:
                self.do(lambda process=process: world.cancel(process))
        else:
            for process in world.processes:
                process.dead = True
        for event in world.events.values():
            event.gone = event.gone or event.claim is None
        for task in world.tasks:
            if task.marked or (task.state == "failed" and not task.timed_out):
                world.clear(task)
        for task in self.need_events():
            world.publish(f"last {task.name}")
        for number in range(self.rounds):
            if all(task.has_ended for task in world.tasks):
                break
            if number % 10 == 9:
                self.what_nobody_has_expires()
            self.a_round()
        else:
            raise AssertionError(f"{[task.state for task in world.tasks]}, {[p.at for p in self.alive]}")
        for task in world.tasks:
            if task.row is not None and task.row.phase == "recorded":
                raise AssertionError(f"{task.event} of {task.name} was never committed")

    def what_nobody_has_expires(self):
        recorded = {task.event for task in self.world.tasks}
        for name, event in self.world.events.items():
            if name not in recorded:
                self.world.expire(event)

    def need_events(self):
        return [t for t in self.world.tasks if not (self.world.counts(t) and self.world.is_the_waits(t))]

    def a_round(self):
        world = self.world
        for task in world.tasks:
            working = [p for p in world.processes if p.alive and p.task is task and p.is_current]
            if task.state is None:
                world.defer(task)
            elif task.state == "deferred" and not working and task.has_trigger:
                self.start(task)
            elif task.state == "scheduled":
                self.do(lambda task=task: world.start_worker(task))
            elif task.state == "running" and not working:
                self.do(lambda task=task: world.try_fails(task))
        for process in self.alive:
            if process.at:
                self.step(process)
        self.do(world.end_what_is_too_late, 5)


class Repeatable(Protocol):
    """A source with claims in the waits' names: polling again gives the same event."""


class Leased(Protocol):
    """A source with claims in nobody's name: polling again gives another event."""

    repeatable = False


class AtLeastOnce(Protocol):
    """A queue: what is not acknowledged may be given out again, and only the inbox knows whose it is."""

    world_class = AtLeastOnceWorld


class Watched(Protocol):
    """A source with nothing to commit."""

    world_class = WatchedWorld

    @rule(number=pick)
    def an_event_goes_away(self, number):
        if number < 50:
            self.one(list(self.world.events.values()), number).gone = True


class Foreseen(Protocol):
    """A clock."""

    world_class = ForeseenWorld

    def need_events(self):
        return []

    @rule(number=pick)
    def an_api_server_dies_with_waits_in_hand(self, number):
        if number < 30:
            self.world.dies_with_waits_in_hand()


TIMES = os.environ.get("MODEL_EXAMPLES")
MODEL = settings(of_examples(int(100 * float(TIMES or 1)), repeatable=TIMES is None), stateful_step_count=100)
MUTANT = settings(of_examples(1000), stateful_step_count=100, report_multiple_bugs=False)


@pytest.fixture(autouse=True, scope="module")
def _say_how_much_was_tried():
    yield
    print(*(f"\n{count:8} {what}" for what, count in sorted(TRIED.items())))


@pytest.mark.parametrize("machine", [Repeatable, Leased, AtLeastOnce, Watched, Foreseen])
def test_the_promises_hold(machine):
    run_state_machine_as_test(machine, settings=MODEL)


def no_unique_key(patch, world):
    """The inbox says DONE to an event that another wait has."""
    patch.setattr(transactions, "taken_of", lambda session, identities: {})
    patch.setattr(transactions, "write_taken", lambda session, taken, now: None)


def no_fence_by_state(patch, world):
    """What comes for a task that has ended counts."""
    patch.setattr(tasks.Task, "is_deferred", True)


def no_fence_by_try(patch, world):
    """What comes from an earlier try of the task counts."""
    lock = tasks.lock

    def lock_by_any(session, ids):
        now = {id: task.ti for id in ids for task in world.tasks if id in task.tries}
        locked = lock(session, set(now.values()))
        return {id: locked[ti] for id, ti in now.items() if ti in locked}

    patch.setattr(tasks, "lock", lock_by_any)


def no_fence_by_try_or_state(patch, world):
    no_fence_by_state(patch, world)
    no_fence_by_try(patch, world)


def no_fence_by_generation(patch, world):
    """What comes from a process counts that another has taken the wait from."""
    fenced = transactions._Batch.fenced

    def of_any_generation(batch, entry):
        task = batch.task(entry)
        head = None if task is None else batch.wait(task, SINGLE)
        return fenced(batch, entry if head is None else dataclasses.replace(entry, generation=head.generation))

    patch.setattr(transactions._Batch, "fenced", of_any_generation)


def a_record_overwrites(patch, world):
    """A wait takes the last of its events."""
    record = transactions._record_one

    def overwrite(batch, entry, taken):
        task, wait = batch.fenced(entry)
        if task is not None and wait is not None and wait.record_id != entry.record_id:
            wait.phase = None
        return record(batch, entry, taken)

    patch.setattr(transactions, "_record_one", overwrite)


def no_fence_by_generation_and_a_record_overwrites(patch, world):
    no_fence_by_generation(patch, world)
    a_record_overwrites(patch, world)


def commit_before_record(patch, world):
    """What every peer does: the source forgets the event first."""
    record = EventTrigger._record

    async def commit_and_record(trigger, listener, wait, event, record_id):
        await commit(listener, wait, event)
        return await record(trigger, listener, wait, event, record_id)

    patch.setattr(EventTrigger, "_record", commit_and_record)


def finish_before_commit(patch, world):
    """The commit is left to a later time, which may not come."""
    ask = EventTrigger._ask

    async def later(*told):
        PROCESS.get().notes.append(told)
        return True

    async def ask_and_commit(trigger, entry):
        answer = await ask(trigger, entry)
        while entry.operation == "finish" and PROCESS.get().notes:
            await commit(*PROCESS.get().notes.pop())
        return answer

    patch.setattr(event_trigger, "acknowledge", later)
    patch.setattr(EventTrigger, "_ask", ask_and_commit)


def outlived_is_done(patch, world):
    """A trigger goes on although it is told that the wait is not its own."""
    ask = world.ask

    async def ask_and_believe(entry):
        answer = await ask(entry)
        return dataclasses.replace(answer, status=Status.DONE) if answer.status == Status.OUTLIVED else answer

    patch.setattr(world, "ask", ask_and_believe)


def a_record_asked_again_is_outlived(patch, world):
    asked_again_is(patch, Status.OUTLIVED)


def a_record_asked_again_is_another(patch, world):
    asked_again_is(patch, Status.HAS)


def asked_again_is(patch, status):
    record = transactions._record_one

    def not_again(batch, entry, taken):
        task, wait = batch.fenced(entry)
        if task is not None and wait is not None and wait.record_id == entry.record_id:
            return Answer(status, stored=transactions._stored(wait))
        return record(batch, entry, taken)

    patch.setattr(transactions, "_record_one", not_again)


def poll_before_begin(patch, world):
    """A trigger polls before it knows what the wait has."""
    go = EventTrigger._pass

    async def poll_and_go(trigger, listener, wait):
        notes = PROCESS.get().notes
        notes[:] = [await Poll(listener, wait, (), {}, None).run()]
        return await go(trigger, listener, wait)

    class Polled(Poll):
        async def run(self):
            return PROCESS.get().notes.pop()

    patch.setattr(event_trigger, "Poll", Polled)
    patch.setattr(EventTrigger, "_pass", poll_and_go)


def no_begin_after_a_loss(patch, world):
    """A trigger goes on as it was after its event went to another wait."""
    ask, lost = EventTrigger._ask, {}

    async def ask_less(trigger, entry):
        if entry.operation == "begin" and trigger in lost:
            return lost.pop(trigger)
        answer = await ask(trigger, entry)
        if entry.operation == "lose":
            lost[trigger] = Answer(Status.DONE, generation=trigger._generation, lost=trigger._after)
        return answer

    patch.setattr(EventTrigger, "_ask", ask_less)


def a_wait_keeps_what_it_gives_back(patch, world):
    """Of an event that is given back after a clear, the inbox goes on to say whose it is."""

    def begin(session, entries):
        before = session.execute(select(TAKEN)).mappings().all()
        answers = transactions.begin(session, entries)
        after = set(session.scalars(select(TAKEN.c.identity)))
        for row in before:
            if row["identity"] not in after:
                session.execute(insert(TAKEN).values(**row))
        return answers

    patch.setattr(transactions, "_WORK", ((Begin, begin), *transactions._WORK[1:]))


def forgetting_lets_go_of_all(patch, world):
    """Of an event that is committed, and that a user forgets, the inbox does not know any more whose it was."""
    forget = world.forget

    def forget_all(task):
        forgotten = task.row.record_id
        forget(task)
        world.database.execute(delete(TAKEN).where(TAKEN.c.record_id == forgotten))

    patch.setattr(world, "forget", forget_all)


def forgetting_while_a_worker_is_to_deliver(patch, world):
    """A user forgets an event that is on its way to a worker."""
    patch.setattr(tables, "AT_WORK", tuple(state for state in tables.AT_WORK if state != "scheduled"))


def nobody_sees_to_timeouts(patch, world):
    """Airflow's timeouts of deferrals are left to triggerers."""
    patch.setattr(upkeep, "clear_timeouts", lambda: 0)


def nobody_looks(patch, world):
    """Who polls does not ask whether another has begun the wait since."""

    async def look(trigger):
        pass

    patch.setattr(EventTrigger, "_look", look)


def a_parked_wait_begins_again(patch, world):
    """Whoever still has the trigger that a wait was parked by begins it."""
    patch.setattr(transactions, "_may_begin", lambda batch, entry, task: task.is_deferred)


# A record that overwrites an earlier one is caught only where the fence by generation is gone too: whoever may
# record has begun last, was told then that the wait has no event, and nobody else could record one since.
MUTANTS = [
    (no_unique_key, AtLeastOnce),
    (no_fence_by_state, Repeatable),
    (no_fence_by_try_or_state, Repeatable),
    (no_fence_by_generation_and_a_record_overwrites, Leased),
    (commit_before_record, Repeatable),
    (commit_before_record, Leased),
    (commit_before_record, AtLeastOnce),
    (finish_before_commit, Repeatable),
    (finish_before_commit, Leased),
    (finish_before_commit, AtLeastOnce),
    (outlived_is_done, Repeatable),
    (outlived_is_done, AtLeastOnce),
    (a_parked_wait_begins_again, Foreseen),
]


@pytest.mark.parametrize(("mutant", "machine"), MUTANTS)
def test_a_mutant_is_caught(mutant, machine, monkeypatch):
    monkeypatch.setattr(machine, "mutant", staticmethod(mutant))
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=MUTANT)


# --- guards that few schedules need, each in one that does


@contextlib.contextmanager
def schedule(machine, mutant=None, **how):
    """Begin a schedule; after it, everything is left alone, and has to come to its end."""
    machine = machine()
    machine.mutant = mutant
    machine.begin(**how)
    try:
        yield machine, machine.world
    finally:
        machine.teardown()


def caught(mutant, match):
    return contextlib.nullcontext() if mutant is None else pytest.raises(AssertionError, match=match)


@pytest.mark.parametrize("mutant", [None, no_fence_by_generation])
def test_who_polls_is_told_by_the_fence_that_another_has_begun(mutant):
    """A triggerer records after another one has begun, and dies: the other would poll in vain."""
    with caught(mutant, "deferred"), schedule(Leased, mutant, left=True) as (machine, world):
        late, alone = world.processes
        machine.go_on_until(alone, None)
        machine.publish()
        machine.go_on_until(late, "ask record")
        other = machine.start(world.tasks[0])
        machine.go_on_until(other, "poll")
        machine.step(late)
        late.dead = True


@pytest.mark.parametrize("mutant", [None, no_fence_by_try])
def test_a_try_does_not_end_the_next_one(mutant):
    """A user has cleared the wait for another event, and the trigger of before goes on."""
    with caught(mutant, "before it was cleared"), schedule(Repeatable, mutant, replay=False) as (machine, world):
        before = world.processes[0]
        machine.go_on_until(before, "ask finish")
        world.clear(world.tasks[0])
        world.defer(world.tasks[0])
        machine.step(before)


@pytest.mark.parametrize("mutant", [None, a_record_asked_again_is_outlived, a_record_asked_again_is_another])
def test_who_asks_again_is_answered_as_before(mutant):
    """
    An answer was lost.

    Nothing else would break: the trigger begins again, at once or after a while, and is told of its own event.
    """
    with caught(mutant, "when asked again"), schedule(AtLeastOnce, mutant) as (machine, world):
        machine.go_on_until(world.processes[0], "answer record")
        machine.step(world.processes[0], LostError())
        machine.go_on_until(world.processes[0], None)


@pytest.mark.parametrize("machine", [Repeatable, Leased, AtLeastOnce, Watched])
@pytest.mark.parametrize("mutant", [None, poll_before_begin])
def test_who_begins_is_told_of_the_event_that_the_wait_has(machine, mutant):
    """A wait that was cleared after its delivery polls for nothing more."""
    with caught(mutant, "deferred"), schedule(machine, mutant) as (machine, world):
        for process in world.processes:
            machine.publish()
            machine.go_on_until(process, None)
        assert [task.state for task in world.tasks] == ["success", "success"]
        world.clear(world.tasks[0])


@pytest.mark.parametrize("mutant", [None, a_wait_keeps_what_it_gives_back])
def test_what_is_given_back_is_anybodys(mutant):
    """A user clears a wait for another event while it has one that was not committed."""
    with caught(mutant, "e0 is nobody's"), schedule(AtLeastOnce, mutant, replay=False) as (machine, world):
        machine.go_on_until(world.processes[0], "commit")
        world.clear(world.tasks[0])
        machine.go_on_until(machine.start(world.tasks[0]), "poll")
        machine.go_on_until(world.processes[1], None)
        assert world.tasks[1].delivered == ["e0"]


@pytest.mark.parametrize("mutant", [None, no_begin_after_a_loss])
def test_nobody_commits_what_was_lost_and_then_claimed_anew(mutant):
    """One triggerer loses the event and claims it again; another still has the lost record."""
    with caught(mutant, "e0 is committed"), schedule(Repeatable, mutant) as (machine, world):
        stale = world.processes[0]
        machine.go_on_until(stale, "commit")
        other = machine.start(world.tasks[0])
        machine.go_on_until(other, "commit")
        world.expire(world.events["e0"])
        machine.go_on_until(other, "ask record")
        assert world.events["e0"].claim is not None
        other.dead = True
        machine.go_on_until(stale, "ask lose")
        assert world.events["e0"].committed_by is None


@pytest.mark.parametrize("machine", [Repeatable, Leased])
@pytest.mark.parametrize("compare_and_set", [True, False])
def test_a_source_without_compare_and_set_is_caught(machine, compare_and_set, monkeypatch):
    """A claim expires; another wait claims and commits the event, and then the first goes on to commit it."""
    monkeypatch.setattr(machine, "compare_and_set", compare_and_set)
    with caught(None if compare_and_set else machine, "e0"), schedule(machine) as (machine, world):
        late, other = world.processes
        machine.go_on_until(late, "commit")
        world.expire(world.events["e0"])
        machine.go_on_until(other, None)
        assert world.tasks[1].delivered == ["e0"]
        machine.go_on_until(late, "poll")


@pytest.mark.parametrize("mutant", [None, forgetting_lets_go_of_all])
def test_what_a_user_forgets_no_other_wait_delivers(mutant):
    """A queue gives out an event again, which is then acknowledged, delivered and forgotten."""
    with caught(mutant, "e0.* by two waits"), schedule(AtLeastOnce, mutant) as (machine, world):
        first, other = world.processes
        machine.go_on_until(first, "commit")
        machine.go_on_until(other, "ask record")
        machine.go_on_until(first, None)
        assert world.tasks[0].state == "success"
        world.forget(world.tasks[0])
        machine.go_on_until(other, "commit")  # to acknowledge what is the other's
        assert world.tasks[1].event is None or mutant
        machine.go_on_until(other, None if mutant else "poll")


@pytest.mark.parametrize("mutant", [None, forgetting_while_a_worker_is_to_deliver])
def test_what_is_on_its_way_to_a_worker_is_not_forgotten(mutant):
    problem = caught(mutant, "has delivered e0, and has None")
    with problem, schedule(AtLeastOnce, mutant, on_worker=True) as (machine, world):
        machine.go_on_until(world.processes[0], None)
        assert world.tasks[0].state == "scheduled"
        world.forget(world.tasks[0])
        machine.do(lambda: world.start_worker(world.tasks[0]))
        machine.go_on_until(world.processes[-1], None)


@pytest.mark.parametrize("mutant", [None, nobody_sees_to_timeouts])
def test_airflow_does_not_end_a_later_try_whose_event_is_recorded(mutant):
    """Airflow gives each deferral its time, and no triggerer was there to tell the inbox of the new one."""
    with caught(mutant, "was ended by Airflow"), schedule(AtLeastOnce, mutant, timed=True) as (machine, world):
        task = world.tasks[0]
        machine.go_on_until(world.processes[0], None)
        assert task.delivered == ["e0"]
        world.clear(task)
        world.defer(task)
        machine.do(world.end_what_is_too_late, TIMEOUT + GRACE + 1)
        assert task.state == "deferred"


@pytest.mark.parametrize("mutant", [None, nobody_looks])
def test_a_triggerer_that_had_the_trigger_before_begins_late_records_and_dies(mutant):
    """The one that has it polls on, though the wait has its event, until it looks."""
    with caught(mutant, "deferred"), schedule(Leased, mutant, left=True) as (machine, world):
        before, alone = world.processes
        machine.go_on_until(alone, None)
        other = machine.start(world.tasks[0])
        machine.go_on_until(other, "poll")
        machine.publish()
        machine.go_on_until(before, "commit")
        machine.do(lambda: world.cancel(before))
