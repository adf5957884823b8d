"""The inbox's client in a triggerer, against API servers that answer, refuse, hang up, or are unreachable."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import re
import threading
import time

import httpx
import pytest
import trustme
from airflow_events import inbox_token, settings
from airflow_events.errors import InboxRefused
from airflow_events.inbox.entries import Answer, Begin, Finish, Record, Status
from airflow_events.listeners.support.hub import shared_log
from airflow_events.listeners.support.positions import Known, Positions
from airflow_events.triggers import inbox as module
from airflow_events.triggers import inbox_http
from airflow_events.triggers.inbox import Inbox

LOGGER = "airflow_events.triggers.inbox"


@pytest.fixture
async def inbox(monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_PAUSE", 0.5)
    one = Inbox.of_loop()
    # It never gives up, and a test should.
    end = asyncio.get_running_loop().call_later(30, lambda: [task.cancel() for task in asyncio.all_tasks()])
    yield one
    end.cancel()
    assert not one._open
    while one._workers:
        await asyncio.sleep(0.01)
    assert not one._queue
    assert not one._working
    if one._post._client:
        await one._post._client.aclose()


def done(entries):
    return [Answer(Status.DONE, entry.ti) for entry in entries]


async def ask_many(inbox, count):
    return await asyncio.gather(*(inbox.ask(Begin(str(number))) for number in range(count)))


async def until(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        await asyncio.sleep(0.01)


async def test_what_is_asked_at_once_goes_in_few_requests_and_each_gets_its_own_answer(api, inbox):
    server = api()
    answers = await ask_many(inbox, 1000)
    assert [answer.message for answer in answers] == [str(number) for number in range(1000)]
    assert sorted(server.batches) == [100, 300, 300, 300]


async def test_what_is_asked_one_by_one_is_not_held_up(api, inbox):
    api()
    await inbox.ask(Begin("first"))
    took = []
    for number in range(20):
        began = time.monotonic()
        assert (await inbox.ask(Begin(str(number)))).message == str(number)
        took.append(time.monotonic() - began)
    assert min(took) < 0.1


async def test_at_most_two_requests_are_under_way_and_what_comes_meanwhile_goes_together(api, inbox):
    server = api()
    lock, may_go_on, now, most = threading.Lock(), threading.Event(), 0, 0

    def carry_out(entries):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        may_go_on.wait(10)
        with lock:
            now -= 1
        return done(entries)

    server.carry_out = carry_out
    asked = []
    for number in range(50):
        asked.append(asyncio.create_task(inbox.ask(Begin(str(number)))))
        await asyncio.sleep(0.01)
    may_go_on.set()
    assert [answer.message for answer in await asyncio.gather(*asked)] == [str(number) for number in range(50)]
    assert most == 2
    assert len(server.batches) == 3


async def test_a_request_is_not_longer_than_some_megabytes(api, inbox):
    server = api()
    long = "x" * 1_500_000
    await asyncio.gather(*(inbox.ask(Record(str(number), event=long)) for number in range(5)))
    assert sorted(server.batches) == [1, 2, 2]
    await inbox.ask(Record("alone", event="x" * 5_000_000))


WHO = contextvars.ContextVar("who", default=None)


class Said(logging.Handler):
    """What was logged, and in whose context."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((WHO.get(), record.levelname, record.getMessage()))


@pytest.fixture
def said():
    handler = Said()
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    level, logger.level = logger.level, logging.INFO
    yield handler.lines
    logger.removeHandler(handler)
    logger.level = level


async def ask_as(inbox, who):
    WHO.set(who)
    return await inbox.ask(Begin(who))


async def test_while_the_server_is_away_all_is_kept_and_each_wait_says_so_once_in_its_own_log(api, inbox, said):
    server = api()
    await inbox.ask(Begin("connected"))
    server.stop()
    asked = [asyncio.create_task(ask_as(inbox, f"early {number}")) for number in range(3)]
    await until(lambda: len(said) == 3 and inbox._trouble)
    asked += [asyncio.create_task(ask_as(inbox, f"late {number}")) for number in range(3)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert len(said) == 6, "who comes later is told at once"
    await asyncio.sleep(1.5)
    assert sorted(who for who, _, _ in said) == [
        *(f"early {number}" for number in range(3)),
        *(f"late {number}" for number in range(3)),
    ]
    for _, level, message in said:
        assert level == "WARNING"
        assert f"{server.url}/events/inbox" in message
        assert "ConnectError" in message
        assert "keeps its event" in message
    del said[:]
    server.start()
    answers = await asyncio.wait_for(asyncio.gather(*asked), 5)
    assert [answer.message for answer in answers][:3] == ["early 0", "early 1", "early 2"]
    assert sorted(said) == sorted((answer.message, "INFO", "The inbox has answered") for answer in answers)
    del said[:]
    await ask_as(inbox, "afterwards")
    assert said == []


async def test_waits_that_share_a_log_say_so_in_one_line(api, inbox, said):
    async def ask_as_hosted(number):
        shared_log.set("a host")
        return await ask_as(inbox, f"hosted {number}")

    server = api()
    await inbox.ask(Begin("connected"))
    server.stop()
    asked = [asyncio.create_task(ask_as_hosted(number)) for number in range(5)]
    await until(lambda: inbox._trouble)
    asked += [asyncio.create_task(ask_as_hosted(number)) for number in range(5, 8)]
    await asyncio.sleep(0.5)
    assert [level for _, level, _ in said] == ["WARNING"]
    server.start()
    await asyncio.wait_for(asyncio.gather(*asked), 5)
    assert [level for _, level, _ in said] == ["WARNING", "INFO"]


async def test_a_server_that_was_away_for_a_moment_is_not_worth_a_word(api, inbox, said, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 10)
    server = api()
    server.refuse(502)
    server.refuse(503)
    assert (await inbox.ask(Begin("a"))).message == "a"
    assert said == []
    assert len(server.asked_at) == 3


async def test_a_server_that_cuts_idle_connections(api, inbox, said):
    server = api(timeout_keep_alive=1)
    for pause in (0, 0.9, 1.0, 1.1, 1.5):
        await asyncio.sleep(pause)
        await inbox.ask(Begin("a"))
    assert len(server.batches) == 5
    assert said == []


async def test_a_connection_that_is_cut_while_a_request_is_under_way(api, inbox, monkeypatch, said):
    """The entry is asked again; that it may have been carried out is the inbox's to know."""
    server = api()
    cuts = []

    async def cut(reader, writer):
        cuts.append(await reader.read(100))
        if len(cuts) == 2:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
        if len(cuts) == 3:
            monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_URL", f"{server.url}/events/inbox")
        writer.close()

    async with await asyncio.start_server(cut, "127.0.0.1", 0) as cutting:
        port = cutting.sockets[0].getsockname()[1]
        monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_URL", f"http://127.0.0.1:{port}")
        assert (await inbox.ask(Begin("a"))).message == "a"
    assert len(cuts) == 3


async def test_a_server_that_hangs_is_given_up_and_asked_again(api, inbox, monkeypatch):
    monkeypatch.setattr(inbox_http, "_TIMEOUT", httpx.Timeout(0.3))
    server = api()
    hangs = threading.Event()
    server.carry_out = lambda entries: (hangs.wait(5), done(entries))[1]
    asked = [asyncio.create_task(inbox.ask(Begin(str(number)))) for number in range(4)]
    await until(lambda: len(server.batches) == 2)
    assert server.batches == [4, 2], "it may be that they are too many"
    hangs.set()
    assert [answer.message for answer in await asyncio.gather(*asked)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("status", [429, 503])
async def test_a_server_that_has_too_much_to_do_says_when_to_come_again(api, inbox, status):
    server = api()
    server.refuse(status, {"detail": "busy"}, {"Retry-After": "1"}, times=2)
    await inbox.ask(Begin("a"))
    first, second, third = server.asked_at
    assert 1 <= second - first < 5
    assert 1 <= third - second < 5


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (302, "", "302"),
        (400, {"detail": "this\nand that"}, "400 this and that"),
        (404, {"detail": "Not Found"}, "404 Not Found"),
        (500, "<h1>" + "x" * 10_000, "500 <h1>xxxx"),
        (502, ["of the proxy"], "502 ..of the proxy"),
        (200, "<h1>log in</h1>", "JSONDecodeError"),
        (200, {"answers": []}, "there were 0 answers to 1 entries"),
        (200, {"answers": [{}]}, "missing"),
        (200, {"version": "1"}, "KeyError"),
        (503, {"detail": "busy"}, "503 busy"),
    ],
    ids=range(10),
)
async def test_whatever_a_server_says_the_entry_is_kept(api, inbox, said, monkeypatch, status, body, reason):
    monkeypatch.setattr(module, "_PATIENCE", 0)
    server = api()
    server.refuse(status, body, {"Retry-After": "tomorrow"})
    assert (await inbox.ask(Begin("a"))).message == "a"
    (_, _, warning), (_, _, through) = said
    assert re.search(reason, warning)
    assert len(warning) < 1000
    assert through == "The inbox has answered"


@pytest.fixture
def of_another(secret):
    """A token that is signed with another key than the API server's."""
    secret("of another deployment")
    token = inbox_token.sign()
    secret("the secret of the tests")
    return token


async def test_a_token_that_is_refused_is_not_used_again(api, inbox, said, of_another, monkeypatch):
    server = api()
    monkeypatch.setattr(module, "_PATIENCE", 60)  # a slow machine takes a while for two requests
    monkeypatch.setattr(inbox_token, "_signed", (of_another, time.time(), os.getpid()))
    await inbox.ask(Begin("a"))
    assert len(server.asked_at) == 2
    assert said == []


@pytest.mark.parametrize("days", [2, -2])
async def test_a_clock_that_is_wrong_by_days(api, inbox, said, monkeypatch, days):
    """The API server refuses the token, and says what time it is."""
    server = api()
    monkeypatch.setattr(module, "_PATIENCE", 60)
    monkeypatch.setattr(inbox_token, "_signed", ("", 0.0, 0))
    monkeypatch.setattr(inbox_token, "_ahead", days * 86400.0)  # of what `sign` takes for the time
    await inbox.ask(Begin("a"))
    assert len(server.asked_at) == 2
    assert abs(inbox_token._ahead) < 60
    assert said == []


async def test_another_key_than_the_api_servers_until_it_is_the_same(api, inbox, said, of_another, monkeypatch):
    server = api()
    with monkeypatch.context() as wrong:
        wrong.setattr(inbox_token, "sign", lambda *, fresh=False: of_another)
        asked = asyncio.create_task(inbox.ask(Begin("a")))
        await until(lambda: said)
    assert "401 the token is signed with another key" in said[0][2]
    assert of_another not in said[0][2]
    assert (await asked).message == "a"
    assert server.batches == [1]


async def test_no_key_at_all(api, inbox, said, secret, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0)
    api()
    secret("")
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", "")
    asked = asyncio.create_task(inbox.ask(Begin("a")))
    await until(lambda: said)
    assert "[core] fernet_key" in said[0][2]
    secret("there it is")
    await asked


async def test_a_configuration_that_cannot_be_read(api, inbox, said, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0)
    api()
    with monkeypatch.context() as wrong:
        wrong.setattr(settings, "inbox_url", lambda: 1 / 0)
        asked = asyncio.create_task(inbox.ask(Begin("a")))
        await until(lambda: said)
    assert "ZeroDivisionError" in said[0][2]
    await asked


async def test_of_a_batch_only_what_cannot_be_read_is_refused(api, inbox, monkeypatch):
    server = api()
    monkeypatch.setattr(Finish, "operation", "later")  # than this version of the API server
    bad = {17, 400, 401}
    asked = [inbox.ask(Finish(str(number)) if number in bad else Begin(str(number))) for number in range(600)]
    for number, answer in enumerate(await asyncio.gather(*asked, return_exceptions=True)):
        if number in bad:
            assert isinstance(answer, InboxRefused)
            assert "rejected the request 'later': 422 entry 0 cannot be read" in str(answer)
            assert "the operation is not one of" in str(answer)
        else:
            assert answer.message == str(number)
    assert sum(server.batches) == 597
    assert len(server.asked_at) < 60


async def test_of_a_batch_that_is_too_long_each_gets_through_that_is_not(api, inbox, monkeypatch):
    api()
    monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_MAX_BODY", "3000")
    asked = [inbox.ask(Begin(str(number), call="x" * (4000 if number == 5 else 400))) for number in range(10)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(answers.pop(5), InboxRefused)
    assert all(answer.status == "done" for answer in answers)


async def test_one_on_which_the_server_breaks_holds_up_no_other(api, inbox, said):
    server = api()
    broken = True

    def carry_out(entries):
        if broken and any(entry.ti == "bad" for entry in entries):
            raise RuntimeError("a fault of the API server's")
        return done(entries)

    server.carry_out = carry_out
    bad = asyncio.create_task(ask_as(inbox, "bad"))
    answers = await asyncio.wait_for(ask_many(inbox, 300), 10)
    assert [answer.message for answer in answers] == [str(number) for number in range(300)]
    await until(lambda: any(who == "bad" for who, _, _ in said))
    assert not bad.done()
    broken = False
    assert (await bad).message == "bad"


async def test_what_is_no_json_is_refused_before_it_is_sent(inbox):
    for wrong in (float("nan"), object()):
        with pytest.raises(InboxRefused, match="cannot be written as JSON"):
            await inbox.ask(Begin("a", rendered={"x": wrong}))


async def test_a_cancelled_wait_holds_up_nobody_and_what_was_not_sent_is_not(api, inbox):
    server = api()
    came, may_go_on = [], threading.Event()

    def carry_out(entries):
        came.extend(entry.ti for entry in entries)
        may_go_on.wait(10)
        return done(entries)

    server.carry_out = carry_out
    under_way = [asyncio.create_task(inbox.ask(Begin(f"under way {number}"))) for number in range(3)]
    await until(lambda: len(came) == 3)
    with_it = asyncio.create_task(inbox.ask(Begin("the second request")))
    await until(lambda: len(came) == 4)
    queued = [asyncio.create_task(inbox.ask(Begin(f"queued {number}"))) for number in range(3)]
    await asyncio.sleep(0.05)
    under_way[1].cancel()
    queued[1].cancel()
    await asyncio.wait([under_way[1], queued[1]])
    may_go_on.set()
    others = [under_way[0], under_way[2], with_it, queued[0], queued[2]]
    assert [answer.message for answer in await asyncio.gather(*others)] == [
        "under way 0", "under way 2", "the second request", "queued 0", "queued 2",
    ]  # fmt: skip
    assert under_way[1].cancelled() and queued[1].cancelled()
    assert "queued 1" not in came


async def test_cancelled_while_the_server_is_away(api, inbox, said):
    server = api()
    server.stop()
    waiting = [asyncio.create_task(ask_as(inbox, str(number))) for number in range(3)]
    await until(lambda: len(said) == 3)
    waiting[0].cancel()
    server.start()
    assert [answer.message for answer in await asyncio.gather(*waiting[1:])] == ["1", "2"]
    assert sum(server.batches) == 2
    all_gone = asyncio.create_task(inbox.ask(Begin("gone")))
    await asyncio.sleep(0)
    all_gone.cancel()
    await asyncio.wait([all_gone])


async def test_a_wait_that_is_told_and_cancelled_in_one_turn_of_the_loop(api, inbox, said, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0)
    server = api()
    server.stop()
    asked = asyncio.create_task(inbox.ask(Begin("a")))
    await until(lambda: inbox._open)
    [one] = inbox._open
    await until(lambda: one.is_told)
    asked.cancel()
    await asyncio.wait([asked])
    server.start()
    await inbox.ask(Begin("b"))
    assert server.batches == [1]


async def test_hubs_ask_it_how_far_their_sources_are_settled(api, inbox):
    def carry_out(entries):
        return [Answer(Status.DONE, settled={one.source: [[0, 7]]}, owner="me") for one in entries]

    api().carry_out = carry_out
    known = await Positions.of_loop().exchange("orders", {"t/0": [(0, 4)]}, {"t/1": 3})
    assert known == Known({"orders": [(0, 7)]}, "me")


async def test_requests_belong_to_no_wait(api, inbox, monkeypatch):
    api()
    seen = []
    post = type(inbox._post).__call__

    async def watched(self, entries):
        seen.append(WHO.get())
        return await post(self, entries)

    monkeypatch.setattr(type(inbox._post), "__call__", watched)
    await ask_as(inbox, "one")
    assert seen == [None]


async def test_below_a_path(api, inbox):
    server = api("/team/airflow")
    await inbox.ask(Begin("a"))
    assert server.batches == [1]
    assert settings.inbox_url().endswith("/team/airflow/events/inbox")


@pytest.mark.parametrize(
    "option", ["AIRFLOW__EVENTS__INBOX_CA", "AIRFLOW__API__SSL_CA_FILE", "AIRFLOW__API__SSL_CERT"]
)
async def test_a_private_authority(api, inbox, said, monkeypatch, tmp_path, option):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    for part in certificate.cert_chain_pems:
        part.write_to_path(tmp_path / "cert.pem", append=True)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server = api(ssl_keyfile=tmp_path / "key.pem", ssl_certfile=tmp_path / "cert.pem")
    monkeypatch.setenv(option, str(tmp_path / "ca.pem"))
    assert server.url.startswith("https:")
    await inbox.ask(Begin("a"))
    assert said == []


async def test_an_authority_that_is_not_trusted_and_one_that_is_not_there(api, inbox, said, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_PATIENCE", 0)
    certificate = trustme.CA().issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    api(ssl_certfile=tmp_path / "server.pem", ssl_keyfile=tmp_path / "server.pem")
    monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_CA", str(tmp_path / "none.pem"))
    first = asyncio.create_task(inbox.ask(Begin("a")))
    await until(lambda: said)
    assert f"certificates cannot be read from {tmp_path / 'none.pem'}" in said.pop()[2]
    monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_CA", "")
    await until(lambda: inbox._post._client)
    second = asyncio.create_task(inbox.ask(Begin("b")))
    await until(lambda: "certificate verify failed" in inbox._trouble)
    for task in (first, second):
        task.cancel()
    await asyncio.wait([first, second])


@pytest.mark.parametrize(
    ("inbox_url", "execution", "base", "address"),
    [
        (None, None, None, "http://localhost:8080/events/inbox"),
        (None, None, "/", "http://localhost:8080/events/inbox"),
        (None, None, "/team", "http://localhost:8080/team/events/inbox"),
        (None, None, "https://airflow.example.com/team/", "https://airflow.example.com/team/events/inbox"),
        (None, "http://api:8080/execution/", "https://airflow.example.com", "http://api:8080/events/inbox"),
        (None, "http://api:8080/team/execution", "https://x", "http://api:8080/team/events/inbox"),
        (None, "http://api:8080/", "https://x", "http://api:8080/events/inbox"),
        (None, "", "https://x", "https://x/events/inbox"),
        ("https://y/events/inbox/", "http://api:8080/execution/", None, "https://y/events/inbox"),
    ],
)
def test_the_address(monkeypatch, inbox_url, execution, base, address):
    for name, value in {
        "EVENTS__INBOX_URL": inbox_url,
        "CORE__EXECUTION_API_SERVER_URL": execution,
        "API__BASE_URL": base,
    }.items():
        if value is None:
            monkeypatch.delenv(f"AIRFLOW__{name}", raising=False)
        else:
            monkeypatch.setenv(f"AIRFLOW__{name}", value)
    assert settings.inbox_url() == address
