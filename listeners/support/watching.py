"""
Watching a log, such as a stream or a topic: the first message that matches, and nothing taken from others.

One reader is at the log's end, for all who watch it, and never goes back. A wait that looks from before what that
one has kept is caught up by another reader, and joins those at the end when it has come to what is kept, so that
nothing lies between. A wait that comes meanwhile is caught up by the same reader or, if that one is past what it
wants, by the next. So an old ``since`` delays nobody else, and the log is not read once for each wait that comes.
"""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from airflow_events.errors import EventUndecodable, SourceMisconfigured
from airflow_events.listeners.base import EventListener, Wait, current_wait
from airflow_events.listeners.support.hub import Hub, Seeker
from airflow_events.listeners.support.shared import shared
from airflow_events.listeners.support.timestamps import check_since, when
from airflow_events.listeners.support.values import Index, Match, OnUndecodable, checked, unreadable

log = logging.getLogger(__name__)

# How many messages are kept for waits that come a little late, and how many bytes they may have at the source: as
# Python has them it may be twenty times that. The log is read again for waits that come later.
_KEPT = 10_000
_KEPT_BYTES = 4 * 2**20
# How many of them, and of how many bytes, are kept and dropped together though they were read one by one.
_TOGETHER, _TOGETHER_BYTES = 100, 2**16

READ_BYTES = 2 * 2**20
"""How many bytes a `Reader` should return at once, where it can tell before; one message may be larger."""

MILLISECOND = timedelta(microseconds=999)
"""How much later than it says a message may have been published, where the source cuts to milliseconds."""

# So that there is something after it.
_LATEST = datetime.max.replace(tzinfo=timezone.utc) - timedelta(days=1)

# From how long before now on the first who watch a log have it read by the reader at its end.
_LATELY = timedelta(minutes=2)

# Seconds between two questions what the log has dropped, however many come late.
_ASK_EVERY = 10.0

# Seconds for which a reader waits for messages, after which new waits are seen.
_BLOCK = 0.5

# Seconds for which matching may hold the triggerer's loop.
_LONGEST_WORK = 0.02

_P = TypeVar("_P")


@dataclass(frozen=True)
class Message:
    """
    A message of a log, as `message_of` makes it.

    :param timestamp: when it was published, as the log says.
    :param size: how many bytes it has at the source.
    :param where: its coordinates, for errors.
    :param event: what a wait gets for it; its ``value`` is what `Match` looks at.
    :param undecodable: why it has no value.
    """

    timestamp: datetime
    size: int
    where: str
    event: dict[str, Any]
    undecodable: EventUndecodable | None = None


def message_of(
    timestamp: datetime | None,
    size: int,
    where: str,
    event: Callable[[], dict[str, Any]],
    within: timedelta = timedelta(),
) -> Message:
    """
    Make a message of what a source has; whatever is wrong with it is its own matter, and fails no reader.

    :param timestamp: None, where it has none that can be read, counts as published now.
    :param within: how much later than that it may have been published, of a source that cuts moments.
    :param event: makes the event. What it raises makes the message undecodable; only `OSError` and
        `SourceMisconfigured` escape, which are not the message's, but the source's or a schema registry's.
    """
    timestamp = datetime.now(timezone.utc) if timestamp is None else min(timestamp, _LATEST) + within
    try:
        return Message(timestamp, size, where, event())
    except EventUndecodable as error:
        return Message(timestamp, size, where, {}, error)
    except (OSError, SourceMisconfigured):
        raise
    except Exception as error:
        return Message(timestamp, size, where, {}, unreadable(where, error))


class Watcher(Seeker):
    """A wait for the first message that matches, published at ``since`` or later."""

    __slots__ = ("match", "on_undecodable", "since")

    def __init__(self, match: Match, since: datetime, on_undecodable: OnUndecodable = "skip") -> None:
        super().__init__()
        self.match = match
        self.since = since
        self.on_undecodable = on_undecodable


class Reader(abc.ABC, Generic[_P]):
    """
    Reads a log on from one place, over its hub's connection.

    :ivar position: what follows is read next. None while nobody knows, of a reader that began at a moment and has
        read nothing.
    """

    position: _P | None = None

    @abc.abstractmethod
    async def read(self, seconds: float) -> list[Message]:
        """
        Return what comes next, and move `position` behind it.

        Some hundred messages and `READ_BYTES` at most; none while `position` is not known.

        :param seconds: how long to wait if there is nothing.
        """

    async def close(self) -> None:
        """End it before its connection ends."""


class _Reading(Generic[_P]):
    """
    A way through the log, over as many connections as it takes, and who is served on it.

    :ivar since: nothing of then or later has been passed over.
    """

    def __init__(self, since: datetime) -> None:
        self.since = since
        self.position: _P | None = None
        self.index = Index()
        self.watchers: dict[Watcher, None] = {}
        self._reader: Reader[_P] | None = None
        self._not_offered: list[Message] = []

    def add(self, watcher: Watcher) -> None:
        self.watchers[watcher] = None
        self.index.add(watcher, watcher.match)

    def remove(self, watcher: Watcher) -> None:
        del self.watchers[watcher]
        self.index.remove(watcher, watcher.match)

    async def read(self, hub: LogHub[_P], seconds: float) -> list[Message]:
        """Return what comes next; or, as long as `offered` was not called, what was returned last."""
        if self._not_offered:
            return self._not_offered
        if self._reader is None:
            self._reader = await hub.reader(self.since, self.position)
        before = self._reader.position
        messages = await self._reader.read(seconds)
        self.position = self._reader.position
        if messages:
            assert before is not None
            self.has_read(before, messages)
        self._not_offered = messages
        return messages

    def offered(self) -> None:
        """Note that all who are served on it were given what they want of what was read."""
        self._not_offered = []

    def has_read(self, before: _P, messages: list[Message]) -> None:
        """Note what was read from the position ``before`` on."""
        self._past(messages)

    def disconnected(self) -> None:
        self._reader = None

    def start_over(self) -> None:
        self._reader = self.position = None
        self._not_offered = []
        self.since = min((watcher.since for watcher in self.watchers), default=datetime.now(timezone.utc))

    async def close(self) -> None:
        if self._reader is not None:
            await self._reader.close()

    def _past(self, messages: list[Message]) -> None:
        for message in messages:
            self.since = max(self.since, message.timestamp + timedelta.resolution)


class _End(_Reading[_P]):
    """The reading at the log's end. It keeps what it has read last, so nothing that is kept is past."""

    def __init__(self, since: datetime) -> None:
        super().__init__(since)
        self._batches: deque[tuple[_P, list[Message]]] = deque()  # with the position before each
        self._count = self._bytes = 0

    @property
    def kept_from(self) -> _P | None:
        """Return the position after which all that was read is kept."""
        return self._batches[0][0] if self._batches else self.position

    def kept(self) -> list[Message]:
        return [message for _, batch in self._batches for message in batch]

    def has_read(self, before: _P, messages: list[Message]) -> None:
        last = self._batches[-1][1] if self._batches else []
        both = [*last, *messages]
        if last and len(both) <= _TOGETHER and sum(message.size for message in both) <= _TOGETHER_BYTES:
            # A position may be as large as a topic has partitions: there is not one for each message.
            self._batches[-1] = self._batches[-1][0], both
        else:
            self._batches.append((before, messages))
        self._count_in(messages, 1)
        while self._count > _KEPT or self._bytes > _KEPT_BYTES:
            _, oldest = self._batches.popleft()
            self._count_in(oldest, -1)
            self._past(oldest)

    def start_over(self) -> None:
        super().start_over()
        self._batches.clear()
        self._count = self._bytes = 0

    def _count_in(self, messages: list[Message], sign: int) -> None:
        self._count += sign * len(messages)
        self._bytes += sign * sum(message.size for message in messages)


class LogHub(Hub[Watcher], Generic[_P]):
    """Reads a log for all who watch it; see this module."""

    def __init__(self, name: str) -> None:
        self._new: list[Watcher] = []
        self._end: _End[_P] | None = None
        # By the ranks of those who are caught up; a reading that is at rest by itself.
        self._catching: dict[Hashable, _Reading[_P]] = {}
        self._is_catching_up = False  # whether one of these has read something in the last round
        self._late: dict[int, list[Watcher]] = {}
        self._places: dict[Watcher, _Reading[_P]] = {}
        self._dropped: datetime | None = None
        self._asked_at = float("-inf")
        super().__init__(name)

    @abc.abstractmethod
    async def reader(self, since: datetime, position: _P | None) -> Reader[_P]:
        """
        Open a reader at ``position``.

        If that is None, open it so that nothing published at ``since`` or later is missed.
        """

    @abc.abstractmethod
    async def dropped_until(self) -> datetime | None:
        """Return until when messages may be gone from the log already, or None if none are."""

    def reached(self, position: _P, other: _P) -> bool:
        """Whether all that comes before ``other`` comes before ``position``."""
        return bool(position >= other)  # type: ignore[operator]

    def start_over(self, reason: str) -> None:
        """
        Read the log from its beginning: another one goes by its name now.

        `connect` calls it, or, before a `serve`, a hub whose readers hold nothing.
        """
        for seeker in self.seekers:
            seeker.tell(logging.WARNING, "%s %s, and is read from its beginning", self.name, reason)
        self._asked_at = float("-inf")
        for reading in self._readings():
            reading.start_over()

    def joined(self, seeker: Watcher) -> None:
        self._new.append(seeker)

    def left(self, seeker: Watcher) -> None:
        if (reading := self._places.pop(seeker, None)) is not None:
            reading.remove(seeker)

    async def serve(self) -> None:
        try:
            await self._admit()
            if self._end is None:
                return
            messages = await self._end.read(self, 0 if self._catching else _BLOCK)
            await self._offer(messages, self._end)
            self._end.offered()
            seconds = 0.0 if self._is_catching_up else _BLOCK / max(len(self._catching), 1)
            read = [await self._catch_up(key, self._end, seconds) for key in list(self._catching)]
            self._is_catching_up = any(read)
        except BaseException:
            for reading in self._readings():
                reading.disconnected()
            raise

    def _readings(self) -> Iterator[_Reading[_P]]:
        yield from self._catching.values()
        if self._end is not None:
            yield self._end

    async def _admit(self) -> None:
        """Have those who are new read for."""
        if new := [watcher for watcher in self._new if not watcher.done]:
            if late := [watcher for watcher in new if self._end is None or watcher.since < self._end.since]:
                await self._warn(late)
            # Not before: whatever fails is tried again. Others may have come, and some of these have left.
            admitted = set(new)
            self._new = [watcher for watcher in self._new if not watcher.done and watcher not in admitted]
            new = [watcher for watcher in new if not watcher.done]
            if self._end is None:
                self._end = _End(_beginning(new))
            end = self._end
            for watcher in new:
                if watcher.since < end.since:
                    self._place_late(watcher)
            await self._place_at_end([watcher for watcher in new if watcher.since >= end.since], end)
        for rank in self._late.keys() - self._catching.keys():
            if waiting := [watcher for watcher in self._late.pop(rank) if not watcher.done]:
                self._catching[rank] = _Reading(min(watcher.since for watcher in waiting))
                for watcher in waiting:
                    self._place(watcher, self._catching[rank])

    async def _warn(self, late: list[Watcher]) -> None:
        if time.monotonic() - self._asked_at > _ASK_EVERY:
            self._dropped = await self.dropped_until()
            self._asked_at = time.monotonic()
        for watcher in late:
            if (dropped := self._dropped) is not None and watcher.since < dropped:
                watcher.tell(
                    logging.WARNING,
                    "%s has dropped messages until %s, and this wait looks from %s on: its event may be gone",
                    self.name,
                    dropped.isoformat(timespec="seconds"),
                    watcher.since.isoformat(timespec="seconds"),
                )

    def _place(self, watcher: Watcher, reading: _Reading[_P]) -> None:
        self.left(watcher)
        reading.add(watcher)
        self._places[watcher] = reading

    def _place_late(self, watcher: Watcher) -> None:
        rank = _rank(datetime.now(timezone.utc) - watcher.since)
        for key, reading in self._catching.items():
            if key in (rank, reading) and reading.since <= watcher.since:
                self._place(watcher, reading)
                return
        self._late.setdefault(rank, []).append(watcher)

    async def _place_at_end(self, watchers: Iterable[Watcher], end: _End[_P]) -> None:
        """Serve them at the log's end from now on; what is kept they may not have seen."""
        only = set(watchers)
        for watcher in only:
            self._place(watcher, end)
        if not only:
            return
        try:
            await self._offer(end.kept(), end, only)
        except BaseException:
            # The source was lost meanwhile: they begin as if they were new.
            for watcher in only:
                self.left(watcher)
            self._new += [watcher for watcher in only if not watcher.done]
            raise

    async def _catch_up(self, key: Hashable, end: _End[_P], seconds: float) -> bool:
        """
        Read on for those who are caught up, and let them join those at the end if they have come so far.

        Return whether there was something to read.
        """
        reading = self._catching[key]
        found = False
        if reading.watchers:
            messages = await reading.read(self, seconds)
            await self._offer(messages, reading)
            reading.offered()
            found = bool(messages)
            here, there = reading.position, end.kept_from
            has_met = here is not None and there is not None and self.reached(here, there)
            if reading.watchers and not has_met:
                if not found and seconds:
                    await self._rest(key, reading)
                return found
            await self._place_at_end(list(reading.watchers), end)
        del self._catching[key]
        await reading.close()
        return found

    async def _rest(self, key: Hashable, reading: _Reading[_P]) -> None:
        """
        Let others of its rank be caught up: the reading has read what there is, and has not met the end.

        That may begin behind whatever has been read, and is met when something new comes. Those that are at the
        same place go on as one.
        """
        self._catching[reading] = self._catching.pop(key)
        here = reading.position
        for other_key, other in list(self._catching.items()):
            there = other.position
            if other_key is not other or other is reading or here is None or there is None:
                continue
            if self.reached(here, there) and self.reached(there, here):
                for watcher in list(reading.watchers):
                    self._place(watcher, other)
                del self._catching[reading]
                await reading.close()
                return

    async def _offer(
        self, messages: list[Message], reading: _Reading[_P], only: set[Watcher] | None = None
    ) -> None:
        """Give messages to those of the reading who want them; ``only`` to these, for whom they are read again."""
        index = reading.index
        if only is not None:
            index = Index()
            for watcher in only:
                index.add(watcher, watcher.match)
        began = time.monotonic()
        for message in messages:
            if time.monotonic() - began > _LONGEST_WORK:  # let other triggers have the loop
                self.heard()  # it is not the source that takes so long
                await asyncio.sleep(0)
                began = time.monotonic()
            among = reading.watchers if only is None else only
            if message.undecodable is not None:
                self._pass_over(message, message.undecodable, list(among), again=only is not None)
                continue
            wanting: list[Watcher] = []
            try:
                wanting += index.find(message.event["value"])
                wanting = [watcher for watcher in wanting if message.timestamp >= watcher.since]
                if wanting:
                    checked(message.event, message.where)
            except EventUndecodable as error:
                self._pass_over(message, error, wanting)
            except Exception as error:  # a value that cannot be compared with what is wanted
                self._pass_over(message, unreadable(message.where, error), wanting)
            else:
                for watcher in wanting:
                    watcher.give(message.event)
        self.heard()

    def _pass_over(
        self, message: Message, error: EventUndecodable, watchers: list[Watcher], again: bool = False
    ) -> None:
        if not again:
            log.warning("%s: skipped: %s", self.name, error)
        for watcher in watchers:
            if message.timestamp >= watcher.since and watcher.on_undecodable == "fail":
                watcher.fail(error)


def _beginning(watchers: list[Watcher]) -> datetime:
    """Return from when on a log's end is read: for those who look from lately on. The others are caught up."""
    now = datetime.now(timezone.utc)
    return min((watcher.since for watcher in watchers if now - _LATELY <= watcher.since < now), default=now)


def _rank(age: timedelta) -> int:
    """
    Return who catch up together: those whose ``since`` is about as old.

    The oldest of a rank is some four times as old as the youngest, and that much more is read for it, at most. So
    none waits long for another that has far more to be read.
    """
    return max(int(age.total_seconds()), 0).bit_length() // 2


class Watch:
    """
    What a wait looks for in a log that all who watch it read by one hub: the first message that matches.

    Made while a listener works for the wait, of whose run ``since`` counts.

    :param key: of the hub, in this event loop; ``make`` makes it for the first who watches.
    :param match: see `airflow_events.listeners.support.values.Match`.
    :param since: see `since_of`.
    :raises ValueError: ``match`` or ``since`` is invalid.
    """

    __slots__ = ("key", "make", "match", "on_undecodable", "since")

    def __init__(
        self,
        key: Hashable,
        make: Callable[[], LogHub[Any]],
        match: dict[str, Any] | str | None,
        since: datetime | str | timedelta | None,
        on_undecodable: OnUndecodable,
    ) -> None:
        self.key, self.make = key, make
        self.match, self.since = Match(match), since_of(since, current_wait())
        self.on_undecodable = on_undecodable

    async def first(self) -> dict[str, Any]:
        """Return the message."""
        watcher = Watcher(self.match, self.since, self.on_undecodable)
        async with shared(self.key, self.make) as hub:
            return dict(await hub.take(watcher))


_Arguments = ParamSpec("_Arguments")
_WATCH = "watch"  # an attribute of the functions that `watches` makes


def watches(
    watch: Callable[Concatenate[Any, _Arguments], Watch],
) -> Callable[Concatenate[Any, _Arguments], Coroutine[Any, Any, dict[str, Any]]]:
    """
    Make the ``poll_for_event`` of a listener of a method that says what is looked for.

    A host asks for just that (`watch_of`), and needs no coroutine for as long as nothing is found.
    """

    @functools.wraps(watch)
    async def poll_for_event(self: Any, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> dict[str, Any]:
        return await watch(self, *args, **kwargs).first()

    vars(poll_for_event)[_WATCH] = watch
    return poll_for_event


def watch_of(listener: type[EventListener], args: Any, kwargs: Any) -> Watch | None:
    """
    Return what a poll would look for; None if only the poll itself can tell.

    :raises Exception: what the poll would raise.
    """
    watch = vars(listener.poll_for_event).get(_WATCH)
    found: Watch | None = None if watch is None else watch(listener(), *args, **kwargs)
    return found


def since_of(since: datetime | str | timedelta | None, wait: Wait) -> datetime:
    """
    Return from when on a watch looks.

    :param since: a datetime or ISO 8601, naive in the DAG's time zone; a timedelta from the creation of the
        run; None is its creation.
    :raises ValueError: the string is no moment, or the run has nothing to count from.
    """
    check_since(since)
    counted = dataclasses.replace(wait, run_start=wait.run_created or wait.run_start)
    return when(timedelta() if since is None else since, counted)
