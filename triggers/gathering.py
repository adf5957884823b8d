"""Polling for many events at once, and recording and committing each as it comes."""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import logging
from collections import deque
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

import greenback
from airflow_events.errors import EventLost
from airflow_events.listeners.base import EventListener, Wait, commits, foresees, releases, working_for
from airflow_events.listeners.clock import Clock
from airflow_events.listeners.commit import inherit_portal, release, settle
from airflow_events.listeners.turns import Turns
from airflow_events.triggers.calls import Calls
from airflow_events.triggers.event import as_recorded, blocking_threshold, poll_once
from airflow_events.triggers.foreseen import foreseen_by
from airflow_events.triggers.journal import EventRecord, Journal

log = logging.getLogger(__name__)

# How many polls begin, and how many are cancelled, in one turn of the event loop.
_AT_ONCE = 50
# How many events that were polled are checked and written down in one turn: each is written several times.
_CHECKED_AT_ONCE = 20
# How many events are recorded and committed at the same time; the second where there is nothing to commit.
_SETTLING = 256
_RECORDING = 2000
# How many claims are given back at the same time, and for how many seconds.
_RELEASING = 16
_LONGEST_RELEASE = 20.0
# Seconds that cancelled polls, and events that are being committed, have to end.
_LONGEST_GOODBYE = 10.0


class Gathering:
    """
    Waits for some of the events of a task, each in the name of a wait of its own.

    Each event has an asyncio task, which polls, and records and commits what it polled; nothing else is kept for
    it, and what waits for a shared source waits in that source's hub. An event that its listener foresees has not
    even that: it stands in a heap until its moment, at which it is polled.

    :param wanted: how many are wanted in all; when so many are there, no more are recorded.
    :param journal: where they are recorded; None leaves that to a worker, and keeps what has been polled in
        ``arrived``.
    :param have: the indexes of those that need not be waited for, since they were recorded and committed.
    """

    def __init__(
        self,
        listener: type[EventListener],
        wait: Wait,
        calls: Calls,
        *,
        wanted: int,
        journal: Journal | None,
        have: Iterable[int] = (),
    ) -> None:
        self.listener, self.wait, self.calls, self.wanted, self.journal = listener, wait, calls, wanted, journal
        self.have = set(have)
        self.arrived: dict[int, Any] = {}  # by index: what was polled, and is not recorded
        self.first_arrived: float | None = None  # by the loop's clock: the first of these
        self.error: Exception | None = None
        # Those that have their event, or are about to: with `wanted` of them, others have to wait.
        self._recorded = {index for index in self.missing if self._is_recorded(index)}
        self._admitted = self.have | self._recorded
        self._queue: deque[asyncio.Future[None]] = deque()
        self._room = asyncio.Semaphore(_SETTLING if commits(listener) else _RECORDING)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._foreseen: list[tuple[datetime, int]] = []  # a heap of those that come later: when, and the index
        self._clock: asyncio.Task[None] | None = None  # which polls for them at their moments
        self._settling: set[int] = set()
        self._turns = Turns(_CHECKED_AT_ONCE)
        self._threshold = blocking_threshold()
        self._has_portal = greenback.has_portal()
        self._changed = asyncio.Event()

    @property
    def complete(self) -> bool:
        """Whether as many events as are wanted are there, and none is recorded that is not committed."""
        if self.journal is None:
            return len(self.have) + len(self.arrived) >= self.wanted
        return len(self.have) >= self.wanted and self._recorded <= self.have

    @property
    def missing(self) -> list[int]:
        """The indexes of the events that are not recorded, in order."""
        return [index for index in range(len(self.calls)) if index not in self.have]

    async def begin(self) -> None:
        """Begin to wait for what is missing; first for what was recorded and not committed."""
        recorded = sorted(self._recorded - self.have)
        others = [index for index in self.missing if index not in self._recorded]
        for number, index in enumerate(recorded + others if len(self.have) < self.wanted else recorded):
            if index in self._recorded or not self._is_to_come(index):
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

    def wake(self) -> None:
        """Let `changed` return."""
        self._changed.set()

    async def end(self, *, at_once: bool = False) -> None:
        """
        End all polls.

        :param at_once: also what is being recorded or committed, which otherwise has a while to end.
        """
        if self._clock is not None:
            self._clock.cancel()
        polls = [index for index in self._tasks if at_once or index not in self._settling]
        for number, index in enumerate(polls):
            if (task := self._tasks.get(index)) is not None:
                task.cancel()
            if number % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=_LONGEST_GOODBYE)
        if left := [task for task in self._tasks.values() if not task.done()]:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=1)

    async def release(self) -> None:
        """Give back what is claimed for events that are not recorded."""
        if not releases(self.listener):
            return
        left = iter([index for index in self.missing if not self._is_recorded(index)])

        async def some() -> None:
            await inherit_portal(self._has_portal)
            for index in left:
                args, kwargs = self.calls.of(index)
                await release(self.listener, self._wait_of(index), self.arrived.get(index), args, kwargs)

        tasks = [asyncio.create_task(some()) for _ in range(_RELEASING)]
        _, late = await asyncio.wait(tasks, timeout=_LONGEST_RELEASE)
        for task in late:
            task.cancel()
        if late:
            log.warning("Not all claims could be given back in %.0f s; the others will lapse", _LONGEST_RELEASE)

    def _is_recorded(self, index: int) -> bool:
        """Whether an event is recorded, committed or not, for the arguments that it has now."""
        return self.journal is not None and self.journal.records.of(index, self.calls.digest(index)) is not None

    def _wait_of(self, index: int) -> Wait:
        after = "" if self.journal is None else self.journal.records.after(index)
        return dataclasses.replace(self.wait, index=index, after=after)

    async def _one(self, index: int) -> None:
        try:
            if self.journal is None:
                with working_for(self._wait_of(index)):
                    self._keep(index, await self._poll(index))
            else:
                await self._poll_and_settle(index, EventRecord(self.journal, index, self.calls.digest(index)))
        except Exception as error:
            self.error = self.error or error
        finally:
            del self._tasks[index]
            self._changed.set()

    async def _poll_and_settle(self, index: int, store: EventRecord) -> None:
        while True:
            record = store.journal.records.of(index, store.call)
            wait = self._wait_of(index)
            with working_for(wait):
                event = await self._poll(index) if record is None else record.event
            self._keep(index, event)
            await self._admit(index)
            async with self._room:
                self._settling.add(index)
                await inherit_portal(self._has_portal and commits(self.listener))
                args, kwargs = self.calls.of(index)
                try:
                    await settle(self.listener, wait, store, event, args=args, kwargs=kwargs)
                except EventLost as lost:
                    log.warning("Event %d went to another wait, and is waited for anew: %s", index, lost)
                    del self.arrived[index]
                    self._leave(index)
                    continue
                finally:
                    self._settling.discard(index)
            del self.arrived[index]
            self.have.add(index)
            return

    async def _admit(self, index: int) -> None:
        while index not in self._admitted and len(self._admitted) >= self.wanted:
            turn = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            await turn
        self._admitted.add(index)

    def _leave(self, index: int) -> None:
        self._admitted.discard(index)
        self._recorded.discard(index)
        while self._queue:
            if not (turn := self._queue.popleft()).done():
                turn.set_result(None)
                return

    def _keep(self, index: int, event: Any) -> None:
        self.arrived[index] = event
        self.first_arrived = self.first_arrived or asyncio.get_running_loop().time()

    async def _poll(self, index: int) -> Any:
        args, kwargs = self.calls.of(index)
        event = await poll_once(self.listener, args, kwargs, self._threshold, portal=self._has_portal)
        await self._turns.take()
        return as_recorded(event)
