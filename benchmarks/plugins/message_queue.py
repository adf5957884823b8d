"""A task that defers itself with Airflow's ``MessageQueueTrigger``, which has no operator of its own."""

from __future__ import annotations

from typing import Any

from airflow.providers.common.messaging.triggers.msg_queue import MessageQueueTrigger
from airflow.sdk import BaseOperator


class MessageQueueWait(BaseOperator):
    """Waits for one message of Kafka."""

    template_fields = ("topics", "kafka_config_id")

    def __init__(self, topics: list[str], apply_function: str, kafka_config_id: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.topics = topics
        self.apply_function = apply_function
        self.kafka_config_id = kafka_config_id

    def execute(self, context: Any) -> None:
        trigger = MessageQueueTrigger(
            scheme="kafka",
            topics=self.topics,
            apply_function=self.apply_function,
            kafka_config_id=self.kafka_config_id,
        )
        self.defer(trigger=trigger, method_name="execute_complete")

    def execute_complete(self, context: Any, event: Any = None) -> Any:
        return event
