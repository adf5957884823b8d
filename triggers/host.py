"""
The trigger of a host: it polls for many waits at once, each of which goes its own way.

A host (`airflow_events.inbox.hosts`) learns from the inbox which waits are its own, also after it was moved to
another triggerer. It yields nothing and never fails, since Airflow would end or fail the wait that it is anchored
to. When the inbox says that its trigger is not the host's any more, it leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import math
import uuid
from collections.abc import AsyncIterator
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import greenback
from airflow.sdk._shared.secrets_masker import redact
from airflow.triggers.base import BaseTrigger, TriggerEvent
from airflow_events.errors import ListenerUnavailable
from airflow_events.inbox.entries import Answer, Begin, Finish, Hosted, Status
from airflow_events.listeners.base import EventListener, Wait, commits, releases
from airflow_events.listeners.support import serde
from airflow_events.listeners.support.hub import Troubles, shared_log
from airflow_events.listeners.support.shared import background
from airflow_events.listeners.support.turns import Turns
from airflow_events.triggers import reference
from airflow_events.triggers.event import EventTrigger, Outlived, by_a_worker_fails, leave, storable
from airflow_events.triggers.inbox import Inbox
from airflow_events.triggers.joining import Joined
from airflow_events.triggers.poll_steps import Steps
from airflow_events.triggers.polling import Found
from airflow_events.triggers.resting import Rests

log = logging.getLogger(__name__)

# Seconds between two looks for waits that have joined by way of another triggerer. All hosts of a triggerer look
# in the same moment, by one request; what joins here is told to the host at once, and so often at most.
_LOOK_EVERY = 1.0
_AT_MOST_EVERY = 0.1
# Seconds between two looks for those that have left: one for so many waits, and at most so many.
_WAITS_A_SECOND = 100.0
_LOOK_FOR_ALL_EVERY = 300.0
# Seconds after which a wait that another process has begun is begun again.
_PATIENCE = 30.0
# How many waits begin in one turn of the event loop.
_AT_ONCE = 50
# Seconds that waits have to commit what they have recorded, when the host leaves.
_TO_COMMIT = 10.0


class HostTrigger(BaseTrigger):
    """
    Poll for all waits of a host.

    :param host: which one, a digest in hex. It stands in trigger rows, and is frozen.
    """

    def __init__(self, *, host: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.host = host
        self._waits: dict[str, asyncio.Task[Any]] = {}
        self._resting: Rests
        self._turns = Turns(_AT_ONCE)
        self._holding: dict[str, _HostedWait] = {}  # those that may hold something at their source
        self._after = ""
        self._is_over = False
        self._letting_go: asyncio.Task[None] | None = None
        self._portal = False  # whether Airflow's runner lets synchronous code of its triggers call Airflow

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return f"{__name__}.{type(self).__name__}", {"host": self.host}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        loop, looked, joined = asyncio.get_running_loop(), float("-inf"), Joined.of_loop()
        self._portal = greenback.has_portal()
        shared_log.set(self.host)
        self._resting = Rests(self._start)
        try:
            while True:
                try:
                    await self._take_in()
                    if not self._is_over and loop.time() - looked > self._look_for_all_every:
                        await self._let_go_of_those_that_left()
                        looked = loop.time()
                except Exception:
                    log.exception("A host could not ask for its waits; this is tried again")
                if self._is_over:
                    break
                await asyncio.sleep(_AT_MOST_EVERY)
                await joined.told(self.host, (-loop.time()) % _LOOK_EVERY)
            await self._let_commits_end()
        finally:
            joined.forget(self.host)
            self._resting.end_all()
            for wait in self._waits.values():
                wait.cancel()
            # By itself, since Airflow does not always call `on_kill`: not once the time of the first anchor is up.
            self._letting_go = background(self._let_go(), f"what the host {self.host} holds")
        await self.on_kill()
        leave()
        yield TriggerEvent({})  # never: it makes this a generator

    async def on_kill(self) -> None:
        """
        Return when what its waits hold at their source is given back: they go on with another trigger of the host.

        Airflow calls this when the trigger is deleted, as its anchor was cleared.
        """
        if self._letting_go is not None:
            await asyncio.shield(self._letting_go)

    async def _let_commits_end(self) -> None:
        """
        Stop polling, and wait some seconds for those whose event is being recorded or committed.

        The next trigger of the host has them by now; but what is committed need not be given back.
        """
        self._resting.end_all()
        ending = {self._waits[ti] for ti, wait in self._holding.items() if wait.has_event and ti in self._waits}
        for wait in self._waits.values():
            if wait not in ending:
                wait.cancel()
        if ending:
            await asyncio.wait(ending, timeout=_TO_COMMIT)

    async def _let_go(self) -> None:
        held, self._holding = self._holding, {}
        await asyncio.gather(*(self._give_back(wait) for wait in held.values()))

    @property
    def _log_of(self) -> str:
        """Whose log this one's lines are in: that of the anchor which it was started for, and may have lost."""
        ti = self.task_instance
        if ti is None:
            return ""
        index = -1 if ti.map_index is None else ti.map_index
        return f"{Wait(ti.dag_id, ti.run_id, ti.task_id, index).id}, try {ti.try_number}"

    @property
    def _look_for_all_every(self) -> float:
        return min(1.0 + self._count / _WAITS_A_SECOND, _LOOK_FOR_ALL_EVERY)

    @property
    def _count(self) -> int:
        """For how many waits it polls."""
        return len(self._waits) + len(self._resting)

    def _ours(self) -> set[str]:
        return {*self._waits, *self._resting}

    async def _take_in(self) -> None:
        """Begin with the waits that have joined since."""
        after = self._after
        while True:
            page = await self._page(after)
            for ti, kwargs, generation, left in page.hosted:
                if ti in self._waits or ti in self._resting:
                    continue
                await self._turns.take()
                # The anchor's begins at once, since Airflow shows this trigger's log as its own.
                if self._is_anchor(ti) or not self._resting.take(ti, kwargs, generation, left):
                    self._start(ti, kwargs, generation)
            after = page.after
            if page.next is None:
                break
        self._after = after

    def _start(self, ti: str, kwargs: str, generation: int, found: Found | None = None) -> None:
        """Let a wait go its way, in this trigger's context, and so with its log."""
        # In steps, as a poll: a portal that is kept while nothing happens takes as much as all else of the wait.
        steps = Steps(self._begin(ti, kwargs, generation, found), math.inf, log.debug, portal=self._portal)
        self._waits[ti] = asyncio.create_task(steps)
        self._waits[ti].add_done_callback(functools.partial(self._forget, ti))

    async def _let_go_of_those_that_left(self) -> None:
        """Stop polling for waits that were cleared or ended by others, whose records would be refused."""
        there: set[str] = set()
        known, after = self._ours(), ""
        while True:
            page = await self._page(after, brief=True)
            there.update(ti for ti, *_ in page.hosted)
            after = page.after
            if page.next is None:
                break
        if self._is_over:  # which says nothing of them
            return
        here = self._ours()
        if there - here:  # joined by a clock that is behind, or long before it could be seen
            self._after = ""
        gone = known & here - there
        for ti in gone:
            self._resting.end(ti)
            if ti in self._waits:
                self._waits[ti].cancel()
        for ti in gone & self._holding.keys():  # not awaited: a source may take its time
            background(self._give_back(self._holding.pop(ti)), f"what {ti} holds")

    async def _page(self, after: str, *, brief: bool = False) -> Answer:
        """Return a page of the waits, empty if the host has another trigger or none."""
        assert self.trigger_id is not None, "a trigger is started by a triggerer"
        trouble = Troubles.of_loop().of(self.host)
        asked = Hosted(
            host=self.host,
            trigger=self.trigger_id,
            after=after,
            brief=brief,
            log_of=self._log_of,
            trouble=storable(str(redact(trouble))),
            waits=self._count,
        )
        answer = await Inbox.of_loop().ask(asked)
        self._is_over = answer.status == Status.OUTLIVED
        return answer

    def _is_anchor(self, ti: str) -> bool:
        return self.task_instance is not None and ti == str(self.task_instance.id)

    async def _begin(self, ti: str, kwargs: str, generation: int, found: Found | None) -> None:
        """Serve a wait; or fail its try, if this process cannot make it of what it has."""
        await self._turns.take()  # a message may be what very many have waited for
        try:
            wait = _HostedWait.of(ti, kwargs, generation)
        except Exception as error:
            await self._fail(ti, ti, generation, error)
            return
        wait.found = found
        # Airflow has put this trigger's log in the place of that of the anchor's own trigger.
        wait.announces = self._is_anchor(ti)
        await self._serve(ti, wait)

    async def _serve(self, ti: str, wait: _HostedWait) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                if wait.holds:
                    self._holding[ti] = wait
                await wait.until_ended()
                return
            except Outlived as outlived:
                # It may be another process's, that had the host before, and dies: so this one begins again.
                log.info("The hosted wait %s is not this process's any more: %s", wait.name, outlived)
                if self._holding.pop(ti, None) is not None:
                    await self._give_back(wait)
                if loop.time() - began > _PATIENCE:  # it was this one's for long
                    continue
            except Exception as error:
                if await self._fail(ti, wait.name, wait.generation, error):
                    if self._holding.pop(ti, None) is not None:  # the next try may have another triggerer
                        await self._give_back(wait)
                    return
            await asyncio.sleep(_PATIENCE)

    async def _give_back(self, wait: _HostedWait) -> None:
        try:
            await wait.on_kill()
        except Exception:
            log.warning("What this process held for %s could not be given back", wait.name, exc_info=True)

    async def _fail(self, ti: str, name: str, generation: int, error: Exception) -> bool:
        log.warning("The try of the hosted wait %s fails: %s", name, storable(str(error)))
        answer = await Inbox.of_loop().ask(Finish(ti, generation=generation, end=by_a_worker_fails(error)))
        if answer.status != Status.DONE:
            log.info("The hosted wait %s is not this process's any more: %s", name, answer.message)
        return answer.status == Status.DONE

    def _forget(self, ti: str, wait: asyncio.Task[Any]) -> None:
        self._waits.pop(ti, None)
        if not wait.cancelled():  # what it held is given back by whoever cancelled it
            self._holding.pop(ti, None)
        with contextlib.suppress(asyncio.CancelledError):
            if (error := wait.exception()) is not None:
                log.error("A hosted wait could not be served", exc_info=error)


class _HostedWait(EventTrigger):
    """A wait that its own trigger has handed to a host: it goes on as there, and neither parks nor joins."""

    announces = False
    found: Found | None = None
    """What its first poll has come to, if it rested until then; None from when it was polled."""

    @classmethod
    def of(cls, ti: str, kwargs: str, generation: int) -> _HostedWait:
        """
        Make one of what the inbox has.

        :param kwargs: empty if the API server could not read them.
        :param generation: of the wait as it began last, for a try that fails before it begins here.
        :raises Exception: they are of another version of this package, say.
        """
        if not kwargs:
            raise ListenerUnavailable("what the wait waits for cannot be read: is [core] fernet_key another one?")
        wait = cls(**serde.decode(kwargs))
        wait.task_instance = SimpleNamespace(id=uuid.UUID(ti), task_id=wait.task_id, try_number=0)  # type: ignore[assignment]
        wait._generation = generation
        return wait

    @property
    def name(self) -> str:
        """As `airflow_events.listeners.base.Wait.id`."""
        assert self.wait is not None
        return Wait(**self.wait).id

    @property
    def holds(self) -> bool:
        """Whether its polls may hold something at their source."""
        listener = reference.load(self.listener)
        return commits(listener) or releases(listener)

    @property
    def has_event(self) -> bool:
        """Whether its event is being recorded, or is."""
        return self._recording is not None

    @property
    def generation(self) -> int:
        """Of the wait, as it began here."""
        return self._generation

    async def _begin(self, listener: type[EventListener], wait: Wait) -> tuple[Answer, Wait]:
        if self.found is None:
            return await super()._begin(listener, wait)
        # It began before it was handed over. Should another process have begun it since, or should it have an
        # event by now, the record is refused, and it begins then.
        return Answer(Status.DONE, generation=self._generation), wait

    def _beginning(self, listener: type[EventListener], wait: Wait) -> Begin:
        return dataclasses.replace(super()._beginning(listener, wait), hosted=True)

    def _take_found(self) -> Found | None:
        found, self.found = self.found, None
        return found

    async def _leave(self, listener: type[EventListener], wait: Wait, until: datetime | None) -> str | None:
        return None

    def _announce(self, wait: Wait) -> None:
        """Say nothing where its own trigger has, and there may be thousands."""
        if self.announces:
            super()._announce(wait)
