"""A consumer that reads, and is no member of its group. All of it blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from airflow_events.listeners.kafka.client import PATIENCE, BrokerUnavailable, Clients, Place
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

# Seconds for which reading waits for messages, after which new waits are seen.
_BLOCK = 0.5


class Reader:
    """
    Reads topics for a group, of which it is no member.

    :ivar consumer: which `Group` may use beside, until it is closed.
    """

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        # An offset that is not there is an error: where to go on then, whoever reads knows.
        self.consumer: Consumer = clients.consumer(**{"auto.offset.reset": "error"})

    def bounds(self, places: Iterable[Place]) -> dict[Place, tuple[int, int]]:
        """Return the offsets of the first message that is there, and of the next one that will be."""
        found = {}
        with self._clients.refusals():
            for place in places:
                bounds = self.consumer.get_watermark_offsets(TopicPartition(*place), timeout=PATIENCE)
                if bounds is None:
                    raise BrokerUnavailable("the broker does not say how far the topic goes")
                found[place] = bounds
        return found

    def assign(self, positions: Mapping[Place, int]) -> None:
        """Read on from there, and nothing else."""
        with self._clients.refusals():
            self.consumer.assign([TopicPartition(*place, offset) for place, offset in positions.items()])

    def read(self, most: int) -> list[Message]:
        """Return messages, and for a partition that is read to its end an error that says so, and how far."""
        with self._clients.refusals():
            found = self.consumer.consume(1, _BLOCK)
            if found and most > 1:
                found += self.consumer.consume(most - 1, 0)
            self._clients.check()
            for message in found:
                error = message.error()
                if error is not None and error.code() != KafkaError._PARTITION_EOF:
                    raise KafkaException(error)
        return found

    def close(self) -> None:
        """Close the consumer."""
        self.consumer.close()
