"""What tasks send to keys, by the authority that only they have."""

from __future__ import annotations

import json
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from airflow.models.dagrun import DagRun
from airflow.models.task_state_store import TaskStateStoreModel
from airflow.sdk.execution_time import task_runner
from airflow_events import EventHook, task_proof
from airflow_events.api import keys, senders
from airflow_events.errors import EventNotSent
from airflow_events.inbox.models import EventKept, EventSent
from airflow_events.operators import event_hook
from sqlalchemy import delete, func, select

NOBODY = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
def server(api, monkeypatch):
    monkeypatch.setattr(event_hook, "_FIRST_PAUSE", 0.01)
    return api()


@pytest.fixture
def waits(http_committed):
    yield http_committed
    http_committed.session.rollback()
    http_committed.session.execute(delete(TaskStateStoreModel))
    http_committed.session.commit()


@pytest.fixture
def running(waits, server, monkeypatch):
    """Let this process run a try of a task: a new one, or the next one of an earlier task."""

    def run(task=None, **columns):
        task = waits.add(state="running") if task is None else task
        waits.set(task, **columns)
        waits.session.commit()
        ti = waits.state(task).id
        monkeypatch.setattr(event_hook, "_sender", None)  # each try has a process of its own
        monkeypatch.setattr(event_hook, "get_current_context", lambda: {"ti": SimpleNamespace(id=ti)})
        monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", Supervisor(waits.session, task, ti), raising=False)
        return task

    return run


class Supervisor:
    """Writes a task's state, as Airflow's supervisor and execution API do: of this try, and of no other."""

    def __init__(self, session, task, ti):
        self._session, self._task, self._ti = session, task, ti
        self.number = 0

    def send(self, message):
        assert message.ti_id == self._ti
        names = {name: getattr(self._task, name) for name in ("dag_id", "run_id", "task_id", "map_index")}
        run = self._session.scalar(select(DagRun.id).where(DagRun.run_id == self._task.run_id))
        row = {**names, "dag_run_id": run, "key": message.key}
        self._session.execute(delete(TaskStateStoreModel).filter_by(**row))
        value = json.dumps(message.value)
        self._session.add(TaskStateStoreModel(**row, value=value, expires_at=message.expires_at))
        self._session.commit()
        self.number += 1


@pytest.fixture
def next_try(waits, running):
    def run(task):
        waits.again(task, cleared=False, state="running", begun=False)
        return running(task)

    return run


def rows(session, table):
    session.rollback()
    return session.scalar(select(func.count()).select_from(table))


def test_a_task_sends_to_a_wait_of_another_dag(waits, running):
    wait = waits.add("order-1", dag_id="other")
    task = running()
    told = EventHook().send("order-1", {"paid": True})
    assert told == {"status": "delivered", "event_id": told["event_id"], "key": "order-1", "waits": [wait.id]}
    waits.session.rollback()
    assert waits.xcoms(wait) == {"return_value": {"paid": True}}
    assert waits.audit(wait) == [("event sent", f"task {task.id}")]


def test_another_try_sends_nothing_twice(waits, running, next_try):
    task = running()
    first = [EventHook().send("key", n) for n in (1, 2)] + [EventHook().send("other", 1)]
    next_try(task)
    assert [EventHook().send("key", n) for n in (1, 2)] + [EventHook().send("other", 1)] == first
    assert len({sent["event_id"] for sent in first}) == 3
    assert EventHook().send("key", 3)["event_id"] not in [sent["event_id"] for sent in first]
    assert rows(waits.session, EventKept) == 4
    waits.session.rollback()
    waits.again(task, cleared=True, state="running", begun=False)
    running(task)
    assert EventHook().send("key", 1) == first[0]
    another = running()  # another run
    assert EventHook().send("key", 1)["event_id"] != first[0]["event_id"]
    assert another != task


def test_a_name_tells_events_apart_in_any_order(running, next_try):
    task = running()
    one, two = (EventHook().send("key", n, name=n) for n in ("one", "two"))
    assert EventHook().send("key", "one", name="one") == one
    next_try(task)
    assert [EventHook().send("key", n, name=n) for n in ("two", "one")] == [two, one]


def test_of_another_event_in_its_place_the_first_counts_and_the_log_says_so(waits, running, next_try, caplog):
    wait = waits.add("key")
    task = running()
    first = EventHook().send("key", {"at": 1})
    next_try(task)
    assert EventHook().send("key", {"at": 2}) == first
    assert "that one counts" in caplog.text
    waits.session.rollback()
    assert waits.xcoms(wait) == {"return_value": {"at": 1}}


def test_it_is_remembered_for_longer_than_the_event_is_kept(waits, running):
    running()
    EventHook().send("key", 1, ttl=1)
    waits.session.rollback()
    kept, sent = (waits.session.scalars(select(table.expires)).one() for table in (EventKept, EventSent))
    assert (sent - kept).days >= 6


def test_one_proof_is_enough_for_a_try(running, server):
    running()
    for number in range(3):
        EventHook().send("key", number)
    assert task_runner.SUPERVISOR_COMMS.number == 1
    assert len(server.asked_at) == 3


def test_a_proof_that_is_gone_is_given_once_more(waits, running):
    running()
    EventHook().send("key", 1)
    waits.session.execute(delete(TaskStateStoreModel))
    waits.session.commit()
    EventHook().send("key", 2)
    assert task_runner.SUPERVISOR_COMMS.number == 2


def test_nobody_else_is_taken_for_the_task(waits, running, next_try, server):
    task = running()
    EventHook().send("key", 1)
    ti, proof = event_hook._sender.ti, event_hook._sender._proof
    body = {"key": "key", "event": 1, "to": "one", "ttl": None, "name": "9"}

    def post(ti, **headers):
        return httpx.post(f"{server.url}/events/tasks/{ti}/events", json=body, headers=headers).status_code

    assert post(ti, Authorization=f"Bearer {proof}") == 202
    assert post(ti) == 401
    assert post(ti, Authorization=f"Basic {proof}") == 401
    assert post(ti, Authorization="Bearer") == 401
    assert post(ti, Authorization=f"Bearer {task_proof.new()}") == 401
    assert post(ti, Authorization=f"Bearer {task_proof.digest(proof)}") == 401
    assert post(NOBODY, Authorization=f"Bearer {proof}") == 401
    other = waits.add(state="running")
    waits.session.commit()
    assert post(waits.state(other).id, Authorization=f"Bearer {proof}") == 401
    waits.set(task, state="success")
    waits.session.commit()
    assert post(ti, Authorization=f"Bearer {proof}") == 401
    next_try(task)
    assert post(ti, Authorization=f"Bearer {proof}") == 401  # of a try that is outlived


def test_tasks_may_be_kept_from_it(running, monkeypatch):
    running()
    monkeypatch.setenv("AIRFLOW__EVENTS__SEND_FROM_TASKS", "False")
    with pytest.raises(EventNotSent, match="send_from_tasks") as refused:
        EventHook().send("key", 1)
    assert refused.value.status == 403


def test_with_teams_it_goes_to_waits_of_the_own_team(waits, running, monkeypatch):
    teams = {"shop": "a", "own": "a", "other": "b", "common": None}
    monkeypatch.setattr("airflow_events.api.senders._teams", lambda session: teams)
    monkeypatch.setenv("AIRFLOW__CORE__MULTI_TEAM", "True")
    own, _, _ = (waits.add("key", dag_id=dag_id) for dag_id in ("own", "other", "common"))
    running()
    assert EventHook().send("key", 1)["waits"] == [own.id]
    assert EventHook().send("key", 1)["waits"] == []


@pytest.mark.parametrize("taken", ["teams", "all"])
def test_what_a_task_may_not_send_any_more_is_not_given(waits, running, monkeypatch, taken):
    """It is asked again when a wait begins; nobody's row is locked meanwhile."""
    monkeypatch.setattr(keys, "reaches", senders.Reaches())
    monkeypatch.setattr(senders, "in_transaction", lambda work: work(waits.session))
    running()
    event_id = EventHook().send("key", 1)["event_id"]
    late = waits.add("key", dag_id="other")
    with monkeypatch.context() as patch:
        if taken == "all":
            patch.setenv("AIRFLOW__EVENTS__SEND_FROM_TASKS", "False")
        else:
            patch.setattr(senders, "_teams", lambda session: {"shop": "a", "other": "b"})
            patch.setenv("AIRFLOW__CORE__MULTI_TEAM", "True")
        assert keys.match(waits.session, "key") == {}
        assert keys.reaches.ask()
        assert keys.match(waits.session, "key") == {}
    monkeypatch.setattr(keys, "reaches", senders.Reaches())
    monkeypatch.setattr(keys, "_refused", keys._Refused())
    assert keys.match(waits.session, "key") == {}
    assert keys.reaches.ask()
    assert keys.match(waits.session, "key") == {event_id: [late.id]}


def test_what_is_refused_says_why(waits, running, server):
    waits.add("strict", schema={"type": "integer"})
    running()
    with pytest.raises(EventNotSent, match=r"422 .*is not of type"):
        EventHook().send("strict", "text")
    with pytest.raises(EventNotSent, match="404 no wait has the key"):
        EventHook().send("nobody", 1, to="all")
    with pytest.raises(EventNotSent, match="NUL"):
        EventHook().send("nobody", "\0")
    for wrong in (float("nan"), object(), {1: object()}):
        with pytest.raises(ValueError, match="not valid JSON"):
            EventHook().send("key", wrong)
    with pytest.raises(ValueError, match="a key is"):
        EventHook().send("", 1)
    with pytest.raises(ValueError, match="'some'"):
        EventHook().send("key", 1, to="some")


def test_outside_of_a_task_it_says_so():
    with pytest.raises(RuntimeError, match="context"):
        EventHook().send("key", 1)


def test_an_api_server_that_is_busy_or_away_is_asked_again(running, server, monkeypatch):
    running()
    server.refuse(503, {"detail": "busy"}, times=2)
    assert EventHook().send("key", 1)["status"] == "kept"
    server.stop()
    monkeypatch.setattr(event_hook, "_PATIENCE", 0.0)
    with pytest.raises(EventNotSent, match="could not be asked") as failed:
        EventHook().send("key", 2)
    assert failed.value.status is None
    server.start()
    assert EventHook().send("key", 3)["status"] == "kept"


class SlowStore:
    """The task's state store, to which one request is under way at a time, and an API server that looks there."""

    def __init__(self):
        self.lock, self.stored = threading.Lock(), None

    def send(self, message):
        with self.lock:
            time.sleep(0.05)
            self.stored = message.value

    def post(self, url, content, headers):
        time.sleep(0.005)
        proof = headers["Authorization"].removeprefix("Bearer ")
        return httpx.Response(200 if task_proof.is_of(proof, self.stored) else 401, json={})


def test_threads_of_one_task_that_send_at_once_get_through(monkeypatch):
    store = SlowStore()
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", store, raising=False)
    sender, together = event_hook._Sender(uuid.uuid4()), threading.Barrier(4)

    def send(_):
        together.wait()
        return sender.post(store, b"{}").status_code

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(send, range(4))) == [200] * 4
