"""A schema registry: Apicurio's, from Maven Central, which speaks as Confluent's does."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import urllib.request
import zipfile
from pathlib import Path

import servers

VERSION = "3.0.9"
MISSING = "needs Java 17 and Maven: apt-get install default-jre-headless maven"
# Where its Confluent interface is.
PATH = "/apis/ccompat/v7"


def program() -> Path | None:
    """Return the program, fetched once; None without Java or Maven."""
    if not (shutil.which("java") and shutil.which("mvn")):
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "airflow-provider-events"
    folder = cache / f"apicurio-registry-{VERSION}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "apicurio.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            half = cache / f"{folder.name}.half"
            shutil.rmtree(half, ignore_errors=True)
            artifact = f"io.apicurio:apicurio-registry-app:{VERSION}:zip:all"
            subprocess.run(
                ["mvn", "-q", "-B", "dependency:copy", f"-Dartifact={artifact}", f"-DoutputDirectory={half}"],
                cwd=cache, check=True, timeout=600,
            )  # fmt: skip
            [archive] = half.glob("*.zip")
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(half)
            archive.unlink()
            half.rename(folder)
    return next(folder.glob("*-runner.jar"))


def server() -> servers.Server | None:
    """The registry, which keeps everything in memory; None if it is not to be had."""
    jar = program()
    if jar is None:
        return None
    return servers.Server(
        lambda server: [
            "java", "-Xmx300m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dquarkus.http.host=127.0.0.1",
            f"-Dquarkus.http.port={server.port}", "-jar", str(jar),
        ],
        _answers,
    )  # fmt: skip


def _answers(server: servers.Server) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{PATH}/subjects", timeout=5) as answer:
        return bool(answer.status == 200)
