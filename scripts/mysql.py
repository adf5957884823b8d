"""
A MySQL server of one's own: the ``mysqld`` on PATH, or Debian unstable's, which is unpacked and not installed.

Debian has one in its unstable edition alone, with newer libraries than this machine's, so it runs with those, by
their own loader.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from bootstrap import ROOT
from deployment import free_port, until

_UNPACKED = ROOT / ".venv" / "mysql"
_LOADER = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
_PACKAGE = "mysql-server-core"


def missing() -> str | None:
    """Say in one line what is missing for a MySQL server, or return None. Fetches the server the first time."""
    for module, package in (("aiomysql", "aiomysql"), ("MySQLdb", "mysqlclient")):
        if importlib.util.find_spec(module) is None:
            return f"no {package} (apt install libmariadb-dev pkg-config; pip install aiomysql mysqlclient)"
    try:
        _mysqld()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no mysqld on PATH (MariaDB's will not do), and none from Debian unstable: {error}"
    return None


@functools.cache
def _mysqld() -> tuple[str, ...]:
    """Return the command of a MySQL server, without arguments."""
    if (found := shutil.which("mysqld")) and "MariaDB" not in _said(found, "--version"):
        return (found, "--no-defaults")
    _UNPACKED.parent.mkdir(exist_ok=True)
    with (_UNPACKED.parent / "mysql.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several tests ask at once
        if not _UNPACKED.exists():
            with tempfile.TemporaryDirectory(dir=_UNPACKED.parent) as folder:
                _unpack(Path(folder)).rename(_UNPACKED)
    libraries = (_UNPACKED / _LOADER).parent
    return (
        str(_UNPACKED / _LOADER), "--library-path", f"{libraries}:{libraries}/mysql/private",
        str(_UNPACKED / "usr/sbin/mysqld"), "--no-defaults", f"--lc-messages-dir={_UNPACKED}/usr/share/mysql",
        f"--character-sets-dir={_UNPACKED}/usr/share/mysql/charsets",
    )  # fmt: skip


def _unpack(folder: Path) -> Path:
    """Have apt download the server and all that it needs, beside this machine's own packages, and unpack it."""
    # Where this machine has its packages from.
    [source, *_] = _said(
        "apt-get", "indextargets", "--format", "$(REPO_URI)",
        "Created-By: Packages", "Component: main", "Origin: Debian",
    ).split() or [""]  # fmt: skip
    for name in ("lists/partial", "cache/archives/partial", "root"):
        (folder / name).mkdir(parents=True)
    signed = "signed-by=/usr/share/keyrings/debian-archive-keyring.gpg"
    (folder / "sources.list").write_text(f"deb [{signed}] {source} unstable main\n")
    (folder / "status").touch()  # as if nothing were installed
    options = {
        "Dir::Etc::sourcelist": folder / "sources.list", "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": folder / "lists", "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache", "Debug::NoLocking": "1", "APT::Sandbox::User": "",
    }  # fmt: skip
    apt = ["apt-get", "-qq", "-y", *(f"-o{name}={value}" for name, value in options.items())]
    _said(*apt, "update")
    _said(*apt, "install", "--download-only", "--no-install-recommends", _PACKAGE)
    for package in (folder / "cache/archives").glob("*.deb"):
        _said("dpkg-deb", "-x", str(package), str(folder / "root"))
    return folder / "root"


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command[:1])}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


class Mysql:
    """A server on 127.0.0.1 that ends, with its folder, when its context does."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="airflow-events-mysql-"))
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mysql+mysqldb://root@127.0.0.1:{self.port}/airflow"

    def __enter__(self) -> Mysql:
        if self._run("--initialize-insecure").wait():
            raise RuntimeError(self._log.read_text()[-2000:])
        self.start()
        return self

    def start(self) -> None:
        self.process = self._run(
            f"--port={self.port}", "--bind-address=127.0.0.1", "--mysqlx=OFF", f"--socket={self.folder}/socket",
            f"--pid-file={self.folder}/pid", "--max-connections=300", "--innodb-flush-log-at-trx-commit=2",
            "--disable-log-bin", "--secure-file-priv=NULL", "--innodb-buffer-pool-size=64M",
        )  # fmt: skip
        until(self._answers, "MySQL answers")

    def crash(self) -> None:
        """End it at once: every connection breaks, and `start` recovers from its log."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _log(self) -> Path:
        return self.folder / "mysqld.log"

    def _run(self, *arguments: str) -> subprocess.Popen[bytes]:
        user = ["--user=root"] if os.geteuid() == 0 else []
        return subprocess.Popen(
            [*_mysqld(), f"--datadir={self.folder}/data", *user, *arguments],
            cwd=self.folder, stdout=self._log.open("ab"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _answers(self) -> bool:
        import MySQLdb

        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(self._log.read_text()[-2000:])
        try:
            connection = MySQLdb.connect(host="127.0.0.1", port=self.port, user="root")
        except MySQLdb.OperationalError:
            return False
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute(
                "CREATE DATABASE IF NOT EXISTS airflow CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_ai_ci"
            )
        return True
