"""
What is done to the files of a directory, all of it by renames, and all of it blocking.

    drops/orders.csv
    drops/.airflow-events/archive/<id>/orders.csv    committed
    drops/.airflow-events/removal/<id>/orders.csv    being deleted, if it is not to be archived

``<id>`` is the file's identity, so a commit moves this very event or nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import glob
import json
import logging
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from airflow_events import settings
from airflow_events.errors import EventLost

log = logging.getLogger(__name__)

OURS = ".airflow-events"

# Of linux/fcntl.h and linux/stat.h, as is the place of each field of statx's answer.
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW, _RENAME_NOREPLACE = -100, 0x100, 1
_STATX_BASIC_STATS, _STATX_BTIME = 0x7FF, 0x800
_STATX = struct.Struct("=I28xQQ32xqI20xqI")


def coordinates(directory: str, name: str, identity: str) -> str:
    """Return what tells a dropped file from every other. Its form is frozen: whose an event is, hangs on it."""
    return json.dumps([directory, name, identity], ensure_ascii=False)


class Attributes(NamedTuple):
    """
    What one look at a file tells of it, in one read, so that no two files are mixed.

    :param modified: in nanoseconds since the epoch.
    :param born: when it was made, likewise; None if the file system does not tell, or ``statx(2)`` is missing.
        It tells a file from one that was deleted, whose inode a file system gives again: of one that is sent once
        more by ``rsync -a`` or ``cp -p``, which keep the modification time, all else is the same.
    """

    inode: int
    modified: int
    size: int
    born: int | None = None

    @classmethod
    def of(cls, stat: os.stat_result) -> Attributes:
        return cls(stat.st_ino, stat.st_mtime_ns, stat.st_size)

    @classmethod
    def at(cls, file: Path) -> Attributes | None:
        """Return those of a file, which is no link; None if there is none."""
        answer = ctypes.create_string_buffer(256)
        wanted = _STATX_BASIC_STATS | _STATX_BTIME
        try:
            statx = _libc().statx
        except AttributeError:  # a C library without it
            number = errno.ENOSYS
        else:
            failed = statx(_AT_FDCWD, os.fsencode(file), _AT_SYMLINK_NOFOLLOW, wanted, answer)
            number = ctypes.get_errno() if failed else 0
        if number in (errno.ENOSYS, errno.EPERM):  # EPERM: a container that does not know the call forbids it
            with contextlib.suppress(FileNotFoundError):
                return cls.of(file.lstat())
            return None
        if number in (errno.ENOENT, errno.ENOTDIR):
            return None
        if number:
            raise OSError(number, os.strerror(number), str(file))
        told, inode, size, born, born_ns, modified, modified_ns = _STATX.unpack_from(answer)
        has_born = told & _STATX_BTIME
        return cls(inode, modified * 10**9 + modified_ns, size, born * 10**9 + born_ns if has_born else None)

    def without_inode(self) -> Attributes:
        """Return what is the same for each mount of a file system that invents the numbers of its files."""
        return self._replace(inode=0, born=None)

    @property
    def identity(self) -> str:
        """
        A name for the file that a rename leaves as it is.

        Frozen, since events and the archive bear it.
        """
        of_file = f"{self.inode:x}-{self.modified:x}-{self.size:x}"
        return of_file if self.born is None else f"{of_file}-{self.born:x}"


def check_directory(root: Path) -> None:
    """
    See that a directory is there.

    :raises FileNotFoundError: it is not.
    """
    if not root.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such directory to watch", str(root))


@dataclass(frozen=True)
class Drops:
    """A directory of dropped files, and where those go that are committed; where that is None they are deleted."""

    root: Path
    archive: Path | None = None

    @classmethod
    def of(cls, directory: str, archive: str | None = None, *, delete: bool = False) -> Drops:
        """
        Return the directory that a user names, below ``[events] directory_root``.

        :raises ValueError: it is empty, as a template without a value is: that is not the root itself.
        """
        if not isinstance(directory, str | os.PathLike) or not str(directory).strip():
            raise ValueError(f"directory is the name of a directory, not {directory!r}")
        root = Path(os.path.abspath(Path(settings.directory_root(), os.path.expanduser(directory))))
        kept = os.path.expanduser(archive) if archive else f"{OURS}/archive"
        return cls(root, None if delete else root / kept)

    def check(self) -> None:
        """
        See that the directory is there, and that files can be moved to where they go when they are committed.

        :raises FileNotFoundError: it is not there.
        :raises ValueError: the archive is on another file system, or nothing can be moved to it.
        """
        check_directory(self.root)
        place = self.archive or _removal(self.root)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"{place}, where committed files are moved, cannot be made: {error.strerror}"
            ) from error
        if place.stat().st_dev != self.root.stat().st_dev:
            raise ValueError(
                f"{place} is on another file system than {self.root}; "
                "a file can be moved there only by copying, which is not exactly once"
            )
        # As by subPath of a pod: nothing is renamed from one to the other.
        if _mount_of(place) != _mount_of(self.root):
            raise ValueError(
                f"{place} is another mount than {self.root}, if of the same file system; a file can be moved "
                "there only by copying, which is not exactly once: mount one folder that has both"
            )
        for folder in (self.root, place):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise ValueError(f"files cannot be moved to {place}: this process may not write to {folder}")

    def path_of(self, name: str, identity: str) -> str | None:
        """Return where a file is once it is committed; None if it is deleted then."""
        return None if self.archive is None else str(self.archive / identity / name)


def commit(event: dict[str, Any]) -> None:
    """
    Move an event's file to where the event says that it is, or delete it. Again, it changes nothing.

    :raises EventLost: it was written to again before it was moved, so that the event tells of half a file, say.
    """
    root, name, identity = Path(event["directory"]), event["name"], event["id"]
    marker = event.get("marker")
    if event["path"] is not None:
        _move(root, name, identity, marker, Path(event["path"]))
        return
    done = _removal(root) / identity / name
    try:
        _move(root, name, identity, marker, done)
    except EventLost:
        if _is_written_to(root / name, identity):
            raise
        # A commit before this one has deleted it, and this is the next file of its name.
    if _identity_at(done, identity) == identity:
        for file in (done, done.parent / (marker or name)):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        done.parent.rmdir()


def _removal(root: Path) -> Path:
    """Return where files are for the moment before they are deleted."""
    return root / OURS / "removal"


def _move(root: Path, name: str, identity: str, marker: str | None, done: Path) -> None:
    file = root / name
    there = _identity_at(file, identity)
    if done.exists():
        # Dropped once more: a hard link, or a copy with all that tells it.
        if there == identity == _identity_at(file, identity):
            log.warning(
                "%s was dropped once more, with the time of what is committed already: it is removed", file
            )
            for again in filter(None, (name, marker)):
                (root / again).unlink(missing_ok=True)
        return
    if there is None:
        claimed = next((root / OURS).glob(f"[cs]*/*/{identity}/{glob.escape(name)}"), None)  # by the first edition
        if claimed is None:  # deleted by the commit before this one, or taken away by somebody else
            return
        file, there = claimed, identity
    if there != identity:
        raise EventLost(f"{file} was written to after it was taken: it is {there} now, and was {identity}")
    done.parent.mkdir(parents=True, exist_ok=True)
    if marker:  # first, so that the next file of that name is not taken for complete by this marker
        with contextlib.suppress(FileNotFoundError):
            os.rename(root / marker, done.parent / marker)
    with contextlib.suppress(FileNotFoundError):  # another process does the same; or NFS says so of a rename again
        os.rename(file, done)
    if (moved := _identity_at(done, identity)) is not None and moved != identity:  # overwritten in that moment
        for again in filter(None, (name, marker)):
            with contextlib.suppress(FileNotFoundError):
                put_back(done.parent / again, root / again)
        raise EventLost(f"{file} was written to again while it was moved")


def _is_written_to(file: Path, identity: str) -> bool:
    """Whether a file is the one that had this identity, with another content; False where nothing can tell."""
    now, was = (_identity_at(file, identity) or "").split("-"), identity.split("-")
    # An inode alone does not: the next file may have it.
    return len(was) == 4 and (now[0], now[3:]) == (was[0], was[3:]) and now != was


def _identity_at(file: Path, wanted: str) -> str | None:
    """Return the identity of a file, in the form of the one that is wanted; None if it is not there."""
    if (found := Attributes.at(file)) is None:
        return None
    if wanted.startswith("0-"):
        return found.without_inode().identity
    says_when_made = wanted.count("-") > 2  # which events of earlier versions do not
    return (found if says_when_made else found._replace(born=None)).identity


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mount_of(folder: Path) -> str | None:
    """Return the number of the mount that a folder is on; None where the kernel does not tell."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lines = Path(f"/proc/self/fdinfo/{opened}").read_text().splitlines()
    except OSError:
        return None
    finally:
        os.close(opened)
    return next((line.split()[1] for line in lines if line.startswith("mnt_id:")), None)


def put_back(file: Path, free: Path) -> None:
    """Rename a file, but never onto another, whose name it then has to wait for."""
    try:
        rename_if_free(file, free)
    except FileExistsError:
        log.warning("%s is kept as %s until its name is free again", free.name, file)


def put_back_claims(root: Path) -> None:
    """Put back the files that waits of the first edition had claimed, and not committed for a long while."""
    before = time.time() - settings.directory_claim_timeout()
    for where in ("claims", "staging"):
        for claim in (root / OURS / where).glob("*"):
            with contextlib.suppress(FileNotFoundError):
                if claim.stat().st_mtime < before:
                    for file in claim.glob("*/*"):
                        log.warning("The claim %s has expired; %s goes back to %s", claim.name, file.name, root)
                        put_back(file, root / file.name)
                    for folder in (*claim.glob("*"), claim):
                        with contextlib.suppress(OSError):  # it is not empty
                            folder.rmdir()


def rename_if_free(old: Path, new: Path) -> None:
    """
    Rename, but never onto an existing file.

    :raises FileExistsError: there is one.
    """
    with contextlib.suppress(AttributeError):
        if not _libc().renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE):
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), str(new))
    os.link(old, new)  # a file system that cannot do it in one step
    os.unlink(old)
