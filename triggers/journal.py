"""
The records of a task that waits for many events: a log in Airflow's database, of pages that are only added to.

What Airflow offers is values by name, without a compare-and-set and, to a trigger, without a list of the names.
Two triggerers may run one trigger at once, so what one writes must not hide what another has written:

- Each process writes pages of its own, under the name of its *slot*, and no other process ever writes them.
- A page is written again while it is the last one, with more entries, and never after that.
- A slot is taken, and the slots of others are found, by reading and writing values alone: see `_Slots`.

So an entry that is written stays, whoever else writes, and whoever reads after it was written finds it. As each
page is a request to Airflow, what comes at once is written at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

from airflow_events.listeners import serde
from airflow_events.listeners.commit import Phase, Record

LOG_KEY = "event_log"
# Under it is what the last writer wrote that joined.
_NEWEST = f"{LOG_KEY}:newest"

# A page is full when it has so many entries, or so many characters of JSON; it is not written again then.
_LONGEST_PAGE = 400
_LARGEST_PAGE = 100_000
# How many of those who wait for the journal go on in one turn of the event loop.
_AT_ONCE = 50
# Seconds for which others are waited for, when many came at once before.
_TOGETHER = 0.05

Slot = tuple[int, int]


class Pages(Protocol):
    """Values by name, in Airflow's database."""

    async def get(self, name: str) -> Any:
        """Return a value, or None if there is none."""

    async def set(self, name: str, value: Any) -> None:
        """Store a value, durably."""


@dataclass(frozen=True)
class Entry:
    """
    One line of the log.

    :param index: of the event.
    :param call: the digest of the arguments that it was waited for with.
    :param record: what was recorded; None in a line that says what became of an earlier one.
    :param committed: the id of the record that was committed.
    :param lost: the id of the record whose event the source gave to another wait.
    """

    index: int
    call: str
    record: Record | None = None
    committed: str | None = None
    lost: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Write the entry as it is stored."""
        told = {"record": self.record and self.record.as_dict(), "committed": self.committed, "lost": self.lost}
        return {"index": self.index, "call": self.call, **{k: v for k, v in told.items() if v is not None}}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Entry:
        """Read what `as_dict` wrote."""
        record = stored.get("record")
        return cls(
            stored["index"],
            stored["call"],
            Record.from_dict(record) if record else None,
            stored.get("committed"),
            stored.get("lost"),
        )


class Records:
    """
    What a log says: the record of each event.

    It says the same in whatever order the entries of several slots are read.
    """

    def __init__(self) -> None:
        self._records: dict[int, dict[str, tuple[str, Record]]] = {}
        self._ids: set[str] = set()
        self._open: set[str] = set()  # those recorded and not committed, as first read
        self._committed: set[str] = set()
        self._lost: set[str] = set()
        self._lost_at: dict[int, set[str]] = {}

    def add(self, entry: Entry) -> None:
        """Take an entry in."""
        if entry.record is not None:
            self._ids.add(entry.record.id)
            if entry.record.phase is Phase.RECORDED:
                self._open.add(entry.record.id)
            self._records.setdefault(entry.index, {}).setdefault(entry.record.id, (entry.call, entry.record))
        if entry.committed is not None:
            self._committed.add(entry.committed)
        if entry.lost is not None:
            self._lost.add(entry.lost)
            self._lost_at.setdefault(entry.index, set()).add(entry.lost)

    def after(self, index: int) -> str:
        """Name what an event has lost by now, in another way after each loss; empty if it has lost nothing."""
        lost = self._lost_at.get(index)
        return hashlib.sha256("".join(sorted(lost)).encode()).hexdigest() if lost else ""

    def __iter__(self) -> Iterator[int]:
        """Go through the indexes of which something is recorded."""
        return (index for index in list(self._records) if self.of(index) is not None)

    def of(self, index: int, call: str | None = None) -> Record | None:
        """
        Return the record of an event, or None if nothing is recorded, or all of that was lost.

        :param call: only if it was waited for with these arguments; None is any.
        """
        found = min(
            (self._rank(record) for told, record in self._valid(index) if call is None or told == call),
            key=lambda ranked: ranked[0],
            default=None,
        )
        return found[1] if found else None

    @property
    def uncommitted(self) -> int:
        """Count what is recorded and neither committed nor lost."""
        return len(self._open - self._committed - self._lost)

    def calls(self, index: int) -> set[str]:
        """Return the digests of the arguments with which an event was waited for that is recorded."""
        return {call for call, _ in self._valid(index)}

    def has(self, id: str) -> bool:
        """Whether the record of this id is known."""
        return id in self._ids

    def _valid(self, index: int) -> list[tuple[str, Record]]:
        found = self._records.get(index, {}).items()
        return [told for id, told in found if id in self._committed or id not in self._lost]

    def _rank(self, record: Record) -> tuple[tuple[bool, str, str], Record]:
        if record.id in self._committed:
            record = record.committed()
        return (record.phase is not Phase.COMMITTED, record.recorded_at, record.id), record


class Journal:
    """
    The log as one process reads and writes it.

    :param check: called before what others wrote is read, and so before anything is recorded; what it raises,
        those get who wanted to record.
    """

    def __init__(self, pages: Pages, check: Callable[[], Awaitable[None]] | None = None) -> None:
        self.records = Records()
        self._pages = pages
        self._check = check
        self._slots = _Slots(pages)
        self._mine: _Log | None = None
        self._newest: Any = None
        self._others: dict[Slot, _Log] = {}
        self._readers: list[asyncio.Future[None]] = []
        self._writers: list[tuple[Entry, asyncio.Future[None]]] = []
        self._work: asyncio.Task[None] | None = None
        self._is_busy = False

    async def read(self) -> None:
        """Read what is in the log by now."""
        future = asyncio.get_running_loop().create_future()
        self._readers.append(future)
        self._go_on()
        await future

    async def write(self, entry: Entry) -> None:
        """Add an entry, durably."""
        future = asyncio.get_running_loop().create_future()
        self._writers.append((entry, future))
        self._go_on()
        await future

    def _go_on(self) -> None:
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while self._readers or self._writers:
            if self._is_busy:
                await asyncio.sleep(_TOGETHER)
            readers, self._readers = self._readers, []
            writers, self._writers = self._writers, []
            waiting = [*readers, *(future for _, future in writers)]
            self._is_busy = len(waiting) >= _AT_ONCE // 2
            try:
                if readers:
                    if self._check is not None:
                        await self._check()
                    await self._collect()
                if writers:
                    await self._append([entry for entry, _ in writers])
            except asyncio.CancelledError:
                for future in waiting:
                    future.cancel()
                raise
            except Exception as error:
                for future in waiting:
                    if not future.done():
                        future.set_exception(error)
                continue
            for number, future in enumerate(waiting):
                if not future.done():
                    future.set_result(None)
                if number % _AT_ONCE == _AT_ONCE - 1:  # each of them has something to do
                    await asyncio.sleep(0)

    async def _collect(self) -> None:
        # Each writer says that it is there after it has its slot, and before it writes. So while the last word is
        # the one after which all slots were looked for, none is missing here.
        newest = await self._pages.get(_NEWEST)
        if newest != self._newest:
            mine = {self._mine.slot} if self._mine else set()
            async for slot in self._slots.taken(known=mine | self._others.keys()):
                if slot not in mine:
                    self._others.setdefault(slot, _Log(self._pages, slot))
            self._newest = newest
        for log in self._others.values():
            async for entries in log.read():
                for entry in entries:
                    self.records.add(entry)

    async def _append(self, entries: list[Entry]) -> None:
        if self._mine is None:
            slot = await self._slots.take()
            await self._pages.set(_NEWEST, uuid.uuid4().hex)
            self._mine = _Log(self._pages, slot)
        await self._mine.append(entries)
        for entry in entries:
            self.records.add(entry)


@dataclass(frozen=True)
class EventRecord:
    """
    The record of one of the events: what `airflow_events.listeners.commit.settle` writes to.

    :param renames: whether an event is polled in the name that the losses in the journal give it.
    """

    journal: Journal
    index: int
    call: str
    renames: bool = True

    @property
    def after(self) -> str:
        return self.journal.records.after(self.index) if self.renames else ""

    async def read(self) -> Record | None:
        await self.journal.read()
        return self.journal.records.of(self.index, self.call)

    async def write(self, record: Record) -> None:
        if record.phase is Phase.COMMITTED and self.journal.records.has(record.id):
            entry = Entry(self.index, self.call, committed=record.id)
        else:
            entry = Entry(self.index, self.call, record)
        await self.journal.write(entry)

    async def drop(self, record: Record) -> None:
        await self.journal.write(Entry(self.index, self.call, lost=record.id))


@dataclass
class _Log:
    """The pages of one slot, as its writer has them or a reader has read them."""

    pages: Pages
    slot: Slot
    _number: int = 0  # of the last page
    _last: list[dict[str, Any]] = field(default_factory=list)
    _size: int = 0
    _unsaved: bool = False

    async def read(self) -> AsyncIterator[list[Entry]]:
        """Go, page by page, through what has been added since this was called last."""
        is_full = True
        while is_full and (page := await self.pages.get(page_name(self.slot, self._number))) is not None:
            new = page["entries"][len(self._last) :]
            self._last, is_full = page["entries"], page["full"]
            if is_full:
                self._number, self._last = self._number + 1, []
            yield [Entry.from_dict(stored) for stored in new]

    async def append(self, entries: list[Entry]) -> None:
        """Add entries, in order, so that no page is there before the one ahead of it."""
        for entry in entries:
            if self._is_full:
                await self._save()
                self._number, self._last, self._size = self._number + 1, [], 0
            stored = entry.as_dict()
            self._last.append(stored)
            self._size += len(serde.encode(stored))
            self._unsaved = True
        await self._save()

    @property
    def _is_full(self) -> bool:
        return len(self._last) >= _LONGEST_PAGE or self._size >= _LARGEST_PAGE

    async def _save(self) -> None:
        if self._unsaved:
            page = {"full": self._is_full, "entries": list(self._last)}
            await self.pages.set(page_name(self.slot, self._number), page)
            self._unsaved = False


class _Slots:
    """
    Slots for whoever wants to write, each taken by one process only, without a compare-and-set.

    They are a grid of splitters (M. Moir, J. H. Anderson, "Wait-free algorithms for fast, long-lived renaming",
    1995). At most one process stops at a splitter: of two that are at one at once, at least one sees the other's
    name in it, or that it is closed, and goes on to the right or down.
    A process that stops, and then dies, has used its slot up; those that come after it go on to the right.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    async def take(self) -> Slot:
        """Take a slot that nobody has, or ever had."""
        me, right, down = uuid.uuid4().hex, 0, 0
        while True:
            slot = (right, down)
            await self._pages.set(_name(slot, "last"), me)
            if await self._pages.get(_name(slot, "closed")):
                right += 1
                continue
            await self._pages.set(_name(slot, "closed"), True)
            if await self._pages.get(_name(slot, "last")) == me:
                return slot
            down += 1

    async def taken(self, known: Set[Slot]) -> AsyncIterator[Slot]:
        """
        Go through all the slots that may have been taken by now.

        Whoever went past a splitter found it closed, or closed it; so behind an open one there is nobody.

        :param known: those that are closed, as far as is known.
        """
        seen: set[Slot] = set()
        ahead = [(0, 0)]
        while ahead:
            slot = ahead.pop()
            if slot in seen:
                continue
            seen.add(slot)
            if slot in known or await self._pages.get(_name(slot, "closed")):
                yield slot
                ahead += [(slot[0] + 1, slot[1]), (slot[0], slot[1] + 1)]


def _name(slot: Slot, what: str) -> str:
    return f"{LOG_KEY}:{slot[0]}.{slot[1]}:{what}"


def page_name(slot: Slot, number: int) -> str:
    """Return the name of a page of a slot."""
    return _name(slot, str(number))


def is_page(name: str) -> bool:
    """Whether a value's name is that of a page."""
    return name.startswith(f"{LOG_KEY}:") and name.rpartition(":")[2].isdecimal()
