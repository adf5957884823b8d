"""What AwaitMessageSensor applies to each message: take it."""

from __future__ import annotations

import json


def take(message):
    return {
        "value": json.loads(message.value()),
        "topic": message.topic(),
        "partition": message.partition(),
        "offset": message.offset(),
    }
