"""A page from elsewhere that makes a browser ask, with the cookie of who is logged in."""

from __future__ import annotations

import pytest
from in_process import ROUTES

# Whoever asks at these has something in hand that no browser adds by itself.
WITHOUT_COOKIE = ("/callback", "/webhooks/", "/inbox", "/tasks/")
CHANGES = [
    (method, path)
    for method, path in ROUTES
    if method not in ("GET", "HEAD", "OPTIONS") and not path.startswith(WITHOUT_COOKIE)
]
JSON = {"Content-Type": "application/json"}
REFUSED = [
    {},
    {"Content-Type": "application/x-www-form-urlencoded", "Origin": "http://airflow"},
    {"Content-Type": "text/plain", "Sec-Fetch-Site": "same-origin"},
    {"Content-Type": "multipart/form-data; boundary=application/json", "Origin": "http://airflow"},
    JSON,
    {**JSON, "Origin": "https://evil.example.com"},
    {**JSON, "Origin": "null"},
    {**JSON, "Origin": ""},
    {**JSON, "Origin": "http://airflow.evil.example.com"},
    {**JSON, "Origin": "http://airflow@evil.example.com"},
    {**JSON, "Origin": "http://airflow:81"},
    {**JSON, "Referer": "http://airflow/"},
    {**JSON, "Origin": "http://airflow", "Sec-Fetch-Site": "cross-site"},
    {**JSON, "Origin": "http://airflow", "Sec-Fetch-Site": "same-site"},
    {**JSON, "Sec-Fetch-Site": "none"},
    {**JSON, "Authorization": "Basic YWRtaW46YWRtaW4="},
]
MEANT = [
    {**JSON, "Origin": "http://airflow"},
    {**JSON, "Origin": "https://airflow.example.com"},  # [api] base_url, behind a proxy that changes the host
    {**JSON, "Sec-Fetch-Site": "same-origin"},
]


def asked(server, method, path, headers, *, token=None, cookie=None):
    wait = server.waits.add("key")
    server.session.commit()
    names = {"dag_id": wait.dag_id, "run_id": wait.run_id, "task_id": wait.task_id, "map_index": -1, "key": "key"}
    client = server.client(token, cookies={"_token": cookie} if cookie else None)
    address = f"/events{path.replace(':path', '').format(**names)}"
    answer = client.request(method, address, content=b'{"reason": "none"}', headers=headers)
    return answer, server.waits.state(wait).state == "deferred"


def test_there_are_such_routes():
    assert {path.rpartition("/")[2] for _, path in CHANGES} >= {"forget", "reject", "{task_id}", "{key:path}"}


@pytest.mark.parametrize(("method", "path"), CHANGES)
@pytest.mark.parametrize("headers", REFUSED, ids=repr)
def test_a_cookie_alone_changes_nothing(server, method, path, headers):
    answer, is_open = asked(server, method, path, headers, cookie=server.token("ADMIN"))
    assert answer.status_code in (403, 415)
    assert is_open


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_the_page_itself_and_programs_with_a_token_get_through(server, method, path):
    token = server.token("ADMIN")
    for headers in MEANT:
        answer, _ = asked(server, method, path, headers, cookie=token)
        assert answer.status_code in (200, 202, 204, 409), answer.text
    answer, _ = asked(server, method, path, JSON, token=token)
    assert answer.status_code in (200, 202, 204, 409), answer.text
    answer, is_open = asked(server, method, path, {"Content-Type": "text/plain"}, token=token)
    assert answer.status_code == 415 and is_open
