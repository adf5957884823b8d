"""In which order the waits of a triggerer ask their supervisor, which answers one request in each of its loops."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from airflow_events.listeners.shared import OnePerLoop


class Requests(OnePerLoop):
    """
    One request at a time for all waits of an event loop: of the wait whose event came first.

    An event takes several requests, one after another. If thousands of events came at once and each request had
    its turn in the order of asking, no wait would end before all of them had come to their last request.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._is_taken = False

    @asynccontextmanager
    async def turn(self, arrived: float | None) -> AsyncIterator[None]:
        """
        Have a turn, for one request.

        :param arrived: when the event came for which it is, in seconds since the epoch; None if none has come yet,
            which is after all others.
        """
        if self._is_taken:
            turn = asyncio.get_running_loop().create_future()
            rank = math.inf if arrived is None else arrived
            heapq.heappush(self._waiting, (rank, next(self._order), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on()
                raise
        self._is_taken = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._is_taken = False
