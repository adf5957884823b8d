"""Apache Kafka: a topic of one partition, unless a test wants more."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import kafka_cluster
import kafka_server
import servers
from airflow_events.listeners.kafka import KafkaListener, KafkaWatchListener
from airflow_events.listeners.support import positions
from broker import Broker
from confluent_kafka import Consumer, KafkaException, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from deployment import until


class Kafka(Broker):
    name = "kafka"
    missing = kafka_server.MISSING
    listener = KafkaListener
    watcher = KafkaWatchListener
    connection_type = "kafka"
    everybody_reads = True
    gives_back_at_once = True
    # The consumer, and who asks about topics and the group.
    clients_of_waits = 2

    @classmethod
    def make(cls) -> Kafka | None:
        found = kafka_server.server()
        if found is None:
            return None
        broker = cls()
        broker.server = found
        found.start()
        return broker

    @property
    def bootstrap(self) -> dict[str, Any]:
        return {"bootstrap.servers": f"127.0.0.1:{self.server.port}", "log_level": 0}

    def fresh(self) -> None:
        super().fresh()
        for server in self.servers:
            if server.process is not None and server.process.poll() is not None:
                server.begin()
            server.wait(120)
        self.make_topic()

    def make_topic(self, partitions: int = 1, on: int | None = None, **config: Any) -> None:
        """
        Make the queue of this test, in the place of what is there under its name.

        :param on: the id of the only broker that has it; None is as the brokers see fit.
        """
        settings = {name.replace("_", "."): str(value) for name, value in config.items()}
        self.queue = self.queue if (partitions, on, config) == (1, None, {}) else f"{self.queue}-of-its-own"
        where = {} if on is None else {"replica_assignment": [[on]] * partitions}
        topic = NewTopic(self.queue, partitions, config=settings, **where)
        admin = AdminClient(self.bootstrap)
        [made] = admin.create_topics([topic]).values()
        made.result(30)

    def connection(self, **changes: Any) -> dict[str, Any]:
        port = changes.pop("port", None)
        where = f"127.0.0.1:{port}" if port else self.bootstrap["bootstrap.servers"]
        extra = {"bootstrap.servers": where, **changes.pop("extra", {})}
        return {"conn_type": "kafka", "extra": extra, **changes}

    def arguments(self, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
        return [self.queue], {"kafka_config_id": "source", **changes}

    watch_arguments = arguments

    def send(self, *values: Any) -> None:
        self.produce(*({"value": json.dumps(value).encode()} for value in values))

    def send_raw(self, raw: bytes) -> None:
        self.produce({"value": raw})

    def produce(self, *messages: dict[str, Any], **settings: Any) -> None:
        producer = Producer({**self.bootstrap, "linger.ms": 0, **settings})
        failed = []
        for message in messages:
            producer.produce(
                self.queue, on_delivery=lambda error, _: failed.append(error) if error else None, **message
            )
        assert producer.flush(60) == 0 and not failed, failed

    @property
    def dead_letter(self) -> str:
        return f"{self.queue}-dead"

    def unacknowledged(self) -> int:
        """Count what is after the group's committed offset, and of that leave out what is settled."""
        offsets, settled = self.committed(), self.settled()
        return sum(
            sum(positions.after(settled.get(number, []), offset) == offset
                for offset in range(max(offsets[number][0], 0), end))
            for number, end in self.ends().items()
        )  # fmt: skip

    def settled(self) -> dict[int, positions.Ranges]:
        """Return what is settled of each partition, as far as the processes of this event loop know."""
        known = positions.Positions.of_loop()._known
        ranges: dict[int, positions.Ranges] = {}
        for source, about in known.items():
            if json.loads(source)[1] == self.queue:
                ranges |= {int(place.rpartition("/")[2]): found for place, found in about.settled.items()}
        return ranges

    def dead_letters(self) -> list[bytes]:
        found = self.messages(self.dead_letter)
        for message in found:
            headers = dict(message.headers())
            assert headers["airflow-events-reason"] and self.queue.encode() in headers["airflow-events-source"]
        return [message.value() for message in found]

    def messages(self, topic: str) -> list[Any]:
        """Return what is in partition 0 of a topic."""
        consumer, found = self.consumer("nobody", enable_partition_eof=True), []
        consumer.assign([TopicPartition(topic, 0, 0)])
        while (message := consumer.poll(30)) is not None and message.error() is None:
            found.append(message)
        consumer.close()
        return found

    def topic_id(self) -> str:
        admin = AdminClient(self.bootstrap)  # which has to outlive what it was asked
        [asked] = admin.describe_topics(TopicCollection([self.queue])).values()
        return str(asked.result(30).topic_id)

    def ends(self) -> dict[int, int]:
        consumer = self.consumer()

        def ends() -> dict[int, int]:
            numbers = consumer.list_topics(self.queue, timeout=30).topics[self.queue].partitions
            places = {number: TopicPartition(self.queue, number) for number in numbers}
            return {
                number: consumer.get_watermark_offsets(place, timeout=30)[1] for number, place in places.items()
            }

        found = until(lambda: _answered(ends), "it says how far the topic goes")
        consumer.close()
        return found

    def consumer(self, group: str = "airflow", **settings: Any) -> Consumer:
        more = {name.replace("_", "."): value for name, value in settings.items()}
        return Consumer({
            **self.bootstrap, "group.id": group, "enable.auto.commit": False, "isolation.level": "read_committed",
            "auto.offset.reset": "earliest", **more,
        })  # fmt: skip

    def committed(self, group: str = "airflow") -> dict[int, tuple[int, Any]]:
        """Return the group's committed offset of each partition, and its metadata."""
        consumer = self.consumer(group)
        places = [TopicPartition(self.queue, number) for number in self.ends()]
        found = until(lambda: _answered(lambda: consumer.committed(places, timeout=30)), "it says its offsets")
        consumer.close()
        return {each.partition: (each.offset, each.metadata) for each in found}

    def clients(self) -> int:
        """Count the clients of this process: a broker does not tell whose its connections are."""
        gc.collect()
        names = (thread / "comm" for thread in Path("/proc/self/task").iterdir())
        return sum(name.exists() and name.read_text().strip() == "rdk:main" for name in names)


class KafkaCluster(Kafka):
    """Several brokers, where each message is on three of them."""

    name = "kafka cluster"
    cluster: kafka_cluster.Cluster
    settings: ClassVar[dict[str, Any]] = {}

    @classmethod
    def make(cls, size: int = 3) -> KafkaCluster | None:
        if kafka_server.jars() is None:
            return None
        broker = cls()
        broker.cluster = kafka_cluster.Cluster(size, **cls.settings)
        broker.server = broker.cluster.servers[0]
        broker.cluster.start()
        return broker

    @property
    def servers(self) -> list[servers.Server]:
        return self.cluster.servers

    @property
    def bootstrap(self) -> dict[str, Any]:
        return {"bootstrap.servers": self.cluster.bootstrap, "log_level": 0}

    def stop(self) -> None:
        self.cluster.stop()

    def coordinator(self, group: str = "airflow") -> int:
        """Return the id of the broker that has the group's offsets."""
        consumer = self.consumer(group)
        consumer.commit(offsets=[TopicPartition(self.queue, 0, 0)], asynchronous=False)  # so that there is a group
        consumer.close()
        admin = AdminClient(self.bootstrap)
        [asked] = admin.describe_consumer_groups([group]).values()
        return asked.result(30).coordinator.id


class KafkaOneCoordinator(KafkaCluster):
    """A cluster where a group's offsets are on one broker only, and nobody has them while it is unreachable."""

    name = "kafka cluster with one coordinator"
    settings: ClassVar[dict[str, Any]] = {
        "offsets_topic_replication_factor": 1,
        "min_insync_replicas": 1,
    }


class Inbox:
    """What is settled, for the hubs of a test, as the inbox of a deployment has it."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.settled: dict[str, dict[str, positions.Ranges]] = {}

    async def exchange(
        self, source: str, settled: Mapping[str, positions.Ranges], begins: Mapping[str, int]
    ) -> positions.Known:
        self.settled[source] = positions.united(self.settled.get(source, {}), settled, begins)
        return positions.Known(dict(self.settled[source]), self.owner)


def _answered(question: Callable[[], Any]) -> Any:
    """Return the answer; None of a broker that has just begun, and does not know yet."""
    try:
        return question()
    except KafkaException:
        return None
