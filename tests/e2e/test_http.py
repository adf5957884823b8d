"""Events over HTTP, as their senders see them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import hmac
import json
import signal
import time
import uuid
from dataclasses import dataclass
from urllib.parse import quote

import httpx
import psutil
import pytest
from airflow_events.api.app import create_app
from airflow_events.page import routes as page
from gaps import folder

from deployment import Run, until

TIMEOUT = 60


@dataclass(frozen=True)
class Sender:
    """Somebody who is logged in, or not."""

    url: str
    headers: dict

    def post(self, path, payload=None, **kwargs):
        headers = {**self.headers, **kwargs.pop("headers", {})}
        if "content" not in kwargs:
            kwargs["json"] = payload
        return httpx.post(f"{self.url}/events{path}", headers=headers, timeout=TIMEOUT, **kwargs)

    def send(self, run, task, payload=None, *, key=None, **kwargs):
        headers = {} if key is None else {"Idempotency-Key": key}
        return self.post(address(run, task), payload, headers={**headers, **kwargs.pop("headers", {})}, **kwargs)

    def reject(self, run, task, reason, **kwargs):
        return self.post(f"{address(run, task)}/reject", {"reason": reason}, **kwargs)


def address(run: Run, task: str) -> str:
    return f"/dags/{run.dag_id}/runs/{quote(run.run_id, safe='')}/tasks/{task}"


@pytest.fixture(autouse=True)
def both_api_servers_live(strict):
    """Each test finds the second API server alive, too."""
    live_again(strict)


@pytest.fixture
def sender(airflow):
    airflow.api("GET", "/dags?limit=1")
    return Sender(airflow.url, {"Authorization": f"Bearer {airflow._token}"})


def logged_in(server, name):
    answer = httpx.post(f"{server.url}/auth/token", json={"username": name, "password": name}, timeout=TIMEOUT)
    return Sender(server.url, {"Authorization": f"Bearer {said(answer, 201)['access_token']}"})


def said(answer, status):
    """Return the answer's body, after a look at its status."""
    assert answer.status_code == status, f"{answer.status_code} {answer.text}"
    return answer.json()


def test_events_reach_waits_of_every_kind_and_the_answers_say_so(airflow, sender):
    run = airflow.run("http")
    begin = ("plain", "over", "finishes_on_worker", "with_outlet", "starts_on_worker", "mapped[0]", "mapped[1]")
    for task in begin:
        run.until_task(task, "deferred")
    assert run.task_state("later") is None

    # What will not do.
    said(sender.send(run, "gather", {}), 404)
    said(sender.send(run, "nobody", {}), 404)
    said(sender.send(run, "plain", {}, params={"map_index": 7}), 404)
    said(sender.post("/dags/http/runs/nobody/tasks/plain", {}), 404)
    said(sender.send(run, "plain", content=b"a=1", headers={"Content-Type": "text/plain"}), 415)
    json_type = {"Content-Type": "application/json"}
    said(sender.send(run, "plain", content=b"{", headers=json_type), 422)
    said(sender.send(run, "plain", content=b"NaN", headers=json_type), 422)
    said(sender.send(run, "plain", content=b"\xff", headers=json_type), 422)
    said(sender.send(run, "plain", content=b"[" * 50_000, headers=json_type), 422)
    said(sender.send(run, "plain", content=b"[" * 200 + b"]" * 200, headers=json_type), 422)
    said(sender.send(run, "plain", content=b'"' + b"a" * 300_000 + b'"', headers=json_type), 413)
    said(sender.send(run, "plain", content=iter([b" " * 100_000] * 4), headers=json_type), 413)
    said(sender.send(run, "plain", {"a": "\0"}), 422)
    said(sender.send(run, "plain", {"__classname__": "a"}), 422)
    said(sender.send(run, "plain", 2**70), 422)
    said(sender.send(run, "later", {"order": "x"}), 422)
    said(sender.send(run, "mapped", {"order": "x"}, params={"map_index": 1}), 422)
    assert run.task_state("plain") == "deferred"

    # Early: durable, delivered when the wait begins.
    early = said(sender.send(run, "later", {"order": 1}, key="k"), 202)
    assert early["status"] == "kept"
    assert said(sender.send(run, "later", {"order": 1}, key="k"), 202) == early
    said(sender.send(run, "later", {"order": 2}, key="k"), 422)
    said(sender.send(run, "later", {"order": 2}), 409)

    # In time: the task has ended when the answer comes.
    first = said(sender.send(run, "plain", {"n": [1, None, 2.5]}, key="k"), 200)
    assert run.task_state("plain") == "success"
    assert said(sender.send(run, "plain", {"n": [1, None, 2.5]}, key="k"), 200) == first
    said(sender.send(run, "plain", {"n": 2}, key="other"), 409)
    said(sender.send(run, "plain", {"n": [1, None, 2.5]}), 409)
    said(sender.send(run, "over", ["a", "b"]), 200)
    said(sender.send(run, "finishes_on_worker", "post_execute"), 200)
    said(sender.send(run, "with_outlet", "outlet"), 200)
    said(sender.send(run, "starts_on_worker", "worker"), 200)
    said(sender.send(run, "mapped", 0, params={"map_index": 0}), 200)
    said(sender.send(run, "mapped", {"order": 3}, params={"map_index": 1}), 200)

    assert run.finished() == "success"
    expected = [{"n": [1, None, 2.5]}, {"order": 1}, "worker", "post_execute", "outlet", [0, {"order": 3}]]
    assert run.xcom("gather") == expected
    assert [run.xcom("one", map_index=n) for n in range(2)] == ["a", "b"]
    assert [run.worker_starts(task) for task in ("plain", "later", "over", "with_outlet")] == [0] * 4
    assert run.worker_starts("starts_on_worker") == 1
    assert run.worker_starts("finishes_on_worker") == 1
    audit = airflow.api("GET", f"/eventLogs?dag_id=http&run_id={quote(run.run_id)}&event=event%20sent")
    assert audit["total_entries"] == 8
    of_run = f"source_dag_id=http&source_run_id={quote(run.run_id)}"
    assert airflow.api("GET", f"/assets/events?{of_run}")["total_entries"] == 1

    # A clear delivers the same again, of a wait that starts in the triggerer as of one that starts on a worker.
    run.clear("plain", "later", "starts_on_worker", "mapped", "gather")
    assert run.finished() == "success"
    assert run.xcom("gather") == expected
    said(sender.send(run, "plain", "another"), 409)


def test_reject(airflow, sender):
    run = airflow.run("http_one")
    run.until_task("wait", "deferred")
    said(sender.reject(run, "wait", ""), 422)
    half = {"content": b'{"reason": "\\ud800"}', "headers": {"Content-Type": "application/json"}}
    said(sender.post(f"{address(run, 'wait')}/reject", **half), 422)
    said(sender.reject(run, "wait", "no budget"), 200)
    said(sender.reject(run, "wait", "no budget"), 200)
    said(sender.send(run, "wait", 1), 410)
    assert run.finished() == "failed"
    assert run.tasks()["wait"]["try_number"] == 1  # though it has retries
    assert "was rejected by Anonymous: no budget" in run.logs("wait")
    said(sender.send(run, "wait", 1), 410)
    # A clear waits again.
    run.clear("wait", "gather")
    until(
        lambda: run.task_state("wait") == "deferred" and run.tasks()["wait"]["try_number"] == 2, "it waits again"
    )
    said(sender.send(run, "wait", 1), 200)
    assert run.finished() == "success"


def test_two_senders_at_once(airflow, sender):
    runs = [airflow.run("http_one") for _ in range(3)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for run in runs:
            run.until_task("wait", "deferred")
            answers = list(pool.map(lambda n, run=run: sender.send(run, "wait", n, key=f"{n}"), range(12)))
            codes = [answer.status_code for answer in answers]
            assert sorted(codes) == [200] + [409] * 11, codes
            winner = codes.index(200)
            assert run.finished() == "success"
            assert run.xcom("gather") == [winner]
            # The same key many times at once is one event and one answer.
        run = airflow.run("http_one")
        run.until_task("wait", "deferred")
        answers = list(pool.map(lambda _: sender.send(run, "wait", "x", key="k"), range(12)))
        assert len({(answer.status_code, answer.text) for answer in answers}) == 1
        assert run.finished() == "success"


def test_ends(airflow, sender):
    """What comes when the wait is over is refused, and so is what comes for a wait that will not begin."""
    run = airflow.run("http_time_out")
    assert run.finished() == "success"
    assert run.xcom("gather") == ["late"]
    said(sender.send(run, "wait", 1), 410)
    run = airflow.run("http_anew")
    run.until_task("wait", "deferred")
    said(sender.send(run, "wait", 1), 200)
    assert run.finished() == "success"
    run.clear("wait", "gather")
    run.until_task("wait", "deferred")
    said(sender.send(run, "wait", 2), 200)
    until(lambda: run.xcom("gather") == [2], "it waits for another after a clear")


def test_keys(airflow, sender, inbox):
    """An event for a key goes to a wait that has it, or will; to one or to all, as the sender says."""

    test = uuid.uuid4().hex

    def run(key, dag="http_one"):
        return airflow.run(dag, {"key": f"{test}/{key}"})

    def to_key(key, payload, status, **kwargs):
        idempotency_key = kwargs.pop("idempotency_key", None)
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return said(sender.post(f"/keys/{test}/{key}", payload, headers=headers, params=kwargs), status)

    # For nobody yet: kept, and given once.
    early = to_key("order/1", {"n": 1}, 202, idempotency_key="a")
    assert early["waits"] == []
    assert to_key("order/1", {"n": 1}, 202, idempotency_key="a") == early
    to_key("order/1", {"n": 2}, 422, idempotency_key="a")
    to_key("brief", 0, 202, ttl=0.5)
    to_key("strict", "unfit", 202)
    to_key("strict", {"order": 1}, 202)
    first = run("order/1")
    assert first.finished() == "success"
    assert first.xcom("gather") == [{"n": 1}]
    assert first.worker_starts("wait") == 0
    # Gone: neither the same key nor another run delivers it again.
    assert to_key("order/1", {"n": 1}, 202, idempotency_key="a") == early

    # Several waits with one key, and one that has an event that expired or did not fit.
    second, third, brief, strict = run("order/1"), run("order/1"), run("brief"), run("strict", "http_strict")
    for waiting in (second, third, brief):
        waiting.until_task("wait", "deferred")
        until_it_has_told_its_key(inbox, waiting)
    answer = to_key("order/1", {"n": 2}, 200, idempotency_key="b")
    assert to_key("order/1", {"n": 2}, 200, idempotency_key="b") == answer
    waits = [*answer["waits"], *to_key("order/1", {"n": 3}, 200)["waits"]]
    assert brief.task_state("wait") == "deferred"
    assert strict.finished() == "success"
    assert strict.xcom("gather") == [{"order": 1}]
    assert sorted(waits) == sorted(f"http_one/{run.run_id}/wait/-1" for run in (second, third))
    for run_ in (second, third):
        assert run_.finished() == "success"
        assert run_.xcom("gather") == [{"n": 2 + waits.index(f"http_one/{run_.run_id}/wait/-1")}]

    # To all.
    to_key("all", 1, 404, to="all")
    runs = [run("all"), run("all"), run("all", "http_strict")]
    for waiting in runs:
        until_it_has_told_its_key(inbox, waiting)
    to_key("all", {"order": 7}, 422, to="some")
    reached = to_key("all", {"order": 7}, 200, to="all", ttl=60)["waits"]
    assert sorted(reached) == sorted(f"{run.dag_id}/{run.run_id}/wait/-1" for run in runs)
    late = run("all")
    assert [run.finished() and run.xcom("gather") for run in [*runs, late]] == [[{"order": 7}]] * 4

    # A payload that no wait wants is refused while they wait.
    strict = run("strict2", "http_strict")
    until_it_has_told_its_key(inbox, strict)
    to_key("strict2", "unfit", 422)
    to_key("strict2", {"order": 2}, 200)
    said(sender.send(brief, "wait", 1), 200)
    assert strict.finished() == brief.finished() == "success"


def test_without_a_login_or_the_permission_every_route_refuses(airflow, strict, sender):
    run = airflow.run("http_one", {"key": f"who-may-{uuid.uuid4().hex}"})
    run.until_task("wait", "deferred")
    names = {
        "dag_id": run.dag_id,
        "run_id": quote(run.run_id),
        "task_id": "wait",
        "key": "k",
        "conn_id": "c",
        "ti": uuid.uuid4(),
    }
    nobody = {}
    forged = {
        "Authorization": "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl",
        "X-Hub-Signature-256": "sha256=00",
        "Stripe-Signature": "t=1,v1=00",
    }
    viewer = logged_in(strict, "vera").headers
    others = {route.path for route in page.router.routes}  # tests/e2e/test_page.py
    routes = [(m, route.path) for route in create_app().routes for m in route.methods if route.path not in others]
    assert len(routes) >= 6
    for method, path in routes:
        path = path.replace(":path", "").format(**names)
        for headers in (nobody, forged, {**forged, **viewer}):
            if headers is not nobody and headers is not forged and path == "/openapi.json":
                continue  # which is for everybody who is logged in
            answer = httpx.request(
                method,
                f"{strict.url}/events{path}",
                headers=headers,
                json={"reason": "none"},
                params={"token": "forged"} if headers else {},
                timeout=TIMEOUT,
            )
            assert answer.status_code in (401, 403), f"{method} {path} {headers}: {answer.text}"
    assert run.task_state("wait") == "deferred"
    # Who may edit the task instances of the DAG may send.
    said(logged_in(strict, "ursula").send(run, "wait", 1), 200)
    assert run.finished() == "success"
    audit = airflow.api("GET", f"/eventLogs?run_id={quote(run.run_id)}&event=event%20sent")["event_logs"]
    assert [entry["owner"] for entry in audit] == ["ursula"]


def test_a_sender_without_an_answer_sends_again(airflow, strict, sender, inbox):
    """Whether it hung up itself, or the API server was killed before the commit, or between that and the reply."""
    runs = [airflow.run("http_one") for _ in range(3)]
    for run in runs:
        run.until_task("wait", "deferred")
    ursula = logged_in(strict, "ursula")
    with pytest.raises(httpx.TimeoutException):
        httpx.post(
            f"{ursula.url}/events{address(runs[0], 'wait')}",
            json="once",
            headers={**ursula.headers, "Idempotency-Key": "k"},
            timeout=httpx.Timeout(TIMEOUT, read=0.001),
        )
    said(ursula.send(runs[0], "wait", "once", key="k"), 200)

    with dies(strict, "before-the-commit", "Receipt"), pytest.raises(httpx.TransportError):
        ursula.send(runs[2], "wait", "once", key="k")
    assert runs[2].task_state("wait") == "deferred"
    assert not has_event(inbox, runs[2])
    live_again(strict)
    said(ursula.send(runs[2], "wait", "once", key="k"), 200)

    with dies(strict, "before-the-reply", "Receipt"), pytest.raises(httpx.TransportError):
        ursula.send(runs[1], "wait", "once", key="k")
    # Another API server, for which the transaction has decided as well.
    elsewhere = Sender(airflow.url, ursula.headers)
    first = said(elsewhere.send(runs[1], "wait", "once", key="k"), 200)
    said(elsewhere.send(runs[1], "wait", "twice", key="other"), 409)
    assert said(elsewhere.send(runs[1], "wait", "once", key="k"), 200) == first
    # Somebody else's key says nothing.
    said(sender.send(runs[1], "wait", "once", key="k"), 409)
    for run in runs:
        assert run.finished() == "success"
        assert run.xcom("gather") == ["once"]


# Within the transaction, before it is committed, and after that.
@pytest.mark.parametrize(
    ("point", "what", "ttl"),
    [
        ("within", "1", 600),
        pytest.param("before-the-reply", "KeyReceipt", None, marks=pytest.mark.release),
        pytest.param("within", "0", None, marks=pytest.mark.release),
        pytest.param("before-the-commit", "KeyReceipt", 600, marks=pytest.mark.release),
        pytest.param("before-the-reply", "KeyReceipt", 600, marks=pytest.mark.release),
    ],
)
def test_an_api_server_that_dies_as_it_gives_an_event_to_all(airflow, strict, sender, inbox, point, what, ttl):
    """None of the waits has it, or all have: the sender repeats, and each has it once."""
    key = uuid.uuid4().hex
    runs = waiting_for(airflow, inbox, key, 3)
    sending = {
        "payload": "for all",
        "headers": {"Idempotency-Key": "k"},
        "params": {"to": "all", **({"ttl": ttl} if ttl else {})},
    }
    ursula = logged_in(strict, "ursula")
    with dies(strict, point, what), pytest.raises(httpx.TransportError):
        ursula.post(f"/keys/{key}", **sending)
    committed = point == "before-the-reply"
    assert [has_event(inbox, run) for run in runs] == [committed] * 3
    assert [run.task_state("wait") for run in runs] == ["success" if committed else "deferred"] * 3
    late = waiting_for(airflow, inbox, key, 1, told=not (committed and ttl))

    elsewhere = Sender(airflow.url, ursula.headers)
    answer = said(elsewhere.post(f"/keys/{key}", **sending), 200)
    assert said(elsewhere.post(f"/keys/{key}", **sending), 200) == answer
    reached = runs if committed else runs + late
    assert sorted(answer["waits"]) == sorted(f"http_one/{run.run_id}/wait/-1" for run in reached)
    if ttl:
        live_again(strict)
        reached = runs + late + waiting_for(airflow, inbox, key, 1, told=False)
    for run in reached:
        had_once(airflow, inbox, run, answer["event_id"], "for all")
    if committed and not ttl:
        assert late[0].task_state("wait") == "deferred"
        said(sender.send(late[0], "wait", "its own"), 200)
        assert late[0].finished() == "success"


@pytest.mark.parametrize(
    ("point", "what", "to"),
    [
        ("before-the-reply", "dict", "one"),
        pytest.param("before-the-commit", "dict", "all", marks=pytest.mark.release),
        pytest.param("within", "0", "one", marks=pytest.mark.release),
        pytest.param("within", "1", "all", marks=pytest.mark.release),
        pytest.param("before-the-reply", "dict", "all", marks=pytest.mark.release),
    ],
)
def test_an_api_server_that_dies_as_it_gives_a_kept_event(airflow, strict, sender, inbox, point, what, to):
    """Another API server finds the event as it was kept, and the waits that have it already; each has it once."""
    key = uuid.uuid4().hex
    with no_matching(airflow), no_matching(strict) as hold:
        sending = {"payload": "kept", "headers": {"Idempotency-Key": "k"}, "params": {"to": to, "ttl": 600}}
        early = said(sender.post(f"/keys/{key}", **sending), 202)
        runs = waiting_for(airflow, inbox, key, 2)
        with dies(strict, point, what):
            hold.unlink()
            until(lambda: strict.components["api-server"].alive is False, "the matcher's API server dies")
        committed = point == "before-the-reply"
        wanted = {"one": [True, False], "all": [True, True]}[to] if committed else [False, False]
        assert sorted((has_event(inbox, run) for run in runs), reverse=True) == wanted
        assert said(sender.post(f"/keys/{key}", **sending), 202) == early
    if to == "all":
        for run in runs:
            had_once(airflow, inbox, run, early["event_id"], "kept")
    else:
        until(lambda: any(run.state == "success" for run in runs), "one of them gets it")
    live_again(strict)
    assert said(sender.post(f"/keys/{key}", **sending), 202) == early
    time.sleep(5)  # some passes of the matchers
    if to == "one":
        [winner] = [run for run in runs if run.state == "success"]
        [loser] = [run for run in runs if run != winner]
        had_once(airflow, inbox, winner, early["event_id"], "kept")
        assert loser.task_state("wait") == "deferred"
        said(sender.send(loser, "wait", "its own"), 200)
        assert loser.finished() == "success"
    else:
        for run in runs:
            had_once(airflow, inbox, run, early["event_id"], "kept")


@pytest.mark.parametrize("then", ["it is killed too", pytest.param("it goes on", marks=pytest.mark.release)])
def test_a_triggerer_that_does_not_learn_that_the_wait_has_its_event(airflow, strict, sender, inbox, then):
    """The API server dies right after the commit, while the triggerer that has the trigger stands still."""
    key = uuid.uuid4().hex
    triggerer = airflow.components["triggerer"]
    with no_matching(airflow), no_matching(strict) as hold:
        early = said(sender.post(f"/keys/{key}", "kept"), 202)
        [run] = waiting_for(airflow, inbox, key, 1)
        airflow.freeze(triggerer)
        try:
            with dies(strict, "before-the-reply", "dict"):
                hold.unlink()
                until(lambda: strict.components["api-server"].alive is False, "the matcher's API server dies")
            assert run.task_state("wait") == "success"
            assert run.finished() == "success"
        finally:
            if then == "it goes on":
                triggerer.signal(signal.SIGCONT)
            else:
                triggerer.kill()
    if then == "it is killed too":
        airflow.restart("triggerer")
    # Whatever runs the trigger last ends before another wait begins.
    other = airflow.run("http_one")
    other.until_task("wait", "deferred")
    said(sender.send(other, "wait", 1), 200)
    assert other.finished() == "success"
    had_once(airflow, inbox, run, early["event_id"], "kept")


def has_event(inbox, run):
    """Whether an event is recorded for a run's wait."""
    row = inbox(run)
    return row is not None and row.phase is not None


def until_it_has_told_its_key(inbox, run):
    until(lambda: (row := inbox(run)) is not None and row.address, "the wait has told its key")


def waiting_for(airflow, inbox, key, number, *, told=True):
    """Start runs whose waits have a key, and wait until they have told it if they live that long."""
    runs = [airflow.run("http_one", {"key": key}) for _ in range(number)]
    for run in runs:
        if told:
            until_it_has_told_its_key(inbox, run)
    return runs


def had_once(airflow, inbox, run, event_id, payload):
    """See that one event, and one only, came to a run, and was delivered at the first try."""
    assert run.finished() == "success"
    assert run.xcom("gather") == [payload]
    assert inbox(run).record_id == event_id
    assert [task["try_number"] for task in run.tasks().values()] == [1, 1]
    audit = airflow.api("GET", f"/eventLogs?run_id={quote(run.run_id)}&event=event%20sent")["event_logs"]
    assert [json.loads(entry["extra"])["event_id"] for entry in audit] == [event_id]


@contextlib.contextmanager
def dies(server, point, what):
    """Let an API server die, and see that it did, of this (tests/plugins/http_kill.py)."""
    order = server.home / f"kill-{point}-{server.port}"
    order.write_text(what)
    try:
        yield
        assert not order.exists(), "it never got there"
        until(lambda: not server.components["api-server"].alive, "the API server is dead")
        assert server.components["api-server"].process.returncode == -signal.SIGKILL
    finally:
        order.unlink(missing_ok=True)


@contextlib.contextmanager
def no_matching(server):
    """Let an API server's matcher pass over, until the file is gone."""
    hold = server.home / f"no-matching-{server.port}"
    hold.touch()
    try:
        yield hold
    finally:
        hold.unlink(missing_ok=True)


def live_again(server):
    if not server.components["api-server"].alive:
        server.restart("api-server")
    until(server.answers, "the API server answers again")


@pytest.mark.parametrize("gap", ["worker-succeeded", pytest.param("worker-resumed", marks=pytest.mark.release)])
def test_a_worker_that_dies_between_record_and_delivery(airflow, sender, gap):
    """The next try delivers the event that the API server recorded, and the wait takes no other."""
    run = airflow.run("http_ends_on_worker")
    run.until_task("wait", "deferred")
    armed = folder(airflow.home, run.run_id)
    armed.mkdir()
    (armed / gap).touch()
    said(sender.send(run, "wait", "once", key="k"), 200)
    [reached] = until(lambda: list(armed.glob(f"{gap}.reached.*")), f"a worker stands at {gap}")
    psutil.Process(int(reached.name.rpartition(".")[2])).kill()
    said(sender.send(run, "wait", "another"), 409)
    assert run.finished() == "success"
    assert run.xcom("gather") == ["once"]
    assert run.tasks()["wait"]["try_number"] == 2
    said(sender.send(run, "wait", "once", key="k"), 200)


def test_events_that_are_kept_outlive_every_api_server(airflow, strict, sender):
    key = uuid.uuid4().hex
    run = airflow.run("http")
    run.until_task("plain", "deferred")
    by_address = said(sender.send(run, "later", {"order": 1}, key="k"), 202)
    by_key = said(sender.post(f"/keys/{key}", "once", headers={"Idempotency-Key": "k"}), 202)
    for server in (airflow, strict):
        server.components["api-server"].kill()
    for server in (airflow, strict):
        server.restart("api-server")
    for server in (airflow, strict):
        until(server.answers, "the API server answers again")
    assert said(sender.send(run, "later", {"order": 1}, key="k"), 202) == by_address
    assert said(sender.post(f"/keys/{key}", "once", headers={"Idempotency-Key": "k"}), 202) == by_key

    said(sender.send(run, "plain", 0), 200)
    first, second = (airflow.run("http_one", {"key": key}) for _ in range(2))
    run.until_task("later", "success")
    assert run.xcom("later") == {"order": 1}

    def delivered():
        return [found for found in (first, second) if found.state == "success"]

    [winner] = until(delivered, "one of the waits gets the event")
    assert winner.xcom("gather") == ["once"]
    loser = second if winner == first else first
    time.sleep(5)  # some passes of the matchers
    assert loser.task_state("wait") == "deferred"
    said(sender.send(loser, "wait", "its own"), 200)
    assert loser.finished() == "success"


def test_cancelled_and_the_same_key_again(airflow, sender, inbox):
    """A run that was ended has no hold on its key, and takes nothing from the run that has it next."""
    key = uuid.uuid4().hex
    cancelled = airflow.run("http_one", {"key": key})
    cancelled.until_task("wait", "deferred")
    until_it_has_told_its_key(inbox, cancelled)
    airflow.api("PATCH", cancelled.path, {"state": "failed"})
    cancelled.until_task("wait", "failed", "skipped")
    said(sender.send(cancelled, "wait", 0), 410)
    early = said(sender.post(f"/keys/{key}", 1), 202)
    assert early["waits"] == []

    again = airflow.run("http_one", {"key": key})
    assert again.finished() == "success"
    assert again.xcom("gather") == [1]
    assert cancelled.task_state("wait") in ("failed", "skipped")
    assert not has_event(inbox, cancelled)
    # Once it is cleared it waits under its key as before.
    cancelled.clear("wait", "gather")
    cancelled.until_task("wait", "deferred")
    assert sender.post(f"/keys/{key}", 2).status_code in (200, 202)
    assert cancelled.finished() == "success"
    assert cancelled.xcom("gather") == [2]


def test_callback_addresses(airflow, sender):
    run = airflow.run("http_partner")
    for task in ("invited", "too_late", "invited_by_task"):
        run.until_task(task, "success")
    run.until_task("wait", "deferred")
    invited, too_late, by_task = (run.xcom(t) for t in ("invited", "too_late", "invited_by_task"))
    other = airflow.run("http_partner")

    def call(url, payload):
        return httpx.post(url, json=payload, timeout=TIMEOUT)

    said(call(too_late, 1), 410)
    said(call(invited[:-3], 1), 403)
    said(call(invited.partition("?")[0], 1), 401)
    said(call(invited, "yes"), 200)
    said(call(by_task, "no"), 409)
    until(lambda: run.xcom("gather") == ["yes"], "downstream has it")
    assert run.finished() == "success"

    other.until_task("invited", "success")
    other.until_task("wait", "deferred")
    before = other.xcom("invited")
    other.clear("wait")
    until(lambda: other.tasks()["wait"]["try_number"] == 2, "the wait begins again")
    other.until_task("wait", "deferred")
    said(call(before, "stale"), 410)
    other.clear("invited")
    until(lambda: other.xcom("invited") not in (None, before), "it is invited again")
    said(call(other.xcom("invited"), "fresh"), 200)
    assert other.finished() == "success"
    log = (airflow.home / "api-server.log").read_text()
    assert "/events/callback" in log
    log += run.logs("invited") + run.logs("invited_by_task")
    assert "The address is" in log
    assert not any(url.partition("token=")[2].rpartition(".")[2] in log for url in (invited, by_task, before))


def test_webhooks(airflow, sender):
    secret, test = "a secret", uuid.uuid4().hex
    for scheme in ("github", "stripe"):
        extra = {"airflow_events": {"webhook": scheme, "keys": f"{test}/*", "events": ["push", "paid"]}}
        connection = {"conn_type": "generic", "password": secret, "extra": json.dumps(extra)}
        airflow.api("POST", "/connections", {"connection_id": f"{scheme}-{test}", **connection})

    def mac(text):
        return hmac.new(secret.encode(), text, hashlib.sha256).hexdigest()

    def github(payload, key=f"{test}/g", signature=None, kind="push", delivery="d1"):
        body = json.dumps(payload).encode()
        headers = {
            "Content-Type": "application/json",
            "X-Hub-Signature-256": f"sha256={signature or mac(body)}",
            "X-GitHub-Event": kind,
            "X-GitHub-Delivery": delivery,
        }
        return httpx.post(f"{airflow.url}/events/webhooks/github-{test}/keys/{key}", content=body, headers=headers)

    def stripe(payload, age=0, secret_of=mac):
        body = json.dumps(payload).encode()
        at = str(int(time.time()) - age).encode()
        signature = f"t={at.decode()},v1={'0' * 64},v1={secret_of(at + b'.' + body)}"
        headers = {"Content-Type": "application/json", "Stripe-Signature": signature}
        return httpx.post(
            f"{airflow.url}/events/webhooks/stripe-{test}/keys/{test}/s", content=body, headers=headers
        )

    said(github({"ref": "main"}, signature="0" * 64), 403)
    said(github({"ref": "main"}, key="elsewhere"), 403)
    said(stripe({"type": "paid"}, age=400), 403)
    said(stripe({"type": "paid"}, secret_of=lambda text: "0" * 64), 403)
    assert github({"zen": "..."}, kind="ping").status_code == 204
    assert stripe({"type": "other"}).status_code == 204
    first = said(github({"ref": "main"}), 202)
    assert said(github({"ref": "main"}), 202) == first
    said(stripe({"type": "paid", "id": "evt_1"}), 202)
    runs = [airflow.run("http_one", {"key": f"{test}/{key}"}) for key in "gs"]
    assert [run.finished() for run in runs] == ["success"] * 2
    assert runs[0].xcom("gather") == [{"ref": "main"}]
    assert runs[1].xcom("gather") == [{"type": "paid", "id": "evt_1"}]


def test_the_event_needs_no_triggerer(airflow, sender):
    run = airflow.run("http_one")
    run.until_task("wait", "deferred")
    airflow.components["triggerer"].kill()
    said(sender.send(run, "wait", 1), 200)
    assert run.finished() == "success"
    assert run.xcom("gather") == [1]
