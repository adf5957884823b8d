"""
Files that are dropped into a directory, without any server.

Consuming moves a file, by renames alone, each of which one of several contenders wins:

    drops/orders.csv
    drops/.airflow-events/staging/<wait>.<random>/<id>/orders.csv   taken away from other waits
    drops/.airflow-events/claims/<wait>/<id>/orders.csv             the wait's one claim
    drops/.airflow-events/archive/<wait>/<id>/orders.csv            committed

A rename of a directory onto one that is not empty is refused, so a wait has one claim, also if two
triggerers run it. ``<id>`` is the file's identity, so a commit moves this very event or nothing. An
archive entry stays, empty if the file was to be deleted: it is the source's memory of who committed
what. A claim that was not committed for ``[events] directory_claim_timeout`` seconds goes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fnmatch
import hashlib
import logging
import os
import re
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar, Literal

from airflow_events import settings
from airflow_events.errors import EventLost
from airflow_events.listeners.base import EventListener, Wait, current_wait
from airflow_events.listeners.shared import background, shared

log = logging.getLogger(__name__)

_OURS = ".airflow-events"
_RELEASED = "released"
_NETWORK_FILE_SYSTEMS = re.compile(r"nfs\d?|cifs|smb3?|smbfs|9p|ceph|lustre|glusterfs|fuse\..*")
# Each watched directory holds one of the forty threads that anyio has for all of a process.
_MOST_WATCHED = 16


class DirectoryListener(EventListener):
    """
    Take a file out of a directory: each file goes to one wait, exactly once.

    The directory must be the same for all triggerers and workers, on one file system. The event says where
    the file will be from the commit on, so downstream tasks open ``event["path"]``:

    ``{"name", "path", "directory", "size", "modified", "id"}``; ``size`` in bytes, ``modified`` a datetime
    in UTC, ``path`` None if the file is deleted, ``id`` an identity that survives every rename.
    """

    repeatable_poll: ClassVar[bool] = True

    async def poll_for_event(
        self,
        directory: str,
        pattern: str = "*",
        *,
        settle: float | timedelta = 1.0,
        done_marker: str | None = None,
        on_commit: Literal["archive", "delete"] = "archive",
        archive: str | None = None,
    ) -> dict[str, Any]:
        """
        Return when a file is there that no other wait has claimed, the one changed longest ago first.

        :param directory: must exist; if relative, below ``[events] directory_root``.
        :param pattern: a shell pattern for the file's name; files in subdirectories are not looked at,
            nor hidden ones unless the pattern begins with a dot.
        :param settle: seconds for which size and modification time must not have changed. 0 is for
            producers that rename finished files into the directory.
        :param done_marker: a name with ``{name}`` in it, such as ``{name}.done``; the file is taken when
            this other file exists beside it. It is moved with the file. None means no marker.
        :param on_commit: what the commit does with the file.
        :param archive: where committed files go, if relative below ``directory``; must be on the same file
            system. None means ``.airflow-events/archive``.
        :raises FileNotFoundError: the directory is not there.
        :raises ValueError: an argument will not do; the message says which.
        """
        drops = _Drops.of(directory, archive)
        drops.prepare()
        if on_commit not in ("archive", "delete"):
            raise ValueError(f"on_commit is 'archive' or 'delete', not {on_commit!r}")
        key = _key(current_wait())
        wanted = _Wanted.of(pattern, settle, done_marker)
        while True:
            claim = await asyncio.to_thread(drops.held, key)
            if claim is None:
                async with shared(("directory", drops.root), lambda: _Hub(drops.root)) as hub:
                    claim = (await hub.take(_Seeker(wanted, drops, key)))[0]
            with contextlib.suppress(FileNotFoundError):  # taken away again: the claim lapsed
                event = _describe(claim, claim.stat(), claim.parent.name, drops.root)
                break
        event["path"] = None if on_commit == "delete" else str(drops.archive / key / event["id"] / event["name"])
        return event

    async def event_checkpointed(self, event: Any) -> None:
        """Move the claimed file to the archive, under the wait's name."""
        key = _key(current_wait())
        await asyncio.to_thread(_Drops.of_event(event).commit, key, event["id"], event["path"] is None)

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Put the claimed file back."""
        drops = _Drops.of(args[0] if args else kwargs["directory"], None)
        await asyncio.to_thread(drops.release, _key(current_wait()))


class DirectoryWatchListener(EventListener):
    """
    Wait until a file that matches is there, and leave it where it is.

    The event is as of `DirectoryListener`, with ``path`` where the file lies.
    """

    async def poll_for_event(
        self,
        directory: str,
        pattern: str = "*",
        *,
        settle: float | timedelta = 1.0,
        done_marker: str | None = None,
    ) -> dict[str, Any]:
        """Return when a file is there; parameters and errors as of `DirectoryListener.poll_for_event`."""
        drops = _Drops.of(directory, None)
        drops.check()
        async with shared(("directory", drops.root), lambda: _Hub(drops.root)) as hub:
            file, stat = await hub.take(_Seeker(_Wanted.of(pattern, settle, done_marker)))
        return _describe(file, stat, _identity(stat), drops.root)


def _key(wait: Wait) -> str:
    """
    Name a wait's folders: readable, and unique by the digest.

    Frozen, since claims and archive entries are found by it.
    """
    readable = re.sub(r"[^\w.-]", "_", f"{wait.dag_id[:60]}.{wait.task_id[:60]}")
    return f"{readable}.{hashlib.sha256(wait.id.encode()).hexdigest()[:20]}"


def _identity(stat: os.stat_result) -> str:
    """
    Name a file by what a rename leaves as it is.

    Frozen, since claims and archive entries bear it.
    """
    return f"{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_size:x}"


def _describe(file: Path, stat: os.stat_result, identity: str, root: Path) -> dict[str, Any]:
    return {
        "name": file.name,
        "path": str(file),
        "directory": str(root),
        "size": stat.st_size,
        "modified": datetime.fromtimestamp(stat.st_mtime, timezone.utc),
        "id": identity,
    }


@dataclass(frozen=True)
class _Wanted:
    """Which files a wait wants, and when it takes them for complete."""

    pattern: str
    settle: float
    done_marker: str | None

    @classmethod
    def of(cls, pattern: str, settle: float | timedelta, done_marker: str | None) -> _Wanted:
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

    def matching(self, names: Iterable[str]) -> set[str]:
        if not any(special in self.pattern for special in "*?["):
            return {self.pattern} & set(names)
        matches = re.compile(fnmatch.translate(self.pattern)).match
        hidden = self.pattern.startswith(".")
        return {name for name in names if matches(name) and (hidden or not name.startswith("."))}

    def marker(self, name: str) -> str | None:
        return self.done_marker.format(name=name) if self.done_marker else None


@dataclass(frozen=True)
class _Drops:
    """A directory of dropped files on disk: the renames. All of it blocks, for a few system calls."""

    root: Path
    archive: Path

    @classmethod
    def of(cls, directory: str, archive: str | None) -> _Drops:
        root = Path(os.path.abspath(Path(settings.directory_root(), os.path.expanduser(directory))))
        return cls(root, root / archive if archive else root / _OURS / "archive")

    @classmethod
    def of_event(cls, event: dict[str, Any]) -> _Drops:
        root = Path(event["directory"])
        return cls(root, Path(event["path"]).parents[2] if event["path"] else root / _OURS / "archive")

    @property
    def claims(self) -> Path:
        return self.root / _OURS / "claims"

    @property
    def staging(self) -> Path:
        return self.root / _OURS / "staging"

    def check(self) -> None:
        if not self.root.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such directory to watch", str(self.root))

    def prepare(self) -> None:
        self.check()
        for folder in (self.claims, self.staging, self.archive):
            folder.mkdir(parents=True, exist_ok=True)
            if folder.stat().st_dev != self.root.stat().st_dev:
                raise ValueError(
                    f"{folder} is on another file system than {self.root}; "
                    "a file can be moved there only by copying, which is not exactly once"
                )

    def held(self, key: str) -> Path | None:
        """Return the file that the wait has claimed, be it by a process that died while claiming."""
        if claim := _only_file(self.claims / key):
            return claim
        for staged in self.staging.glob(f"{key}.*"):
            if _only_file(staged) and (claim := self._own(key, staged)):
                return claim
        return None

    def claim(self, key: str, name: str, expected: str, marker: str | None) -> Path | None:
        """Claim a file and return it, or None if it went to somebody else or is another by now."""
        staged = self.staging / f"{key}.{uuid.uuid4().hex}"
        folder = staged / expected
        folder.mkdir(parents=True)
        try:
            os.rename(self.root / name, folder / name)
        except FileNotFoundError:
            _prune(folder)
            return None
        if _identity((folder / name).stat()) != expected:  # written to again, after it had settled
            self._put_back(staged)
            return None
        if marker:
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.root / marker, folder / marker)
        return self._own(key, staged)

    def _own(self, key: str, staged: Path) -> Path | None:
        try:
            os.rename(staged, self.claims / key)
        except FileNotFoundError:
            pass  # another triggerer of this wait has finished what this one began
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            self._put_back(staged)  # another triggerer of this wait has a claim already
        return _only_file(self.claims / key)

    def commit(self, key: str, identity: str, delete: bool) -> None:
        done = self.archive / key / identity
        if not done.exists():
            done.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(self.claims / key / identity, done)
            except FileNotFoundError:
                if not done.exists():
                    _prune(done.parent)
                    raise EventLost(
                        f"{self.root} holds no claim of this wait on the file {identity}; another wait has it"
                    ) from None
        _prune(self.claims / key)
        if delete:
            for file in done.iterdir():
                file.unlink(missing_ok=True)

    def release(self, key: str) -> None:
        for claim in (self.claims / key, *self.staging.glob(f"{key}.*")):
            self._take_away(claim)

    def sweep(self, older_than: float) -> None:
        """Put back what was claimed before ``older_than`` (a time since the epoch), or half put back."""
        for folder in (*self.claims.glob("*"), *self.staging.glob("*")):
            with contextlib.suppress(FileNotFoundError):
                if folder.name.startswith(f"{_RELEASED}."):
                    self._put_back(folder)
                elif folder.stat().st_mtime < older_than:
                    log.warning("The claim %s has lapsed; its file goes back to %s", folder.name, self.root)
                    self._take_away(folder)

    def _take_away(self, claim: Path) -> None:
        # By one rename, so that a commit at the same time has either moved the claim or finds nothing.
        away = self.staging / f"{_RELEASED}.{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(claim, away)
            self._put_back(away)

    def _put_back(self, staged: Path) -> None:
        for file in _files(staged):
            try:
                _rename_if_free(file, self.root / file.name)
            except FileExistsError:
                log.warning("%s is kept as %s until its name is free again", file.name, file)
            except FileNotFoundError:
                pass
        for folder in staged.glob("*"):
            _prune(folder)


def _files(claim: Path) -> list[Path]:
    return sorted(claim.glob("*/*"), key=lambda file: len(file.name))


def _only_file(claim: Path) -> Path | None:
    """Return the claimed file; a done marker beside it has a longer name."""
    files = _files(claim)
    return files[0] if files else None


def _prune(folder: Path) -> None:
    """Remove a folder and the wait's folder around it, if they are empty."""
    for empty in (folder, folder.parent):
        if empty.parent.name in ("claims", "staging") or empty is folder:
            with contextlib.suppress(OSError):
                empty.rmdir()


def _rename_if_free(old: Path, new: Path) -> None:
    """Rename, but never onto an existing file."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        os.link(old, new)
        os.unlink(old)
        return
    at_fdcwd, no_replace = -100, 1
    if renameat2(at_fdcwd, os.fsencode(old), at_fdcwd, os.fsencode(new), no_replace):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(new))


@dataclass(eq=False)
class _Seeker:
    """One wait for a file; without drops and key it only watches."""

    wanted: _Wanted
    drops: _Drops | None = None
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


class _Hub:
    """
    Looks at one directory for all the waits on it in this triggerer.

    It looks when the file system reports a change (inotify, by watchfiles), when a file will have settled,
    and every ``[events] directory_rescan_interval`` seconds.
    """

    _watched: ClassVar[int] = 0

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seekers: dict[_Wanted, deque[_Seeker]] = {}
        self._seen: dict[str, _Seen] = {}
        # What matches and was not given yet, so that a look compares only new files with old patterns.
        self._candidates: dict[_Wanted, set[str]] = {}
        self._look = asyncio.Event()
        self._closed = asyncio.Event()
        self._claiming = asyncio.Lock()
        self._swept = time.monotonic()
        self._server = background(self._serve(), f"directory {root}")
        self._watcher = background(self._listen(), f"changes of {root}")

    async def close(self) -> None:
        self._closed.set()  # the watcher's thread sees it at once, and not that its task is cancelled
        self._server.cancel()
        await asyncio.gather(self._server, self._watcher, return_exceptions=True)

    async def take(self, seeker: _Seeker) -> tuple[Path, os.stat_result]:
        """Return a file for the seeker. Cancelled, it may leave a claim, which is the wait's."""
        self._seekers.setdefault(seeker.wanted, deque()).append(seeker)
        self._look.set()
        try:
            return await seeker.found
        finally:
            async with self._claiming:  # so that a claim in this wait's name is made by now, or never
                if seeker in (waiting := self._seekers.get(seeker.wanted, deque())):
                    waiting.remove(seeker)

    async def _listen(self) -> None:
        import watchfiles

        if kind := _network_file_system(self._root):
            log.info("%s is on %s, which reports no changes: polling", self._root, kind)
            return
        if _Hub._watched >= _MOST_WATCHED:
            log.info("%s: more than %d directories are watched already: polling", self._root, _MOST_WATCHED)
            return
        _Hub._watched += 1
        try:
            async for _ in watchfiles.awatch(
                self._root,
                recursive=False,
                stop_event=self._closed,
                watch_filter=lambda change, path: (
                    change is not watchfiles.Change.deleted and Path(path).parent == self._root
                ),
            ):
                self._look.set()
        except Exception as error:
            log.warning("Changes of %s cannot be watched (%s): polling instead", self._root, error)
        finally:
            _Hub._watched -= 1

    async def _serve(self) -> None:
        while True:
            self._look.clear()
            try:
                files = await asyncio.to_thread(_scan, self._root)
                next_look = await self._hand_out(files)
                if time.monotonic() - self._swept > 60:
                    self._swept = time.monotonic()
                    await asyncio.to_thread(self._sweep)
            except OSError as error:
                log.warning("%s cannot be looked at, which is tried again: %s", self._root, error)
                next_look = settings.directory_rescan_interval()
            except Exception as error:  # a fault of this code: better failed waits than waits that hang
                for seeker in [seeker for seekers in self._seekers.values() for seeker in seekers]:
                    if not seeker.found.done():
                        seeker.found.set_exception(error)
                raise
            # Not asyncio.wait_for, which before Python 3.12 may swallow the cancellation.
            alarm = asyncio.get_running_loop().call_later(next_look, self._look.set)
            await self._look.wait()
            alarm.cancel()
            await asyncio.sleep(0.02)  # what comes at once is looked at once

    def _sweep(self) -> None:
        _Drops.of(str(self._root), None).sweep(time.time() - settings.directory_claim_timeout())

    async def _hand_out(self, files: dict[str, os.stat_result]) -> float:
        """Give settled files to waits, and return for how many seconds nothing more will have settled."""
        now = asyncio.get_running_loop().time()
        before, self._seen = self._seen, {}
        for name, stat in files.items():
            seen = before.get(name)
            if seen is None or seen.identity != _identity(stat):
                seen = _Seen(stat, _identity(stat), now)
            self._seen[name] = seen
        fresh = [name for name in files if name not in before]
        candidates = await asyncio.to_thread(self._match, list(self._seekers), fresh)
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

    def _match(self, patterns: list[_Wanted], fresh: list[str]) -> dict[_Wanted, set[str]]:
        self._candidates = {
            wanted: (self._candidates[wanted] & self._seen.keys()) | wanted.matching(fresh)
            if wanted in self._candidates
            else wanted.matching(self._seen)
            for wanted in patterns
        }
        return self._candidates

    async def _give(self, name: str, seen: _Seen, seekers: deque[_Seeker], marker: str | None) -> None:
        """Give one file: to every watcher, and to the consumer that has waited longest."""
        for seeker in [s for s in seekers if s.drops is None and not s.found.done()]:
            seeker.found.set_result((self._root / name, seen.stat))
        async with self._claiming:
            for seeker in seekers:
                if seeker.drops and not seeker.found.done():
                    await self._claim(seeker.drops, seeker, name, seen, marker)
                    break
        for seeker in [s for s in seekers if s.found.done()]:
            seekers.remove(seeker)

    async def _claim(self, drops: _Drops, seeker: _Seeker, name: str, seen: _Seen, marker: str | None) -> None:
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
                    if entry.is_file(follow_symlinks=False):
                        yield entry.name, entry.stat(follow_symlinks=False)

    return dict(regular_files())


def _network_file_system(root: Path) -> str | None:
    """Return the type of the network file system on which ``root`` is, or None."""
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        real = os.path.realpath(root)
        over = [m for m in mounts if real == m[1] or real.startswith(m[1].rstrip("/") + "/")]
        if over and _NETWORK_FILE_SYSTEMS.fullmatch(kind := max(over, key=lambda m: len(m[1]))[2]):
            return kind
    return None
