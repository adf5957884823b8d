"""
How a file is taken out of a directory: by renames alone, each of which one of several contenders wins.

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

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow_events import settings
from airflow_events.errors import EventLost
from airflow_events.listeners.base import Wait

log = logging.getLogger(__name__)

OURS = ".airflow-events"
_RELEASED = "=released"  # a wait's key has no such character


@dataclass(frozen=True)
class Drops:
    """A directory of dropped files on disk: the renames. All of it blocks, for a few system calls."""

    root: Path
    archive: Path

    @classmethod
    def of(cls, directory: str, archive: str | None) -> Drops:
        root = Path(os.path.abspath(Path(settings.directory_root(), os.path.expanduser(directory))))
        return cls(root, root / archive if archive else root / OURS / "archive")

    @classmethod
    def of_event(cls, event: dict[str, Any]) -> Drops:
        root = Path(event["directory"])
        return cls(root, Path(event["path"]).parents[2] if event["path"] else root / OURS / "archive")

    @property
    def claims(self) -> Path:
        return self.root / OURS / "claims"

    @property
    def staging(self) -> Path:
        return self.root / OURS / "staging"

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
        try:
            written_to_again = identity_of((folder / name).stat()) != expected
        except FileNotFoundError:  # another triggerer of this wait goes on with what this one began
            return _only_file(self.claims / key)
        if written_to_again:
            self._put_back(staged)
            return None
        if marker:
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.root / marker, folder / marker)
        return self._own(key, staged)

    def _own(self, key: str, staged: Path) -> Path | None:
        try:
            self._rename_to_claim(key, staged)
        except FileNotFoundError:
            pass  # another triggerer of this wait has finished what this one began
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            self._put_back(staged)  # another triggerer of this wait has a claim already
        return _only_file(self.claims / key)

    def _rename_to_claim(self, key: str, staged: Path) -> None:
        claim = self.claims / key
        try:
            os.rename(staged, claim)
        except OSError:
            if _only_file(claim) is not None:
                raise
            for empty in claim.glob("*"):  # folders without a file are no claim
                _prune(empty)
            os.rename(staged, claim)

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
            self._put_back(claim)

    def sweep(self, older_than: float) -> None:
        """Put back what was claimed before ``older_than`` (a time since the epoch), or half put back."""
        for folder in (*self.claims.glob("*"), *self.staging.glob("*")):
            try:
                if folder.name.startswith(_RELEASED):
                    self._put_back(folder)
                elif folder.stat().st_mtime < older_than:
                    log.warning("The claim %s has lapsed; its file goes back to %s", folder.name, self.root)
                    self._put_back(folder)
            except FileNotFoundError:
                pass
            except OSError as error:
                log.warning("%s cannot be put back, which is tried again: %s", folder, error)

    def _put_back(self, claim: Path) -> None:
        """Put a file back, and its marker; by whoever is the first to move the claim away."""
        # By one rename, so that a commit at the same time has either moved the claim or finds nothing.
        away = self.staging / f"{_RELEASED}.{uuid.uuid4().hex}"
        try:
            os.rename(claim, away)
        except FileNotFoundError:
            return
        for file in _files(away):
            try:
                _rename_if_free(file, self.root / file.name)
            except FileExistsError:
                if _is_linked_below(self.root, file):
                    file.unlink()
                else:
                    log.warning("%s is kept as %s until its name is free again", file.name, file)
        for folder in away.glob("*"):
            _prune(folder)


def _files(claim: Path) -> list[Path]:
    try:
        return sorted(claim.glob("*/*"), key=lambda file: len(file.name))
    except FileNotFoundError:  # a folder went away meanwhile
        return []


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
    """
    Rename, but never onto an existing file.

    :raises FileExistsError: there is one; or ``old`` is the second link of a file, which a process that died
        in the middle of this left behind (on a file system that cannot do it in one step).
    """
    with contextlib.suppress(AttributeError):
        at_fdcwd, no_replace = -100, 1
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        if not rename(at_fdcwd, os.fsencode(old), at_fdcwd, os.fsencode(new), no_replace):
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), str(new))
    if _is_linked_below(new.parent, old):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
    os.link(old, new)
    os.unlink(old)


def _is_linked_below(root: Path, file: Path) -> bool:
    """Whether the same file, by another link, is still in ``root``, or was claimed or archived."""
    stat = file.stat()
    if stat.st_nlink == 1:
        return False
    places = (root.glob("*"), (root / OURS).glob("*/*/*/*"))
    return any(place != file and place.lstat().st_ino == stat.st_ino for found in places for place in found)


def key_of(wait: Wait) -> str:
    """
    Name a wait's folders: readable, and unique by the digest.

    Frozen, since claims and archive entries are found by it.
    """
    readable = re.sub(r"[^\w.-]", "_", f"{wait.dag_id[:60]}.{wait.task_id[:60]}")
    return f"{readable}.{hashlib.sha256(wait.id.encode()).hexdigest()[:20]}"


def identity_of(stat: os.stat_result) -> str:
    """
    Name a file by what a rename leaves as it is.

    Frozen, since claims and archive entries bear it.
    """
    return f"{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_size:x}"
