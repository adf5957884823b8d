"""A cluster of Valkey's, of three nodes without replicas."""

from __future__ import annotations

import itertools

import servers
from redis import Redis

from deployment import free_port, until

_SLOTS = 16384
_SIZE = 3


class Cluster:
    """Its nodes, each of which has a third of the keys."""

    def __init__(self, nodes: list[servers.Server], buses: list[int]) -> None:
        self.nodes = nodes
        self._buses = buses  # the ports at which they speak with each other

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        bounds = [round(number * _SLOTS / _SIZE) for number in range(_SIZE + 1)]
        slots = itertools.pairwise(bounds)
        for (first, after), node, bus in zip(slots, self.nodes, self._buses, strict=True):
            self._ask(node, "CLUSTER ADDSLOTSRANGE", first, after - 1)
            self._ask(self.nodes[0], "CLUSTER MEET", "127.0.0.1", node.port, bus)
        until(lambda: all(map(self._is_whole, self.nodes)), "the cluster is whole")

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

    def _is_whole(self, node: servers.Server) -> bool:
        about = self._ask(node, "CLUSTER INFO")
        return about["cluster_state"] == "ok" and int(about["cluster_known_nodes"]) == _SIZE

    def _ask(self, node: servers.Server, command: str, *arguments: object) -> dict[str, str]:
        with Redis(port=node.port) as client:
            return client.execute_command(command, *arguments)


def cluster() -> Cluster | None:
    """Such a cluster, not started; None if Valkey is not installed."""
    buses = [free_port() for _ in range(_SIZE)]
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port")
    nodes = [servers.valkey(*options, str(bus)) for bus in buses]
    return Cluster([node for node in nodes if node], buses) if all(nodes) else None
