"""One thing for many waits: a connection, a watcher, whatever a source can share in a triggerer."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable
from typing import Any, ClassVar, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

# Seconds for which a resource stays after its last user, since the next one often comes soon.
_LINGER = 2.0


class Resource(Protocol):
    """What can be shared: opened by its constructor, closed once."""

    @property
    def is_needed(self) -> bool:
        """Whether it must stay although nobody uses it."""

    async def close(self) -> None:
        """End it. Called some while after its last user has left."""


_R = TypeVar("_R", bound=Resource)
_C = TypeVar("_C")
_O = TypeVar("_O", bound="OnePerLoop")
_W = TypeVar("_W")
_working: set[asyncio.Task[Any]] = set()
_open: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, _Shared]] = WeakKeyDictionary()


class _Shared:
    """A resource and those who use it."""

    def __init__(self, resource: Any) -> None:
        self.resource = resource
        self.users = 0
        self.closing: asyncio.Task[None] | None = None


@contextlib.asynccontextmanager
async def shared(key: Hashable, make: Callable[[], _R]) -> AsyncIterator[_R]:
    """
    Use the resource that goes by ``key`` in this event loop.

    The first user makes it; some while after the last one has left it is closed, and when the loop ends.

    :param make: called in the event loop, so it must not block; what it raises, the first user gets.
    """
    resource = use(key, make)
    try:
        yield resource
    finally:
        if not leave(key):
            await asyncio.sleep(0)  # its closing begins, so that the end of the loop does not come before it


def use(key: Hashable, make: Callable[[], _R]) -> _R:
    """Do what `shared` does as it is entered; whoever does so calls `leave` once."""
    resources = _open.setdefault(asyncio.get_running_loop(), {})
    if key not in resources:
        resources[key] = _Shared(make())
    one = resources[key]
    one.users += 1
    if one.closing is not None:
        one.closing.cancel()
        one.closing = None
    resource: _R = one.resource
    return resource


def leave(key: Hashable) -> int:
    """Use it no more; return how many still do."""
    resources = _open[asyncio.get_running_loop()]
    one = resources[key]
    one.users -= 1
    if not one.users:
        one.closing = background(_close_later(resources, key, one), f"closing {key}")
    return one.users


async def _close_later(resources: dict[Hashable, _Shared], key: Hashable, one: _Shared) -> None:
    try:
        is_needed = True
        while is_needed:
            await asyncio.sleep(_LINGER)
            is_needed = one.resource.is_needed
    finally:
        if not one.users:  # it was not cancelled by another user, but by the end of the loop, or not at all
            resources.pop(key, None)
            await one.resource.close()


@contextlib.asynccontextmanager
async def connected(
    key: Hashable,
    connect: Callable[[], Awaitable[_C]],
    close: Callable[[_C], Awaitable[Any]],
    is_closed: Callable[[_C], bool] = lambda _: False,
) -> AsyncIterator[_C]:
    """
    Use the connection that goes by ``key`` in this event loop; for short work, such as a commit.

    :param connect: opens it, for the first user, and again for whoever finds it closed; its errors escape.
    :param close: closes it some while after its last user.
    :param is_closed: whether it has gone by itself. A client that connects again by itself needs none.
    """
    async with shared(key, lambda: _Connection(connect, close, is_closed)) as connection:
        yield await connection.get()


class _Connection(Generic[_C]):
    is_needed = False

    def __init__(
        self,
        connect: Callable[[], Awaitable[_C]],
        close: Callable[[_C], Awaitable[Any]],
        is_closed: Callable[[_C], bool],
    ) -> None:
        self._connect = connect
        self._close = close
        self._is_closed = is_closed
        self._open: _C | None = None
        self._connecting = asyncio.Lock()

    async def get(self) -> _C:
        async with self._connecting:
            if self._open is None or self._is_closed(self._open):
                self._open = await self._connect()
            return self._open

    async def close(self) -> None:
        if self._open is not None:
            await self._close(self._open)


class OnePerLoop:
    """What an event loop has one of, for all its waits, as long as there is the loop."""

    _ones: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, dict[type[Any], Any]]] = WeakKeyDictionary()

    @classmethod
    def of_loop(cls: type[_O]) -> _O:
        """Return that of the running event loop."""
        ones = cls._ones.setdefault(asyncio.get_running_loop(), {})
        if cls not in ones:
            ones[cls] = cls()
        one: _O = ones[cls]
        return one


def background(work: Coroutine[Any, Any, _W], name: str) -> asyncio.Task[_W]:
    """
    Start ``work`` as a task that belongs to no wait.

    A task inherits the context of whoever starts it, and with it, in a triggerer, the log of that wait's
    task; this one starts with an empty context. asyncio itself would not keep it.
    """
    task = contextvars.Context().run(asyncio.get_running_loop().create_task, work, name=name)
    _working.add(task)
    task.add_done_callback(_working.discard)
    return task


async def woken(event: asyncio.Event, seconds: float) -> None:
    """
    Return when ``event`` is set, or after so many seconds.

    Before Python 3.12, `asyncio.wait_for` swallows a cancellation that comes as the event is set (cpython #86296).
    """
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiting}, timeout=seconds)
    finally:
        waiting.cancel()


async def within(work: Awaitable[_W], seconds: float = 60.0) -> _W:
    """
    Do ``work`` as a task of its own.

    A client may cancel whoever waits for a connection that is lost; that must not look like our own end.

    :raises ConnectionError: it was cancelled by the client, or took longer than ``seconds``.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise
    if not done:
        task.cancel()
        await asyncio.wait({task})
        raise ConnectionError(f"the server did not answer for {seconds:.0f} s")
    if task.cancelled():
        raise ConnectionError("the connection was lost")
    return task.result()
