"""
One look at a directory for all the waits on it.

A wait joins its directory's hub as a seeker. The hub scans the directory, in a thread, when there is a reason to,
compares new files with the patterns that are sought, and gives each settled file to the seeker that has waited
longest, or to all seekers that only watch. Two triggerers may give one file to a wait each: the inbox decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import functools
import importlib
import json
import logging
import math
import os
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from airflow_events import settings
from airflow_events.listeners.directory.files import Attributes, check_directory, coordinates, put_back_claims
from airflow_events.listeners.support.hub import Seeker
from airflow_events.listeners.support.queue import Delivery, LookingHub, Wanting
from airflow_events.listeners.support.shared import background

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_NETWORK_FILE_SYSTEMS = re.compile(r"nfs\d?|cifs.*|smb3?.*|smbfs|9p|ceph|lustre|glusterfs|fuse(\..*)?")
# Those that give each file a number as it is first seen: each mount another one.
_INVENTS_INODES = re.compile(r"fuse(\.(?!glusterfs|ceph|juicefs|lustre).*)?|(cifs|smb3?) \(noserverino\)")
# As /proc/self/mounts writes a blank in a name, say.
_OCTAL = re.compile(r"\\([0-7]{3})")
# Each watched directory holds one of the forty threads that anyio has for all of a process.
_MOST_WATCHED = 16
# Of each directory.
_THREADS = 2
# Seconds that a hub waits for a reason to look in one piece.
_LONGEST_SERVE = 5.0
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
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"pattern is one shell pattern for the names of files, not {pattern!r}")
        if done_marker is not None and not isinstance(done_marker, str):
            raise ValueError(f"done_marker is a file name with {{name}} in it, not {done_marker!r}")
        seconds = settle.total_seconds() if isinstance(settle, timedelta) else float(settle)
        if not seconds >= 0:
            raise ValueError(f"settle is a number of seconds of at least 0, not {settle!r}")
        if done_marker is not None and (
            "{name}" not in done_marker or "/" in done_marker or done_marker == "{name}"
        ):
            raise ValueError(f"done_marker is a file name with {{name}} in it, not {done_marker!r}")
        if "/" in pattern:
            raise ValueError(f"pattern is for names in the directory itself, not {pattern!r}")
        return cls(pattern, seconds, done_marker)

    def matching(self, names: Set[str]) -> set[str]:
        pattern = composed(self.pattern)
        if not any(special in pattern for special in "*?["):
            if pattern.isascii():
                return {pattern} & names
            return {name for name in names if composed(name) == pattern}
        matches = re.compile(fnmatch.translate(pattern)).match
        hidden = pattern.startswith(".")
        return {name for name in names if matches(composed(name)) and (hidden or not name.startswith("."))}

    def marker(self, name: str) -> str | None:
        return self.done_marker.replace("{name}", name) if self.done_marker else None


def composed(name: str) -> str:
    """Return a name with each letter and its accents as one character, as macOS, say, does not write it."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _among(names: Set[str], name: str) -> str | None:
    """Return the name as the directory has it, however that writes its accents; None if it is not there."""
    if name.isascii() or name in names:
        return name if name in names else None
    return next((each for each in names if composed(each) == composed(name)), None)


class FileSeeker(Wanting):
    """A wait for a file."""

    def __init__(self, wanted: Wanted, *, watches: bool = False) -> None:
        """:param watches: whether it leaves the file to others."""
        super().__init__(wanted)
        self.watches = watches


class File(NamedTuple):
    """A file as a look found it, and which one marks it as complete."""

    name: str
    attributes: Attributes
    marker: str | None


@dataclass(frozen=True)
class _Seen:
    """
    A file as the last looks found it.

    :param attributes: what its event is made of; ``stat`` what tells whether it has changed.
    :param since: the loop's time at which it began to look so.
    """

    attributes: Attributes
    since: float
    stat: Attributes
    is_link: bool = False


class _Scan(NamedTuple):
    """What is in a directory: the regular files, and those to which symbolic links in it lead."""

    files: dict[str, os.stat_result]
    links: dict[str, os.stat_result]


class DirectoryHub(LookingHub):
    """
    Looks at one directory for all the waits on it in this triggerer.

    It looks when the file system reports a change (inotify, by watchfiles), when a file will have settled,
    and every ``[events] directory_rescan_interval`` seconds. It has threads of its own, so that a file system that
    hangs holds up nobody else.
    """

    _watched: ClassVar[int] = 0

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[str, _Seen] = {}
        # Names of files that were moved since the last look: what looks like one of them may be the next.
        self._doubted: set[str] = set()
        self._network: str | None = None  # the type of its file system, if that is one
        self._invents_inodes = False
        # What matches and was not given yet, so that a look compares only new files with old patterns.
        self._candidates: dict[Wanted, set[str]] = {}
        self._look = asyncio.Event()
        self._next_look = 0.0
        self._ended: asyncio.Event | None = None
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"events-{root.name}")
        super().__init__(f"the directory {root}")

    async def on_disk(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Do what may block in a thread of this directory's."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def connect(self) -> None:
        await self.on_disk(check_directory, self._root)
        await self.on_disk(put_back_claims, self._root)
        self._network = await self.on_disk(_network_file_system, self._root)
        self._invents_inodes = self._network is not None and bool(_INVENTS_INODES.fullmatch(self._network))
        self._ended = asyncio.Event()
        background(self._listen(self._ended), f"changes of {self._root}")
        self._next_look = 0.0

    async def disconnect(self) -> None:
        if self._ended is not None:
            self._ended.set()  # the watcher's thread sees it at once, and not that its task is cancelled

    async def close(self) -> None:
        await super().close()
        self._threads.shutdown(wait=False)

    def look_again(self) -> None:
        self._look.set()

    def left(self, seeker: Seeker) -> None:
        assert isinstance(seeker, FileSeeker)
        super().left(seeker)
        if seeker.wanted not in self.waiting:
            self._candidates.pop(seeker.wanted, None)

    def forget(self, id: str) -> None:
        super().forget(id)
        self._doubted.add(json.loads(id)[1])

    async def lag(self, seeker: Seeker) -> int | None:
        assert isinstance(seeker, FileSeeker)
        return await self.on_disk(_count, self._root, seeker.wanted)

    async def acknowledge(self, deliveries: Mapping[str, Delivery]) -> None:
        """Nothing: `files.commit` moves a file by what its event says."""

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._look.is_set() and (pause := self._next_look - loop.time()) > 0:
            await self._changes(min(pause, _LONGEST_SERVE))
            return
        self._look.clear()
        began = loop.time()
        doubted, self._doubted = self._doubted, set()
        found = await self.on_disk(_scan, self._root)
        candidates = await self.on_disk(self._match, list(self.waiting), found, doubted, began)
        settles_in = self._hand_out(candidates, found.files.keys() | found.links.keys())
        looked = loop.time() - began
        self._next_look = loop.time() + min(settles_in, settings.directory_rescan_interval())
        # What comes at once is looked at once, and thousands of patterns leave others the interpreter, too.
        await asyncio.sleep(min(max(_SHORTEST_PAUSE, looked), _LONGEST_PAUSE))

    async def _changes(self, seconds: float) -> None:
        """Wait until there is a reason to look, but not for longer."""
        look = asyncio.ensure_future(self._look.wait())
        try:
            await asyncio.wait({look}, timeout=seconds)
        finally:
            look.cancel()

    def _match(
        self, patterns: list[Wanted], found: _Scan, doubted: set[str], now: float
    ) -> dict[Wanted, set[str]]:
        """Note what was found, and return what of it the patterns match; to be called in a thread."""
        before, self._seen = self._seen, {}
        for name in doubted:
            before.pop(name, None)
        for name, stat in found.files.items():
            seen = before.get(name)
            if seen is not None and seen.stat == Attributes.of(stat):
                self._seen[name] = seen
            elif (attributes := self._attributes_of(name)) is not None:
                self._seen[name] = _Seen(self._as_told(attributes), now, attributes._replace(born=None))
        for name, stat in found.links.items():
            seen, attributes = before.get(name), Attributes.of(stat)
            if seen is None or not seen.is_link or seen.stat != attributes:
                seen = _Seen(attributes, now, attributes, is_link=True)
            self._seen[name] = seen
        fresh = self._seen.keys() - before.keys()
        self._candidates = {
            wanted: (self._candidates[wanted] & self._seen.keys()) | wanted.matching(fresh)
            if wanted in self._candidates
            else wanted.matching(self._seen.keys())
            for wanted in patterns
        }
        return {wanted: names for wanted, names in self._candidates.items() if names}

    def _attributes_of(self, name: str) -> Attributes | None:
        """Return those of a file; None if there is none."""
        try:
            return Attributes.at(self._root / name)
        except OSError as error:
            _warn_of_file(str(self._root / name), str(error))
            return None

    def _as_told(self, attributes: Attributes) -> Attributes:
        """Return them such that each machine finds the same."""
        if self._invents_inodes:
            return attributes.without_inode()
        # Whether a network file system tells it, depends on the machine's kernel.
        return attributes if self._network is None else attributes._replace(born=None)

    def _hand_out(self, candidates: Mapping[Wanted, set[str]], files: Set[str]) -> float:
        """Give settled files to waits, and return for how many seconds nothing more will have settled."""
        now = asyncio.get_running_loop().time()
        settle_in = math.inf
        for wanted, names in candidates.items():
            seekers = [seeker for seeker in self.waiting.get(wanted, ()) if not seeker.done]
            watchers = [seeker for seeker in seekers if seeker.watches]
            consumers = deque(seeker for seeker in seekers if not seeker.watches)
            for name in sorted(names, key=lambda name: (self._seen[name].attributes.modified, name)):
                if not watchers and not consumers:
                    break
                marker = wanted.marker(name)
                if marker and (marker := _among(files, marker)) is None:
                    continue
                seen = self._seen[name]
                if (settles_in := seen.since + wanted.settle - now) > 0:
                    settle_in = min(settle_in, settles_in)
                else:
                    file = File(name, seen.attributes, marker)
                    while watchers:
                        watchers.pop().give(file)
                    id = coordinates(str(self._root), name, seen.attributes.identity)
                    if seen.is_link:  # a commit would move the link, and leave the file
                        _warn_of_link(str(self._root / name))
                    elif consumers and (delivery := self.hold(id, file)) is not None:
                        consumers.popleft().give(delivery)
        return settle_in

    async def _listen(self, ended: asyncio.Event) -> None:
        # In a thread the first time, since it reads many files.
        await asyncio.to_thread(importlib.import_module, "watchfiles")
        import watchfiles

        if self._network is not None:
            log.info("%s is on %s, which reports no changes: polling", self._root, self._network)
            return
        if DirectoryHub._watched >= _MOST_WATCHED:
            log.info("%s: more than %d directories are watched already: polling", self._root, _MOST_WATCHED)
            return
        root = str(self._root)
        DirectoryHub._watched += 1
        try:
            async for _ in watchfiles.awatch(
                self._root,
                recursive=False,
                stop_event=ended,
                watch_filter=lambda change, path: (
                    change is not watchfiles.Change.deleted and os.path.dirname(path) == root
                ),
            ):
                self._look.set()
        except Exception as error:
            log.warning("Changes of %s cannot be watched (%s): polling instead", self._root, error)
        finally:
            DirectoryHub._watched -= 1


def _scan(root: Path) -> _Scan:
    found = _Scan({}, {})
    with os.scandir(root) as entries:
        for entry in entries:
            try:
                if entry.is_file() and _is_unicode(entry):
                    (found.links if entry.is_symlink() else found.files)[entry.name] = entry.stat()
            except FileNotFoundError:
                pass
            except OSError as error:  # of this file alone
                _warn_of_file(entry.path, str(error))
    return found


def _count(root: Path, wanted: Wanted) -> int:
    return len(wanted.matching(_scan(root).files.keys()))


def _is_unicode(entry: os.DirEntry[str]) -> bool:
    """Whether a file's name can be told to Airflow; one that cannot is left where it is."""
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        _warn_of_name(entry.path)
        return False
    return True


@functools.lru_cache(maxsize=1000)
def _warn_of_file(path: str, error: str) -> None:
    log.warning("%s is skipped: %s", path, error)


@functools.lru_cache(maxsize=1000)
def _warn_of_link(path: str) -> None:
    log.warning("%s is a symbolic link: watches see it, and no wait takes it, since its file would stay", path)


@functools.lru_cache(maxsize=1000)
def _warn_of_name(path: str) -> None:
    log.warning("%r is skipped: its name is no valid Unicode", path)


def _network_file_system(root: Path) -> str | None:
    """Return the type of the network file system on which ``root`` is, or None."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/mounts").read_text().splitlines()
        mounts = [[_OCTAL.sub(lambda code: chr(int(code[1], 8)), part) for part in line.split()] for line in lines]
        real = os.path.realpath(root)
        over = [m for m in mounts if real == m[1] or real.startswith(m[1].rstrip("/") + "/")]
        # Of several at one place the last counts: that which automount has made over its own.
        _, _, kind, options, *_ = max(reversed(over), key=lambda m: len(m[1]))
        if "noserverino" in options.split(","):
            kind += " (noserverino)"
        if _NETWORK_FILE_SYSTEMS.fullmatch(kind):
            return kind
    return None
