"""`send_event` as a DAG file has it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from airflow.sdk import DAG
from airflow_events import send_event
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


def test_to_whom_it_goes_is_checked_when_the_dag_is_parsed():
    with pytest.raises(ValueError, match="'some'"):
        send_event("key", 1, to="some")
