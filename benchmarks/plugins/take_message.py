"""What AwaitMessageSensor applies to each message: take it."""

from __future__ import annotations

import json


def value(message):
    return json.loads(message.value())
