"""Files on a real file system, several waits and several triggerers on one directory."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from airflow_events.errors import EventLost
from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.directory import DirectoryListener, DirectoryWatchListener, claims, hub
from airflow_events.listeners.directory.claims import Drops, identity_of, key_of


def wait(number=0):
    return Wait("dag", f"run{number}", "task")


@pytest.fixture
def drops(tmp_path):
    folder = tmp_path / "drops"
    folder.mkdir()
    return folder


def poll(drops, number=0, listener=DirectoryListener, **kwargs):
    with working_for(wait(number)):
        return asyncio.create_task(listener().poll_for_event(str(drops), **{"settle": 0, **kwargs}))


async def commit(event, number=0):
    with working_for(wait(number)):
        await DirectoryListener().event_checkpointed(event)


async def release(drops, number=0, event=None):
    with working_for(wait(number)):
        await DirectoryListener().event_released(event, str(drops))


def left(drops):
    return sorted(p.name for p in drops.iterdir() if p.is_file())


def archived(drops):
    return sorted(p.name for p in (drops / ".airflow-events/archive").glob("*/*/*"))


async def soon(task):
    return await asyncio.wait_for(task, 10)


async def nothing(task):
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(task), 0.5)


async def cancel(task):
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_file_is_taken_and_committed(drops):
    (drops / "a.csv").write_text("12345")
    event = await soon(poll(drops, pattern="*.csv"))
    assert (event["name"], event["size"], event["directory"]) == ("a.csv", 5, str(drops))
    assert left(drops) == []
    assert not Path(event["path"]).exists()
    await commit(event)
    assert Path(event["path"]).read_text() == "12345"


async def test_a_file_that_comes_later_is_reported_by_the_file_system(drops, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__DIRECTORY_RESCAN_INTERVAL", "3600")
    task = poll(drops)
    await asyncio.sleep(0.7)
    (drops / "late").touch()
    assert (await soon(task))["name"] == "late"


async def test_without_reports_the_directory_is_polled(drops, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__DIRECTORY_RESCAN_INTERVAL", "0.1")
    monkeypatch.setattr(hub, "_network_file_system", lambda root: "nfs4")
    task = poll(drops)
    await asyncio.sleep(0.3)
    (drops / "late").touch()
    assert (await soon(task))["name"] == "late"


async def test_polling_again_returns_the_same_event_until_it_is_committed(drops):
    for name in "ab":
        (drops / name).touch()
    event = await soon(poll(drops))
    assert await soon(poll(drops)) == event
    await commit(event)
    assert await soon(poll(drops)) != event


async def test_each_file_goes_to_one_wait(drops):
    tasks = [poll(drops, number) for number in range(20)]
    for number in range(20):
        (drops / f"f{number:02}").touch()
    events = await soon(asyncio.gather(*tasks))
    assert sorted(e["name"] for e in events) == [f"f{n:02}" for n in range(20)]
    for number, event in reversed(list(enumerate(events))):
        await commit(event, number)
    assert archived(drops) == [f"f{n:02}" for n in range(20)]


async def test_the_file_changed_longest_ago_comes_first(drops):
    for name, age in (("new", 10), ("old", 1000), ("middle", 100)):
        (drops / name).touch()
        os.utime(drops / name, (time.time() - age,) * 2)
    names = [(await soon(poll(drops, number)))["name"] for number in range(3)]
    assert names == ["old", "middle", "new"]


async def test_a_commit_may_be_repeated_also_long_after(drops):
    (drops / "a").touch()
    event = await soon(poll(drops))
    for _ in range(3):
        await commit(event)
    assert archived(drops) == ["a"]


async def test_a_commit_of_an_event_that_another_wait_has_is_refused(drops):
    (drops / "a").touch()
    event = await soon(poll(drops))
    await release(drops)  # as a lapsed claim would be
    taken = await soon(poll(drops, 1))
    with pytest.raises(EventLost):
        await commit(event)
    await commit(taken, 1)
    with pytest.raises(EventLost):
        await commit(event)
    await commit(taken, 1)


async def test_a_lapsed_claim_on_another_file_is_not_committed_in_its_place(drops):
    (drops / "a").touch()
    old = await soon(poll(drops))
    await release(drops)
    other = await soon(poll(drops, 1))
    (drops / "b").touch()
    new = await soon(poll(drops))
    with pytest.raises(EventLost):
        await commit(old)
    assert await soon(poll(drops)) == new
    await commit(new)
    await commit(other, 1)


async def test_deleting_leaves_a_marker_that_tells_who_committed(drops):
    (drops / "a").touch()
    event = await soon(poll(drops, on_commit="delete"))
    assert event["path"] is None
    for _ in range(2):
        await commit(event)
    assert left(drops) == archived(drops) == []
    with pytest.raises(EventLost):
        await commit(event, 1)


async def test_an_archive_of_ones_own(drops):
    (drops / "a").touch()
    event = await soon(poll(drops, archive="done"))
    await commit(event)
    assert Path(event["path"]).is_relative_to(drops / "done")
    assert Path(event["path"]).exists()


async def test_a_released_file_goes_to_the_next(drops):
    (drops / "a").write_text("x")
    first = await soon(poll(drops))
    await release(drops, event=first)
    assert left(drops) == ["a"]
    second = await soon(poll(drops, 1))
    assert {**second, "path": None} == {**first, "path": None}  # the identity too


async def release_beside_a_new_file(drops):
    (drops / "a").write_text("first")
    await soon(poll(drops))
    (drops / "a").write_text("second")
    await release(drops)
    assert (drops / "a").read_text() == "second"
    assert (await soon(poll(drops, 1)))["size"] == len("second")
    Drops.of(str(drops), None).sweep(0)
    assert (drops / "a").read_text() == "first"


async def test_releasing_never_overwrites_a_new_file_of_that_name(drops):
    await release_beside_a_new_file(drops)


async def test_releasing_after_the_commit_changes_nothing(drops):
    (drops / "a").touch()
    event = await soon(poll(drops))
    await commit(event)
    await release(drops, event=event)
    assert left(drops) == []
    assert archived(drops) == ["a"]


async def test_a_file_that_is_still_written_to_is_not_taken(drops):
    (drops / "a").write_text("1")
    task = poll(drops, settle=0.6)
    for _ in range(6):
        await asyncio.sleep(0.2)
        with (drops / "a").open("a") as file:
            file.write("1")
        assert not task.done()
    assert (await soon(task))["size"] == 7


async def test_a_done_marker_is_waited_for_and_moved_with_the_file(drops):
    (drops / "a").touch()
    task = poll(drops, pattern="a", done_marker="{name}.done")
    await nothing(task)
    (drops / "a.done").touch()
    event = await soon(task)
    assert event["name"] == "a"
    await release(drops)
    assert left(drops) == ["a", "a.done"]
    await commit(await soon(poll(drops, pattern="a", done_marker="{name}.done")))
    assert left(drops) == []
    assert archived(drops) == ["a", "a.done"]


async def test_hidden_files_and_folders_and_links_are_left_alone(drops, tmp_path):
    (drops / ".tmp").touch()
    (drops / "folder").mkdir()
    (tmp_path / "target").touch()
    (drops / "link").symlink_to(tmp_path / "target")
    task = poll(drops)
    await nothing(task)
    await cancel(task)
    assert (await soon(poll(drops, pattern=".tm*")))["name"] == ".tmp"


async def test_watching_takes_nothing(drops):
    tasks = [poll(drops, n, DirectoryWatchListener, pattern="b*") for n in range(3)]
    (drops / "a").touch()
    (drops / "b1").touch()
    assert [e["name"] for e in await soon(asyncio.gather(*tasks))] == ["b1"] * 3
    assert left(drops) == ["a", "b1"]
    assert not (drops / ".airflow-events").exists()


async def test_a_cancelled_wait_takes_no_file_from_others(drops):
    first = poll(drops, 0)
    second = poll(drops, 1)
    await asyncio.sleep(0.2)
    await cancel(first)
    (drops / "a").touch()
    assert (await soon(second))["name"] == "a"


async def test_a_claim_that_lapses_goes_back(drops):
    (drops / "a").touch()
    event = await soon(poll(drops))
    ours = Drops.of(str(drops), None)
    ours.sweep(older_than=time.time() - 3600)
    assert left(drops) == []
    ours.sweep(older_than=time.time() + 1)
    assert left(drops) == ["a"]
    with pytest.raises(EventLost):
        await commit(event)


def test_a_dag_may_be_called_as_our_own_folders(drops):
    """Its claims are not taken for something that was half put back."""
    ours = Drops.of(str(drops), None)
    ours.prepare()
    (drops / "a").touch()
    for dag_id in ("released", "=released"):
        key = key_of(Wait(dag_id, "run", "task"))
        assert ours.claim(key, "a", identity_of((drops / "a").stat()), None)
        ours.sweep(older_than=0)
        assert left(drops) == []
        ours.release(key)


def test_folders_without_a_file_are_no_claim(drops):
    ours = Drops.of(str(drops), None)
    ours.prepare()
    (ours.claims / key_of(wait()) / "1-2-3").mkdir(parents=True)
    (drops / "a").touch()
    assert ours.held(key_of(wait())) is None
    assert ours.claim(key_of(wait()), "a", identity_of((drops / "a").stat()), None).name == "a"


@pytest.fixture
def no_renameat2(monkeypatch):
    """A file system like NFS, which cannot rename without overwriting."""

    class Library:
        def __init__(self, *args, **kwargs):
            pass

        @staticmethod
        def renameat2(*args):
            claims.ctypes.set_errno(claims.errno.EINVAL)
            return -1

    monkeypatch.setattr(claims.ctypes, "CDLL", Library)


async def test_releasing_where_a_rename_may_overwrite(drops, no_renameat2):
    await release_beside_a_new_file(drops)


@pytest.mark.parametrize("taken", [False, True])
async def test_dying_between_link_and_unlink_doubles_nothing(drops, no_renameat2, monkeypatch, taken):
    (drops / "a").write_text("first")
    await soon(poll(drops))
    with monkeypatch.context() as dies:

        def die(path):
            raise SystemExit

        dies.setattr(claims.os, "unlink", die)
        with pytest.raises(SystemExit):
            Drops.of(str(drops), None).release(key_of(wait()))
    if taken:
        await soon(poll(drops, 1))
    Drops.of(str(drops), None).sweep(0)
    files = [p for p in drops.glob("**/*") if p.is_file()] + list((drops / ".airflow-events").glob("*/*/*/*"))
    assert len({p for p in files if p.name == "a"}) == 1


async def test_one_waits_odd_marker_is_its_own_affair(drops):
    odd = poll(drops, 1, done_marker="{name}.{day}")
    (drops / "a").touch()
    assert (await soon(poll(drops, 0)))["name"] == "a"
    await cancel(odd)


async def test_names_that_airflow_cannot_store_are_passed_over(drops):
    os.close(os.open(os.fsencode(drops) + b"/\xff", os.O_CREAT))
    task = poll(drops)
    (drops / "good").touch()
    assert (await soon(task))["name"] == "good"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"settle": -1}, "settle is a number of seconds"),
        ({"done_marker": "done"}, "a file name with {name} in it, not 'done'"),
        ({"pattern": "a/*"}, "names in the directory itself, not 'a/\\*'"),
        ({"on_commit": "burn"}, "'archive' or 'delete', not 'burn'"),
        ({"archive": "/proc"}, "on another file system"),
    ],
)
async def test_arguments_that_will_not_do_are_named(drops, kwargs, message):
    with pytest.raises((ValueError, PermissionError), match=message):
        await soon(poll(drops, **kwargs))


@pytest.mark.parametrize("listener", [DirectoryListener, DirectoryWatchListener])
async def test_a_directory_that_is_not_there_is_named(tmp_path, listener):
    with pytest.raises(FileNotFoundError, match=r"no such directory to watch.*missing"):
        await soon(poll(tmp_path / "missing", listener=listener))


async def test_one_look_serves_all_waits(drops, monkeypatch):
    """A thousand waits and ten thousand files: the number of scans does not depend on the waits."""
    scans = []
    scan = hub._scan
    monkeypatch.setattr(hub, "_scan", lambda root: scans.append(1) or scan(root))
    for number in range(10_000):
        (drops / f"{number}.txt").touch()
    tasks = [poll(drops, n, DirectoryWatchListener, pattern=f"{n}.csv") for n in range(1000)]
    await asyncio.sleep(2)
    assert not any(task.done() for task in tasks)
    (drops / "17.csv").touch()
    assert (await soon(tasks[17]))["name"] == "17.csv"
    assert len(scans) < 100
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _claim_until_killed(root, number, started):
    ours = Drops.of(root, None)
    ours.prepare()
    started.set()
    while True:
        for name in sorted(os.listdir(root)):
            if not name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    identity = identity_of(os.stat(f"{root}/{name}"))
                    ours.claim(key_of(wait(number)), name, identity, None)
        ours.release(key_of(wait(number)))


def test_processes_killed_while_they_claim_and_release_lose_and_double_nothing(drops):
    """Two triggerers on each of three waits, killed at random: every file is somewhere exactly once."""
    names = [f"f{n:03}" for n in range(30)]
    for name in names:
        (drops / name).write_text(name)
    context = multiprocessing.get_context("fork")
    for _ in range(8):
        started = context.Event()
        workers = [
            context.Process(target=_claim_until_killed, args=(str(drops), number // 2, started))
            for number in range(6)
        ]
        for worker in workers:
            worker.start()
        assert started.wait(10)
        time.sleep(0.15)
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
            assert worker.exitcode == -signal.SIGKILL
    ours = Drops.of(str(drops), None)
    counts = [len(list(claim.glob("*/*"))) for claim in ours.claims.glob("*")]
    assert all(count <= 1 for count in counts)
    ours.sweep(older_than=time.time() + 1)
    ours.sweep(older_than=time.time() + 1)
    assert left(drops) == names
    assert all((drops / name).read_text() == name for name in names)


@pytest.mark.parametrize("patterns", [["*"] * 200, [f"{n}.csv" for n in range(200)]], ids=["one", "each"])
async def test_many_files_or_watches_at_once_are_given_out_over_several_turns(drops, turn, patterns):
    for number in range(200):
        (drops / f"{number}.csv").touch()
    done = []
    tasks = [
        poll(drops, number, DirectoryWatchListener, pattern=pattern) for number, pattern in enumerate(patterns)
    ]
    for task in tasks:
        task.add_done_callback(lambda _: done.append(turn()))
    events = await soon(asyncio.gather(*tasks))
    assert len({event["name"] for event in events}) == len(set(patterns))
    assert max(Counter(done).values()) <= 50
