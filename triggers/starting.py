"""
How a trigger starts one run for each event of a source.

It goes round: ask the inbox for room, poll for as many events as there is room for, have a run started for each,
tell the source to forget the event. What a crash leaves:

- before the run: the event is unacknowledged at its source, which delivers it again;
- between run and acknowledgement: likewise, and the inbox knows that it has started a run. It is acknowledged, and
  starts no other;
- two triggerers on one trigger, for a while, get different events, or one of them is told that it is taken.

So it does not matter which process has an event, and nothing has to be handed over.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import greenback
from airflow_events import metrics
from airflow_events.errors import CommitFailed, EventLost, EventUndecodable
from airflow_events.inbox.entries import Answer, Settle, StartRoom, StartRun, Status, Told
from airflow_events.listeners.base import EventListener, Wait
from airflow_events.listeners.support import serde
from airflow_events.listeners.support.commit import (
    acknowledge,
    inherit_portal,
    recorded,
    release,
    release_later,
    tags,
)
from airflow_events.listeners.support.shared import background, woken
from airflow_events.triggers import reference
from airflow_events.triggers.event import recording
from airflow_events.triggers.inbox import Inbox
from airflow_events.triggers.polling import Poll
from airflow_events.triggers.source_state import SourceState
from airflow_events.triggers.start_rules import NoLogicalDate, Rules

log = logging.getLogger(__name__)

MOST_AT_ONCE = 64
"""For how many events one trigger polls at once."""

# Seconds from one look for room to the next, where there is none, and where there is some and no event comes.
_LOOK_WHEN_FULL, _LOOK_WHILE_OPEN = 1.0, 5.0
# Seconds after something went wrong; of each of a row twice as long.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
# Seconds without room after which that is said.
_UNUSUAL = 30.0
# Of how many messages that cannot be read a trigger remembers that it has said so.
_REMEMBERED = 1000


@dataclass(frozen=True)
class What:
    """
    What a trigger polls for, and what is made of it.

    :param reference: the listener, as `airflow_events.triggers.reference` reads it.
    :param up_to: as of `StartRoom`; ``makes`` likewise.
    :param rules: which events start runs, and how.
    """

    trigger: int
    reference: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    up_to: int | None
    makes: str
    rules: Rules


@dataclass(frozen=True)
class Held:
    """
    An event in hand, that is unacknowledged at its source.

    :param wait: in whose name it was polled.
    :param arrived: in seconds since the epoch.
    """

    wait: Wait
    event: Any
    arrived: float | None

    @functools.cached_property
    def shapes(self) -> Any:
        """The event as its run has it."""
        return shapes(self.event)

    @functools.cached_property
    def size(self) -> int:
        """Of these, in characters of JSON."""
        return len(json.dumps(self.shapes))


class Starts:
    """
    Polls, and starts runs, for one trigger.

    :ivar room: how many more runs there may be, by the last answer of the inbox.
    :ivar wanting: how many polls and events count on it. An event that waits for its key does not.
    """

    def __init__(self, what: What) -> None:
        self._what = what
        self._slots: dict[int, asyncio.Task[None]] = {}
        self._polling: set[int] = set()
        self._changed = asyncio.Event()
        self._failures = 0
        self._fails_until = 0.0  # of the loop's clock
        self._unreadable: set[str | None] = set()
        self._full_since: float | None = None
        self._has_said = False  # that there is no room
        self._is_nobodys = False
        self._portal = False
        self._dags: tuple[str, ...] = ()
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()  # by key
        self._source = SourceState(f"trigger {what.trigger}")
        self.room = self.wanting = 0

    async def run(self) -> None:
        """Go round until the trigger is nobody's, or this is cancelled; whatever fails is tried again."""
        self._portal = greenback.has_portal()
        self._source.begin()
        try:
            while not self._is_nobodys:
                try:
                    await self._look()
                    self._open(reference.load(self._what.reference))
                except Exception as error:
                    self._has_failed(error)
                await self._pause()
        finally:
            self._source.end()
            for slot in self._slots.values():
                slot.cancel()
            if self._slots:
                await asyncio.wait(self._slots.values())

    async def _look(self) -> None:
        """Learn how much room there is."""
        asked = StartRoom(
            trigger=self._what.trigger,
            up_to=self._what.up_to,
            makes=self._what.makes,
            lag=self._source.lag,
            trouble=self._source.trouble,
        )
        answer = await Inbox.of_loop().ask(asked)
        self.room = answer.room
        if answer.dags:
            self._dags = answer.dags
        self._say(answer.message)
        # It may be for a moment, as a DAG is read again.
        since = self._now() if self._full_since is None else self._full_since
        self._is_nobodys = answer.status == Status.OUTLIVED and self._now() - since >= _UNUSUAL
        self._close()

    def _close(self) -> None:
        """End polls that there is no room for any more."""
        for number in sorted(self._polling, reverse=True)[: max(self.wanting - self.room, 0)]:
            self._slots[number].cancel()

    def _say(self, why_full: str) -> None:
        """Tell the log of a lack of room that lasts, once."""
        if self.room:
            if self._has_said:
                log.info("%s are taken again", self._name())
            self._full_since, self._has_said = None, False
            return
        now = self._now()
        self._full_since = now if self._full_since is None else self._full_since
        if not self._has_said and now - self._full_since >= _UNUSUAL:
            log.info("%s stay at their source, as there is no room: %s", self._name(), why_full)
            self._has_said = True

    def _open(self, listener: type[EventListener]) -> None:
        """Begin as many polls as there is room for."""
        if self._fails:
            return
        free = [number for number in range(MOST_AT_ONCE) if number not in self._slots]
        for number in free[: max(self.room - self.wanting, 0)]:
            serving = self._serve(listener, number)
            self._slots[number] = asyncio.create_task(serving, name=f"{self._name()} {number}")

    async def _pause(self) -> None:
        """Wait until it is time to look again."""
        if (left := self._fails_until - self._now()) > 0:
            await asyncio.sleep(left)
            return
        seconds = _LOOK_WHILE_OPEN if self._polling else _LOOK_WHEN_FULL
        await woken(self._changed, seconds)
        self._changed.clear()

    async def _serve(self, listener: type[EventListener], number: int) -> None:
        """Take one event after another, as long as there is room."""
        try:
            while self.wanting < self.room and not self._fails:
                self.wanting += 1
                try:
                    held = await self._polled(listener, number)
                finally:
                    self.wanting -= 1
                if held is not None:
                    await self._take_in_turn(listener, held)
        finally:
            self._slots.pop(number, None)
            self._changed.set()

    async def _polled(self, listener: type[EventListener], number: int) -> Held | None:
        """
        Return an event; None if there is none.

        :param number: of the poll, among those that are open and those whose events are in hand.
        """
        await inherit_portal(self._portal)
        wait = Wait(", ".join(self._dags), f"trigger {self._what.trigger}", "start_on", index=number)
        poll = Poll(listener, wait, self._what.args, self._what.kwargs, None)
        event = None
        self._polling.add(number)
        try:
            event = await poll.run()
        except EventUndecodable as error:
            await self._cannot_read(error)
        except Exception as error:
            self._has_failed(error)
        finally:
            self._polling.discard(number)
            if event is None and poll.event is not None:  # it came as the poll was cancelled, or cannot be stored
                self._let_go(listener, [Held(wait, poll.event, None)])
        if event is None:
            return None
        held = Held(wait, event, poll.arrived)
        if self._what.rules.wants(held.shapes):
            return held
        log.debug("%s: skipped and acknowledged, as it does not match: %s", self._name(), event)
        await asyncio.shield(background(self._acknowledge(listener, held, None), f"passing over {wait.id}"))
        return None

    async def _take_in_turn(self, listener: type[EventListener], held: Held) -> None:
        """Have something made of an event; of one with a key after those of that key that came before it."""
        if (key := self._what.rules.key_of(held.shapes)) is None:
            await self._take(listener, [held])
            return
        waits = True  # and nothing is asked for the event
        try:
            async with self._turns.setdefault(key, asyncio.Lock()):
                while True:
                    waits = False
                    if await self._take(listener, [held], key):
                        return
                    waits = True
                    await asyncio.sleep(_LOOK_WHEN_FULL)
        finally:
            if waits:
                self._let_go(listener, [held])

    async def _take(self, listener: type[EventListener], held: Sequence[Held], key: str | None = None) -> bool:
        """
        Have something made of events; return False if it has to be tried again, for which they are in hand.

        In a task of its own: what has begun with an event goes on if this trigger is cancelled.
        """
        self.wanting += 1
        taking = background(self._taken(listener, held, key), f"taking {held[0].wait.id}")
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:  # nobody tries it again
            taking.add_done_callback(
                lambda done: None if not done.cancelled() and done.result() else self._let_go(listener, held)
            )
            raise

    async def _taken(self, listener: type[EventListener], held: Sequence[Held], key: str | None) -> bool:
        """Have something made of events, and acknowledge them; give them back if it is not to be."""
        await inherit_portal(self._portal)
        told: list[Told] = []
        try:
            told = [self._told(listener, one) for one in held]
            answer = await Inbox.of_loop().ask(
                StartRun(
                    trigger=self._what.trigger,
                    up_to=self._what.up_to,
                    makes=self._what.makes,
                    record_id=uuid.uuid4().hex,
                    events=tuple(told),
                    key=key,
                    logical_date=self._what.rules.logical_date_of(held[0].shapes),
                )
            )
            self.room = answer.room
        except NoLogicalDate as error:
            answer = Answer(Status.REJECTED, str(error))
        except Exception as error:
            answer = Answer(Status.INVALID, repr(error))
        self.wanting -= 1
        if key is not None and answer.status in (Status.BUSY, Status.FULL):
            return False
        if answer.status in (Status.REJECTED, Status.INVALID) and len(held) > 1:  # it may be for one of them
            for some in (held[: len(held) // 2], held[len(held) // 2 :]):
                self.wanting += 1
                await self._taken(listener, some, key)
            return True
        await self._end(listener, held, told, answer)
        return True

    async def _end(
        self, listener: type[EventListener], held: Sequence[Held], told: Sequence[Told], answer: Answer
    ) -> None:
        """Acknowledge what is taken, and give back what may be taken later."""
        if answer.status in (Status.DONE, Status.TAKEN):
            self._failures = 0
            if answer.status == Status.TAKEN:
                log.info(
                    "%s: %d redelivered events already have %s; acknowledged",
                    self._name(),
                    len(held),
                    answer.message,
                )
            else:
                for one in held:
                    recorded(listener, one.wait, one.arrived)
            await asyncio.gather(
                *(self._acknowledge(listener, one, of) for one, of in zip(held, told, strict=True))
            )
            return
        if answer.status not in (Status.REJECTED, Status.INVALID):
            self._let_go(listener, held)
            return
        # Others go on, though not at once: it may be for what all of them have.
        log.error(
            "%s: one stays at its source, and is tried again in some minutes, as no run can have it: %s",
            self._name(),
            answer.message,
        )
        self._pause_for_failure()
        self._let_go_later(listener, held)

    def _told(self, listener: type[EventListener], held: Held) -> Told:
        told = recording(listener, reference.scope(self._what.reference, listener), held.wait, held.event)
        return Told(json.dumps(held.shapes), told["identity"], told["content"])

    async def _acknowledge(self, listener: type[EventListener], held: Held, told: Told | None) -> None:
        await inherit_portal(self._portal)
        try:
            is_confirmed = await acknowledge(listener, held.wait, held.event)
        except EventLost as lost:
            log.warning(
                "%s: a run was started, but the source gave the event to another consumer: %s", self._name(), lost
            )
            metrics.count(metrics.LOST, **tags(listener, held.wait))
            return
        except CommitFailed as failed:
            log.error(
                "%s: a run was started, but its event could not be acknowledged and will be redelivered: %s",
                self._name(),
                failed,
            )
            self._let_go_later(listener, [held])
            return
        metrics.count(metrics.COMMITTED, **tags(listener, held.wait))
        if is_confirmed and told is not None and told.identity:
            await Inbox.of_loop().ask(Settle("", identity=told.identity, content=told.content))

    def _let_go(self, listener: type[EventListener], held: Sequence[Held]) -> None:
        """Give events back to their source, which delivers them again."""

        async def give_back() -> None:
            await inherit_portal(self._portal)
            for one in held:
                await release(listener, one.wait, one.event, self._what.args, self._what.kwargs)

        background(give_back(), f"giving back of {self._name()}")

    def _let_go_later(self, listener: type[EventListener], held: Sequence[Held]) -> None:
        for one in held:
            release_later(listener, one.wait, one.event, self._what.args, self._what.kwargs)

    async def _cannot_read(self, error: EventUndecodable) -> None:
        """Say so once; the source keeps the message, and others go on."""
        if error.event_id in self._unreadable:
            await asyncio.sleep(_FIRST_PAUSE)
            return
        if len(self._unreadable) >= _REMEMBERED:
            self._unreadable.clear()
        self._unreadable.add(error.event_id)
        what = "one cannot be read, and stays at its source unless on_undecodable says otherwise"
        log.error("%s: %s: %s", self._name(), what, error)

    def _has_failed(self, error: Exception) -> None:
        """Pause, longer each time, and say why, once for all that failed together."""
        if self._fails:
            return
        self._pause_for_failure()
        seconds = self._fails_until - self._now()
        self._source.failed(error, seconds)
        log.error("%s: tried again in %.0f s", self._name(), seconds, exc_info=error)

    def _pause_for_failure(self) -> None:
        if not self._fails:
            pause = min(_FIRST_PAUSE * 2 ** min(self._failures, 10), _LONGEST_PAUSE)
            self._failures += 1
            self._fails_until = self._now() + pause

    @property
    def _fails(self) -> bool:
        """Whether something went wrong a moment ago."""
        return self._now() < self._fails_until

    def _name(self) -> str:
        dags = ", ".join(self._dags) or "a DAG"
        return f"Events of {reference.display_name(self._what.reference)} for {dags}"

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def shapes(value: Any) -> Any:
    """
    Return a checked event in JSON shapes for people and templates: a run's conf is plain JSON.

    Datetimes, dates and times are ISO 8601, timedeltas seconds, sets and tuples lists, and all else text.
    """
    if isinstance(value, Mapping):
        return {key: shapes(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((shapes(item) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
    if isinstance(value, (list, tuple)):
        return [shapes(item) for item in value]
    value = serde.as_json_has_it(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
