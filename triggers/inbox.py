"""What the waits of a triggerer ask the inbox, in few requests, and again until it has answered."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import deque
from collections.abc import Mapping
from typing import TypeAlias

from airflow_events.errors import InboxRefused
from airflow_events.inbox import entries
from airflow_events.inbox.entries import Answer, Entry, as_json
from airflow_events.listeners.support.hub import shared_log
from airflow_events.listeners.support.positions import Known, Positions, Ranges, union
from airflow_events.listeners.support.shared import OnePerLoop, background, woken
from airflow_events.triggers.inbox_http import Failed, Post, Unfit

log = logging.getLogger(__name__)

_Said: TypeAlias = "Answer | InboxRefused | str"  # a text says why there is no answer yet

# Of one request.
_MOST_ENTRIES = 300
_MOST_BYTES = 4_000_000
_AT_ONCE = 2
# Seconds.
_COLLECTING = 0.005
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 15.0
_PATIENCE = 1.0  # until waits are told that the inbox cannot be reached
_FEW_FAILURES = 4  # until a wait is told when it is so for this one alone


class _Asked:
    def __init__(self, entry: Entry) -> None:
        self.operation = entry.operation
        self.body = json.dumps(as_json(entry), allow_nan=False).encode()
        self.said: asyncio.Future[_Said] = asyncio.get_running_loop().create_future()
        self.most = _MOST_ENTRIES  # in one request with this one
        self.failures = 0
        self.is_told = False

    def say(self, said: _Said) -> None:
        if not self.said.done():  # as it is when nobody waits for it any more
            self.said.set_result(said)

    def tell(self, trouble: str) -> None:
        """Let the wait say, once, in its own log, why it waits."""
        if not self.is_told and not self.said.done():
            self.is_told = True
            told, self.said = self.said, asyncio.get_running_loop().create_future()
            told.set_result(trouble)


class Inbox(OnePerLoop):
    """
    The inbox, for all waits of an event loop.

    What comes within some milliseconds goes into one request, as does what comes while requests are under way.
    Whatever fails is asked again for as long as somebody waits for it. Nothing is lost by waiting, since the
    source still has what is not recorded, and an operator may mend what is wrong.
    """

    def __init__(self) -> None:
        self._open: dict[_Asked, None] = {}
        self._queue: deque[_Asked] = deque()  # of these, what is in no request
        self._post = Post(_AT_ONCE)
        self._workers: set[asyncio.Task[None]] = set()
        self._working = 0
        self._is_collecting = False
        self._failing_since: float | None = None
        self._trouble = ""  # of the inbox as a whole, and of now
        self._logs_told: set[str] = set()  # those that many waits share, and that have it
        self._got_through = asyncio.Event()
        Positions.of_loop().inbox = self._exchange

    async def ask(self, entry: Entry) -> Answer:
        """
        Return what the inbox says to an entry.

        Whoever is cancelled in here does not know whether the entry was carried out, or still will be.

        :raises InboxRefused: the API server cannot read it.
        """
        try:
            asked = _Asked(entry)
        except (TypeError, ValueError, RecursionError) as error:
            raise InboxRefused(entry.operation, f"it cannot be written as JSON: {error}") from error
        if self._trouble:
            asked.is_told = True
            self._warn(self._trouble)
        self._open[asked] = None
        self._queue.append(asked)
        self._work_if_need_be()
        try:
            while isinstance(said := await asked.said, str):
                self._warn(said)
        finally:
            asked.said.cancel()
            del self._open[asked]
        if asked.is_told:
            self._reassure()
        if isinstance(said, InboxRefused):
            raise said
        return said

    def _warn(self, trouble: str) -> None:
        """Write it into the log of the wait that asks; into one that it shares with others, once."""
        shared = shared_log.get("")
        if not shared or shared not in self._logs_told:
            self._logs_told.add(shared)
            log.warning("%s", trouble)

    def _reassure(self) -> None:
        shared = shared_log.get("")
        if not shared or shared in self._logs_told:
            self._logs_told.discard(shared)
            log.info("The inbox has answered")

    async def _exchange(self, source: str, settled: Mapping[str, Ranges], begins: Mapping[str, int]) -> Known:
        answer = await self.ask(entries.Positions(source=source, settled=settled, begins=begins))
        return Known({place: union(ranges) for place, ranges in (answer.settled or {}).items()}, answer.owner)

    def _work_if_need_be(self) -> None:
        if self._queue and not self._is_collecting and self._working < _AT_ONCE:
            self._is_collecting = True
            self._working += 1
            worker = background(self._work(), "airflow-events inbox")
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    async def _work(self) -> None:
        pause = _FIRST_PAUSE
        try:
            await asyncio.sleep(_COLLECTING)
            self._is_collecting = False
            while batch := self._take():
                self._work_if_need_be()  # for what is left
                if (failed := await self._settle(batch)) is None:
                    pause = _FIRST_PAUSE
                    continue
                await self._pause(pause, failed.retry_after)
                pause = min(2 * pause, _LONGEST_PAUSE)
                self._queue.extend(batch)  # behind the others, should one of these fail for ever
        finally:
            self._working -= 1

    def _take(self) -> list[_Asked]:
        batch: list[_Asked] = []
        size, most = 0, _MOST_ENTRIES
        while self._queue:
            asked = self._queue[0]
            size, most = size + len(asked.body), min(most, asked.most)
            if batch and (size > _MOST_BYTES or len(batch) >= most):
                break
            self._queue.popleft()
            if not asked.said.done():
                batch.append(asked)
        return batch

    async def _settle(self, batch: list[_Asked]) -> Failed | None:
        """Ask what is in a batch; return why it has to be asked again, if it has."""
        began = asyncio.get_running_loop().time()
        try:
            answers = await self._post(asked.body for asked in batch)
            if len(answers) != len(batch):
                raise Failed(f"there were {len(answers)} answers to {len(batch)} entries")
        except Failed as failed:
            self._has_failed(batch, began, failed)
            if failed.may_be_one:
                _halve(batch)
            return failed
        except Unfit as unfit:
            self._is_through()
            if len(batch) == 1:
                batch[0].say(InboxRefused(batch[0].operation, str(unfit)))
            else:
                _halve(batch)
                self._queue.extendleft(reversed(batch))
            return None
        self._is_through()
        for asked, answer in zip(batch, answers, strict=True):
            asked.say(answer)
        return None

    def _has_failed(self, batch: list[_Asked], began: float, failed: Failed) -> None:
        trouble = (
            f"The inbox at {self._post.url} cannot be reached ({failed}). The wait keeps its event, and the "
            "request is tried again until the inbox answers; `airflow events doctor` says what may be wrong"
        )
        self._failing_since = began if self._failing_since is None else self._failing_since
        if asyncio.get_running_loop().time() - self._failing_since >= _PATIENCE:
            self._trouble = trouble
            for asked in self._open:
                asked.tell(trouble)
        for asked in batch:
            asked.failures += 1
            if asked.failures >= _FEW_FAILURES:
                asked.tell(trouble)

    def _is_through(self) -> None:
        self._failing_since, self._trouble = None, ""
        self._got_through.set()

    async def _pause(self, seconds: float, retry_after: float | None) -> None:
        """Wait until it is time to ask again, or another request got through."""
        if retry_after is not None:
            await asyncio.sleep(retry_after * random.uniform(1, 1.5))
            return
        await asyncio.sleep(_FIRST_PAUSE * random.uniform(0.5, 1))
        self._got_through.clear()
        await woken(self._got_through, (seconds - _FIRST_PAUSE) * random.uniform(0.5, 1))


def _halve(batch: list[_Asked]) -> None:
    """Let what is wrong with one of a batch be found with few requests."""
    for asked in batch:
        asked.most = max(1, len(batch) // 2)
