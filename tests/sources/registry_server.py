"""A schema registry: Apicurio's, from Maven Central, which speaks as Confluent's does."""

from __future__ import annotations

import urllib.request
import zipfile
from pathlib import Path

import maven
import servers

VERSION = "3.0.9"
MISSING = maven.MISSING
# Where its Confluent interface is.
PATH = "/apis/ccompat/v7"


def program() -> Path | None:
    """Return the program, fetched once; None without Java or Maven."""
    folder = maven.fetched(f"apicurio-registry-{VERSION}", _fetch)
    return folder and next(folder.glob("*-runner.jar"))


def _fetch(folder: Path) -> None:
    artifact = f"io.apicurio:apicurio-registry-app:{VERSION}:zip:all"
    maven.run("dependency:copy", f"-Dartifact={artifact}", f"-DoutputDirectory={folder}", cwd=folder)
    [archive] = folder.glob("*.zip")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    archive.unlink()


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
