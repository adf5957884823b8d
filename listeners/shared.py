"""One thing for many waits: a connection, a watcher, whatever a source can share in a triggerer."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary


class Resource(Protocol):
    """What can be shared: opened by its constructor, closed once."""

    async def close(self) -> None:
        """End it. Called after its last user has left."""


_R = TypeVar("_R", bound=Resource)
_open: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, tuple[Any, list[object]]]] = WeakKeyDictionary()


@contextlib.asynccontextmanager
async def shared(key: Hashable, make: Callable[[], _R]) -> AsyncIterator[_R]:
    """
    Use the resource that goes by ``key`` in this event loop; the first user makes it, the last closes it.

    :param make: called in the event loop, so it must not block; what it raises, the first user gets.
    """
    resources = _open.setdefault(asyncio.get_running_loop(), {})
    if key not in resources:
        resources[key] = (make(), [])
    resource, users = resources[key]
    user = object()
    users.append(user)
    try:
        yield resource
    finally:
        users.remove(user)
        if not users:
            del resources[key]
            await resource.close()


def background(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """
    Start ``work`` as a task that belongs to no wait.

    A task inherits the context of whoever starts it, and with it, in a triggerer, the log of that wait's
    task; this one starts with an empty context.
    """
    return contextvars.Context().run(asyncio.get_running_loop().create_task, work, name=name)
