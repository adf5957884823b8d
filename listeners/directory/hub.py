"""
One look at a directory for all the waits on it.

A wait joins its directory's hub as a seeker. The hub scans the directory, in a thread, when there is a reason to,
compares new files with the patterns that are sought, and gives each settled file to the seeker that has waited
longest, whose claim it makes, or to all seekers that only watch.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import functools
import importlib
import logging
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

from airflow_events import settings
from airflow_events.listeners.directory.claims import Drops, identity_of
from airflow_events.listeners.shared import background
from airflow_events.listeners.turns import Turns

log = logging.getLogger(__name__)

_NETWORK_FILE_SYSTEMS = re.compile(r"nfs\d?|cifs|smb3?|smbfs|9p|ceph|lustre|glusterfs|fuse\..*")
# Each watched directory holds one of the forty threads that anyio has for all of a process.
_MOST_WATCHED = 16
# How many waits are given a file in one turn of the event loop.
_AT_ONCE = 50
# Seconds.
_SWEEP_INTERVAL = 60.0
# Seconds after a look until the next: as long as the look took, between these.
_SHORTEST_PAUSE = 0.02
_LONGEST_PAUSE = 0.2


@dataclass(frozen=True)
class Wanted:
    """Which files a wait wants, and when it takes them for complete."""

    pattern: str
    settle: float
    done_marker: str | None

    @classmethod
    def of(cls, pattern: str, settle: float | timedelta, done_marker: str | None) -> Wanted:
        seconds = settle.total_seconds() if isinstance(settle, timedelta) else float(settle)
        if seconds < 0:
            raise ValueError(f"settle is a number of seconds of at least 0, not {settle!r}")
        if done_marker is not None and (
            "{name}" not in done_marker or "/" in done_marker or done_marker == "{name}"
        ):
            raise ValueError(f"done_marker is a file name with {{name}} in it, not {done_marker!r}")
        if "/" in pattern:
            raise ValueError(f"pattern is for names in the directory itself, not {pattern!r}")
        return cls(pattern, seconds, done_marker)

    def matching(self, names: Set[str]) -> set[str]:
        if not any(special in self.pattern for special in "*?["):
            return {self.pattern} if self.pattern in names else set()
        matches = re.compile(fnmatch.translate(self.pattern)).match
        hidden = self.pattern.startswith(".")
        return {name for name in names if matches(name) and (hidden or not name.startswith("."))}

    def marker(self, name: str) -> str | None:
        return self.done_marker.replace("{name}", name) if self.done_marker else None


@dataclass(eq=False)
class Seeker:
    """One wait for a file; without drops and key it only watches."""

    wanted: Wanted
    drops: Drops | None = None
    key: str = ""
    found: asyncio.Future[tuple[Path, os.stat_result]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


@dataclass(frozen=True)
class _Seen:
    """A file as the last looks found it; ``since`` is the loop's time at which it began to look so."""

    stat: os.stat_result
    identity: str
    since: float


class Hub:
    """
    Looks at one directory for all the waits on it in this triggerer.

    It looks when the file system reports a change (inotify, by watchfiles), when a file will have settled,
    and every ``[events] directory_rescan_interval`` seconds.
    """

    _watched: ClassVar[int] = 0
    _swept: ClassVar[dict[Path, float]] = {}

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seekers: dict[Wanted, deque[Seeker]] = {}
        self._seen: dict[str, _Seen] = {}
        # What matches and was not given yet, so that a look compares only new files with old patterns.
        self._candidates: dict[Wanted, set[str]] = {}
        self._look = asyncio.Event()
        self._closed = asyncio.Event()
        self._claiming = asyncio.Lock()
        self._turns = Turns(_AT_ONCE)
        # Kept over hubs, which may be short-lived; the first time later, when waits have their claims again.
        self._swept.setdefault(root, time.monotonic())
        self._server = background(self._serve(), f"directory {root}")
        self._watcher = background(self._listen(), f"changes of {root}")

    async def close(self) -> None:
        self._closed.set()  # the watcher's thread sees it at once, and not that its task is cancelled
        self._server.cancel()
        await asyncio.gather(self._server, self._watcher, return_exceptions=True)

    async def take(self, seeker: Seeker) -> tuple[Path, os.stat_result]:
        """Return a file for the seeker. Cancelled, it may leave a claim, which is the wait's."""
        if self._server.done():
            self._server.result()
        self._seekers.setdefault(seeker.wanted, deque()).append(seeker)
        self._look.set()
        try:
            return await seeker.found
        finally:
            async with self._claiming:  # so that a claim in this wait's name is made by now, or never
                if seeker in (waiting := self._seekers.get(seeker.wanted, deque())):
                    waiting.remove(seeker)

    async def _listen(self) -> None:
        # In a thread the first time, since it reads many files.
        await asyncio.to_thread(importlib.import_module, "watchfiles")
        import watchfiles

        if kind := await asyncio.to_thread(_network_file_system, self._root):
            log.info("%s is on %s, which reports no changes: polling", self._root, kind)
            return
        if Hub._watched >= _MOST_WATCHED:
            log.info("%s: more than %d directories are watched already: polling", self._root, _MOST_WATCHED)
            return
        root = str(self._root)
        Hub._watched += 1
        try:
            async for _ in watchfiles.awatch(
                self._root,
                recursive=False,
                stop_event=self._closed,
                watch_filter=lambda change, path: (
                    change is not watchfiles.Change.deleted and os.path.dirname(path) == root
                ),
            ):
                self._look.set()
        except Exception as error:
            log.warning("Changes of %s cannot be watched (%s): polling instead", self._root, error)
        finally:
            Hub._watched -= 1

    async def _serve(self) -> None:
        while True:
            self._look.clear()
            began = time.monotonic()
            try:
                files = await asyncio.to_thread(_scan, self._root)
                next_look = await self._hand_out(files)
                if time.monotonic() - self._swept[self._root] > _SWEEP_INTERVAL:
                    self._swept[self._root] = time.monotonic()
                    await asyncio.to_thread(self._sweep)
            except OSError as error:
                log.warning("%s cannot be looked at, which is tried again: %s", self._root, error)
                next_look = settings.directory_rescan_interval()
            except Exception as error:  # a fault of this code: better failed waits than waits that hang
                for seeker in [seeker for seekers in self._seekers.values() for seeker in seekers]:
                    if not seeker.found.done():
                        seeker.found.set_exception(error)
                raise
            looked = time.monotonic() - began
            # Not asyncio.wait_for, which before Python 3.12 may swallow the cancellation.
            alarm = asyncio.get_running_loop().call_later(next_look, self._look.set)
            await self._look.wait()
            alarm.cancel()
            # What comes at once is looked at once, and thousands of patterns leave others the interpreter, too.
            await asyncio.sleep(min(max(_SHORTEST_PAUSE, looked), _LONGEST_PAUSE))

    def _sweep(self) -> None:
        Drops.of(str(self._root), None).sweep(time.time() - settings.directory_claim_timeout())

    async def _hand_out(self, files: dict[str, os.stat_result]) -> float:
        """Give settled files to waits, and return for how many seconds nothing more will have settled."""
        now = asyncio.get_running_loop().time()
        candidates = await asyncio.to_thread(self._match, list(self._seekers), files, now)
        next_look = settings.directory_rescan_interval()
        for wanted, names in candidates.items():
            names = names & self._seen.keys()  # another pattern's wait may have got one just now
            for name in sorted(names, key=lambda name: (self._seen[name].stat.st_mtime_ns, name)):
                seekers = self._seekers[wanted]
                if not seekers:
                    break
                marker = wanted.marker(name)
                if marker and marker not in files:
                    continue
                if (settles_in := self._seen[name].since + wanted.settle - now) > 0:
                    next_look = min(next_look, settles_in)
                    continue
                await self._give(name, self._seen[name], seekers, marker)
        for wanted in [wanted for wanted, seekers in self._seekers.items() if not seekers]:
            del self._seekers[wanted]
            self._candidates.pop(wanted, None)
        return next_look

    def _match(
        self, patterns: list[Wanted], files: dict[str, os.stat_result], now: float
    ) -> dict[Wanted, set[str]]:
        """Note what was found, and return what of it the patterns match; to be called in a thread."""
        before, self._seen = self._seen, {}
        for name, stat in files.items():
            seen, identity = before.get(name), identity_of(stat)
            self._seen[name] = seen if seen and seen.identity == identity else _Seen(stat, identity, now)
        fresh = files.keys() - before.keys()
        self._candidates = {
            wanted: (self._candidates[wanted] & self._seen.keys()) | wanted.matching(fresh)
            if wanted in self._candidates
            else wanted.matching(self._seen.keys())
            for wanted in patterns
        }
        return {wanted: names for wanted, names in self._candidates.items() if names}

    async def _give(self, name: str, seen: _Seen, seekers: deque[Seeker], marker: str | None) -> None:
        """Give one file: to every watcher, and to the consumer that has waited longest."""
        for seeker in [s for s in seekers if s.drops is None and not s.found.done()]:
            await self._turns.take()
            if not seeker.found.done():  # nor has gone meanwhile
                seeker.found.set_result((self._root / name, seen.stat))
        async with self._claiming:
            for seeker in seekers:
                if seeker.drops and not seeker.found.done():
                    await self._claim(seeker.drops, seeker, name, seen, marker)
                    break
        for seeker in [s for s in seekers if s.found.done()]:
            seekers.remove(seeker)

    async def _claim(self, drops: Drops, seeker: Seeker, name: str, seen: _Seen, marker: str | None) -> None:
        try:
            claim = await asyncio.to_thread(drops.claim, seeker.key, name, seen.identity, marker)
        except OSError as error:
            if not seeker.found.done():
                seeker.found.set_exception(error)  # no permission, say: for the log of that wait's task
            return
        self._seen.pop(name, None)  # gone, to this wait or to somebody else
        if claim and not seeker.found.done():
            seeker.found.set_result((claim, seen.stat))


def _scan(root: Path) -> dict[str, os.stat_result]:
    def regular_files() -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(root) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False) and _is_unicode(entry):
                        yield entry.name, entry.stat(follow_symlinks=False)

    return dict(regular_files())


def _is_unicode(entry: os.DirEntry[str]) -> bool:
    """Whether a file's name can be told to Airflow; one that cannot is left where it is."""
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        _warn_of_name(entry.path)
        return False
    return True


@functools.lru_cache(maxsize=1000)
def _warn_of_name(path: str) -> None:
    log.warning("%r is passed over: its name is no valid Unicode", path)


def _network_file_system(root: Path) -> str | None:
    """Return the type of the network file system on which ``root`` is, or None."""
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        real = os.path.realpath(root)
        over = [m for m in mounts if real == m[1] or real.startswith(m[1].rstrip("/") + "/")]
        if over and _NETWORK_FILE_SYSTEMS.fullmatch(kind := max(over, key=lambda m: len(m[1]))[2]):
            return kind
    return None
