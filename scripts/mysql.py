"""A MySQL server of one's own, from the ``mysqld`` on PATH."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from deployment import free_port, until


def missing() -> str | None:
    """Say in one line what is missing for a MySQL server, or return None."""
    if shutil.which("mysqld") is None:
        return "no mysqld on PATH (Debian unstable: apt install mysql-server-core; MariaDB's will not do)"
    for module, package in (("pymysql", "pymysql"), ("aiomysql", "aiomysql"), ("MySQLdb", "mysqlclient")):
        if importlib.util.find_spec(module) is None:
            return f"no {package} (pip install pymysql aiomysql mysqlclient)"
    return None


class Mysql:
    """A server on 127.0.0.1 that ends, with its folder, when its context does."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="airflow-events-mysql-"))
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mysql+pymysql://root@127.0.0.1:{self.port}/airflow"

    def __enter__(self) -> Mysql:
        if self._run("--initialize-insecure").wait():
            raise RuntimeError(self._log.read_text()[-2000:])
        self.process = self._run(
            f"--port={self.port}", "--bind-address=127.0.0.1", "--mysqlx=OFF", f"--socket={self.folder}/socket",
            f"--pid-file={self.folder}/pid", "--max-connections=300", "--innodb-flush-log-at-trx-commit=2",
            "--disable-log-bin", "--secure-file-priv=NULL", "--innodb-buffer-pool-size=64M",
        )  # fmt: skip
        until(self._answers, "MySQL answers", timeout=60)
        return self

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
            ["mysqld", "--no-defaults", f"--datadir={self.folder}/data", *user, *arguments],
            cwd=self.folder, stdout=self._log.open("ab"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _answers(self) -> bool:
        import pymysql

        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(self._log.read_text()[-2000:])
        try:
            connection = pymysql.connect(host="127.0.0.1", port=self.port, user="root")
        except pymysql.err.OperationalError:
            return False
        with connection, connection.cursor() as cursor:
            cursor.execute(
                "CREATE DATABASE IF NOT EXISTS airflow CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_ai_ci"
            )
        return True
