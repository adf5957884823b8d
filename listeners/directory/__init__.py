"""
Files that are dropped into a directory, without any server.

`claims` has the renames by which a file is taken, exactly once; `hub` looks at a directory for all waits on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar, Literal

from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.directory.claims import Drops, identity_of, key_of
from airflow_events.listeners.directory.hub import Hub, Seeker, Wanted
from airflow_events.listeners.shared import shared


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
        drops = Drops.of(directory, archive)
        if on_commit not in ("archive", "delete"):
            raise ValueError(f"on_commit is 'archive' or 'delete', not {on_commit!r}")
        key = key_of(current_wait())
        wanted = Wanted.of(pattern, settle, done_marker)
        await asyncio.to_thread(drops.prepare)
        while True:
            claim = await asyncio.to_thread(drops.held, key)
            if claim is None:
                async with shared(("directory", drops.root), lambda: Hub(drops.root)) as hub:
                    claim = (await hub.take(Seeker(wanted, drops, key)))[0]
            with contextlib.suppress(FileNotFoundError):  # taken away again: the claim lapsed
                event = _describe(claim, claim.stat(), claim.parent.name, drops.root)
                break
        event["path"] = None if on_commit == "delete" else str(drops.archive / key / event["id"] / event["name"])
        return event

    async def event_checkpointed(self, event: Any) -> None:
        """Move the claimed file to the archive, under the wait's name."""
        key = key_of(current_wait())
        await asyncio.to_thread(Drops.of_event(event).commit, key, event["id"], event["path"] is None)

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Put the claimed file back."""
        drops = Drops.of(args[0] if args else kwargs["directory"], None)
        await asyncio.to_thread(drops.release, key_of(current_wait()))


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
        drops = _checked(directory, int(time.monotonic()))
        async with shared(("directory", drops.root), lambda: Hub(drops.root)) as hub:
            file, stat = await hub.take(Seeker(Wanted.of(pattern, settle, done_marker)))
        return _describe(file, stat, identity_of(stat), drops.root)


@functools.lru_cache(maxsize=64)
def _checked(directory: str, second: int) -> Drops:
    """
    Return a directory that is there, looked for once in each ``second`` for all who begin to watch it.

    Each time that the file system is asked, another thread, a hub's say, may have the interpreter for a while; and
    reading Airflow's configuration takes longer than the rest of what a watch does.
    """
    drops = Drops.of(directory, None)
    drops.check()
    return drops


def _describe(file: Path, stat: os.stat_result, identity: str, root: Path) -> dict[str, Any]:
    return {
        "name": file.name,
        "path": str(file),
        "directory": str(root),
        "size": stat.st_size,
        "modified": datetime.fromtimestamp(stat.st_mtime, timezone.utc),
        "id": identity,
    }
