"""Lists of waits, in each database: what their places have, page by page, and what a clear makes of it."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timedelta, timezone

import pytest
from airflow.models.task_state_store import TaskStateStoreModel
from airflow.models.xcom import XComModel
from airflow.sdk.serde import serialize
from airflow_events.inbox import transactions
from airflow_events.inbox.entries import Place, Places, Status, answer_of, as_json, entry_of
from airflow_events.inbox.models import EventTaken, EventWait
from airflow_events.listeners.support import serde
from sqlalchemy import insert, select, update

ARGUMENTS = hashlib.sha256(b"arguments").hexdigest()
ID, OTHER = hashlib.sha256(b"orders/0/17").hexdigest(), hashlib.sha256(b"orders/0/18").hexdigest()
MOMENT = "2026-11-23T12:00:00.000+00:00"


def begun(waits, **more):
    ti = waits.deferred()
    waits.begin(ti, **more)
    return ti


def test_places_say_what_they_have_and_what_they_have_lost(waits):
    ti = begun(waits)
    waits.record(ti, 1, '"a"', record_id="a", place=0, arguments=ARGUMENTS)
    waits.record(ti, 1, '"b"', record_id="b", place=7, arguments=ARGUMENTS, after="x")
    waits.finish(ti, 1, "a", None, place=0)
    waits.record(ti, 1, '"c"', record_id="c", place=9)
    waits.lose(ti, 1, "c", place=9)
    answer = waits.places(ti, 1)
    assert (answer.status, answer.next) == (Status.DONE, None)
    assert answer.places == (
        Place("a", "committed", '"a"', place=0, arguments=ARGUMENTS),
        Place("b", "recorded", '"b"', "x", place=7, arguments=ARGUMENTS),
        Place("", "", "null", place=9, lost="c"),
    )
    assert waits.places(begun(waits), 1).places == ()


def test_a_long_list_is_told_page_by_page(waits):
    ti = begun(waits)
    for place in range(0, 20, 2):
        waits.record(ti, 1, record_id=f"r{place}", place=place)
    seen, start = [], 0
    while start is not None:
        answer = waits.places(ti, 1, start=start, limit=3)
        assert len(answer.places) <= 3
        seen += [place.place for place in answer.places]
        start = answer.next
    assert seen == list(range(0, 20, 2))


def test_long_events_make_short_pages_and_no_page_is_empty(waits, monkeypatch):
    monkeypatch.setattr(transactions, "_LARGEST_PAGES", 2500)
    one, other = begun(waits), begun(waits)
    for ti in (one, other):
        for place in range(4):
            waits.record(ti, 1, json.dumps("x" * 800), record_id=f"r{place}", place=place)
    answers = transactions.places(waits.session, [Places(ti, generation=1) for ti in (one, other)])
    assert [[place.place for place in answer.places] for answer in answers] == [[0, 1], [0]]
    assert [answer.next for answer in answers] == [2, 1]


def test_what_has_begun_again_elsewhere_is_told_nothing(waits):
    ti = begun(waits)
    waits.record(ti, 1, place=0)
    waits.begin(ti)
    assert waits.places(ti, 1).status == Status.OUTLIVED
    assert len(waits.places(ti, 2).places) == 1
    waits.set(ti, state="failed")
    assert waits.places(ti, 2).status == Status.OUTLIVED


def test_airflows_own_timeout_stays_while_other_places_wait(waits):
    ti = begun(waits, timeout=60.0)
    waits.record(ti, 1, place=0)
    assert waits.state(ti).trigger_timeout is not None


def test_a_wait_that_begins_after_its_deadline_is_not_ended_by_airflow_at_once(waits):
    """A worker has deferred it again, since no triggerer was there in time."""
    ti = begun(waits, timeout=1.0)
    late = datetime.now(timezone.utc) - timedelta(hours=1)
    waits.session.execute(update(EventWait).values(deadline=late))
    waits.set(ti, trigger_timeout=datetime.now(timezone.utc) + timedelta(hours=1))
    waits.begin(ti, timeout=1.0, grace=300.0)
    at = waits.state(ti).trigger_timeout.replace(tzinfo=timezone.utc)
    assert timedelta(seconds=200) < at - datetime.now(timezone.utc) <= timedelta(seconds=300)


def test_an_event_of_a_place_is_known_by_the_places_name(waits):
    ti = begun(waits)
    assert waits.record(ti, 1, record_id="r", place=3, identity=ID, content=ARGUMENTS).status == Status.DONE
    answer = waits.record(ti, 1, place=4, identity=ID, content=ARGUMENTS)
    assert (answer.status, answer.message) == (Status.TAKEN, "shop/run_1/wait/-1#3")


def test_without_replay_a_clear_waits_for_all_of_them_again_and_a_retry_does_not(waits):
    ti = begun(waits, replay=False)
    neighbour = begun(waits, replay=False)
    for of in (ti, neighbour):
        waits.record(of, 1, '"a"', record_id="a", place=0)
        waits.finish(of, 1, "a", None, place=0)
    waits.record(ti, 1, '"b"', record_id="b", place=1, identity=ID, content=ARGUMENTS)
    ti = waits.again(ti)
    assert [place.phase for place in waits.places(ti, waits.begin(ti, replay=False).generation).places] == [
        "committed",
        "recorded",
    ]
    ti = waits.again(ti, cleared=True)
    generation = waits.begin(ti, replay=False).generation
    # The second was not committed: its source will deliver it again, to whoever waits.
    assert waits.places(ti, generation).places == (Place("", "", "null", place=1, lost="b"),)
    assert waits.session.scalars(select(EventTaken)).all() == []
    assert waits.record(ti, generation, '"c"', record_id="c", place=0, arguments=ARGUMENTS).status == Status.DONE
    assert waits.begin(waits.again(ti), replay=False).generation == generation + 1
    assert waits.row(ti, 0).event == '"c"'
    assert waits.row(neighbour, 0).event == '"a"'


def test_a_single_event_that_is_given_back_can_be_recorded_for_whoever_waits(waits):
    ti, other = begun(waits, replay=False), begun(waits)
    waits.record(ti, 1, '"a"', record_id="a", identity=ID, content=ARGUMENTS)
    ti = waits.again(ti, cleared=True)
    assert waits.begin(ti, replay=False).superseded.record_id == "a"
    assert waits.record(other, 1, '"a"', identity=ID, content=ARGUMENTS).status == Status.DONE


def test_only_what_the_batch_is_about_is_read(waits):
    """Of two lists, not each place of the one with each of the other's."""
    one, other = begun(waits), begun(waits)
    for ti in (one, other):
        for place in (0, 1):
            waits.record(ti, 1, place=place)
    entries = [Places(one, place=0), Places(other, place=1)]
    batch = transactions._Batch.lock(waits.session, entries)
    assert sorted(place for _, place in batch.waits) == [-1, -1, 0, 1]


def test_pages_survive_json():
    entry = Places("t", generation=2, start=5, limit=10)
    assert entry_of(json.loads(json.dumps(as_json(entry)))) == entry
    answer = transactions.Answer("done", places=(Place("r", "recorded", "1", "x", 3, "l", ARGUMENTS),), next=4)
    assert answer_of(json.loads(json.dumps(as_json(answer)))) == answer


class FirstEdition:
    """What it wrote for a task that waits for several events."""

    def __init__(self, waits, ti):
        self.session = waits.session
        dag_id, task_id, run_id, map_index = waits._keys[ti]
        self.of = {"dag_id": dag_id, "task_id": task_id, "run_id": run_id, "map_index": map_index}
        self.run = int(run_id.removeprefix("run_"))
        self.now = datetime.now(timezone.utc)

    def xcom(self, key, value):
        """By a trigger."""
        row = {**self.of, "dag_run_id": self.run, "key": key, "timestamp": self.now, "value": value}
        self.session.execute(insert(XComModel.__table__).values(row))

    def stored(self, key, value):
        """By a worker."""
        row = {**self.of, "dag_run_id": self.run, "key": key, "value": json.dumps(value), "updated_at": self.now}
        self.session.execute(insert(TaskStateStoreModel.__table__).values(row))


def record(event, id, phase="recorded", **more):
    return {"phase": phase, "event": serialize(event), "id": id, "recorded_at": MOMENT, **more}


CALL = "0123456789abcdef01"
PADDED = CALL.ljust(64, "0")


def by_place(waits, ti):
    return {place.place: place for place in waits.places(ti, waits.begin(ti).generation).places}


def test_the_log_of_the_first_edition_is_taken_over(waits):
    ti = waits.deferred()
    first = FirstEdition(waits, ti)
    first.xcom("event_log:newest", "abc")
    first.xcom("event_log:0.0:last", "abc")
    first.xcom("event_log:0.0:closed", True)
    moment = datetime(2030, 1, 1, tzinfo=timezone.utc)
    page = [
        {"index": 0, "call": CALL, "record": record(moment, "a", "committed")},
        {"index": 1, "call": CALL, "record": record({"n": 1}, "b")},
        {"index": 2, "call": CALL, "record": record("lost", "c")},
        {"index": 2, "call": CALL, "lost": "c"},
        {"index": 2, "call": CALL, "record": record("second", "d", after="f" * 64)},
    ]
    first.xcom("event_log:0.0:0", {"full": True, "entries": page})
    first.xcom("event_log:0.0:1", {"full": False, "entries": [{"index": 1, "call": CALL, "committed": "b"}]})
    first.xcom("event_progress", {"phase": "recorded", "arrived": 3, "of": 5, "uncommitted": 1})

    found = by_place(waits, ti)
    assert serde.decode(found[0].event) == moment
    lost = hashlib.sha256(b"c").hexdigest()[:40]
    assert found[0] == Place("a", "committed", found[0].event, place=0, arguments=PADDED)
    assert found[1] == Place("b", "committed", '{"n": 1}', place=1, arguments=PADDED)
    assert found[2] == Place("d", "recorded", '"second"', "f" * 40, 2, lost, PADDED)
    assert waits.finish(ti, 1, "d", None, place=2).status == Status.DONE
    assert by_place(waits, ti)[2].phase == "committed"  # a second beginning reads the rows, not the log


def test_of_two_records_of_the_first_edition_for_one_place_the_committed_one_counts(waits):
    ti = waits.deferred()
    first = FirstEdition(waits, ti)
    for slot, id in (("0.0", "a"), ("1.0", "b")):
        entries = [{"index": 0, "call": CALL, "record": record(id, id)}]
        if id == "b":
            entries.append({"index": 0, "call": CALL, "committed": "b"})
        first.xcom(f"event_log:{slot}:0", {"full": False, "entries": entries})
    assert [place.record_id for place in by_place(waits, ti).values()] == ["b"]


@pytest.mark.parametrize(("generation", "count"), [("3", 1), ("2", 0)])
def test_what_a_worker_of_the_first_edition_recorded_counts_for_its_generation(waits, generation, count):
    ti = waits.deferred()
    assert waits.state(ti).max_tries == 3
    first = FirstEdition(waits, ti)
    page = {"full": False, "entries": [{"index": 0, "call": CALL, "record": record("a", "a", "committed")}]}
    first.stored(f"{generation}:event_log:0.0:0", page)
    assert len(by_place(waits, ti)) == count


def test_a_log_of_the_first_edition_that_cannot_be_read_is_told_and_left(waits, caplog):
    ti = waits.deferred()
    FirstEdition(waits, ti).xcom("event_log:0.0:0", "s3://somewhere-else")
    assert by_place(waits, ti) == {}
    assert "shop/run_1/wait/-1 cannot be read" in caplog.text
