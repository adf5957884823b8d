"""How many requests are worked on at once, whatever those do who wait for them."""

from __future__ import annotations

import asyncio

import pytest
from airflow_events import admission
from airflow_events.admission import CHANGES, LOOKS, Admission


@pytest.fixture(autouse=True)
def limits_of_this_loop(monkeypatch):
    for cached in (admission._limits, admission._threads):
        cached.cache_clear()
    yield
    for cached in (admission._limits, admission._threads):
        cached.cache_clear()


class Works:
    """An app that works on a request until it is told to go on, and then answers."""

    def __init__(self):
        self.inside, self.goes_on = [], asyncio.Event()

    async def __call__(self, scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        self.inside.append(scope["path"])
        await self.goes_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def ask(app, path, *, method="POST", parts=1, sent=None, root=""):
    """Send a request: of ``parts`` parts, the first at once and the others as they are put into the queue."""
    body = asyncio.Queue()
    body.put_nowait({"type": "http.request", "body": b"", "more_body": parts > 1})

    async def answered(message):
        if sent is not None:
            await sent(message)

    scope = {"type": "http", "method": method, "path": root + path, "root_path": root}
    return asyncio.create_task(app(scope, body.get, answered)), body


async def turns(count=20):
    for _ in range(count):
        await asyncio.sleep(0)


async def test_few_are_inside_and_the_others_follow_in_their_order():
    works = Works()
    app = Admission(works, "/inbox")
    tasks = [ask(app, str(number))[0] for number in range(CHANGES + 3)]
    await turns()
    assert works.inside == [str(number) for number in range(CHANGES)]
    works.goes_on.set()
    await asyncio.gather(*tasks)
    assert works.inside == [str(number) for number in range(CHANGES + 3)]


async def test_who_sends_and_who_looks_have_turns_of_their_own():
    works = Works()
    app = Admission(works, "/inbox")
    tasks = [ask(app, "look", method="GET")[0] for _ in range(LOOKS + 3)]
    tasks += [ask(app, "send")[0] for _ in range(CHANGES + 3)]
    await turns()
    assert (works.inside.count("look"), works.inside.count("send")) == (LOOKS, CHANGES)
    works.goes_on.set()
    await asyncio.gather(*tasks)


async def test_the_metrics_tell_how_long_each_waited(monkeypatch):
    told = []
    monkeypatch.setattr(admission.metrics, "since", lambda name, came, **tags: told.append((name, tags["kind"])))
    works = Works()
    app = Admission(works, "/inbox")
    tasks = [ask(app, "send")[0] for _ in range(CHANGES + 1)] + [ask(app, "look", method="GET")[0]]
    tasks += [ask(app, "/inbox")[0]]
    await turns()
    name = "events.time_to_admission"
    assert told == [(name, "change")] * CHANGES + [(name, "look")]
    works.goes_on.set()
    await asyncio.gather(*tasks)
    assert told == [(name, "change")] * CHANGES + [(name, "look"), (name, "change")]


@pytest.mark.parametrize("root", ["", "/events", "/air/flow/events"])
async def test_the_triggerers_wait_for_nobody(root):
    works = Works()
    app = Admission(works, "/inbox")
    paths = [*["/keys/inbox"] * (CHANGES + 3), *["/inbox"] * 9, "/inbox/x", "/inboxes"]
    tasks = [ask(app, path, root=root)[0] for path in paths]
    await turns()
    assert [works.inside.count(root + path) for path in ("/keys/inbox", "/inbox", "/inbox/x", "/inboxes")] == [
        CHANGES,
        9,
        1,
        0,
    ]
    works.goes_on.set()
    await asyncio.gather(*tasks)


async def test_who_sends_slowly_is_in_nobodys_way():
    works = Works()
    app = Admission(works, "/inbox")
    slow = [ask(app, "slow", parts=2) for _ in range(CHANGES + 3)]
    await turns()
    quick, _ = ask(app, "quick")
    await turns()
    assert works.inside == ["quick"]
    for _, body in slow:
        body.put_nowait({"type": "http.request", "body": b"", "more_body": False})
    await turns()
    assert works.inside == ["quick", *["slow"] * (CHANGES - 1)]
    works.goes_on.set()
    await asyncio.gather(quick, *(task for task, _ in slow))


async def test_who_reads_the_answer_slowly_is_in_nobodys_way():
    works, reads = Works(), asyncio.Event()
    works.goes_on.set()
    app = Admission(works, "/inbox")
    tasks = [ask(app, str(number), sent=lambda message: reads.wait())[0] for number in range(CHANGES + 3)]
    await turns()
    assert len(works.inside) == CHANGES + 3
    reads.set()
    await asyncio.gather(*tasks)


async def test_who_fails_or_is_cancelled_leaves():
    async def fails(scope, receive, send):
        raise ValueError("no")

    app = Admission(fails, "/inbox")
    tasks = [ask(app, "fails")[0] for _ in range(CHANGES + 3)]
    said = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(error) for error in said] == ["no"] * (CHANGES + 3)

    works = Works()
    app = Admission(works, "/inbox")
    tasks = [ask(app, "cancelled")[0] for _ in range(CHANGES + 3)]
    slow, _ = ask(app, "slow", parts=2)
    await turns()
    for task in (*tasks, slow):
        task.cancel()
    await asyncio.wait([*tasks, slow])
    works.inside.clear()
    works.goes_on.set()
    await asyncio.gather(*(ask(app, "after")[0] for _ in range(CHANGES + 3)))
    assert works.inside == ["after"] * (CHANGES + 3)
