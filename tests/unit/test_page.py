"""What runs in the browser, in a real one, with made-up answers of the API server."""

from __future__ import annotations

import json
from importlib.resources import files
from urllib.parse import urlsplit

import pytest

import browser

STATIC = files("airflow_events.page") / "static"
pytestmark = pytest.mark.slow

URL = "http://airflow.example.com/events"
NO_WAITS = {"waits": [], "total": 0, "more": False}
SUMMARY = {
    "dag_id": "shop", "run_id": "run", "task_id": "wait", "map_index": -1, "state": "deferred", "stage": "open",
    "try_number": 1, "listener": "HttpListener", "call": "HttpListener()", "since": "2026-11-30T12:00:00Z",
    "deadline": None, "holder": None, "triggerer": None, "sign_of_life": None, "phase": None, "recorded": None,
    "ended": None, "seconds_to_delivery": None, "arrived": None, "wanted": None, "dag_state": None,
    "parked": True, "hosted": False, "log_of": None, "trouble": None,
}  # fmt: skip
DETAIL = {
    "summary": SUMMARY, "record": None, "arguments": None, "steps": [], "tries": [], "error": None,
    "takes_http_events": True, "cannot_forget": None,
}  # fmt: skip
RECORD = {
    "phase": "committed", "event": None, "preview": None, "length": 20, "recorded": "2026-11-30T12:00:00Z",
    "committed": "2026-11-30T12:00:00Z", "delivered": None, "sent_by": "ada", "reason": None,
}  # fmt: skip


@pytest.fixture
def page(chromium):
    """A page whose ``answers`` are by what is asked for: (status, text); what was sent is in ``sent``."""
    with browser.logged_in(chromium, URL, "token") as page:
        page.answers, page.sent = {"waits": (200, json.dumps(NO_WAITS)), "starts": (200, "[]")}, []
        page.route("**/*", lambda route: answer(page, route))
        yield page
        assert not page.problems


def answer(page, route):
    url = urlsplit(route.request.url)
    path = url.path.removeprefix("/events/")
    if path.startswith("page/"):
        name = path.removeprefix("page/") or "index.html"
        kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "html": "text/html"}
        route.fulfill(body=STATIC.joinpath(name).read_bytes(), content_type=kinds[name.rpartition(".")[2]])
        return
    if route.request.method == "POST":
        page.sent.append(route.request.post_data)
        route.fulfill(status=200, body="{}", content_type="application/json")
        return
    status, text = page.answers.get(path.removeprefix("api/"), (404, "{}"))
    if "stage=recorded" in url.query:
        status, text = 200, json.dumps(NO_WAITS)
    route.fulfill(status=status, body=text, content_type="application/json")


def open_wait(page, **detail):
    text = json.dumps({"wait": {**DETAIL, **detail}, "may_see_event": True, "may_edit": True})
    page.answers["waits/shop/run/wait/-1"] = (200, text)
    page.goto(f"{URL}/page/?dag_id=shop&run_id=run&task_id=wait&map_index=-1")


def send(page, text):
    open_wait(page)
    page.locator("#send").click()
    page.locator("#payload").fill(text)
    page.locator("#send-yes").click()


def test_an_event_is_sent_as_it_is_typed(page):
    """A browser's own numbers have 53 bits, and no fraction that is zero."""
    send(page, '{"id": 9007199254740993, "price": 1.0}')
    page.locator("#send-dialog").wait_for(state="detached")
    assert page.sent == ['{"id": 9007199254740993, "price": 1.0}']


def test_what_is_no_json_is_not_sent(page):
    send(page, "{'id': 1}")
    page.get_by_text("This is not valid JSON").wait_for()
    assert page.sent == []


def test_a_long_integer_is_shown_as_it_is(page):
    record = {**RECORD, "event": {"ids": [9007199254740993, -9223372036854775808, 17]}}
    open_wait(page, record=record)
    assert json.loads(page.locator("#event").inner_text()) == record["event"]


def test_who_may_not_see_what_starts_runs_gets_back(page):
    page.answers["starts"] = (403, '{"detail": "Forbidden"}')
    page.goto(f"{URL}/page/?stage=starts")
    page.get_by_role("alert").wait_for()
    page.locator("#tab-open").click()
    page.get_by_text("No open waits").wait_for()


def test_the_keyboard_stays_on_a_link_while_the_list_refreshes(page):
    page.answers["waits"] = (200, json.dumps({**NO_WAITS, "waits": [SUMMARY], "total": 1}))
    page.goto(f"{URL}/page/?stage=ended")
    link = page.locator("td.name a")
    link.focus()
    link.evaluate("element => { element.old = true; }")
    page.wait_for_function("!document.querySelector('td.name a').old", timeout=20_000)
    page.wait_for_function("document.activeElement?.tagName === 'A'", timeout=2_000)
