"""How many requests of users an API server works on at once: few, so that Airflow's own are never behind many."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TypeVar

from airflow_events import metrics
from airflow_events.inbox.database import in_transaction
from anyio import CapacityLimiter, to_thread
from sqlalchemy.orm import Session
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_T = TypeVar("_T")

# An API server has 15 connections to its database, unless told otherwise, and Airflow's own routes need some.
# What is let in is mostly work of the processor, which all threads of a process share, Airflow's routes too.
LOOKS, CHANGES = 2, 2


@functools.cache
def _limits() -> dict[bool, CapacityLimiter]:
    """Return how many are let in, by whether they only look: who sends an event does not wait for those."""
    return {True: CapacityLimiter(LOOKS), False: CapacityLimiter(CHANGES)}


@functools.cache
def _threads() -> CapacityLimiter:
    """Return which threads they have: of their own, for Airflow's routes may have taken all others."""
    return CapacityLimiter(LOOKS + CHANGES)


async def in_turn(work: Callable[[Session], _T], *, again: bool = True) -> _T:
    """
    Do what `in_transaction` does, in a thread.

    The connection is given back with the end of the transaction, whatever the event loop has to do meanwhile.
    """
    return await to_thread.run_sync(lambda: in_transaction(work, again=again), limiter=_threads())


class Admission:
    """
    A middleware that lets few requests in at once; the others wait for their turn, in their order.

    Who waits costs a socket and what has come of the body: neither a thread nor a connection to the database, nor
    steps of the event loop between two of Airflow's. Nobody is inside while the network is waited for: who sends a
    body slowly, or reads an answer slowly, is in nobody's way.

    :param apart: the path of requests that have turns of their own, and of all below it.
    """

    def __init__(self, app: ASGIApp, apart: str) -> None:
        self.app = app
        self.apart = apart

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_apart(scope):
            await self.app(scope, receive, send)
            return
        looks = scope["method"] in ("GET", "HEAD")
        visit, came = _Visit(_limits()[looks], receive, send, await receive()), time.time()
        await visit.enter()
        metrics.since(metrics.TO_ADMISSION, came, kind="look" if looks else "change")
        try:
            await self.app(scope, visit.receive, visit.send)
        finally:
            visit.leave()

    def _is_apart(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return bool(path == self.apart or path.startswith(f"{self.apart}/"))


class _Visit:
    """
    One request.

    :param first: what has come of its body before it is let in: mostly all of it.
    """

    def __init__(self, limit: CapacityLimiter, receive: Receive, send: Send, first: Message) -> None:
        self._limit, self._receive, self._send = limit, receive, send
        self._first: Message | None = first
        self._inside = False

    async def enter(self) -> None:
        await self._limit.acquire_on_behalf_of(self)
        self._inside = True

    def leave(self) -> None:
        if self._inside:
            self._inside = False
            self._limit.release_on_behalf_of(self)

    async def receive(self) -> Message:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        if not self._inside:  # it is being answered
            return await self._receive()
        self.leave()
        message = await self._receive()
        await self.enter()
        return message

    async def send(self, message: Message) -> None:
        self.leave()
        await self._send(message)
