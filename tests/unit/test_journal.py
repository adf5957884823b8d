"""The journal: what is written stays and is found, whoever else writes, and whoever dies."""

from __future__ import annotations

import asyncio
import json
import random

import pytest
from airflow_events.listeners.commit import Phase, Record
from airflow_events.triggers import journal as journals
from airflow_events.triggers.journal import Entry, EventRecord, Journal, Records, _Slots, is_page
from hypothesis import given, settings
from hypothesis import strategies as st


class Memory:
    """Airflow's XComs, each request a step that others may come before."""

    def __init__(self, order=None):
        self.values = {}
        self.order = order
        self.writes = []
        self.failing = 0

    async def get(self, name):
        await self.step()
        return json.loads(self.values.get(name, "null"))

    async def set(self, name, value):
        await self.step()
        if self.failing:
            self.failing -= 1
            raise ConnectionError("away")
        self.writes.append(name)
        self.values[name] = json.dumps(value)

    async def step(self):
        for _ in range(self.order.randrange(4) if self.order else 0):
            await asyncio.sleep(0)


def record(event, phase=Phase.RECORDED, id=""):
    return Record(event, phase, id or f"id of {event}")


async def read(memory):
    journal = Journal(memory)
    await journal.read()
    return {index: journal.records.of(index) for index in journal.records}


@given(st.randoms(use_true_random=False), st.integers(2, 6))
@settings(max_examples=200, deadline=None)
def test_no_two_take_one_slot_and_every_slot_is_found(order, count):
    async def scenario():
        memory = Memory(order)
        taken = await asyncio.gather(*[_Slots(memory).take() for _ in range(count)])
        assert len(set(taken)) == count
        assert {slot async for slot in _Slots(memory).taken(set())} >= set(taken)

    asyncio.run(scenario())


@given(st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_who_died_while_taking_a_slot_is_in_nobodys_way(order):
    async def scenario():
        memory = Memory(order)
        tasks = [asyncio.create_task(_Slots(memory).take()) for _ in range(4)]
        for task in tasks[:3]:
            for _ in range(order.randrange(20)):
                await asyncio.sleep(0)
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        slots = [slot for slot in done if isinstance(slot, tuple)]
        last = await _Slots(memory).take()
        assert len({*slots, last}) == len(slots) + 1
        assert {slot async for slot in _Slots(memory).taken(set())} >= {*slots, last}

    asyncio.run(scenario())


@given(st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_what_several_write_at_once_is_found_by_whoever_reads_after(order):
    async def scenario():
        memory = Memory(order)
        written = {}

        async def writer(number):
            journal = Journal(memory)
            for event in range(order.randrange(1, 8)):
                index = number * 10 + event
                await journal.write(Entry(index, "c", record(index)))
                written[index] = index
                before = dict(written)
                assert {i: r.event for i, r in (await read(memory)).items()}.items() >= before.items()

        journals._LONGEST_PAGE, before = 3, journals._LONGEST_PAGE
        try:
            await asyncio.gather(*[writer(number) for number in range(3)])
        finally:
            journals._LONGEST_PAGE = before
        assert {i: r.event for i, r in (await read(memory)).items()} == written

    asyncio.run(scenario())


async def test_a_reader_that_goes_on_reads_what_was_added_to_a_page_it_has_read(monkeypatch):
    monkeypatch.setattr(journals, "_LONGEST_PAGE", 2)
    memory = Memory()
    writer, reader = Journal(memory), Journal(memory)
    for index in range(7):
        await writer.write(Entry(index, "c", record(index)))
        await reader.read()
        assert set(reader.records) == set(range(index + 1))
    assert max(int(name.rpartition(":")[2]) for name in memory.values if is_page(name)) == 3


async def test_what_comes_at_once_is_written_at_once():
    memory = Memory()
    journal = Journal(memory)
    await asyncio.gather(*[journal.write(Entry(n, "c", record(n))) for n in range(500)])
    assert sum(map(is_page, memory.writes)) <= 4  # 400 on a page
    assert len(await read(memory)) == 500


async def test_a_page_that_could_not_be_written_leaves_no_hole(monkeypatch):
    monkeypatch.setattr(journals, "_LONGEST_PAGE", 1)
    memory = Memory()
    journal = Journal(memory)
    await journal.write(Entry(0, "c", record(0)))
    memory.failing = 1
    with pytest.raises(ConnectionError):
        await journal.write(Entry(1, "c", record(1)))
    await journal.write(Entry(2, "c", record(2)))
    assert {0, 2} <= set(await read(memory))


async def test_the_phases_of_a_record():
    memory = Memory()
    store = EventRecord(Journal(memory), 5, "c")
    assert await store.read() is None
    await store.write(record("a"))
    assert (await read(memory))[5].phase is Phase.RECORDED
    await store.write(record("a").committed())
    assert (await read(memory))[5] == record("a", Phase.COMMITTED)
    again = EventRecord(Journal(memory), 5, "c")
    assert await again.read() == record("a", Phase.COMMITTED)
    assert await EventRecord(Journal(memory), 5, "other arguments").read() is None


async def test_a_record_that_is_lost_makes_room_for_another():
    memory = Memory()
    store = EventRecord(Journal(memory), 0, "c")
    await store.write(record("a"))
    assert store.after == ""
    await store.drop(record("a"))
    assert await read(memory) == {}
    names = {store.after}
    await store.write(record("b"))
    assert (await read(memory))[0].event == "b"
    await store.drop(record("b"))
    names.add(store.after)
    assert len(names - {""}) == 2
    assert EventRecord(Journal(memory), 1, "c").after == ""


def test_records_say_the_same_in_whatever_order_they_are_read():
    entries = [
        Entry(0, "c", record("a")),
        Entry(0, "c", record("b")),
        Entry(0, "c", committed="id of b"),
        Entry(1, "c", record("c")),
        Entry(1, "c", lost="id of c"),
    ]
    said = set()
    for seed in range(50):
        random.Random(seed).shuffle(entries)
        records = Records()
        for entry in entries:
            records.add(entry)
        said.add((records.of(0).event, records.of(0).phase, records.of(1), tuple(records), records.uncommitted))
    assert said == {("b", Phase.COMMITTED, None, (0,), 1)}


async def test_who_may_not_record_is_told_before():
    async def check():
        raise PermissionError("the task has ended")

    memory = Memory()
    with pytest.raises(PermissionError):
        await EventRecord(Journal(memory, check), 0, "c").read()
    assert memory.writes == []


async def test_a_reading_that_fails_on_its_way_leaves_nothing_out(monkeypatch):
    monkeypatch.setattr(journals, "_LONGEST_PAGE", 2)

    class Failing(Memory):
        async def get(self, name):
            if name.endswith(":2") and self.failing:
                self.failing -= 1
                raise ConnectionError("away")
            return await super().get(name)

    memory = Failing()
    writer, reader = Journal(memory), Journal(memory)
    for number in range(6):
        await writer.write(Entry(number, "c", record(number)))
    memory.failing = 1
    with pytest.raises(ConnectionError):
        await reader.read()
    await reader.read()
    assert sorted(reader.records) == list(range(6))
