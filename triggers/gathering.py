"""Polling for many events at once, and recording and committing each as it comes."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import heapq
import logging
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import greenback
from airflow_events import metrics
from airflow_events.errors import ArgumentsChanged, EventLost, EventUndecodable
from airflow_events.inbox.entries import (
    Answer,
    Entry,
    Finish,
    Lose,
    Phase,
    Place,
    Places,
    Record,
    Status,
)
from airflow_events.listeners.base import EventListener, Wait, commits, foresees, releases, working_for
from airflow_events.listeners.support import serde
from airflow_events.listeners.support.clock import Clock
from airflow_events.listeners.support.commit import (
    acknowledge,
    inherit_portal,
    recorded,
    release,
    release_later,
    tags,
)
from airflow_events.listeners.support.queue import InHand
from airflow_events.listeners.support.turns import Turns
from airflow_events.triggers.calls import Calls
from airflow_events.triggers.event import answer_to_record, checked, fails_for, id_of, recording, settle
from airflow_events.triggers.polling import BeginAgain, blocking_threshold, foreseen_by, poll_once

log = logging.getLogger(__name__)

# How many polls begin, and how many are cancelled, in one turn of the event loop.
_AT_ONCE = 50
# How many events are checked and written down, or read, in one turn.
_CHECKED_AT_ONCE = 20
# How many events are recorded and committed at the same time; the second where there is nothing to commit.
_SETTLING = 256
_RECORDING = 2000
# How many claims are given back at the same time, and for how many seconds.
_RELEASING = 16
_LONGEST_RELEASE = 20.0
# Seconds that cancelled polls, and events that are being committed, have to end.
_LONGEST_GOODBYE = 10.0


@dataclass(frozen=True)
class Held:
    """
    A list of waits as a trigger holds it: what it asks the inbox, and for what.

    :param ask: ask the inbox.
    :param ti: of which try; ``generation`` likewise.
    :param scope: what an event's id is unique in.
    """

    ask: Callable[[Entry], Awaitable[Answer]]
    ti: str
    generation: int
    scope: str


@dataclass(frozen=True)
class _Recorded:
    """An event that is a place's, and not known to be committed."""

    record_id: str
    event: Any
    after: str


class Gathering:
    """
    Waits for some of the events of a list, each in the name of a wait of its own.

    Each event has an asyncio task, which polls, and records and commits what it polled; nothing else is kept for
    it, and what waits for a shared source waits in that source's hub. An event that its listener foresees has not
    even that: it stands in a heap until its moment, at which it is polled.

    :param wanted: how many are wanted in all; when so many are there, no more are recorded.
    :ivar events: by index: those that are recorded and committed.
    :ivar error: why not all of it can be waited for any more.
    """

    def __init__(
        self, listener: type[EventListener], wait: Wait, calls: Calls, held: Held, *, wanted: int
    ) -> None:
        self.listener, self.wait, self.calls, self.wanted = listener, wait, calls, wanted
        self.events: dict[int, Any] = {}
        self.error: BaseException | None = None
        self._held = held
        self._uncommitted: dict[int, _Recorded] = {}
        self._lost: dict[int, str] = {}  # the recording that a place has lost last
        self._polled: dict[int, tuple[Any, float]] = {}  # what is not recorded, and when it came
        self._asked: dict[int, asyncio.Future[Answer]] = {}  # whether it can be recorded
        # Those that have their event, or are about to: with `wanted` of them, others have to wait.
        self._admitted: set[int] = set()
        self._queue: deque[asyncio.Future[None]] = deque()
        self._room = asyncio.Semaphore(_SETTLING if commits(listener) else _RECORDING)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._foreseen: list[tuple[datetime, int]] = []  # a heap of those that come later: when, and the index
        self._clock: asyncio.Task[None] | None = None  # which polls for them at their moments
        self._settling: set[int] = set()
        self._is_ending = False
        self._turns = Turns(_CHECKED_AT_ONCE)
        self._threshold = blocking_threshold()
        self._has_portal = greenback.has_portal()
        self._changed = asyncio.Event()

    @property
    def complete(self) -> bool:
        """Whether as many events as are wanted are there, and none is recorded that is not committed."""
        return len(self.events) >= self.wanted and not self._uncommitted

    @property
    def arrived(self) -> int:
        """How many events are recorded, committed or not."""
        return len(self.events) + len(self._uncommitted)

    @property
    def missing(self) -> list[int]:
        """The indexes of the events that are not there, in order."""
        return [index for index in range(len(self.calls)) if index not in self.events]

    async def read(self) -> None:
        """
        Read what the places have already.

        :raises ArgumentsChanged: an event was recorded for other arguments than those at its index now, and its
            source has forgotten it, or will, for that.
        """
        changed: list[Place] = []
        start: int | None = 0
        while start is not None:
            page = await self._ask(Places, start=start)
            for number, place in enumerate(page.places):
                if not self._take(place):
                    changed.append(place)
                if number % _CHECKED_AT_ONCE == _CHECKED_AT_ONCE - 1:
                    await asyncio.sleep(0)
            start = page.next
        if changed and commits(self.listener):
            raise ArgumentsChanged.at(changed[0].place, len(self.calls))
        for first in range(0, len(changed), _SETTLING):
            await asyncio.gather(*map(self._lose, changed[first : first + _SETTLING]))
        self._admitted = {*self.events, *self._uncommitted}

    def _take(self, place: Place) -> bool:
        """Take in what a place has; return False if it has an event, for other arguments than it has now."""
        if place.lost:
            self._lost[place.place] = place.lost
        if not place.phase:
            return True
        if place.place >= len(self.calls) or place.arguments != self.calls.digest(place.place):
            return False
        event = serde.decode(place.event)
        if place.phase == Phase.COMMITTED:
            self.events[place.place] = event
        else:
            self._uncommitted[place.place] = _Recorded(place.record_id, event, place.after)
        return True

    async def begin(self, *, polling: bool = True) -> None:
        """
        Begin to wait for what is missing; first for what is recorded and not committed.

        :param polling: whether to wait for what is not recorded, too.
        """
        indexes = sorted(self._uncommitted)
        if polling and len(self.events) < self.wanted:
            indexes += [index for index in self.missing if index not in self._uncommitted]
        for number, index in enumerate(indexes):
            if index in self._uncommitted or not self._is_to_come(index):
                self._begin_one(index)
            if number % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)
        if self._foreseen:
            self._clock = asyncio.create_task(self._begin_in_time())

    def _begin_one(self, index: int) -> None:
        self._tasks[index] = asyncio.create_task(self._one(index))

    def _is_to_come(self, index: int) -> bool:
        """Whether there is nothing to poll yet, since the event is foreseen for later; if so, keep it in mind."""
        if not foresees(self.listener):
            return False
        args, kwargs = self.calls.of(index)
        found = foreseen_by(self.listener, self._wait_of(index), args, kwargs)
        if found is None or found[1] <= datetime.now(timezone.utc):
            return False
        heapq.heappush(self._foreseen, (found[1], index))
        return True

    async def _begin_in_time(self) -> None:
        """Poll for each event that is foreseen when its moment has come."""
        while self._foreseen:
            await Clock.of_loop().until(self._foreseen[0][0])
            now = datetime.now(timezone.utc)
            for _ in range(_AT_ONCE):
                if not self._foreseen or self._foreseen[0][0] > now:
                    break
                self._begin_one(heapq.heappop(self._foreseen)[1])
            await asyncio.sleep(0)

    async def changed(self, seconds: float) -> None:
        """Wait until something has come, or failed, but not for longer than that."""
        # Not asyncio.wait_for, which before Python 3.12 may swallow the cancellation.
        alarm = asyncio.get_running_loop().call_later(seconds, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            alarm.cancel()
        self._changed.clear()

    def begin_again(self) -> None:
        """End the waiting, so that it begins again with what the inbox says then."""
        self._fail(BeginAgain())

    def _fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self._changed.set()

    async def end(self, *, at_once: bool = False, patiently: bool = False) -> None:
        """
        End all polls.

        :param at_once: also what is being recorded or committed, which otherwise has a while to end.
        :param patiently: as long a while as ``[events] commit_timeout`` lets it take.
        """
        self._is_ending = True
        if self._clock is not None:
            self._clock.cancel()
        ready = self._settling | self._uncommitted.keys() | (self._polled.keys() & self._admitted)
        polls = [index for index in self._tasks if at_once or index not in ready]
        settling = [] if at_once else [self._tasks[index] for index in ready if index in self._tasks]
        cancelled = [self._tasks[index] for index in polls]
        for number, task in enumerate(cancelled):
            task.cancel()
            if number % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)
        if cancelled:
            await asyncio.wait(cancelled, timeout=_LONGEST_GOODBYE)
        if settling:
            await asyncio.wait(settling, timeout=None if patiently else _LONGEST_GOODBYE)
        if left := [task for task in self._tasks.values() if not task.done()]:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=1)

    async def release(self, *, ended: bool = True) -> None:
        """
        Give back what is held for places that have no event.

        :param ended: whether nobody waits for them any more. If somebody does, what may be held in the name of a
            place, since it has no id, is kept for it.
        """
        if not releases(self.listener):
            return
        # What was on its way to the inbox when this was cancelled may be recorded by now.
        answers = await asyncio.gather(*self._asked.values(), return_exceptions=True)
        has = (Status.DONE, Status.TAKEN)
        settled = {
            index
            for index, answer in zip(self._asked, answers, strict=True)
            if isinstance(answer, Answer) and answer.status in has
        }
        of_polled = {index: event for index, (event, _) in self._polled.items()}
        held = self.missing if ended else self._with_id(of_polled)
        left = [index for index in held if index not in settled | self._uncommitted.keys()]
        # What is recorded stays its place's; delivered again, to whoever waits, it is acknowledged.
        known = self._with_id({index: of.event for index, of in self._uncommitted.items()})
        todo = iter([*left, *known])

        async def some() -> None:
            await inherit_portal(self._has_portal)
            for index in todo:
                args, kwargs = self.calls.of(index)
                event = known[index] if index in known else self._polled.pop(index, (None, 0.0))[0]
                await release(self.listener, self._wait_of(index), event, args, kwargs)

        tasks = [asyncio.create_task(some()) for _ in range(_RELEASING)]
        _, late = await asyncio.wait(tasks, timeout=_LONGEST_RELEASE)
        for task in late:
            task.cancel()
        if late:
            log.warning(
                "Not all that is held could be given back in %.0f s; the source delivers the rest again by itself",
                _LONGEST_RELEASE,
            )

    def _with_id(self, events: dict[int, Any]) -> dict[int, Any]:
        """Return those that are told from every other, by their places."""
        return {
            index: event
            for index, event in events.items()
            if id_of(self.listener, self._wait_of(index), event) is not None
        }

    def _wait_of(self, index: int) -> Wait:
        return dataclasses.replace(self.wait, index=index, after=self._lost.get(index, ""))

    async def _one(self, index: int) -> None:
        try:
            await self._poll_and_settle(index)
        except asyncio.CancelledError:
            if self._is_ending:
                raise
            self._fail(RuntimeError(f"{self.listener.__qualname__}.poll_for_event cancelled itself"))
        except BaseException as error:
            self._fail(error)
        finally:
            del self._tasks[index]
            self._changed.set()

    async def _poll_and_settle(self, index: int) -> None:
        while True:
            if index not in self._uncommitted:
                try:
                    with working_for(self._wait_of(index)):
                        event = await self._poll(index)
                except EventUndecodable as error:
                    if await self._fails_for(index, error):
                        raise
                    continue
                self._polled[index] = event, time.time()
                await self._admit(index)
            async with self._room:
                self._settling.add(index)
                try:
                    await inherit_portal(self._has_portal and commits(self.listener))
                    if await self._settle(index) or self._is_ending:
                        return
                finally:
                    self._settling.discard(index)
            self._leave(index)

    async def _settle(self, index: int) -> bool:
        """Record and commit what was polled, or what is recorded; return False if it is not this place's."""
        if index not in self._uncommitted and not await self._record(index):
            return False
        if (of_place := self._uncommitted.get(index)) is None:
            return True  # there was nothing to commit
        wait = dataclasses.replace(self._wait_of(index), after=of_place.after)
        try:
            acknowledged = await acknowledge(self.listener, wait, of_place.event)
        except EventLost as lost:
            log.warning("Event %d went to another wait, and its place continues: %s", index, lost)
            metrics.count(metrics.LOST, **tags(self.listener, wait))
            self._lost[index] = (await self._ask(Lose, place=index, record_id=of_place.record_id)).lost
            del self._uncommitted[index]
            return False
        metrics.count(metrics.COMMITTED, **tags(self.listener, wait))
        await self._ask(Finish, place=index, record_id=of_place.record_id, acknowledged=acknowledged)
        self.events[index] = of_place.event
        del self._uncommitted[index]
        return True

    async def _record(self, index: int) -> bool:
        """
        Have an event recorded; return False if another wait has it.

        :raises BeginAgain: its place has one by now, or there is to be none.
        """
        event, arrived = self._polled[index]
        wait, record_id = self._wait_of(index), uuid.uuid4().hex
        entry = Record(
            self._held.ti,
            index,
            generation=self._held.generation,
            record_id=record_id,
            arguments=self.calls.digest(index),
            **recording(self.listener, self._held.scope, wait, event),
        )
        # Should this be cancelled meanwhile, `release` finds out what became of it.
        asked = self._asked[index] = asyncio.ensure_future(self._held.ask(entry))
        try:
            answer = checked(entry, await answer_to_record(self.listener, wait, event, asked))
        except EventUndecodable as error:
            del self._asked[index], self._polled[index]
            release_later(self.listener, wait, event, *self.calls.of(index))
            if await self._fails_for(index, error):
                raise
            return False
        del self._asked[index]
        if answer.status == Status.TAKEN:
            await settle(self.listener, wait, event, self.calls.of(index), entry, answer, self._held.ask)
            del self._polled[index]
            return False
        if answer.status != Status.DONE:
            raise BeginAgain
        recorded(self.listener, wait, arrived)
        if entry.committed:
            self.events[index] = event
        else:
            self._uncommitted[index] = _Recorded(record_id, event, wait.after)
        del self._polled[index]
        return True

    async def _fails_for(self, index: int, error: EventUndecodable) -> bool:
        """As `fails_for` says."""
        entry = functools.partial(self._entry, place=index)
        return await fails_for(error, self._held.scope, self._held.ask, entry)

    async def _lose(self, place: Place) -> None:
        """Give up an event that had nothing to commit, and was recorded for other arguments."""
        self._lost[place.place] = (await self._ask(Lose, place=place.place, record_id=place.record_id)).lost

    async def _ask(self, kind: Any, **told: Any) -> Answer:
        entry = self._entry(kind, **told)
        return checked(entry, await self._held.ask(entry))

    def _entry(self, kind: Any, **told: Any) -> Any:
        return kind(self._held.ti, generation=self._held.generation, **told)

    async def _admit(self, index: int) -> None:
        while index not in self._admitted and len(self._admitted) >= self.wanted:
            turn = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            await turn
        self._admitted.add(index)

    def _leave(self, index: int) -> None:
        self._admitted.discard(index)
        while self._queue:
            if not (turn := self._queue.popleft()).done():
                turn.set_result(None)
                return

    async def _poll(self, index: int) -> Any:
        args, kwargs = self.calls.of(index)
        event = None
        try:
            event = await poll_once(self.listener, args, kwargs, self._threshold, portal=self._has_portal)
        finally:
            await InHand.of_loop().poll_ended(self.listener, self._wait_of(index).id, event)
        await self._turns.take()
        return serde.check(event)
