"""Turns of the event loop, for what many waits have to do at the same time."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """
    Let so many go on in one turn of the event loop; the others follow in the next turns, in their order.

    What wakes thousands of waits at once, a message that all of them want, say, would otherwise hold up every
    other trigger until the last of them is done with it.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._left = at_once
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._next: asyncio.Handle | None = None

    async def take(self) -> None:
        """Return in this turn, if it has room, or else in the first that has."""
        loop = asyncio.get_running_loop()
        if self._next is None:
            self._next = loop.call_soon(self._begin)
        if self._left:
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _begin(self) -> None:
        self._left = self._at_once
        while self._waiting and self._left:
            if not (turn := self._waiting.popleft()).done():
                turn.set_result(None)
                self._left -= 1
        is_quiet = self._left == self._at_once
        self._next = None if is_quiet else asyncio.get_running_loop().call_soon(self._begin)
