"""Apache Kafka as a cluster: brokers that are controllers too, and can be killed one by one."""

from __future__ import annotations

from typing import Any

import kafka_server
import servers

from deployment import free_port

# How many brokers have a copy of everything; one of them may be unreachable.
COPIES = 3
# Seconds that all of them have to start together, on a machine that does other things as well.
_PATIENCE = 300


class Cluster:
    """
    Brokers, each of which can be killed, and started again on what it left.

    :param settings: as of `kafka_server.server`, of each broker.
    """

    def __init__(self, size: int, **settings: Any) -> None:
        ports: set[int] = set()
        while len(ports) < 2 * size:
            ports.add(free_port())
        controllers = sorted(ports)[:size]
        voters = ",".join(f"{node}@127.0.0.1:{port}" for node, port in enumerate(controllers, 1))
        copies = min(size, COPIES)
        least = max(copies - 1, 1)
        cluster = kafka_server.new_id()
        self.servers: list[servers.Server] = []
        for node, (port, controller) in enumerate(zip(sorted(ports)[size:], controllers, strict=True), 1):
            about = {
                "node_id": node,
                "controller_quorum_voters": voters,
                "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
                "advertised_listeners": f"PLAINTEXT://127.0.0.1:{port}",
                "default_replication_factor": copies,
                "min_insync_replicas": least,
                "offsets_topic_replication_factor": copies,
                "transaction_state_log_replication_factor": copies,
                "transaction_state_log_min_isr": least,
                "share_coordinator_state_topic_replication_factor": copies,
                "share_coordinator_state_topic_min_isr": least,
            }
            broker = kafka_server.server(cluster, **{**about, **settings})
            assert broker is not None, kafka_server.MISSING
            broker.port = port
            self.servers.append(broker)

    @property
    def bootstrap(self) -> str:
        return ",".join(f"127.0.0.1:{server.port}" for server in self.servers)

    def start(self) -> None:
        try:
            for server in self.servers:
                server.begin()
            self.wait()
        except BaseException:
            self.stop()
            raise

    def wait(self) -> None:
        """Wait until all of them answer."""
        for server in self.servers:
            server.wait(_PATIENCE)

    def stop(self) -> None:
        for server in self.servers:  # together: the last of them would wait for the others
            if server.process is not None:
                server.kill()
        for server in self.servers:
            server.stop()

    def behind(self) -> list[str]:
        """Return the partitions of which not all of their brokers have everything."""
        from confluent_kafka.admin import AdminClient

        settings: dict[str, Any] = {"bootstrap.servers": self.bootstrap, "log_level": 0}
        topics = AdminClient(settings).list_topics(timeout=30).topics
        return [
            f"{name}/{number}"
            for name, topic in topics.items()
            for number, partition in topic.partitions.items()
            if set(partition.isrs) != set(partition.replicas)
        ]
