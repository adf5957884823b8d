"""One thing for many waits: a connection, a watcher, whatever a source can share in a triggerer."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable
from typing import Any, ClassVar, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary


class Resource(Protocol):
    """What can be shared: opened by its constructor, closed once."""

    async def close(self) -> None:
        """End it. Called after its last user has left."""


_R = TypeVar("_R", bound=Resource)
_C = TypeVar("_C")
_O = TypeVar("_O", bound="OnePerLoop")
_open: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, tuple[Any, set[object]]]] = WeakKeyDictionary()


@contextlib.asynccontextmanager
async def shared(key: Hashable, make: Callable[[], _R]) -> AsyncIterator[_R]:
    """
    Use the resource that goes by ``key`` in this event loop; the first user makes it, the last closes it.

    :param make: called in the event loop, so it must not block; what it raises, the first user gets.
    """
    resources = _open.setdefault(asyncio.get_running_loop(), {})
    if key not in resources:
        resources[key] = (make(), set())
    resource, users = resources[key]
    user = object()
    users.add(user)
    try:
        yield resource
    finally:
        users.remove(user)
        if not users:
            del resources[key]
            await resource.close()


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
    :param close: closes it after its last user.
    :param is_closed: whether it has gone by itself. A client that connects again by itself needs none.
    """
    async with shared(key, lambda: _Connection(connect, close, is_closed)) as connection:
        yield await connection.get()


class _Connection(Generic[_C]):
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


def background(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """
    Start ``work`` as a task that belongs to no wait.

    A task inherits the context of whoever starts it, and with it, in a triggerer, the log of that wait's
    task; this one starts with an empty context.
    """
    return contextvars.Context().run(asyncio.get_running_loop().create_task, work, name=name)
