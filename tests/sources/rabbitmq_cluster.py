"""RabbitMQ as a cluster of three nodes, each of which can be killed, and started again on what it left."""

from __future__ import annotations

import subprocess

import servers

_SIZE = 3


class Cluster:
    """Nodes with one ``epmd`` and one cookie, those of the first."""

    def __init__(self, nodes: list[servers.RabbitMQServer]) -> None:
        self.nodes = nodes
        first = nodes[0]
        for node in nodes[1:]:
            node.epmd_port = first.epmd_port
            node.environment |= {"HOME": str(first.folder), "ERL_EPMD_PORT": str(first.epmd_port)}

    def start(self) -> None:
        first, *others = self.nodes
        try:
            first.start()
            for node in others:
                node.start()
                for command in (("stop_app",), ("join_cluster", first.node), ("start_app",)):
                    self._control(node, *command)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        for node in self.nodes:  # none waits for the others
            if node.process is not None:
                node.kill(0)
        for node in self.nodes:
            node.stop()

    def _control(self, node: servers.RabbitMQServer, *command: str) -> None:
        done = subprocess.run(
            [str(node.program.with_name("rabbitmqctl")), "--node", node.node, *command],
            env=node.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def cluster() -> Cluster | None:
    """Such a cluster, not started; None if RabbitMQ is not installed."""
    nodes = [servers.rabbitmq() for _ in range(_SIZE)]
    return Cluster([node for node in nodes if node]) if all(nodes) else None
