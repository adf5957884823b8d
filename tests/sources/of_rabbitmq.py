"""RabbitMQ, with a classic and with a quorum queue as the source; asked by a client in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import re
import struct
import subprocess
import threading
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import aiormq
import rabbitmq_cluster
import servers
from aiormq.abc import ChannelFrame
from airflow_events.listeners.rabbitmq import RabbitMQListener, RabbitMQWatchListener
from broker import Broker
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader


class RawHeader(ContentHeader):
    """A header frame whose flags and properties are bytes: what no client here would write."""

    def __init__(self, raw: bytes, body_size: int) -> None:
        super().__init__(body_size=body_size)
        self.raw = raw

    def marshal(self) -> bytes:
        return struct.pack(">HxxQ", Basic.frame_id, self.body_size) + self.raw


# Bytes of a body that one frame has.
_FRAME = 100_000
# How many queues are made when the server starts.
_MADE = 25


class RabbitMQ(Broker):
    name = "rabbitmq, classic queue"
    missing = "apt install rabbitmq-server"
    listener = RabbitMQListener
    watcher = RabbitMQWatchListener
    connection_type = "amqp"
    acknowledges_anywhere = False
    gives_back_at_once = True
    dead_letter = True
    queue_type = "classic"

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._client: aiormq.Connection | None = None
        self._made: set[str] = set()

    @classmethod
    def make(cls) -> RabbitMQ | None:
        server = servers.rabbitmq()
        if server is None:
            return None
        broker = cls()
        broker.server = server
        server.start()
        # RabbitMQ 3.10 forgets quorum queues and streams that were made in the second before a SIGKILL.
        for _ in range(_MADE):
            broker.fresh()
        broker._count = 0
        time.sleep(3)
        return broker

    def stop(self) -> None:
        super().stop()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def fresh(self) -> None:
        super().fresh()
        if self.server.process.poll() is not None:
            self.server.start()
        if self.queue not in self._made:
            self._made.add(self.queue)
            self.declare(f"{self.queue}.dead")
            self.make_queue()
        if self.watcher is not None and self.stream not in self._made:
            self._made.add(self.stream)
            self.declare(self.stream, {"x-queue-type": "stream"})

    def make_queue(self, **arguments: Any) -> None:
        """Make the source, with another queue for its dead letters."""
        dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{self.queue}.dead"}
        self.declare(self.queue, {"x-queue-type": self.queue_type, **dead, **arguments})

    def dead_letters(self) -> list[bytes]:
        return [message.body for message in self.look(f"{self.queue}.dead")]

    @property
    def stream(self) -> str:
        return f"{self.queue}.stream"

    def connection(self, **changes: Any) -> dict[str, Any]:
        return {
            "conn_type": "amqp", "host": "127.0.0.1", "port": self.server.port, "login": "guest",
            "password": "guest", **changes,
        }  # fmt: skip

    def arguments(self, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
        return [self.queue], {"rabbitmq_conn_id": "source", **changes}

    def watch_arguments(self, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
        return [self.stream], {"rabbitmq_conn_id": "source", **changes}

    def send_raw(self, raw: bytes) -> None:
        stamp = datetime.now(timezone.utc).replace(microsecond=0)
        self.publish(raw, timestamp=stamp, message_id=uuid.uuid4().hex)

    def publish(self, body: bytes, to: str | None = None, raw: bytes = b"", **properties: Any) -> None:
        """
        Send a message to the queue and the stream, or to one of another name, and see it taken.

        :param raw: its flags and properties, as they are sent.
        """
        found = Basic.Properties(**{"delivery_mode": 2, "headers": {"n": 1}, **properties})
        header = RawHeader(raw, len(body)) if raw else ContentHeader(properties=found, body_size=len(body))
        self.do(self._publish(body, [to] if to else self._both(), header))

    def _both(self) -> list[str]:
        return [self.queue] if self.watcher is None else [self.queue, self.stream]

    async def _publish(self, body: bytes, queues: list[str], header: ContentHeader) -> None:
        for queue in queues:
            channel = await self._channel_where_there_is(queue)
            await channel.tx_select()
            # Not basic_publish, which gives a message_id to a message that has none.
            frames = [
                Basic.Publish(exchange="", routing_key=queue),
                header,
                *(ContentBody(body[start : start + _FRAME]) for start in range(0, len(body), _FRAME)),
            ]
            await channel.write_queue.put(ChannelFrame.marshall(channel.number, frames))
            await channel.tx_commit()
            await channel.close()

    async def _channel_where_there_is(self, queue: str) -> Any:
        end = time.monotonic() + 15
        while True:  # a stream is there again a little later than the server
            channel = await self.channel(publisher_confirms=False)
            try:
                await channel.queue_declare(queue, passive=True)
                return channel
            except aiormq.ChannelNotFoundEntity:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.1)

    async def channel(self, **options: Any) -> Any:
        if self._client is None or self._client.is_closed:
            url = f"amqp://guest:guest@127.0.0.1:{self.server.port}/?name=tests"
            self._client = await aiormq.connect(url)
        return await self._client.channel(**options)

    def do(self, work: Any) -> Any:
        """Run a coroutine beside the test's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def declare(self, queue: str, arguments: dict[str, Any] | None = None, **options: Any) -> None:
        async def declare() -> None:
            channel = await self.channel()
            await channel.queue_declare(queue, arguments=arguments or {}, **{"durable": True, **options})
            await channel.close()

        self.do(declare())

    def look(self, queue: str) -> list[Any]:
        """Return what a queue has that nobody else holds; it stays there."""

        async def look() -> list[Any]:
            channel, found = await self.channel(), []
            while not isinstance((message := await channel.basic_get(queue)).delivery, Basic.GetEmpty):
                found.append(message)
            await channel.close()  # which puts them back, in their order
            return found

        return self.do(look())

    def ask(self, expression: str) -> str:
        """
        Evaluate an Erlang expression on the server, as ``rabbitmqctl eval`` does, which takes seconds.

        Each time under a name of its own: the server refuses whoever has the name of a node that it has not yet
        seen leave, and ``erl_call`` always has the same, or with ``-r`` one of a few.
        """
        cookie = Path(self.server.environment["HOME"], ".erlang.cookie").read_text()
        name = f"tests-{uuid.uuid4().hex}"
        done = subprocess.run(
            ["erl_call", "-c", cookie, "-h", name, "-n", self.server.node, "-e", "-timeout", "25"],
            input=f"{expression}\n", capture_output=True, text=True,
            env={**os.environ, **self.server.environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def queues(self) -> dict[str, int]:
        """Return all queues of the server and how many messages each has, given out or not."""
        asked = (
            'lists:flatten([io_lib:format("<~s>=~p;", [N, M]) || [{name, {_, _, _, N}}, {messages, M}] <- '
            'rabbit_amqqueue:info_all(<<"/">>, [name, messages])]).'
        )
        return {name: int(count) for name, count in re.findall(r"<([^>]*)>=(\d+);", self.ask(asked))}

    def unacknowledged(self) -> int:
        return self.waiting(self.queues())

    def waiting(self, queues: dict[str, int]) -> int:
        """Return how many messages the source has, given out or not."""
        return queues[self.queue]

    def clients(self) -> int:
        asked = (
            "length([1 || [{client_properties, P}] <- rabbit_networking:connection_info_all([client_properties]), "
            '{<<"connection_name">>, _, <<"airflow-events">>} <- P]).'
        )
        return int(re.search(r"(\d+)}", self.ask(asked))[1])


class Quorum(RabbitMQ):
    name = "rabbitmq, quorum queue"
    watcher = None
    queue_type = "quorum"

    def waiting(self, queues: dict[str, int]) -> int:
        # What the server lists for a quorum queue is some seconds old. After a restart its leader tells nothing
        # until it has applied its log, which it has when it has applied a command.
        asked = (
            f'Queue = {{list_to_atom("%2F_{self.queue}"), node()}}, '
            "{ok, _, _} = ra:process_command(Queue, rabbit_fifo:make_garbage_collection(), 20000), "
            "{ok, {_, Count}, _} = ra:leader_query(Queue, fun rabbit_fifo:query_messages_total/1), Count."
        )
        found = re.match(r"\{ok, (\d+)\}", answer := self.ask(asked))
        if found is None and "{timeout," in answer:
            raise TimeoutError(f"the queue has no leader yet: {answer}")
        assert found is not None, answer
        return int(found[1])


class RabbitMQCluster(Quorum):
    """Three nodes; a connection names all of them."""

    name = "rabbitmq cluster"
    cluster: rabbitmq_cluster.Cluster

    @classmethod
    def make(cls) -> RabbitMQCluster | None:
        cluster = rabbitmq_cluster.cluster()
        if cluster is None:
            return None
        broker = cls()
        broker.cluster = cluster
        broker.server = cluster.nodes[0]
        cluster.start()
        return broker

    @property
    def servers(self) -> list[servers.Server]:
        return list(self.cluster.nodes)

    def stop(self) -> None:
        self.cluster.stop()
        super().stop()

    def connection(self, **changes: Any) -> dict[str, Any]:
        nodes = ",".join(f"127.0.0.1:{node.port}" for node in self.cluster.nodes)
        return {**super().connection(**changes), "host": nodes, "port": None}

    def turn_to(self, number: int) -> None:
        """Ask and send by the node of that number from now on."""
        self.server, self._client = self.cluster.nodes[number], None
