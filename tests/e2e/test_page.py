"""The page in a real Airflow: with a real browser, with real permissions, and from the terminal."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode

import jwt
import pytest
from airflow_events.page.routes import router

import browser
from deployment import until


@pytest.fixture(scope="module")
def token(airflow):
    """Make the login of a user with a role; None is a user without any permission."""
    airflow.api("GET", "/dags?limit=1")
    claims = jwt.decode(airflow._token, options={"verify_signature": False})
    secret = airflow.environment["AIRFLOW__API_AUTH__JWT_SECRET"]

    def token(role):
        return jwt.encode({**claims, "sub": f"a {role}", "role": role}, secret, algorithm="HS512")

    return token


@dataclass(frozen=True)
class Answer:
    status: int
    body: str

    @property
    def json(self):
        return json.loads(self.body)


def ask(server, path, *, method="GET", token=None):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if method == "POST":
        headers["Content-Type"] = "application/json"
    request = urllib.request.Request(f"{server.url}/events{path}", method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return Answer(answer.status, answer.read().decode())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode())


def of_wait(run, task="wait"):
    return f"/api/waits/{quote(run.dag_id)}/{quote(run.run_id, safe='')}/{task}/-1"


def phase(server, run, token):
    """How far the event of a wait has come, as the page has it; None if nothing is recorded."""
    record = ask(server, of_wait(run), token=token).json["wait"]["record"]
    return record and record["phase"]


ROUTES = sorted((method, route.path) for route in router.routes for method in route.methods)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_without_a_login_no_route_answers(strict, method, path):
    path = path.format(dag_id="leased", run_id="x", task_id="wait", map_index=-1, name="page.js")
    assert ask(strict, path, method=method).status in (401, 403)
    assert ask(strict, path, method=method, token="not.a.token").status in (401, 403)


def test_who_has_no_permission_sees_and_does_nothing_and_a_viewer_only_sees(airflow, strict, base, token):
    base.drop("first.csv")
    run = airflow.run("finish_in_triggerer", base.conf)
    run.finished()
    nobody, viewer, user = token(None), token("viewer"), token("user")

    for path in ("/api/waits?stage=ended", of_wait(run)):
        assert ask(strict, path, token=nobody).status == 403
        assert ask(strict, path, token=viewer).status == 200
    for login in (nobody, viewer):
        assert ask(strict, f"{of_wait(run)}/forget", method="POST", token=login).status == 403
    assert phase(strict, run, viewer) == "committed"
    shown = ask(strict, of_wait(run), token=viewer).json
    assert not shown["may_edit"]
    assert [step["done"] for step in shown["wait"]["steps"]] == [True] * 4

    assert ask(strict, f"{of_wait(run)}/forget", method="POST", token=user).status == 204
    assert ask(strict, f"{of_wait(run)}/forget", method="POST", token=user).status == 409
    assert phase(strict, run, viewer) is None
    assert run.xcom("wait") is None
    log = airflow.api("GET", f"/eventLogs?event=forget_event&run_id={quote(run.run_id)}")["event_logs"]
    assert "a user" in {entry["owner"] for entry in log}

    # A clear waits for another event, and the one that was forgotten does not come again.
    base.drop("second.csv")
    run.clear("wait", "deliver")
    run.finished()
    assert run.xcom("wait")["name"] == "second.csv"


def in_terminal(terminal, run):
    """What ``airflow events show`` says of a wait."""
    [told] = json.loads(terminal("events", "show", run.dag_id, run.run_id, "wait", "--output", "json"))
    return told


def test_the_terminal_does_what_the_page_does(airflow, terminal, base):
    run = airflow.run("leased", base.conf)
    run.until_task("wait", "deferred")
    rendered = f"LeasedQueue({str(base.path)!r})"  # once it has begun
    until(lambda: in_terminal(terminal, run)["waits_for"] == rendered, "the wait has begun")
    listed = json.loads(airflow.airflow("events", "list", "--dag-id", "leased", "--output", "json"))
    [wait] = [wait for wait in listed if wait["run_id"] == run.run_id]
    assert (wait["state"], wait["waits_for"]) == ("deferred", rendered)
    with pytest.raises(RuntimeError, match="Nothing is recorded"):
        terminal("events", "forget", "--yes", "leased", run.run_id, "wait")
    base.send("a")
    run.finished()
    assert json.loads(in_terminal(terminal, run)["event"])["message"] == "a"
    assert "Forgotten" in terminal("events", "forget", "--yes", "leased", run.run_id, "wait")
    assert in_terminal(terminal, run)["event"] is None
    with pytest.raises(RuntimeError, match="is not found, or does not wait"):
        terminal("events", "show", "leased", "nobody", "wait")


def test_the_terminal_asks_before_it_forgets(airflow, terminal, base):
    base.send("a")
    run = airflow.run("leased", base.conf)
    run.finished()
    forget = ("events", "forget", "leased", run.run_id, "wait")
    with pytest.raises(RuntimeError, match="Nothing was forgotten"):
        terminal(*forget, typed="maybe\nn\n")
    assert in_terminal(terminal, run)["phase"] == "committed"
    assert "Forgotten" in terminal(*forget, typed="y\n")
    assert in_terminal(terminal, run)["phase"] is None


def test_the_terminal_sends_and_rejects(airflow, terminal):
    run = airflow.run("http")
    run.until_task("plain", "deferred")

    def send(task, payload, *options, typed=""):
        return terminal(
            "events", "send", "http", run.run_id, *task.split(), "--payload", payload, *options, typed=typed
        )

    with pytest.raises(RuntimeError, match="The payload is not valid JSON"):
        send("plain", "{")
    with pytest.raises(RuntimeError, match='is not of type "integer"'):
        send("later", '{"order": "x"}')
    with pytest.raises(RuntimeError, match="there is no task instance"):
        send("nobody", "1")
    assert "It is kept until the wait begins" in send("later", '{"order": 1}')
    assert "The wait has it" in send("plain", "-", "--idempotency-key", "k", typed='{"n": 1}')
    assert "The wait has it" in send("plain", '{"n": 1}', "--idempotency-key", "k")
    with pytest.raises(RuntimeError, match="has another event"):
        send("plain", '{"n": 2}')
    run.until_task("mapped[1]", "deferred")
    assert "The wait has it" in send("mapped 1", '{"order": 2}')
    for task in ("plain", "later", "mapped[1]"):
        run.until_task(task, "success")
    assert run.xcom("later") == {"order": 1}

    run.until_task("starts_on_worker", "deferred")
    reject = ("events", "reject", "http", run.run_id, "starts_on_worker", "--reason", "no budget")
    assert "The task fails now" in terminal(*reject)
    assert run.until_task("starts_on_worker", "failed", "up_for_retry", "success") == "failed"
    assert "no budget" in run.logs("starts_on_worker")
    with pytest.raises(RuntimeError, match="was rejected"):
        send("starts_on_worker", "1")
    audit = airflow.api("GET", f"/eventLogs?dag_id=http&run_id={quote(run.run_id)}&limit=100")["event_logs"]
    done = [entry["event"] for entry in audit if entry["event"] in ("event sent", "event rejected")]
    assert sorted(done) == ["event rejected"] + ["event sent"] * 3


def searched(page, strict, run):
    """Search the list for a run, and return the page once it has that one row."""
    page.goto(f"{strict.url}/plugin/event-waits")
    inside = browser.frame(page)
    inside.locator("#search").fill(run.run_id)
    inside.get_by_text(re.compile(r"\bof 1$")).wait_for()
    return inside


def test_in_the_browser_a_wait_is_rejected(airflow, strict, chromium, token):
    run = airflow.run("http_one")
    run.until_task("wait", "deferred")
    with browser.logged_in(chromium, strict.url, token("admin")) as page:
        inside = searched(page, strict, run)
        inside.locator("tbody a").click()
        inside.locator("#reject").click()
        inside.locator("#reject-yes").click()  # without a reason
        assert inside.locator("#reject-dialog").is_visible()
        inside.locator("#reason").fill("nobody")
        inside.locator("#cancel").click()
        inside.locator("#reject-dialog").wait_for(state="detached")
        assert run.task_state("wait") == "deferred"
        assert phase(strict, run, token("admin")) is None
        inside.locator("#reject").click()
        inside.locator("#reason").fill("the order was withdrawn")
        inside.locator("#reject-yes").click()
        inside.get_by_text("by a admin: the order was withdrawn").first.wait_for()
        assert run.finished() == "failed"
        assert run.tasks()["wait"]["try_number"] == 1  # though it has retries
        inside.get_by_text("Ended: failed").first.wait_for()
        assert page.problems == []


def test_in_the_browser_a_wait_is_found_opened_sent_an_event_and_forgotten(airflow, strict, chromium, token):
    run = airflow.run("http_one")
    run.until_task("wait", "deferred")
    with browser.logged_in(chromium, strict.url, token("admin")) as page:
        inside = searched(page, strict, run)
        found = inside.locator("tbody a")
        assert found.all_inner_texts() == ["http_one · wait"]

        found.click()
        inside.get_by_text("HttpListener").first.wait_for()
        assert inside.locator("#forget").count() == 0
        inside.locator("#send").click()
        inside.locator("#payload").fill('{"order": ')
        inside.locator("#send-yes").click()
        inside.get_by_text("This is not valid JSON").wait_for()
        inside.locator("#payload").fill('{"order": 42}')
        inside.locator("#send-yes").click()
        inside.locator("#event").wait_for()
        assert '"order": 42' in inside.locator("#event").inner_text()
        assert run.finished() == "success"
        assert run.xcom("gather") == [{"order": 42}]

        inside.locator("#forget").click()
        inside.locator("#cancel").click()
        assert phase(strict, run, token("admin")) == "committed"
        inside.locator("#forget").click()
        inside.locator("#forget-yes").click()
        inside.get_by_text("No event has been recorded").wait_for()
        assert phase(strict, run, token("admin")) is None

        # Out of the frame to the task, and there the same wait as a tab.
        inside.locator("#task").click()
        page.wait_for_url("**/tasks/wait")
        page.get_by_role("link", name="Wait", exact=True).click()
        browser.frame(page).get_by_text("The wait", exact=True).wait_for()
        assert page.problems == []


def test_in_the_browser_what_starts_runs_is_listed(airflow, strict, chromium, token):
    dag = "events_start_runs"
    airflow.add_dags(Path(__file__).parents[2] / "example_dags" / "event_starts.py")
    airflow.wait_for_dags(dag)
    airflow.api("PATCH", f"/dags/{dag}", {"is_paused": False})
    listed = lambda: ask(strict, "/api/starts", token=token("viewer")).json  # noqa: E731
    states = lambda: [(one["state"], one["lag"]) for one in listed()]  # noqa: E731
    until(lambda: states() == [("failing", None)], "it says that there is no directory")
    [about] = listed()
    assert "starts cannot be reached" in about["trouble"]
    (airflow.home / "starts").mkdir()
    until(lambda: states() == [("open", 0)], "the next event starts a run")
    assert ask(strict, "/api/starts", token=token(None)).status == 403
    with browser.logged_in(chromium, strict.url, token("viewer")) as page:
        page.goto(f"{strict.url}/plugin/event-waits")
        inside = browser.frame(page)
        inside.locator("#tab-starts").click()
        row = inside.locator("tbody tr", has_text=dag)  # other tables are there until this one has come
        row.wait_for()
        assert [text.strip() for text in row.locator("td").all_inner_texts()[:6]] == [
            dag, "DirectoryListener('starts', pattern='*.csv')", "open", "0 of 8", "0", "none",
        ]  # fmt: skip
        inside.locator("#search").fill("nothing of this name")
        inside.get_by_text("Nothing matches").wait_for()
        inside.locator("#search").fill("EVENTS_start")
        row.wait_for()
        row.locator("a").first.click()
        page.wait_for_url(f"**/dags/{dag}")
        assert page.problems == []


@pytest.mark.parametrize("theme", ["dark", pytest.param("light", marks=pytest.mark.release)])
def test_it_has_the_color_mode_of_airflow(strict, chromium, token, theme):
    with browser.logged_in(chromium, strict.url, token("viewer"), theme=theme) as page:
        page.goto(f"{strict.url}/plugin/event-waits?{urlencode({'stage': 'ended'})}")
        root = browser.frame(page).locator("html")
        until(lambda: root.get_attribute("data-theme") == theme, f"the page is {theme}")
        body = browser.frame(page).locator("body")
        color = "element => getComputedStyle(element).backgroundColor"
        assert body.evaluate(color) == page.locator("html").evaluate(color)


def test_in_the_browser_who_has_no_permission_sees_no_wait(strict, chromium, token):
    with browser.logged_in(chromium, strict.url, token(None)) as page:
        page.goto(f"{strict.url}/events/page/")
        page.get_by_role("alert").wait_for()
        assert page.locator("tbody tr").count() == 0
