"""Files on a real file system, several waits and several triggerers on one directory."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from airflow_events.errors import EventLost, SourceUnreachable
from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.directory import DirectoryListener, DirectoryWatchListener, files, hub
from airflow_events.triggers.event import recording


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


async def release(event, number=0):
    with working_for(wait(number)):
        await DirectoryListener().event_released(event, event["directory"])


def elsewhere(work, *arguments, **more):
    """What another triggerer does: in an event loop of its own."""

    async def run():
        return await work(*arguments, **more)

    def in_thread():
        found.append(asyncio.run(run()))

    found = []
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join(20)
    [result] = found
    return result


def left(drops):
    return sorted(p.name for p in drops.iterdir() if p.is_file())


def archived(drops):
    return sorted(p.name for p in (drops / ".airflow-events/archive").glob("*/*"))


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
    assert left(drops) == ["a.csv"]  # until it is recorded
    assert not Path(event["path"]).exists()
    await commit(event)
    assert left(drops) == []
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


async def test_a_commit_in_another_process_too(drops):
    (drops / "a").touch()
    event = await soon(poll(drops))
    await asyncio.to_thread(elsewhere, commit, event)
    assert (archived(drops), left(drops)) == (["a"], [])
    await commit(event)
    assert (archived(drops), left(drops)) == (["a"], [])


async def test_deleting(drops):
    (drops / "a").touch()
    event = await soon(poll(drops, on_commit="delete"))
    assert event["path"] is None
    for _ in range(3):
        await commit(event)
        assert [file for file in drops.rglob("*") if file.is_file()] == []
    (drops / "a").write_text("the next one of that name")
    await commit(event)  # again, by a triggerer that comes after the one which died before it could say so
    assert left(drops) == ["a"]
    assert (await soon(poll(drops, 1)))["id"] != event["id"]


async def test_the_next_file_of_that_name_is_another_event(drops):
    (drops / "a").write_text("first")
    event = await soon(poll(drops))
    await commit(event)
    (drops / "a").write_text("second")
    await commit(event)
    second = await soon(poll(drops, 1))
    assert DirectoryListener().event_id(second) != DirectoryListener().event_id(event)
    await commit(second, 1)
    assert archived(drops) == ["a", "a"]


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_that_is_written_to_after_it_was_taken_is_not_the_event(drops, replaced):
    """Its writer paused for longer than it takes to settle."""
    (drops / "a").write_text("half")
    event = await soon(poll(drops))
    if replaced:
        (drops / "b").write_text("half and half")
        (drops / "b").rename(drops / "a")
    else:
        with (drops / "a").open("a") as file:
            file.write(" and half")
    with pytest.raises(EventLost, match="was written to after it was taken"):
        await commit(event)
    assert left(drops) == ["a"]
    whole = await soon(poll(drops))
    assert whole["size"] == len("half and half")
    await commit(whole)
    assert Path(whole["path"]).read_text() == "half and half"


async def test_a_file_that_is_written_to_after_it_was_taken_is_not_deleted(drops):
    """The event of half of it is dropped, as that file is the same one; a file in its place is the next event."""
    (drops / "a").write_text("half")
    if files.Attributes.at(drops / "a").born is None:
        pytest.skip("the file system does not say when a file was made")
    event = await soon(poll(drops, on_commit="delete"))
    with (drops / "a").open("a") as file:
        file.write(" and half")
    with pytest.raises(EventLost, match="was written to after it was taken"):
        await commit(event)
    whole = await soon(poll(drops, on_commit="delete"))
    assert whole["size"] == len("half and half")
    (drops / "b").write_text("the next")
    (drops / "b").rename(drops / "a")
    await commit(whole)
    assert left(drops) == ["a"]
    await commit(await soon(poll(drops, 1, on_commit="delete")), 1)
    assert left(drops) == []


async def test_what_is_moved_to_be_deleted_and_is_another_file_is_kept(drops, monkeypatch):
    """It came in the moment of the rename, and its own name is taken again when it is put back."""
    (drops / "a").write_text("first")
    event = await soon(poll(drops, pattern="a", on_commit="delete"))
    rename = os.rename

    def overwritten(old, new):
        (drops / "new").write_text("second")
        rename(drops / "new", drops / "a")
        rename(old, new)
        (drops / "a").write_text("third")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "rename", overwritten)
        await commit(event)
    await commit(event)
    assert sorted(path.read_text() for path in drops.rglob("*") if path.is_file()) == ["second", "third"]


async def test_a_file_that_is_overwritten_as_it_is_moved_is_put_back(drops, monkeypatch):
    (drops / "a").write_text("first")
    (drops / "a.done").touch()
    event = await soon(poll(drops, pattern="a", done_marker="{name}.done"))
    rename = os.rename

    def overwritten(old, new):
        if Path(old).name == "a":
            (drops / "new").write_text("second")
            rename(drops / "new", drops / "a")
        rename(old, new)

    monkeypatch.setattr(files.os, "rename", overwritten)
    with pytest.raises(EventLost, match="was written to again while it was moved"):
        await commit(event)
    assert (left(drops), archived(drops)) == (["a", "a.done"], [])
    assert (drops / "a").read_text() == "second"


async def test_two_triggerers_may_give_a_file_to_a_wait_each_and_both_may_commit_it(drops):
    """The inbox decides whose it is; the other one acknowledges it."""
    (drops / "a").touch()
    event = await soon(poll(drops))
    again = await asyncio.to_thread(elsewhere, poll_once, drops)
    assert again == event
    await asyncio.to_thread(elsewhere, commit, again)
    await commit(event)
    assert archived(drops) == ["a"]


async def test_two_waits_that_archive_it_elsewhere_are_given_the_same_event(drops):
    (drops / "a").touch()
    event = await soon(poll(drops))
    again = await asyncio.to_thread(elsewhere, poll_once, drops, archive="done")
    assert again["path"] != event["path"]
    contents = {recording(DirectoryListener, "l", wait(), each)["content"] for each in (event, again)}
    assert len(contents) == 1


async def poll_once(drops, **more):
    with working_for(wait()):
        return await DirectoryListener().poll_for_event(str(drops), settle=0, **more)


async def test_an_archive_of_ones_own(drops):
    (drops / "a").touch()
    event = await soon(poll(drops, archive="done"))
    await commit(event)
    assert Path(event["path"]).is_relative_to(drops / "done")
    assert Path(event["path"]).exists()


def test_an_archive_may_be_below_a_home(drops, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "etl"))
    assert files.Drops.of(str(drops), "~/done").archive == tmp_path / "etl/done"
    assert files.Drops.of("~/drops").root == tmp_path / "etl/drops"


async def test_a_released_file_goes_to_the_next(drops):
    (drops / "a").write_text("x")
    first = await soon(poll(drops))
    second = poll(drops, 1)
    await nothing(second)
    await release(first)
    assert await soon(second) == first
    assert left(drops) == ["a"]


async def test_releasing_after_the_commit_changes_nothing(drops):
    (drops / "a").touch()
    event = await soon(poll(drops))
    await commit(event)
    await release(event)
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
    assert left(drops) == ["a", "a.done"]
    await commit(event)
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


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system that has such times")
async def test_a_file_of_a_year_that_no_datetime_has():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        drops = Path(folder)
        (drops / "late").write_text("here")
        os.utime(drops / "late", (300_000_000_000,) * 2)
        assert (await soon(poll(drops, listener=DirectoryWatchListener)))["modified"] is None
        event = await soon(poll(drops))
        assert event["modified"] is None
        await commit(event)
        assert left(drops) == []


async def test_a_cancelled_wait_takes_no_file_from_others(drops):
    first = poll(drops, 0)
    second = poll(drops, 1)
    await asyncio.sleep(0.2)
    await cancel(first)
    (drops / "a").touch()
    assert (await soon(second))["name"] == "a"


@pytest.fixture(params=["renameat2", "link"])
def renames(request, monkeypatch):
    if request.param == "link":
        monkeypatch.setattr(files, "_libc", object)  # a C library without it, nor with statx


@pytest.mark.usefixtures("renames")
async def test_what_the_first_edition_had_claimed_goes_back_when_nobody_commits_it(drops, monkeypatch):
    claim = drops / ".airflow-events/claims/dag.task.0123/1-2-3"
    claim.mkdir(parents=True)
    (claim / "a").write_text("claimed")
    (claim / "b").write_text("its name is taken")
    (drops / "b").write_text("new")
    task = poll(drops, pattern="a")
    await nothing(task)
    await cancel(task)
    monkeypatch.setenv("AIRFLOW__EVENTS__DIRECTORY_CLAIM_TIMEOUT", "0")
    files.put_back_claims(drops)
    assert (drops / "a").read_text() == "claimed"
    assert (drops / "b").read_text() == "new"
    assert (claim / "b").read_text() == "its name is taken"


async def test_what_the_first_edition_had_recorded_and_claimed_is_committed(drops):
    (drops / "a").touch()
    identity = files.Attributes.of((drops / "a").stat()).identity
    ours = drops / ".airflow-events"
    (ours / "claims/dag.task.0123" / identity).mkdir(parents=True)
    (drops / "a").rename(ours / "claims/dag.task.0123" / identity / "a")
    path = ours / "archive/dag.task.0123" / identity / "a"
    event = {"name": "a", "path": str(path), "directory": str(drops), "size": 0, "id": identity}
    for _ in range(2):
        await commit(event)
        assert path.exists()
    assert not list((ours / "claims").glob("*/*/*"))


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


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize(
    ("archive", "message"),
    [("archive", "this process may not write to {root}"), (None, "{root}/.airflow-events/removal, where")],
)
def test_a_directory_that_may_not_be_written_to_is_named(archive, message):
    """What was recorded could never be committed."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "archive").mkdir(mode=0o777)
        root.chmod(0o755)
        if not (child := os.fork()):
            said = ""
            try:
                os.setuid(65534)
                files.Drops(root, archive and root / archive).check()
            except Exception as error:
                said = str(error)
            os._exit(0 if message.format(root=root) in said else 1)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"settle": -1}, "settle is a number of seconds"),
        ({"done_marker": "done"}, "a file name with {name} in it, not 'done'"),
        ({"settle": math.nan}, "settle is a number of seconds"),
        ({"done_marker": 5}, "a file name with {name} in it, not 5"),
        ({"pattern": "a/*"}, "names in the directory itself, not 'a/\\*'"),
        ({"pattern": ["*.csv", "*.txt"]}, r"pattern is one shell pattern for the names of files, not \['"),
        ({"pattern": None}, "pattern is one shell pattern for the names of files, not None"),
        ({"pattern": ""}, "pattern is one shell pattern for the names of files, not ''"),
        ({"on_commit": "burn"}, "'archive' or 'delete', not 'burn'"),
        ({"archive": "/proc"}, "on another file system"),
        ({"archive": "/etc/hostname"}, "where committed files are moved, cannot be made: File exists"),
        ({"archive": "/etc/hostname/archive"}, "where committed files are moved, cannot be made: Not a directory"),
    ],
)
async def test_arguments_that_will_not_do_are_named(drops, kwargs, message):
    with pytest.raises((ValueError, PermissionError), match=message):
        await soon(poll(drops, **kwargs))


@pytest.mark.parametrize("directory", ["", " ", None])
@pytest.mark.parametrize("listener", [DirectoryListener, DirectoryWatchListener])
async def test_a_directory_without_a_name_is_not_the_root_of_them_all(drops, monkeypatch, listener, directory):
    """Airflow's own files are in it by default."""
    monkeypatch.setenv("AIRFLOW__EVENTS__DIRECTORY_ROOT", str(drops))
    (drops / "airflow.db").write_text("tables")
    with pytest.raises(ValueError, match="directory is the name of a directory, not"):
        await soon(asyncio.ensure_future(listener().poll_for_event(directory, settle=0)))


async def test_a_file_that_is_sent_once_more_is_another(drops):
    """By ``rsync -a``: with the same modification time, and, on ext4, the number of the one that was deleted."""
    ids, numbers = set(), set()
    for number in range(5):
        unfinished = drops.parent / "unfinished"
        unfinished.write_text("x")
        os.utime(unfinished, ns=(17 * 10**17, 17 * 10**17))
        numbers.add(unfinished.stat().st_ino)
        unfinished.rename(drops / "a")
        event = await soon(poll(drops, number, settle=0, on_commit="delete"))
        await commit(event, number)
        assert not (drops / "a").exists()
        ids.add(DirectoryListener().event_id(event))
    if files.Attributes.at(drops).born is None:
        pytest.skip("the file system does not tell when a file was made")
    assert len(ids) == 5


async def test_a_file_that_is_moved_during_a_look_is_none(drops, monkeypatch):
    """What is left of it would be another identity, and so another event."""
    scan, archive = hub._scan, drops.parent / "archive"

    def scan_and_move(root):
        found = scan(root)
        for name in found.files:
            (root / name).rename(archive)
        return found

    monkeypatch.setattr(hub, "_scan", scan_and_move)
    (drops / "a").write_text("x")
    task = poll(drops, settle=0)
    await nothing(task)
    assert archive.exists()
    await cancel(task)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_where_statx_is_forbidden_a_file_has_its_older_identity(drops, monkeypatch, number):
    class Libc:
        def statx(self, *_arguments):
            ctypes.set_errno(number)
            return -1

    (drops / "a").write_text("x")
    told = files.Attributes.at(drops / "a")
    monkeypatch.setattr(files, "_libc", Libc)
    assert files.Attributes.at(drops / "a") == told._replace(born=None)
    assert files.Attributes.at(drops / "b") is None


async def test_an_event_of_an_earlier_version_does_not_say_when_its_file_was_made(drops):
    (drops / "a").write_text("x")
    event = await soon(poll(drops, settle=0))
    without = event["id"].rpartition("-")[0]
    await commit({**event, "id": without, "path": event["path"].replace(event["id"], without)})
    assert not (drops / "a").exists()


@pytest.mark.parametrize("listener", [DirectoryListener, DirectoryWatchListener])
async def test_a_directory_that_does_not_come_is_named(tmp_path, listener, monkeypatch, caplog):
    task = poll(tmp_path / "missing", listener=listener)
    while "missing cannot be reached; trying again" not in caplog.text:
        await asyncio.sleep(0.02)
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
    with pytest.raises(SourceUnreachable, match=r"missing could not be reached.*no such directory to watch"):
        await soon(task)


@pytest.mark.parametrize("listener", [DirectoryListener, DirectoryWatchListener])
async def test_a_directory_that_comes_later_or_goes_and_comes_again(drops, listener):
    folder = drops / "2026-11-28"
    first, second = poll(folder, 0, listener, pattern="a"), poll(folder, 1, listener, pattern="b")
    await nothing(first)
    folder.mkdir()
    (folder / "a").touch()
    assert (await soon(first))["name"] == "a"
    (folder / "a").unlink(missing_ok=True)
    for file in folder.rglob(".*"):
        file.rename(drops / "elsewhere")
    folder.rmdir()
    await nothing(second)
    folder.mkdir()
    (folder / "b").touch()
    assert (await soon(second))["name"] == "b"


async def test_a_file_system_that_hangs_holds_up_nobody_else(drops, tmp_path, monkeypatch):
    hangs, scan, go_on = tmp_path / "hangs", hub._scan, threading.Event()
    hangs.mkdir()
    monkeypatch.setattr(hub, "_scan", lambda root: (go_on.wait(20) if root == hangs else None, scan(root))[1])
    hung = [poll(hangs, number) for number in range(3)]
    await asyncio.sleep(0.2)
    (drops / "a").touch()
    assert (await soon(poll(drops, 9)))["name"] == "a"
    await asyncio.to_thread(int)  # asyncio's own threads are free
    for task in hung:
        await cancel(task)
    go_on.set()


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


def _commit_until_killed(events, started):
    started.set()
    while True:
        for event in events:
            files.commit(event)


@pytest.mark.slow
def test_processes_killed_while_they_commit_lose_and_double_nothing(drops):
    """Four triggerers commit the same events, and are killed at random: every file is somewhere exactly once."""
    names = [f"f{n:03}" for n in range(60)]
    archive = drops / ".airflow-events/archive"
    events = []
    for name in names:
        (drops / name).write_text(name)
        identity = files.Attributes.at(drops / name).identity
        path = None if name < "f030" else str(archive / identity / name)
        events.append({"name": name, "id": identity, "directory": str(drops), "path": path})
    context = multiprocessing.get_context("fork")
    seen_half = 0
    for number in range(1, 13):
        started = context.Event()
        some = events[: 5 * number]
        workers = [context.Process(target=_commit_until_killed, args=(some, started)) for _ in range(4)]
        for worker in workers:
            worker.start()
        assert started.wait(10)
        time.sleep(0.002 * number)
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
            assert worker.exitcode == -signal.SIGKILL
        seen_half += bool(left(drops))
        found = left(drops) + archived(drops)
        assert len(found) == len(set(found))
        assert set(names[30:]) <= set(found)
    assert seen_half
    for event in events:
        files.commit(event)
    assert (left(drops), archived(drops)) == ([], names[30:])
    assert list(drops.rglob("removal/*/*")) == []


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


async def test_a_symbolic_link_is_watched_and_never_taken(drops, caplog):
    """As a volume of Kubernetes has its files: a commit would move the link, and leave the file."""
    (drops / "..data").mkdir()
    (drops / "..data" / "countries.json").write_text("[]")
    (drops / "countries.json").symlink_to("..data/countries.json")
    event = await soon(poll(drops, pattern="countries.json", listener=DirectoryWatchListener))
    assert (event["size"], event["path"]) == (2, str(drops / "countries.json"))
    task = poll(drops, pattern="countries.json")
    await nothing(task)
    await cancel(task)
    assert "countries.json is a symbolic link: watches see it, and no wait takes it" in caplog.text


@pytest.mark.parametrize("pattern", ["Müller-*.csv", "Müller-1.csv"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
async def test_a_pattern_matches_names_however_their_accents_are_written(drops, pattern, written):
    name = unicodedata.normalize(written, "Müller-1.csv")
    (drops / name).write_text("x")
    event = await soon(poll(drops, pattern=unicodedata.normalize("NFC", pattern)))
    assert event["name"] == name
    await commit(event)
    assert archived_names(drops) == [name]


def archived_names(drops):
    return [file.name for file in (drops / ".airflow-events/archive").glob("*/*")]


async def test_a_file_that_cannot_be_looked_at_holds_up_no_other(drops, monkeypatch, caplog):
    at = files.Attributes.at

    def broken(file):
        if file.name == "a":
            raise OSError(errno.EIO, "Input/output error", str(file))
        return at(file)

    monkeypatch.setattr(hub.Attributes, "at", broken)
    (drops / "a").write_text("x")
    (drops / "b").write_text("x")
    assert (await soon(poll(drops)))["name"] == "b"
    assert "Input/output error" in caplog.text


async def test_where_inodes_are_invented_they_tell_nothing(drops, monkeypatch):
    """Each machine's mount by sshfs, say, gives the file another number."""
    monkeypatch.setattr(hub, "_network_file_system", lambda root: "fuse.sshfs")
    (drops / "a").write_text("x")
    event = await soon(poll(drops))
    assert event["id"].startswith("0-") and event["id"].count("-") == 2
    shutil.copy2(drops / "a", drops / "other mount")
    (drops / "other mount").replace(drops / "a")
    await commit(event)
    assert archived_names(drops) == ["a"]


@pytest.mark.parametrize("listener", [DirectoryListener, DirectoryWatchListener])
async def test_a_file_settles_where_inodes_are_invented(drops, monkeypatch, listener):
    monkeypatch.setattr(hub, "_network_file_system", lambda root: "fuse.sshfs")
    (drops / "a").write_text("x")
    assert (await soon(poll(drops, listener=listener, settle=0.3)))["name"] == "a"


MOUNTS = """\
/dev/root / ext4 rw 0 0
blobfuse2 /mnt/blob fuse rw,nosuid,nodev,relatime,user_id=0,group_id=0,allow_other 0 0
systemd-1 /mnt/auto autofs rw,relatime,fd=29,pgrp=1,timeout=0 0 0
me@host:/data /mnt/auto fuse.sshfs rw,nosuid,nodev,relatime,user_id=0,group_id=0 0 0
//nas/share /mnt/nas cifs rw,relatime,vers=3.0,noserverino 0 0
me@host:/data /mnt/my\\040share fuse.sshfs rw,nosuid 0 0
"""


@pytest.mark.parametrize("root", ["/mnt/blob", "/mnt/auto", "/mnt/nas", "/mnt/my share"])
def test_what_invents_inodes_is_known(root, monkeypatch):
    read = Path.read_text

    def mounts(path, *args, **kwargs):
        return MOUNTS if str(path) == "/proc/self/mounts" else read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", mounts)
    found = hub._network_file_system(Path(root))
    assert found is not None and hub._INVENTS_INODES.fullmatch(found), found


async def test_over_the_network_a_file_has_one_identity_whether_its_birth_is_told_or_not(drops, monkeypatch):
    """It depends on the kernel of the machine that has mounted it."""
    monkeypatch.setattr(hub, "_network_file_system", lambda root: "nfs4")
    (drops / "a").write_text("x")
    event, at = await soon(poll(drops)), files.Attributes.at

    def without_birth(cls, file):
        return (found := at(file)) and found._replace(born=None)

    monkeypatch.setattr(files.Attributes, "at", classmethod(without_birth))
    other = elsewhere(lambda: soon(poll(drops, 1)))
    assert DirectoryListener().event_id(event) == DirectoryListener().event_id(other)


@pytest.fixture
def bound(tmp_path):
    """Two folders of one file system, each mounted by itself, as by ``subPath`` of a pod."""
    made = []
    for name in ("drops", "archive"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / name).mkdir()
        bind = ["mount", "--bind", tmp_path / "data" / name, tmp_path / name]
        if subprocess.run(bind, capture_output=True).returncode == 0:
            made.append(tmp_path / name)
    if len(made) == 2:
        yield tmp_path
    for one in made:
        subprocess.run(["umount", one], check=True)
    if len(made) < 2:
        pytest.skip("nothing can be mounted here")


async def test_an_archive_that_is_another_mount_of_the_same_file_system_is_refused(bound):
    (bound / "drops" / "a").write_text("x")
    with pytest.raises(ValueError, match=r"archive is another mount than .*drops"):
        await soon(poll(bound / "drops", archive=str(bound / "archive")))


@pytest.mark.parametrize("how", ["a hard link", "a copy with its time, where inodes are invented"])
async def test_a_file_that_is_dropped_once_more_holds_up_nobody(drops, monkeypatch, how):
    if how != "a hard link":
        monkeypatch.setattr(hub, "_network_file_system", lambda root: "fuse.sshfs")
    (drops / "a").write_text("x")
    os.utime(drops / "a", (1_700_000_000, 1_700_000_000))
    event = await soon(poll(drops))
    await commit(event)
    again = os.link if how == "a hard link" else shutil.copy2
    again(event["path"], drops / "a")
    (drops / "b").write_text("y")
    redelivered = await soon(poll(drops, 1))
    assert redelivered["id"] == event["id"]
    await commit(redelivered, 1)  # as it is that the inbox knows
    assert (await soon(poll(drops, 2)))["name"] == "b"
    assert left(drops) == ["b"]
