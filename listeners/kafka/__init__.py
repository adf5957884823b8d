"""
Apache Kafka: a topic as a queue with an acknowledgement for each message, and a topic as a log.

`state` is what is known of a queue, as a value; `ledger` keeps it on the broker by transactions; `consume` hands
messages out by it; `watch` reads a topic without a group; `client` makes Kafka's clients of an Airflow connection.
Why there is a ledger: ``docs/decisions/kafka-acknowledgement.md``.
"""

from __future__ import annotations

try:
    import confluent_kafka  # noqa: F401
except ImportError as error:
    raise ImportError("a Kafka listener needs: pip install airflow-provider-events[kafka]") from error

from airflow_events.listeners.kafka.consume import KafkaListener
from airflow_events.listeners.kafka.watch import KafkaWatchListener

__all__ = ["KafkaListener", "KafkaWatchListener"]
