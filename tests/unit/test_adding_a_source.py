"""The source that docs/adding-a-source.md shows does what a source owes."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from pathlib import Path
from types import ModuleType

import pytest
from airflow_events.errors import EventUndecodable
from airflow_events.listeners.base import Wait, check_listener, working_for

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-source.md"


@pytest.fixture(scope="module")
def shown():
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    module = ModuleType("shown")
    exec(compile(code, str(PAGE), "exec"), vars(module))
    return module


@pytest.fixture
def table(tmp_path):
    path = str(tmp_path / "events.db")
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT)")
    return path


def rows(path):
    with sqlite3.connect(path) as database:
        return [row for (row,) in database.execute("SELECT id FROM events ORDER BY id")]


def put(path, *bodies):
    with sqlite3.connect(path) as database:
        database.executemany("INSERT INTO events (body) VALUES (?)", [(body,) for body in bodies])


async def poll(shown, path, number):
    with working_for(Wait("dag", f"run{number}", "task")):
        return await shown.SqliteListener().poll_for_event(path)


async def test_each_row_goes_to_one_wait_and_is_there_until_it_is_acknowledged(shown, table):
    check_listener(shown.SqliteListener)
    polls = [asyncio.create_task(poll(shown, table, number)) for number in range(3)]
    put(table, "1", "2", "3")
    events = await asyncio.gather(*polls)
    assert sorted(event["value"] for event in events) == [1, 2, 3]
    assert rows(table) == [1, 2, 3]
    for event in events:
        await shown.SqliteListener().event_checkpointed(event)
    assert rows(table) == []
    await shown.SqliteListener().event_checkpointed(events[0])  # again, it changes nothing


async def test_what_is_given_back_goes_to_another_wait_under_the_same_id(shown, table):
    put(table, "1")
    first = await poll(shown, table, 1)
    await shown.SqliteListener().event_released(first, table)
    second = await poll(shown, table, 2)
    assert shown.SqliteListener().event_id(second) == shown.SqliteListener().event_id(first)


async def test_another_process_acknowledges(shown, table):
    put(table, "1", "2")
    event = {"path": table, "id": 1, "value": 1}
    await shown.SqliteListener().event_checkpointed(event)
    assert rows(table) == [2]


async def test_what_cannot_be_read_fails_one_wait_and_stops_nothing(shown, table):
    put(table, "{", "2")
    with pytest.raises(EventUndecodable) as failed:
        await poll(shown, table, 1)
    assert failed.value.event_id == shown.coordinates(table, 1)
    assert (await poll(shown, table, 2))["value"] == 2
    assert rows(table) == [1, 2]
