"""`send_event` as a DAG file has it."""

from __future__ import annotations

import json
from collections import UserList
from datetime import datetime, timedelta, timezone
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import pytest
from airflow.sdk import DAG
from airflow_events import send_event
from airflow_events.operators import event_hook
from airflow_events.operators import send_event as module
from airflow_events.operators.send_event import SendEventOperator


def test_each_call_is_a_task_with_a_name_of_its_own():
    with DAG("d", schedule=None) as dag:
        first = send_event("key-{{ params.order }}", {"run": "{{ run_id }}"})
        send_event("key", first)
        send_event.override(task_id="news", retries=7)("news", 1, to="all", ttl=timedelta(hours=1))
    assert sorted(dag.task_ids) == ["news", "send_event", "send_event__1"]
    assert [dag.get_task(task).retries for task in ("send_event", "news")] == [3, 7]
    assert dag.get_task("send_event__1").upstream_task_ids == {"send_event"}


@pytest.mark.parametrize(
    ("key", "of_event", "message"),
    [
        ("", {}, "a key is a text of 1 to 256 characters in one line, not ''"),
        ("two\nlines", {}, "a key is a text"),
        ("key", {"ttl": "1h"}, "ttl is a time above zero, a timedelta or seconds, not '1h'"),
        ("key", {"ttl": 0}, "ttl is a time above zero"),
        ("key", {"ttl": timedelta(0)}, "ttl is a time above zero"),
        ("key", {"ttl": float("inf")}, "ttl is a time above zero"),
        ("key", {"to": "both"}, "an event goes to 'one' or to 'all', not to 'both'"),
    ],
)
def test_what_can_never_be_sent_is_refused_as_the_dag_is_parsed(key, of_event, message):
    with DAG("d", schedule=None), pytest.raises(ValueError, match=message):
        send_event(key, 1, **of_event)


def test_it_is_mapped_as_any_operator_is():
    with DAG("d", schedule=None) as dag:
        SendEventOperator.partial(task_id="send", event=1).expand(key=["a", "b"])
    assert dag.get_task("send").is_mapped


def test_what_was_rendered_is_sent_and_the_answer_returned(monkeypatch):
    sent = []

    class Hook:
        def send(self, *args, **kwargs):
            sent.append((args, kwargs))
            return {"status": "kept"}

    monkeypatch.setattr(module, "EventHook", Hook)
    task = SendEventOperator(task_id="send", key="order-{{ n }}", event={"n": ["{{ n }}"]}, to="all", ttl=5)
    task.render_template_fields({"n": 17})
    assert task.execute({}) == {"status": "kept"}
    assert sent == [(("order-17", {"n": ["17"]}), {"to": "all", "ttl": 5})]


class Colour(Enum):
    RED = "red"


NOON = datetime(2026, 11, 30, 12, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("event", "body"),
    [
        ({"path": Path("/a"), "colour": Colour.RED}, {"path": "/a", "colour": "red"}),
        (
            [NOON, NOON.date(), NOON.time(), timedelta(seconds=5)],
            [NOON.isoformat(), "2026-11-30", "12:00:00", 5.0],
        ),
        ({"set": {2, 1}, "id": UUID(int=7)}, {"set": [1, 2], "id": str(UUID(int=7))}),
        (UserList([UserList([1]), 2]), [[1], 2]),  # as the outputs of a mapped task, which are a sequence
    ],
)
def test_what_stands_for_json_is_sent_as_that(monkeypatch, event, body):
    sent = []

    def answer(key, post):
        post(SimpleNamespace(post=lambda url, content, headers: sent.append(content)))
        return {"differs": False, "event_id": "e", "status": "kept"}

    monkeypatch.setattr(event_hook, "get_current_context", lambda: {"ti": SimpleNamespace(id=UUID(int=1))})
    monkeypatch.setattr(event_hook, "_answer", answer)
    monkeypatch.setattr(event_hook._Sender, "post", event_hook._Sender._post)
    SendEventOperator(task_id="send", key="k", event=event).execute({})
    assert json.loads(sent[0])["event"] == body
    with pytest.raises(ValueError, match="Object of type object is not JSON serializable"):
        SendEventOperator(task_id="send", key="k", event=object()).execute({})


def test_to_whom_it_goes_is_checked_when_the_dag_is_parsed():
    with pytest.raises(ValueError, match="'some'"):
        send_event("key", 1, to="some")
