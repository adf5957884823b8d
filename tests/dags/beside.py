"""A module beside the DAG files, which no triggerer can import."""

import asyncio
from pathlib import Path

from airflow_events import EventListener

GREETING = "hello"


def read(path):
    return Path(path).read_text()


class BesideListener(EventListener):
    async def poll_for_event(self, path):
        while not Path(path).exists():
            await asyncio.sleep(0.2)
        return f"{GREETING} {read(path)}"
