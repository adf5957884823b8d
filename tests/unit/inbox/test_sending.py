"""Events that are sent to a wait, in each database: who has them then, and what the task makes of them."""

from __future__ import annotations

import json
import logging
import threading
from datetime import datetime, timedelta, timezone

import pytest
import time_machine
from airflow.models.asset import AssetActive, AssetModel
from airflow.models.taskmap import TaskMap
from airflow.models.xcom import XComModel
from airflow_events.api import sending
from airflow_events.api.refusals import HasEvent, Moving, NoSuchWait, Over, TooEarly, Unfit
from airflow_events.inbox.database import in_transaction
from airflow_events.inbox.entries import Status
from airflow_events.listeners.base import Wait
from airflow_events.listeners.support import schemas
from airflow_events.triggers import outcome
from sqlalchemy import insert, select

HOUR = timedelta(hours=1)
ORDER = {"type": "object", "required": ["order"], "properties": {"order": {"type": "integer"}}}


def send(http, wait, payload, *, by="ada", **more):
    return sending.send(http.session, wait, payload, by=by, **more)


def nested(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


def to_worker(http, wait):
    """What a worker that is to end the task is told."""
    state = http.state(wait)
    assert (state.state, state.trigger_id, state.next_method) == ("scheduled", None, "execute_complete")
    return outcome.decode(state.next_kwargs["event"])


def test_an_event_ends_the_task_of_a_deferred_wait(http):
    wait = http.add(columns={"trigger_timeout": datetime.now(timezone.utc) + HOUR})
    receipt = send(http, wait, {"n": [1, None, 2.5]}, event_id="e")
    assert receipt == sending.Receipt("delivered", "e", wait.id)
    state, row = http.state(wait), http.row(wait)
    assert (state.state, state.trigger_id, state.trigger_timeout) == ("success", None, None)
    assert http.xcoms(wait) == {"return_value": {"n": [1, None, 2.5]}}
    assert (row.phase, json.loads(row.event), row.record_id) == ("committed", {"n": [1, None, 2.5]}, "e")
    assert (row.record_clears, row.sent_by, row.finished_by, row.expires) == (3, "ada", 1, None)
    assert None not in (row.recorded_at, row.committed_at, row.delivered_at)
    assert http.audit(wait) == [("event sent", "ada")]


def test_of_two_senders_the_first_has_it(http):
    wait = http.add()
    send(http, wait, "first")
    with pytest.raises(HasEvent):
        send(http, wait, "second", by="bob")
    assert http.xcoms(wait) == {"return_value": "first"}
    assert http.audit(wait) == [("event sent", "ada")]


def test_an_event_that_comes_early_is_there_when_the_wait_begins(http):
    wait = http.add(state=None)
    assert send(http, wait, {"n": 1}, ttl=HOUR).status == "kept"
    row = http.row(wait)
    assert (row.phase, row.since, row.delivered_at) == ("committed", None, None)
    assert row.expires > datetime.now(timezone.utc)
    with pytest.raises(HasEvent):
        send(http, wait, {"n": 2})
    begun = http.again(wait, cleared=False)
    assert json.loads(begun.stored.event) == {"n": 1}
    with time_machine.travel(datetime.now(timezone.utc) + 2 * HOUR):  # it is the wait's now, and stays so
        assert json.loads(http.again(wait, cleared=False).stored.event) == {"n": 1}


@pytest.mark.parametrize("cleared", [False, True], ids=["at first", "after a clear"])
def test_an_early_event_that_has_expired_is_none(http, cleared):
    wait = http.add(state="deferred" if cleared else None)
    if cleared:
        http.again(wait, cleared=True, state=None)
    send(http, wait, "early", ttl=HOUR)
    with time_machine.travel(datetime.now(timezone.utc) + 2 * HOUR):
        assert http.again(wait, cleared=False).stored is None
        assert send(http, wait, "in time").status == "delivered"
    assert http.xcoms(wait) == {"return_value": "in time"}


def test_who_comes_after_an_early_event_that_has_expired_is_taken_before_the_wait_begins(http):
    wait = http.add(state=None)
    send(http, wait, "early", ttl=HOUR)
    with time_machine.travel(datetime.now(timezone.utc) + 2 * HOUR):
        assert send(http, wait, "later").status == "kept"
        assert http.row(wait).expires is None
        assert json.loads(http.again(wait, cleared=False).stored.event) == "later"


def test_an_event_for_a_deferred_wait_whose_trigger_has_not_begun_ends_it_as_well(http):
    wait = http.add(begun=False)
    assert send(http, wait, 1, ttl=HOUR).status == "delivered"
    assert http.state(wait).state == "success"
    assert http.begin(wait).status == Status.OUTLIVED


def test_a_wait_that_is_on_a_worker_to_begin_has_the_event_when_it_does(http):
    wait = http.add(state="running")
    assert send(http, wait, 1, ttl=HOUR).status == "kept"
    assert http.row(wait).expires is None  # it has begun
    assert http.again(wait, cleared=False).stored.event == "1"


@pytest.mark.parametrize("state", ["deferred", None])
def test_a_rejected_wait_fails_on_a_worker_and_a_clear_undoes_it(http, state):
    wait = http.add(state=state)
    assert sending.reject(http.session, wait, "no budget", by="bob") == ("delivered" if state else "kept")
    row = http.row(wait)
    assert (row.phase, row.reason, row.sent_by, row.record_clears) == ("rejected", "no budget", "bob", 3)
    assert row.delivered_at is None
    assert http.audit(wait) == [("event rejected", "bob")]
    if state:
        assert to_worker(http, wait) == outcome.Rejected("no budget", "bob")
        assert row.finished_by == 1
    assert sending.reject(http.session, wait, "no budget", by="bob") == ("delivered" if state else "kept")
    for other in (lambda: send(http, wait, 1), lambda: sending.reject(http.session, wait, "else", by="bob")):
        with pytest.raises(Over, match="was rejected"):
            other()
    retried = http.again(wait, cleared=False)
    assert (retried.status, retried.message, retried.by) == (Status.REJECTED, "no budget", "bob")
    assert http.again(wait, cleared=True).stored is None
    assert send(http, wait, 1).status == "delivered"


def test_a_clear_that_has_undone_a_rejection_lets_an_event_come_before_the_wait_begins(http):
    wait = http.add()
    sending.reject(http.session, wait, "no", by="bob")
    http.again(wait, cleared=True, state=None)
    assert send(http, wait, 1).status == "kept"
    assert http.again(wait, cleared=False).stored.event == "1"


def test_with_replay_a_clear_delivers_the_event_again_and_takes_no_other(http):
    wait = http.add()
    send(http, wait, "mine")
    http.again(wait, cleared=True, state=None)
    with pytest.raises(HasEvent):
        send(http, wait, "another")
    assert http.again(wait, cleared=False).stored.event == '"mine"'


def test_without_replay_a_clear_waits_for_another(http):
    wait = http.add(replay=False)
    send(http, wait, "first")
    http.again(wait, cleared=True, state=None)
    assert send(http, wait, "second").status == "kept"
    with pytest.raises(HasEvent):
        send(http, wait, "third")
    assert http.again(wait, cleared=False).stored.event == '"second"'
    assert http.again(wait, cleared=True).stored is None
    assert send(http, wait, "third").status == "delivered"


def test_an_idempotency_key_is_its_senders(http):
    wait = http.add()
    receipt = send(http, wait, 1, idempotency_key="k")
    assert send(http, wait, 1, idempotency_key="k") == receipt
    with pytest.raises(Unfit, match="another payload"):
        send(http, wait, 2, idempotency_key="k")
    for others in ({"by": "bob", "idempotency_key": "k"}, {"idempotency_key": "l"}, {}):
        with pytest.raises(HasEvent):
            send(http, wait, 1, **others)
    assert http.audit(wait) == [("event sent", "ada")]


def test_a_request_that_is_made_again_since_its_commit_was_not_confirmed_is_the_same(http):
    wait = http.add()
    assert send(http, wait, 1, event_id="e") == send(http, wait, 1, event_id="e")
    assert http.audit(wait) == [("event sent", "ada")]


def test_what_a_worker_has_to_end_goes_to_one(http):
    wait = http.add(finish_on_worker=True, columns={"trigger_timeout": datetime.now(timezone.utc) + HOUR})
    send(http, wait, {"n": 1})
    arrived = to_worker(http, wait)
    assert (arrived.event, http.xcoms(wait)) == ({"n": 1}, {})
    row = http.row(wait)
    assert (row.phase, row.finished_by, row.delivered_at) == ("committed", 1, None)
    assert http.state(wait).trigger_timeout is None


@pytest.mark.parametrize(
    ("event", "trigger"),
    [
        ("text", {"mapped_over": True}),
        (None, {"mapped_over": True}),
        ([1, 2], {"mapped_over": True, "push": False}),
        (list(range(2000)), {"mapped_over": True}),
        ([1], {"multiple_outputs": True}),
        ({"k" * 513: 1}, {"multiple_outputs": True}),
        ({"": 1}, {"multiple_outputs": True}),
        ({"\U0001f389": 1}, {"multiple_outputs": True}),
    ],
)
def test_a_worker_says_why_an_event_cannot_be_what_the_task_returns(http, event, trigger):
    wait = http.add(**trigger)
    assert send(http, wait, event).status == "delivered"
    assert to_worker(http, wait).event == event


def test_a_custom_xcom_backend_is_not_called_in_the_api_server(http, monkeypatch):
    class Elsewhere(sending.XCom):
        pass

    monkeypatch.setattr(sending, "XCom", Elsewhere)
    wait, silent = http.add(), http.add(push=False)
    send(http, wait, 1), send(http, silent, 1)
    assert to_worker(http, wait).event == 1
    assert http.state(silent).state == "success"


def test_airflows_listeners_need_no_worker(http, monkeypatch):
    monkeypatch.setattr("airflow_events.inbox.tasks._has_listeners", lambda: True)
    wait = http.add()
    send(http, wait, 1)
    assert http.state(wait).state == "success"


def test_the_length_of_what_is_mapped_over_is_told(http):
    of_dag, of_trigger = http.add(dependants=["one"]), http.add(mapped_over=True)
    send(http, of_dag, ["a", "b"]), send(http, of_trigger, {"a": 1})
    lengths = {row.run_id: row.length for row in http.session.scalars(select(TaskMap))}
    assert lengths == {of_dag.run_id: 2, of_trigger.run_id: 1}
    # A mapped wait is mapped over as a whole, and not by what one of it returns.
    mapped = http.add(dependants=["one"], map_index=0)
    send(http, mapped, "text")
    assert http.xcoms(mapped) == {"return_value": "text"}


def test_multiple_outputs_are_xcoms_too(http):
    wait = http.add(multiple_outputs=True)
    send(http, wait, {"a": 1, "b": None, "return_value": "no"})
    assert http.xcoms(wait) == {"a": 1, "b": None, "return_value": {"a": 1, "b": None, "return_value": "no"}}


def test_without_a_push_nothing_is_an_xcom(http):
    for wait, event in ((http.add(push=False, multiple_outputs=True), {"a": 1}), (http.add(), None)):
        send(http, wait, event)
        assert (http.state(wait).state, http.xcoms(wait)) == ("success", {})


def test_the_dags_result_is_marked(http):
    wait = http.add()
    http.tasks[wait.task_id].returns_dag_result = True
    send(http, wait, 1)
    assert http.session.scalars(select(XComModel.dag_result)).all() == [True]


def test_outlets_are_registered_and_one_that_cannot_be_is_a_workers(http, caplog, monkeypatch):
    asset = AssetModel(name="orders", uri="orders")
    http.session.add(asset)
    http.session.flush()
    http.session.add(AssetActive(name="orders", uri="orders"))
    http.session.flush()
    registered = []
    monkeypatch.setattr(
        "airflow.models.taskinstance.TaskInstance.register_asset_changes_in_db",
        lambda ti, outlets, events, session: registered.append(outlets[0].name) or [],
    )
    wait = http.add(outlets=[{"name": "orders", "uri": "orders", "type": "Asset"}])
    send(http, wait, 1)
    assert (http.state(wait).state, registered) == ("success", ["orders"])
    wait = http.add(outlets=[{"colour": "red"}])
    with caplog.at_level(logging.WARNING):
        send(http, wait, {"n": 2})
    assert to_worker(http, wait).event == {"n": 2}
    assert http.xcoms(wait) == {}
    assert http.row(wait).delivered_at is None
    assert "cannot be registered here" in caplog.text


@pytest.mark.parametrize("payload", [nested(96), nested(2000), {"a": nested(95)}, ["\0"], {"__type": 1}, 2**70])
def test_what_airflow_cannot_give_back_is_refused_and_the_wait_goes_on(http, payload):
    wait = http.add()
    with pytest.raises(Unfit), http.session.begin_nested():
        send(http, wait, payload)
    assert http.state(wait).state == "deferred"
    assert send(http, wait, nested(95)).status == "delivered"


def test_what_does_not_fit_the_schema_is_refused(http):
    wait = http.add(schema=ORDER)
    with pytest.raises(Unfit, match=r"\$.order"):
        send(http, wait, {"order": "x"})
    for bad in ({"type": "order"}, {"pattern": r"(a)\1"}, {"$ref": "https://example.com/order"}):
        with pytest.raises(Unfit, match="not a valid JSON Schema that events can be judged by"):
            send(http, http.add(schema=bad), 1)
    assert send(http, wait, {"order": 1}).status == "delivered"


def test_why_a_payload_does_not_fit_is_worked_out_when_its_wait_is_free_again(http, monkeypatch):
    asked = []
    monkeypatch.setattr(schemas, "misfit", lambda *judged: asked.append(judged) or "why")
    with pytest.raises(Unfit) as refused, http.session.begin_nested():
        send(http, http.add(schema=ORDER), {"order": "x"})
    assert not asked
    assert str(refused.value) == "why" and asked == [(ORDER, {"order": "x"})]


def test_a_wait_that_is_not_there_or_cannot_take_it(http):
    with pytest.raises(NoSuchWait):
        send(http, Wait("shop", "no", "such"), 1)
    with pytest.raises(NoSuchWait, match="no wait of HttpListener"):
        send(http, http.add(listener="airflow_events.listeners.timer:TimerListener"), 1)
    for state in ("success", "failed", "skipped", "upstream_failed", "removed"):
        with pytest.raises(Over, match=state):
            send(http, http.add(state=state), 1)
    with pytest.raises(Moving, match="being handed to a worker"):
        send(http, http.add(state="scheduled", columns={"next_method": "execute_complete"}), 1)
    parked = http.add()
    http.set(parked, trigger_id=None)
    with pytest.raises(Moving, match="has no trigger"):
        send(http, parked, 1)
    unknown = http.add(state=None)
    http.tasks[unknown.task_id].event_wait = json.dumps({"listener": "x", "replay": True})
    with pytest.raises(NoSuchWait):
        send(http, unknown, 1)
    told = json.loads(http.tasks[parked.task_id].event_wait)
    http.tasks[unknown.task_id].event_wait = json.dumps({name: told[name] for name in ("listener", "replay")})
    with pytest.raises(TooEarly):
        send(http, unknown, 1)


def test_what_the_first_edition_recorded_counts(http):
    wait = http.add(state=None)
    receipt = {"status": "kept", "event_id": "old", "wait": wait.id}
    told = {
        "phase": "committed",
        "event": "early",
        "id": "old",
        "recorded_at": "2026-11-23T12:00:00.000+00:00",
        "receipt": {**receipt, "key": "k", "digest": sending.digest_of("early")},
    }
    names = {name: getattr(wait, name) for name in ("dag_id", "run_id", "task_id", "map_index")}
    stamp = {"dag_run_id": http.runs, "key": "event_record", "timestamp": datetime.now(timezone.utc)}
    http.session.execute(insert(XComModel.__table__).values(**names, **stamp, value=told))
    with pytest.raises(HasEvent):
        send(http, wait, "another")
    assert send(http, wait, "early", idempotency_key="k") == sending.Receipt(**receipt)
    assert http.again(wait, cleared=False).stored.record_id == "old"


def test_of_many_senders_at_once_one_has_it(committed, http_committed):
    wait = http_committed.add()
    committed.commit()
    receipts, refused = [], []

    def one(number):
        try:
            receipts.append(
                in_transaction(lambda session: sending.send(session, wait, number, by=f"sender {number}"))
            )
        except HasEvent:
            refused.append(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(receipts), len(refused)) == (1, 5)
    assert http_committed.row(wait).record_id == receipts[0].event_id
    assert [event for event, _ in http_committed.audit(wait)] == ["event sent"]
