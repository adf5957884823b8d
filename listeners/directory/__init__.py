"""
Files that are dropped into a directory, without any server.

`files` has the renames by which a file is committed; `hub` looks at a directory for all waits on it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal

from airflow_events.errors import EventLost
from airflow_events.listeners.base import EventListener, is_template
from airflow_events.listeners.directory.files import Drops, commit, coordinates
from airflow_events.listeners.directory.hub import DirectoryHub, File, FileSeeker, Wanted
from airflow_events.listeners.support.queue import FinalIdListener, receive
from airflow_events.listeners.support.shared import shared
from airflow_events.listeners.support.timestamps import of_epoch

# Seconds after which a file system that does not answer is the hub's to tell of.
_LONGEST_CHECK = 5.0


class DirectoryListener(FinalIdListener):
    """
    Take a file out of a directory: each file goes to one wait, exactly once.

    The directory must be the same for all triggerers and workers, on one file system, under one path. The event
    says where the file will be from the commit on, so downstream tasks open ``event["path"]``:

    ``{"name", "path", "directory", "size", "modified", "id", "marker"}``; ``size`` in bytes, ``modified`` a
    datetime in UTC, or None after the year 9999, ``path`` None if the file is deleted, ``id`` an identity that
    survives every rename, ``marker`` the name of the file that marked it as complete, or None. Directory, name and
    id are what tells the event from every other.

    The file stays where it is until the event is recorded. If it is written to again before it was moved, the
    event was of half a file: it is dropped, and the wait goes on until the file has settled again.
    """

    not_taken: ClassVar[Mapping[str, str]] = {"match": "a file is chosen by its name, with pattern"}

    @classmethod
    def check_arguments(cls, directory: Any = None, pattern: Any = "*", **more: Any) -> None:
        _check(pattern, **more)

    async def poll_for_event(
        self,
        directory: str,
        pattern: str = "*",
        *,
        settle: float | timedelta = 5.0,
        done_marker: str | None = None,
        on_commit: Literal["archive", "delete"] = "archive",
        archive: str | None = None,
    ) -> dict[str, Any]:
        """
        Return when a file is there, the one changed longest ago first.

        :param directory: if relative, below ``[events] directory_root``. It may come later.
        :param pattern: a shell pattern for the file's name; files in subdirectories are not looked at,
            nor hidden ones unless the pattern begins with a dot.
        :param done_marker: a name with ``{name}`` in it, such as ``{name}.done``; the file is taken when
            this other file exists beside it. It is moved with the file. None means no marker. Where a producer
            writes slowly and cannot rename, this is what tells a whole file from half of one.
        :param settle: seconds for which size and modification time must not have changed. 0 is for
            producers that rename finished files into the directory.
        :param on_commit: what the commit does with the file. The same for all waits that may be given it, as is
            ``archive``: with several triggerers, another wait may come to commit it.
        :param archive: where committed files go, if relative below ``directory``; must be on the same file
            system. None means ``.airflow-events/archive``.
        :raises SourceUnreachable: the directory was not there, or could not be read, for longer than ``[events]
            unreachable_timeout``.
        :raises ValueError: an argument will not do; the message says which.
        """
        if on_commit not in ("archive", "delete"):
            raise ValueError(f"on_commit is 'archive' or 'delete', not {on_commit!r}")
        drops = Drops.of(directory, archive, delete=on_commit == "delete")
        wanted = Wanted.of(pattern, settle, done_marker)

        def read(file: File) -> dict[str, Any]:
            event = _describe(drops.root, file)
            return {**event, "path": drops.path_of(file.name, event["id"]), "marker": file.marker}

        async with shared(*_hub(drops.root)) as hub:
            # What fails, or hangs, the hub says, if it does not come soon.
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(hub.on_disk(drops.check), _LONGEST_CHECK)
            return await receive(*_hub(drops.root), read, seek=lambda: FileSeeker(wanted))

    def event_id(self, event: Any) -> str:
        """Return directory, name and identity of the file, as JSON."""
        return coordinates(event["directory"], event["name"], event["id"])

    async def event_checkpointed(self, event: Any) -> None:
        """Move the file to the archive, or delete it."""
        async with shared(*_hub(Path(event["directory"]))) as hub:
            try:
                await hub.on_disk(commit, event)
            except EventLost:
                await hub.release(self.event_id(event))
                raise
            hub.forget(self.event_id(event))


class DirectoryWatchListener(EventListener):
    """
    Wait until a file that matches is there, and leave it where it is.

    The event is as of `DirectoryListener`, with ``path`` where the file lies.
    """

    hosted: ClassVar[bool] = True

    @classmethod
    def check_arguments(cls, directory: Any = None, pattern: Any = "*", **more: Any) -> None:
        _check(pattern, **more)

    async def poll_for_event(
        self,
        directory: str,
        pattern: str = "*",
        *,
        settle: float | timedelta = 5.0,
        done_marker: str | None = None,
    ) -> dict[str, Any]:
        """Return when a file is there; parameters and errors as of `DirectoryListener.poll_for_event`."""
        root, wanted = Drops.of(directory).root, Wanted.of(pattern, settle, done_marker)
        async with shared(*_hub(root)) as hub:
            file: Any = await hub.take(FileSeeker(wanted, watches=True))
        return {**_describe(root, file), "path": str(root / file.name)}


def _check(pattern: Any, settle: Any = 0, done_marker: Any = None, **others: Any) -> None:
    if not any(map(is_template, (pattern, settle, done_marker))):
        Wanted.of(pattern, settle, done_marker)


def _hub(root: Path) -> tuple[tuple[str, Path], Callable[[], DirectoryHub]]:
    return ("directory", root), lambda: DirectoryHub(root)


def _describe(root: Path, file: File) -> dict[str, Any]:
    return {
        "name": file.name,
        "directory": str(root),
        "size": file.attributes.size,
        "modified": of_epoch(file.attributes.modified / 10**6),
        "id": file.attributes.identity,
    }
