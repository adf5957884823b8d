"""Signed addresses die with their run, their clear and their wait, and only with these."""

from __future__ import annotations

from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow.models.taskinstancehistory import TaskInstanceHistory
from airflow_events.api.callback import callback_url
from sqlalchemy import delete, select


@pytest.fixture
def wait(server):
    found = server.waits.add()
    server.session.commit()
    return found


def address(server, wait):
    """As a template of a task of the same run makes it; here of the wait itself."""
    made_in = SimpleNamespace(dag_id=wait.dag_id, run_id=wait.run_id, id=server.waits.state(wait).id)
    server.session.commit()
    url = urlsplit(callback_url(made_in, wait.task_id))
    return f"/events/callback?{url.query}"


def another_try(server, wait, *, cleared):
    """As Airflow makes it: it notes the try before in its history."""
    ti = server.session.scalars(select(TaskInstance).where(TaskInstance.id == server.waits.state(wait).id)).one()
    TaskInstanceHistory.record_ti(ti, session=server.session)
    server.session.flush()
    server.waits.again(wait, cleared=cleared)
    server.session.commit()


def delete_run(server, wait):
    for table in (TaskInstance, DagRun):
        server.session.execute(delete(table).where(table.run_id == wait.run_id))
    server.session.commit()


def ask(server, address, payload=1):
    answer = server.client().post(address, json=payload)
    return answer.status_code, answer.json().get("detail", "")


def test_one_of_a_run_that_was_deleted_and_made_again_under_its_id(server, wait):
    before = address(server, wait)
    delete_run(server, wait)
    assert ask(server, before)[0] == 404
    again = server.waits.add()
    server.session.commit()
    assert again == wait
    assert ask(server, before) == (410, "the run that the URL was made in is gone")
    assert server.waits.state(again).state == "deferred"
    assert ask(server, address(server, again))[0] == 200


def test_one_that_was_made_before_a_retry_and_before_the_maker_was_tried_again(server, wait):
    before = address(server, wait)
    another_try(server, wait, cleared=False)
    assert ask(server, before)[0] == 200


def test_one_that_was_made_before_a_clear(server, wait):
    before = address(server, wait)
    another_try(server, wait, cleared=True)
    status, why = ask(server, before)
    assert status == 410 and "was cleared after the URL was made" in why
    assert server.waits.state(wait).state == "deferred"
    assert ask(server, address(server, wait))[0] == 200


@pytest.mark.parametrize("state", ["success", "failed", "skipped"])
def test_one_of_a_wait_that_has_ended(server, wait, state):
    before = address(server, wait)
    server.waits.set(wait, state=state, trigger_id=None)
    server.session.commit()
    assert ask(server, before)[0] == 410


def test_one_ends_one_wait_once(server, wait):
    other = server.waits.add()
    server.session.commit()
    theirs = address(server, wait)
    assert [ask(server, theirs, payload)[0] for payload in (1, 2)] == [200, 409]
    assert server.waits.state(other).state == "deferred"


def test_those_of_an_earlier_version_are_good_until_they_expire(server, wait):
    old = SimpleNamespace(dag_id=wait.dag_id, run_id=wait.run_id)
    assert ask(server, f"/events/callback?{urlsplit(callback_url(old, wait.task_id)).query}")[0] == 200


def test_a_wait_that_is_not_expanded_yet_has_none(server):
    """Airflow makes its row that of index 0, which would get what was sent to no index."""
    wait = server.waits.add(state=None)
    server.waits.tasks[wait.task_id].get_needs_expansion = lambda: True
    server.session.commit()
    client = server.client(server.token("USER"))
    answer = client.post(f"/events/dags/{wait.dag_id}/runs/{wait.run_id}/tasks/{wait.task_id}", json="whose?")
    assert answer.status_code == 425
    assert "name its map_index then" in answer.json()["detail"]
