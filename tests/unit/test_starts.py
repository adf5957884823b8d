"""What starts runs: what a DAG author meets, and what a trigger does with events of a real directory."""

from __future__ import annotations

import asyncio
import enum
import json
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest
from airflow.sdk import DAG, Asset, task
from airflow_events import EventListener, start_on
from airflow_events.inbox.entries import Answer, Settle, StartRoom, StartRun, Status
from airflow_events.listeners.base import current_wait
from airflow_events.listeners.directory import DirectoryListener, DirectoryWatchListener
from airflow_events.listeners.http import HttpListener
from airflow_events.listeners.support import commit
from airflow_events.listeners.timer import TimerListener
from airflow_events.triggers import source_state, starting
from airflow_events.triggers.inbox import Inbox
from airflow_events.triggers.start_rules import NoLogicalDate, Rules
from airflow_events.triggers.starting import shapes
from airflow_events.triggers.starts import StartTrigger


class Shop(DirectoryListener):
    async def poll_for_event(self, url, password=None):
        raise NotImplementedError

    @classmethod
    def check_arguments(cls, url, password=None): ...


class WithoutId(EventListener):
    async def poll_for_event(self): ...

    async def event_checkpointed(self, event): ...


@task
def upstream(): ...


@pytest.mark.parametrize(
    ("listener", "arguments", "of_asset", "error", "message"),
    [
        (TimerListener, ["2030-01-01"], {}, TypeError, "nothing to acknowledge"),
        (DirectoryWatchListener, ["d"], {}, TypeError, "nothing to acknowledge"),
        (HttpListener, ["k"], {}, TypeError, "nothing to acknowledge"),
        (WithoutId, [], {}, TypeError, "what tells an event from every other"),
        (DirectoryListener, [], {}, TypeError, "does not take these arguments"),
        (DirectoryListener, ["{{ var.value.folder }}"], {}, TypeError, "for which a template could be rendered"),
        (DirectoryListener, [object()], {}, TypeError, "cannot be stored"),
        ("text", [], {}, TypeError, "a listener is a subclass"),
        (DirectoryListener, ["d"], {"up_to": 0}, ValueError, "of at least 1, not 0"),
        (DirectoryListener, ["d"], {"up_to": True}, ValueError, "not True"),
        (DirectoryListener, ["d"], {"batch": 5}, ValueError, "give both"),
        (DirectoryListener, ["d"], {"within": 5}, ValueError, "give both"),
        (DirectoryListener, ["d"], {"batch": 1001, "within": 5}, ValueError, "at most 1000, not 1001"),
        (DirectoryListener, ["d"], {"batch": 5, "within": timedelta()}, ValueError, "more than 0 seconds"),
        (DirectoryListener, ["d"], {"batch": 5, "within": 5, "key": "name"}, ValueError, "give key, or batch"),
        (DirectoryListener, ["d"], {"key": "name["}, ValueError, "key is no JMESPath expression"),
        (DirectoryListener, ["d"], {"key": 7}, TypeError, "key is a JMESPath expression or None, not 7"),
        (DirectoryListener, ["d"], {"logical_date": "a b"}, ValueError, "logical_date is no JMESPath expression"),
        (DirectoryListener, ["d"], {"match": "a b"}, ValueError, "match is no JMESPath expression"),
        (DirectoryListener, ["d"], {"match": 7}, TypeError, "match is a mapping, a JMESPath expression or None"),
        (DirectoryListener, ["d"], {"match": {"a": date(2026, 1, 1)}}, TypeError, "match takes what JSON has"),
    ],
)
def test_what_cannot_be_is_refused_when_the_dag_is_parsed(listener, arguments, of_asset, error, message):
    with pytest.raises(error, match=message):
        start_on.override(**of_asset)(listener, *arguments)


@pytest.mark.parametrize("option", ["up_to", "batch", "key", "match", "name"])
def test_an_argument_of_its_own_is_pointed_to_where_it_goes(option):
    with pytest.raises(TypeError, match=rf"start_on\.override\({option}=\.\.\.\)\(DirectoryListener"):
        start_on(DirectoryListener, "drops", **{option: 5})


def test_a_path_and_a_member_of_an_enum_stand_for_what_they_say():
    class Folder(enum.Enum):
        DROPS = "/drops"

    told = start_on(DirectoryListener, Folder.DROPS, archive=Path("/done")).watchers[0].trigger.serialize()[1]
    assert json.loads(json.dumps(told)) == told
    assert told == start_on(DirectoryListener, "/drops", archive="/done").watchers[0].trigger.serialize()[1]


def test_the_output_of_a_task_is_refused():
    with DAG("d"), pytest.raises(TypeError, match="start_on takes literals"):
        start_on(DirectoryListener, upstream())


def test_another_asset_cannot_be_waited_for_and_may_start_runs_too():
    started = start_on(DirectoryListener, "d")
    for both in (lambda: started & Asset("a"), lambda: Asset("a") & started):
        with pytest.raises(TypeError, match="starts a run for each event"):
            both()
    assert {asset.name for asset in (started | Asset("a")).objects} == {"DirectoryListener('d')", "a"}


def test_the_name_says_what_it_is_and_never_means_two():
    assert start_on(DirectoryListener, "d", settle=2).name == "DirectoryListener('d', settle=2)"
    assert start_on.override(name="drops")(DirectoryListener, "d").name == "drops"
    rules = start_on.override(up_to=3, match={"size": 0}, key="name")(DirectoryListener, "d")
    assert rules.name == "DirectoryListener('d') up_to=3 match={\"size\": 0} key=name"
    long = [start_on(DirectoryListener, "d", "x" * 300 + end).name for end in "ab"]
    assert len(set(long)) == 2 and len(long[0]) < 600
    assert start_on(DirectoryListener, "größe").name.isascii()


def test_a_name_shows_no_password():
    first, other = (
        start_on(Shop, f"amqp://ada:{word}@broker/orders", word).name for word in ("s3cret", "hunter2")
    )
    assert first.startswith("Shop('amqp://ada:***@broker/orders', '***') #")
    assert first != other
    assert "s3cret" not in start_on(Shop, "amqp://broker/orders", password="s3cret").name


def test_an_event_becomes_plain_json():
    at = datetime(2026, 11, 29, 1, 2, 3, tzinfo=timezone.utc)
    event = {
        "at": at, "day": date(2026, 1, 2), "time": time(1, 2), "took": timedelta(minutes=1), "some": {3, 1},
        "pair": (1, [None, True]), "price": Decimal("1.50"), "text": "größe",
    }  # fmt: skip
    assert shapes(event) == {
        "at": "2026-11-29T01:02:03+00:00", "day": "2026-01-02", "time": "01:02:00", "took": 60.0, "some": [1, 3],
        "pair": [1, [None, True]], "price": "1.50", "text": "größe",
    }  # fmt: skip


class Room:
    """The inbox, as far as a trigger that starts runs sees it; a test says what it answers to a file's name."""

    def __init__(self):
        self.room, self.answers, self.asked, self.looks = 0, {}, [], 0
        self.settled, self.entries = [], []
        self.poison = {}  # what is answered to whatever has a file of that name
        self.of_room = Status.DONE
        self.lag, self.trouble = None, ""  # as it was told last
        self.hold = None  # until when answers are held back

    async def ask(self, entry):
        if isinstance(entry, StartRoom):
            self.looks += 1
            self.lag, self.trouble = entry.lag, entry.trouble
            return Answer(self.of_room, room=self.room, dags=("order",))
        if isinstance(entry, Settle):
            self.settled.append(entry.identity)
            return Answer(Status.DONE)
        assert isinstance(entry, StartRun)
        names = [json.loads(told.event)["name"] for told in entry.events]
        self.asked.append(names[0] if entry.makes == "run" else names)
        self.entries.append(entry)
        if self.hold is not None:
            await self.hold.wait()
        status = self.answers.get(names[0], Status.DONE)
        status = next((self.poison[name] for name in names if name in self.poison), status)
        self.room -= status == Status.DONE
        return Answer(status, "why", room=self.room, dags=("order",))


@pytest.fixture
def inbox(monkeypatch):
    room = Room()
    monkeypatch.setattr(Inbox, "of_loop", lambda: room)
    for name, seconds in (("_LOOK_WHEN_FULL", 0.05), ("_LOOK_WHILE_OPEN", 0.1), ("_FIRST_PAUSE", 0.2)):
        monkeypatch.setattr(starting, name, seconds)
    for name in ("_EVERY", "_UNTIL_POLLED", "_IS_OVER"):
        monkeypatch.setattr(source_state, name, 0.2)
    return room


@pytest.fixture
def drops(tmp_path):
    folder = tmp_path / "drops"
    folder.mkdir()
    return folder


@pytest.fixture
async def running(drops):
    """Let triggers run, as a triggerer has them."""
    started = set()

    def start(**what):
        trigger = StartTrigger.of(DirectoryListener, (str(drops),), {"settle": 0}, **what)
        _, arguments = trigger.serialize()
        trigger = StartTrigger(**json.loads(json.dumps(arguments)))
        trigger.trigger_id = 7

        async def run():
            async for _ in trigger.run():
                raise AssertionError("it does not yield")

        one = asyncio.create_task(run())
        started.add(one)
        return one

    yield start
    for one in started:
        one.cancel()
    await asyncio.wait(started)


@pytest.fixture
async def trigger(running):
    return running()


async def until(condition):
    async def look():
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(look(), 20)


def drop(drops, *names):
    for name in names:
        (drops / name).write_text(name)


def archived(drops):
    return sorted(p.name for p in (drops / ".airflow-events/archive").glob("*/*"))


async def test_each_event_is_told_once_and_acknowledged(inbox, drops, trigger):
    inbox.room = 10
    drop(drops, "a", "b", "c")
    await until(lambda: len(inbox.settled) == 3)
    assert archived(drops) == sorted(inbox.asked) == ["a", "b", "c"]


async def test_without_room_nothing_is_polled(inbox, drops, trigger):
    await until(lambda: inbox.looks > 2)
    drop(drops, "a", "b", "c")
    looks = inbox.looks
    await until(lambda: inbox.looks > looks + 5)
    assert inbox.asked == []
    inbox.room = 2
    await until(lambda: len(archived(drops)) == 2)
    looks = inbox.looks
    await until(lambda: inbox.looks > looks + 5)
    assert len(inbox.asked) == 2 and inbox.room == 0


async def test_no_more_events_are_in_hand_than_there_is_room(inbox, drops, trigger):
    inbox.room, inbox.hold = 2, asyncio.Event()
    drop(drops, "a", "b", "c")
    await until(lambda: len(inbox.asked) == 2)
    looks = inbox.looks
    await until(lambda: inbox.looks > looks + 5)
    assert len(inbox.asked) == 2
    inbox.hold.set()


async def test_what_is_taken_already_is_acknowledged(inbox, drops, trigger):
    inbox.room = 10
    inbox.answers["a"] = Status.TAKEN
    drop(drops, "a")
    await until(lambda: inbox.settled)
    assert archived(drops) == ["a"]


@pytest.mark.parametrize("status", [Status.FULL, Status.OUTLIVED])
async def test_what_is_not_taken_is_given_back_and_comes_again(inbox, drops, trigger, status):
    inbox.room = 10
    inbox.answers["a"] = status
    drop(drops, "a")
    await until(lambda: inbox.asked.count("a") >= 2)
    assert archived(drops) == [] and (drops / "a").exists()
    inbox.answers.clear()
    await until(lambda: archived(drops) == ["a"])


async def test_a_trigger_that_is_nobodys_for_a_while_leaves(inbox, running, monkeypatch):
    monkeypatch.setattr(starting, "_UNUSUAL", 0.2)
    one = running()
    inbox.of_room = Status.OUTLIVED
    await until(lambda: inbox.looks > 2)
    inbox.of_room, inbox.room = Status.DONE, 1
    await asyncio.sleep(0.4)
    assert not one.done()
    inbox.of_room, inbox.room = Status.OUTLIVED, 0
    await until(one.cancelled)


@pytest.mark.parametrize("status", [Status.REJECTED, Status.INVALID])
async def test_what_no_run_can_have_stays_and_others_go_on(inbox, drops, trigger, monkeypatch, status):
    """Its params refuse it, or the database does; some while later that may be mended."""
    monkeypatch.setattr(commit, "_LATER", 2.0)
    inbox.room = 10
    inbox.answers["a"] = status
    drop(drops, "a")
    await until(lambda: "a" in inbox.asked)
    drop(drops, "b")
    await until(lambda: archived(drops) == ["b"])
    assert (drops / "a").exists() and inbox.asked.count("a") == 1
    inbox.answers.clear()
    await until(lambda: archived(drops) == ["a", "b"])


async def test_what_cannot_be_acknowledged_is_in_nobodys_way(inbox, drops, trigger, monkeypatch):
    """A message whose deletion its source refuses must not take the place of those behind it again and again."""

    async def fails(self, event):
        if event["name"] == "a":
            failures.append(event)
            raise OSError("its source refuses it")
        await checkpointed(self, event)

    failures, checkpointed = [], DirectoryListener.event_checkpointed
    monkeypatch.setenv("AIRFLOW__EVENTS__COMMIT_TIMEOUT", "0.1")
    monkeypatch.setattr(DirectoryListener, "event_checkpointed", fails)
    inbox.room = 10
    drop(drops, "a")
    await until(lambda: failures)
    drop(drops, "b")
    await until(lambda: archived(drops) == ["b"])
    assert inbox.asked.count("a") == 1


async def test_what_has_begun_goes_on_when_the_trigger_is_cancelled(inbox, drops, trigger):
    inbox.room, inbox.hold = 10, asyncio.Event()
    drop(drops, "a")
    await until(lambda: inbox.asked == ["a"])
    trigger.cancel()
    await asyncio.wait({trigger})
    inbox.hold.set()
    await until(lambda: archived(drops) == ["a"])


async def test_a_source_that_fails_is_tried_again(inbox, drops, trigger, monkeypatch):
    inbox.room = 10
    failures = []

    async def fail(self, *args, **kwargs):
        failures.append(1)
        raise OSError("no such source")

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryListener, "poll_for_event", fail)
        await until(lambda: failures)
        before = len(failures)
        await until(lambda: len(failures) > before)
        await until(lambda: inbox.trouble == "OSError: no such source")
    drop(drops, "a")
    await until(lambda: archived(drops) == ["a"])
    await until(lambda: inbox.trouble == "")


async def test_what_is_left_at_the_source_is_told(inbox, drops, running):
    inbox.room = 2
    drop(drops, *map(str, range(5)))
    running()
    await until(lambda: len(inbox.asked) == 2 and inbox.lag == 3)


async def test_what_does_not_match_is_acknowledged_and_starts_nothing(inbox, drops, running):
    inbox.room = 10
    running(match=json.dumps("ends_with(name, '.csv') && size > `0`"))
    drop(drops, "a.csv", "b.txt")
    (drops / "c.csv").write_text("")
    await until(lambda: archived(drops) == ["a.csv", "b.txt", "c.csv"])
    assert inbox.asked == ["a.csv"]
    await until(lambda: len(inbox.settled) == 1)
    assert inbox.settled == [inbox.entries[0].events[0].identity]


@pytest.mark.parametrize("status", [Status.REJECTED, Status.INVALID])
async def test_one_that_no_run_can_have_keeps_no_others_of_its_batch(inbox, drops, running, status):
    inbox.room = 10
    batches(running, batch=4)
    inbox.poison = {"c": status}
    drop(drops, "a", "b", "c", "d")
    await until(lambda: archived(drops) == ["a", "b", "d"])
    assert (drops / "c").exists() and {len(names) for names in inbox.asked} == {4, 2, 1}


async def test_a_batch_is_of_what_matches(inbox, drops, running):
    inbox.room = 10
    batches(running, match=json.dumps({"size": "1"}))
    drop(drops, "a", "bb", "c", "dd", "e")
    await until(lambda: archived(drops) == ["a", "bb", "c", "dd", "e"])
    assert [sorted(names) for names in inbox.asked] == [["a", "c", "e"]]


@pytest.mark.parametrize("status", [Status.BUSY, Status.FULL])
async def test_an_event_waits_for_its_key_and_others_go_on(inbox, drops, running, status):
    inbox.room = 4
    running(key="name")
    inbox.answers["a"] = status
    drop(drops, "a", "b")
    await until(lambda: archived(drops) == ["b"])
    drop(drops, "c")
    await until(lambda: archived(drops) == ["b", "c"] and inbox.asked.count("a") > 2)
    assert (drops / "a").exists() and {entry.key for entry in inbox.entries} == {"a", "b", "c"}
    inbox.answers.clear()
    await until(lambda: archived(drops) == ["a", "b", "c"])


async def test_events_of_a_key_are_asked_for_in_their_order(inbox, drops, running):
    inbox.room = 10
    running(key='`"one"`')
    drop(drops, "a")
    inbox.answers["a"] = Status.BUSY
    await until(lambda: inbox.asked.count("a") > 1)
    drop(drops, "b")
    looks = inbox.looks
    await until(lambda: inbox.looks > looks + 5)
    drop(drops, "c")
    looks = inbox.looks
    await until(lambda: inbox.looks > looks + 5)
    assert {*inbox.asked} == {"a"}  # of all that wait for a key one asks
    inbox.answers.clear()
    await until(lambda: archived(drops) == ["a", "b", "c"])
    assert list(dict.fromkeys(inbox.asked)) == ["a", "b", "c"]


async def test_events_of_a_key_that_come_at_once_are_asked_for_in_the_order_of_their_source(inbox, drops, running):
    inbox.room = 100
    names = [f"{number:02}" for number in range(40)]
    drop(drops, *names)
    running(key='`"one"`')
    await until(lambda: archived(drops) == names)
    assert list(dict.fromkeys(inbox.asked)) == names  # a file that was read as it was archived comes again


async def test_what_waits_for_its_key_is_given_back_when_the_trigger_is_cancelled(inbox, drops, running):
    inbox.room = 10
    one = running(key='`"one"`')
    inbox.answers = {"a": Status.BUSY, "b": Status.BUSY}
    drop(drops, "a", "b")
    await until(lambda: len(inbox.asked) > 2)
    one.cancel()
    await asyncio.wait({one})
    inbox.answers.clear()
    running()
    await until(lambda: archived(drops) == ["a", "b"])


async def test_what_is_asked_as_the_trigger_is_cancelled_is_given_back_if_its_key_is_busy(inbox, drops, running):
    inbox.room, inbox.hold = 10, asyncio.Event()
    one = running(key="name")
    inbox.answers = {"a": Status.BUSY}
    drop(drops, "a", "b")
    await until(lambda: sorted(inbox.asked) == ["a", "b"])
    one.cancel()
    await asyncio.wait({one})
    inbox.hold.set()
    await until(lambda: archived(drops) == ["b"])
    inbox.answers.clear()
    running()
    await until(lambda: archived(drops) == ["a", "b"])


async def test_an_event_without_a_key_waits_for_none(inbox, drops, running):
    inbox.room = 10
    running(key="nothing.here")
    drop(drops, "a", "b")
    await until(lambda: archived(drops) == ["a", "b"])
    assert {entry.key for entry in inbox.entries} == {None}


async def test_the_logical_date_is_the_events(inbox, drops, running, caplog):
    inbox.room = 10
    running(logical_date="modified")
    drop(drops, "a")
    await until(lambda: archived(drops) == ["a"])
    [entry] = inbox.entries
    assert datetime.fromisoformat(entry.logical_date) == datetime.fromisoformat(
        json.loads(entry.events[0].event)["modified"]
    )


async def test_an_event_without_a_moment_for_its_logical_date_stays_at_its_source(inbox, drops, running, caplog):
    inbox.room = 10
    running(logical_date="name")
    drop(drops, "a", "2026-11-28T10:00:00+01:00")
    await until(lambda: len(archived(drops)) == 1)
    assert [entry.logical_date for entry in inbox.entries] == ["2026-11-28T09:00:00+00:00"]
    await until(lambda: "the logical date cannot be 'a'" in caplog.text)
    assert (drops / "a").exists()


@pytest.mark.parametrize(
    ("found", "moment"),
    [
        ("2026-11-28", "2026-11-28T00:00:00+00:00"),
        ("2026-11-28T01:02:03.000004", "2026-11-28T01:02:03.000004+00:00"),
        (1_795_824_000.5, "2026-11-28T00:00:00.500000+00:00"),
        ("1795824000", "2026-11-28T00:00:00+00:00"),
        (None, None),
        ("PT1H", "it is a duration"),
        (True, "of type bool"),
        ([1], "of type list"),
        (1e30, "cannot be 1e"),
        ("soon", "neither ISO 8601"),
    ],
)
def test_moments_for_a_logical_date(found, moment):
    rules = Rules(logical_date="at")
    if moment is None or moment.endswith("+00:00"):
        assert rules.logical_date_of({"at": found}) == moment
    else:
        with pytest.raises(NoLogicalDate, match=moment):
            rules.logical_date_of({"at": found})


def batches(running, **more):
    return running(makes="batch", **{"batch": 3, "within": 600.0, **more})


async def test_a_full_batch_starts_a_run(inbox, drops, running):
    inbox.room = 10
    batches(running)
    drop(drops, "a", "b")
    await until(lambda: inbox.looks > 3)
    assert inbox.asked == []
    drop(drops, "c", "d")
    await until(lambda: archived(drops) == ["a", "b", "c"])
    assert [sorted(names) for names in inbox.asked] == [["a", "b", "c"]]
    assert (drops / "d").exists()


async def test_a_batch_starts_a_run_of_what_has_come_when_its_time_is_up(inbox, drops, running):
    inbox.room = 10
    batches(running, within=0.3)
    await until(lambda: inbox.looks > 8)
    assert inbox.asked == []  # never an empty one
    drop(drops, "a", "b")
    await until(lambda: archived(drops) == ["a", "b"])
    assert sorted(name for names in inbox.asked for name in names) == ["a", "b"]


async def test_what_is_gathered_is_given_back_when_there_is_no_room_any_more(inbox, drops, running):
    inbox.room = 10
    batches(running)
    drop(drops, "a", "b")
    await until(lambda: inbox.looks > 3)
    inbox.room = 0
    looks = inbox.looks
    await until(lambda: inbox.looks > looks + 2)
    drop(drops, "c")
    inbox.room = 1
    await until(lambda: archived(drops) == ["a", "b", "c"])
    assert len(inbox.asked) == 1 and inbox.room == 0


async def test_a_poll_that_fails_ends_no_batch(inbox, drops, running, monkeypatch):
    inbox.room = 1
    (drops / "a").touch()
    poll = DirectoryListener.poll_for_event

    async def fail(self, *args, **kwargs):
        if current_wait().index == 2:
            raise OSError("no such source")
        return await poll(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryListener, "poll_for_event", fail)
        batches(running, within=2.0)
        await asyncio.sleep(1)
        assert not inbox.asked
    (drops / "b").touch()
    (drops / "c").touch()
    await until(lambda: inbox.asked)
    assert inbox.asked == [["a", "b", "c"]]


async def test_a_batch_is_no_larger_than_an_api_server_takes(inbox, drops, running, monkeypatch):
    inbox.room = 10
    monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_MAX_BODY", "3000")
    batches(running, batch=10, within=1.0)
    drop(drops, *(f"{letter * 100}" for letter in "abcdef"))
    await until(lambda: len(archived(drops)) == 6)
    assert len(inbox.asked) > 1
    assert sorted(name for batch in inbox.asked for name in batch) == [letter * 100 for letter in "abcdef"]


async def test_many_batches_follow_one_another(inbox, drops, running):
    inbox.room = 100
    batches(running, batch=70)
    drop(drops, *(f"{number:03}" for number in range(210)))
    await until(lambda: len(archived(drops)) == 210)
    assert [len(names) for names in inbox.asked] == [70, 70, 70]
    assert len({name for names in inbox.asked for name in names}) == 210


async def test_a_source_that_fails_for_days_is_tried_each_minute():
    loop = starting.Starts(starting.What(7, "m:L", [], {}, None, "run", Rules()))
    loop._failures = 5000
    loop._has_failed(OSError("no such source"))
    assert loop._fails and loop._fails_until - loop._now() <= 60
