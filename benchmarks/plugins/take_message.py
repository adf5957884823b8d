"""What AwaitMessageSensor applies to each message: take it."""

from __future__ import annotations

import json


def take(message):
    return json.loads(message.value())
