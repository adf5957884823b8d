"""What somebody sees of waits that share something with those of others, and what it costs to look."""

from __future__ import annotations

import json

import pytest
from airflow_events.inbox.models import EventHost, EventWait
from sqlalchemy import event, insert, update


def test_what_a_host_tells_of_other_dags_is_for_those_who_may_see_them(server):
    blue, red = server.waits.add(dag_id="blue"), server.waits.add(dag_id="red")
    host = b"h" * 32
    trouble = "the topic 'secret' of the connection 'red_kafka' cannot be reached; trying again"
    server.session.add(EventHost(host=host, trigger_id=1, log_of=f"{red.id}, try 1", trouble=trouble))
    values = {"host": host, "parked": "x", "hosted_at": server.waits.row(blue).since}
    both = EventWait.run_id.in_([blue.run_id, red.run_id])
    server.session.execute(update(EventWait).where(both).values(**values))
    server.session.commit()

    def seen(*teams):
        client = server.client(server.token("VIEWER", teams=list(teams)))
        [listed] = [
            wait for wait in client.get("/events/api/waits?limit=200").json()["waits"] if wait["dag_id"] == "blue"
        ]
        page = client.get(f"/events/api/waits/blue/{blue.run_id}/{blue.task_id}/-1").json()["wait"]
        assert [page["summary"][name] for name in ("trouble", "log_of")] == [listed["trouble"], listed["log_of"]]
        return listed["trouble"], listed["log_of"]

    assert seen("blue") == ("a source of the waits that share its trigger cannot be reached", None)
    assert seen("blue", "red") == (trouble, f"{red.id}, try 1")


def test_of_ten_thousand_places_no_more_is_read_than_is_shown(server):
    wait = server.waits.add()
    names = {name: getattr(wait, name) for name in ("dag_id", "run_id", "task_id", "map_index")}
    text = json.dumps({"value": "x" * 1000})
    row = {**names, "phase": "committed", "event": text, "generation": 0, "clears": 0}
    server.session.execute(insert(EventWait), [{**row, "place": place} for place in range(10_000)])
    server.session.commit()
    read = []

    def note(instance, context):
        read.append(instance)

    event.listen(EventWait, "load", note)
    try:
        client = server.client(server.token("VIEWER"))
        answer = client.get(f"/events/api/waits/{wait.dag_id}/{wait.run_id}/{wait.task_id}/-1")
    finally:
        event.remove(EventWait, "load", note)
    assert answer.status_code == 200
    record = answer.json()["wait"]["record"]
    assert record["phase"] == "committed" and record["preview"].startswith('{"0": {"value": "xxx')
    assert record["length"] > 10_000 * len(text)
    assert len(read) < 60


def test_a_list_decrypts_no_arguments_of_waits_that_have_begun(server, monkeypatch):
    wait, read = server.waits.add(), []
    monkeypatch.setattr("airflow_events.waits.arguments.read", lambda *args, **kwargs: read.append(args))

    def listed(call):
        begun = EventWait.run_id == wait.run_id, EventWait.task_id == wait.task_id
        server.session.execute(update(EventWait).where(*begun).values(call=call))
        server.session.commit()
        path = f"/events/api/waits?dag_id={wait.dag_id}&run_id={wait.run_id}&task_id={wait.task_id}"
        [found] = server.client(server.token("VIEWER")).get(path).json()["waits"]
        return found["call"], len(read)

    assert listed("HttpListener('orders')") == ("HttpListener('orders')", 0)
    assert listed(None) == (None, 1)


@pytest.mark.parametrize(
    ("query", "name", "told"),
    [
        ("limit=0", "limit", "greater than or equal to 1"),
        ("limit=201", "limit", "less than or equal to 200"),
        ("limit=many", "limit", "valid integer"),
        ("offset=-1", "offset", "greater than or equal to 0"),
        ("stage=closed", "stage", "Input should be 'recorded', 'open'"),
        ("order=colour", "order", "Input should be"),
        ("descending=maybe", "descending", "valid boolean"),
        ("dag_id=a%00b", "dag_id", "should match pattern"),
        ("text=" + "x" * 251, "text", "at most 250 characters"),
        ("dag=blue", "dag", "no such parameter; there are ['stage', 'dag_id', "),
        ("dag_id=blue&dag_id=red", "dag_id", "more than once"),
    ],
)
def test_a_list_of_other_waits_than_meant_is_refused(server, query, name, told):
    answer = server.client(server.token("VIEWER")).get(f"/events/api/waits?{query}")
    [detail] = answer.json()["detail"]
    assert (answer.status_code, detail["loc"]) == (422, ["query", name])
    assert told in detail["msg"]
