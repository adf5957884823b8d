"""Apache Kafka: a topic of one partition, unless a test wants more."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import kafka_cluster
import kafka_server
import servers
from airflow_events.listeners.kafka import KafkaListener, KafkaWatchListener
from broker import Broker
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic


class Kafka(Broker):
    name = "kafka"
    missing = kafka_server.MISSING
    listener = KafkaListener
    watcher = KafkaWatchListener
    connection_type = "kafka"
    # Two readers and the writer of the ledger, and the reader of the topic.
    clients_of_waits = 4

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

    @property
    def servers(self) -> list[servers.Server]:
        """Every process of it, for whoever kills them."""
        return [self.server]

    def fresh(self) -> None:
        super().fresh()
        if self.server.process is not None and self.server.process.poll() is not None:
            self.server.start()
        self.make_topic()

    def make_topic(self, partitions: int = 1, **config: Any) -> None:
        """Make the queue of this test, in the place of what is there under its name."""
        settings = {name.replace("_", "."): str(value) for name, value in config.items()}
        self.queue = self.queue if not config and partitions == 1 else f"{self.queue}-of-its-own"
        topic = NewTopic(self.queue, partitions, config=settings)
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

    def unacknowledged(self) -> int:
        state = self.state()
        ends = self.ends()
        return sum(end - state[number]["next"] + len(state[number]["open"]) for number, end in ends.items())

    def ends(self) -> dict[int, int]:
        consumer = self.consumer()
        numbers = consumer.list_topics(self.queue, timeout=30).topics[self.queue].partitions
        ends = {n: consumer.get_watermark_offsets(TopicPartition(self.queue, n), timeout=30)[1] for n in numbers}
        consumer.close()
        return ends

    def consumer(self, group: str = "airflow", **settings: Any) -> Consumer:
        more = {name.replace("_", "."): value for name, value in settings.items()}
        return Consumer({
            **self.bootstrap, "group.id": group, "enable.auto.commit": False, "isolation.level": "read_committed",
            "auto.offset.reset": "earliest", **more,
        })  # fmt: skip

    def committed(self, group: str = "airflow") -> dict[int, tuple[int, Any]]:
        """Return the group's committed offset of each partition, and its metadata."""
        numbers = self.ends()
        consumer = self.consumer(group)
        found = consumer.committed([TopicPartition(self.queue, number) for number in numbers], timeout=30)
        consumer.close()
        return {each.partition: (each.offset, each.metadata) for each in found}

    def records(self, topic: str, isolation: str = "read_committed") -> list[tuple[str, Any]]:
        """Return what a topic of the ledger has, by key; ``read_uncommitted`` is with what is undecided."""
        return [(key, value) for _, key, value in self.placed(topic, isolation)]

    def placed(self, topic: str, isolation: str = "read_committed") -> list[tuple[int, str, Any]]:
        """Return offset, key and value of what a topic of the ledger has."""
        consumer = self.consumer("nobody", isolation_level=isolation, enable_partition_eof=True)
        consumer.assign([TopicPartition(topic, 0, 0)])
        found = []
        while True:
            message = consumer.poll(30)
            assert message is not None, f"{topic} is not read to its end, after {len(found)} messages"
            error = message.error()
            if error is not None and error.code() == KafkaError._PARTITION_EOF:
                break
            assert error is None, error
            found.append((message.offset(), message.key().decode(), _value(message.value())))
        consumer.close()
        return found

    def state(self, group: str = "airflow") -> dict[int, Any]:
        """Return the last state of the group in its ledger."""
        states = [state for key, state in self.records("airflow-events.state") if key == f"{group}/{self.queue}"]
        return {int(number): partition for number, partition in states[-1]["partitions"].items()}

    def clients(self) -> int:
        """Count the clients of this process: a broker does not tell whose its connections are."""
        gc.collect()
        names = (thread / "comm" for thread in Path("/proc/self/task").iterdir())
        return sum(name.exists() and name.read_text().strip() == "rdk:main" for name in names)


class KafkaCluster(Kafka):
    """Several brokers, where each message is on three of them."""

    name = "kafka cluster"
    cluster: kafka_cluster.Cluster

    @classmethod
    def make(cls, size: int = 3) -> KafkaCluster | None:
        if kafka_server.jars() is None:
            return None
        broker = cls()
        broker.cluster = kafka_cluster.Cluster(size)
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


def _value(raw: bytes | None) -> Any:
    try:
        return json.loads(raw or b"null")
    except ValueError:  # what a test has written there
        return raw
