"""What the servers of the tests fetch from Maven Central, once."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

MISSING = "needs Java 17 and Maven: apt-get install default-jre-headless maven"


def fetched(name: str, fetch: Callable[[Path], None]) -> Path | None:
    """
    Return a folder of the cache; None without Java or Maven.

    :param fetch: fills it, where it is not there yet. What is half filled is never taken for it.
    """
    if not (shutil.which("java") and shutil.which("mvn")):
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "airflow-provider-events"
    folder = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            half = cache / f"{name}.half"
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            fetch(half)
            half.rename(folder)
    return folder


def run(goal: str, *options: str, cwd: Path) -> None:
    """Run a goal of Maven's."""
    subprocess.run(["mvn", "-q", "-B", goal, *options], cwd=cwd, check=True, timeout=600)
