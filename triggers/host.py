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
import uuid
from collections.abc import AsyncIterator, Coroutine
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import greenback
from airflow.triggers.base import BaseTrigger, TriggerEvent
from airflow_events.errors import ListenerUnavailable
from airflow_events.inbox.entries import Answer, Begin, Finish, Hosted, Status
from airflow_events.listeners.base import EventListener, Wait
from airflow_events.listeners.support import serde
from airflow_events.listeners.support.commit import inherit_portal
from airflow_events.listeners.support.hub import shared_log
from airflow_events.triggers.event import EventTrigger, Outlived, by_a_worker_fails, leave, storable
from airflow_events.triggers.inbox import Inbox

log = logging.getLogger(__name__)

# Seconds between two looks for waits that have joined, and between two for those that have left.
_LOOK_EVERY = 0.5
_LOOK_FOR_ALL_EVERY = 60.0
# Seconds after which a wait that another process has begun is begun again.
_PATIENCE = 30.0


class HostTrigger(BaseTrigger):
    """
    Poll for all waits of a host.

    :param host: which one, a digest in hex. It stands in trigger rows, and is frozen.
    """

    def __init__(self, *, host: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.host = host
        self._waits: dict[str, asyncio.Task[Any]] = {}
        self._after = ""
        self._is_over = False
        self._portal = False  # whether Airflow's runner lets synchronous code of its triggers call Airflow

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return f"{__name__}.{type(self).__name__}", {"host": self.host}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        loop, looked = asyncio.get_running_loop(), float("-inf")
        self._portal = greenback.has_portal()
        shared_log.set(self.host)
        try:
            while not self._is_over:
                try:
                    if loop.time() - looked > _LOOK_FOR_ALL_EVERY:
                        await self._let_go_of_those_that_left()
                        looked = loop.time()
                    await self._take_in()
                except Exception:
                    log.exception("A host could not ask for its waits; this is tried again")
                await asyncio.sleep(_LOOK_EVERY)
        finally:
            for wait in self._waits.values():
                wait.cancel()
        leave()
        yield TriggerEvent({})  # never: it makes this a generator

    async def _take_in(self) -> None:
        """Begin with the waits that have joined since."""
        after = self._after
        while True:
            page = await self._page(after)
            for ti, kwargs, generation in page.hosted:
                if ti not in self._waits:
                    # In this trigger's context, and so with its log.
                    self._waits[ti] = asyncio.create_task(self._begin(ti, kwargs, generation))
                    self._waits[ti].add_done_callback(functools.partial(self._forget, ti))
            after = page.after
            if page.next is None:
                break
        self._after = after

    async def _let_go_of_those_that_left(self) -> None:
        """Stop polling for waits that were cleared or ended by others, whose records would be refused."""
        there: set[str] = set()
        known, after = set(self._waits), ""
        while True:
            page = await self._page(after, brief=True)
            there.update(ti for ti, *_ in page.hosted)
            after = page.after
            if page.next is None:
                break
        if there - self._waits.keys():  # joined by a clock that is behind, or long before it could be seen
            self._after = ""
        for ti in known - there:
            if (wait := self._waits.get(ti)) is not None:
                wait.cancel()

    async def _page(self, after: str, *, brief: bool = False) -> Answer:
        """Return a page of the waits, empty if the host has another trigger or none."""
        assert self.trigger_id is not None, "a trigger is started by a triggerer"
        asked = Hosted(host=self.host, trigger=self.trigger_id, after=after, brief=brief)
        answer = await Inbox.of_loop().ask(asked)
        self._is_over = answer.status == Status.OUTLIVED
        return answer

    def _begin(self, ti: str, kwargs: str, generation: int) -> Coroutine[Any, Any, Any]:
        """Return what serves a wait; or what fails its try, if this process cannot make it of what it has."""
        try:
            return self._serve(ti, _HostedWait.of(ti, kwargs, generation))
        except Exception as error:
            return self._fail(ti, ti, generation, error)

    async def _serve(self, ti: str, wait: _HostedWait) -> None:
        await inherit_portal(self._portal)
        while True:
            try:
                await wait.until_ended()
                return
            except Outlived as outlived:
                # It may be another process's, that had the host before, and dies: so this one begins again.
                log.info("The hosted wait %s is not this process's any more: %s", wait.name, outlived)
            except Exception as error:
                if await self._fail(ti, wait.name, wait.generation, error):
                    return
            await asyncio.sleep(_PATIENCE)

    async def _fail(self, ti: str, name: str, generation: int, error: Exception) -> bool:
        log.warning("The try of the hosted wait %s fails: %s", name, storable(str(error)))
        answer = await Inbox.of_loop().ask(Finish(ti, generation=generation, end=by_a_worker_fails(error)))
        if answer.status != Status.DONE:
            log.info("The hosted wait %s is not this process's any more: %s", name, answer.message)
        return answer.status == Status.DONE

    def _forget(self, ti: str, wait: asyncio.Task[Any]) -> None:
        self._waits.pop(ti, None)
        with contextlib.suppress(asyncio.CancelledError):
            if (error := wait.exception()) is not None:
                log.error("A hosted wait could not be served", exc_info=error)


class _HostedWait(EventTrigger):
    """A wait that its own trigger has handed to a host: it goes on as there, and neither parks nor joins."""

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
    def generation(self) -> int:
        """Of the wait, as it began here."""
        return self._generation

    def _beginning(self, listener: type[EventListener], wait: Wait) -> Begin:
        return dataclasses.replace(super()._beginning(listener, wait), hosted=True)

    async def _leave(self, listener: type[EventListener], wait: Wait, until: datetime | None) -> str | None:
        return None

    def _announce(self, wait: Wait) -> None:
        """Say nothing: its own trigger has."""
