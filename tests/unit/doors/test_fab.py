"""The doors under the FAB auth manager, where it is installed: roles of its own, in tables of its own."""

from __future__ import annotations

import pytest
from airflow.api_fastapi.app import get_auth_manager
from airflow_events.api import keys, matcher, senders
from in_process import in_process

fab = pytest.importorskip("airflow.providers.fab.auth_manager.fab_auth_manager")

ROLES = ("Public", "Viewer", "User", "Op", "Admin")
MAY = {
    "see": {"Viewer", "User", "Op", "Admin"},
    "edit": {"User", "Op", "Admin"},
}


@pytest.fixture(scope="module")
def fab_server(tmp_path_factory):
    name = f"{fab.FabAuthManager.__module__}.{fab.FabAuthManager.__qualname__}"
    with in_process(tmp_path_factory.mktemp("fab"), CORE__AUTH_MANAGER=name, CORE__MULTI_TEAM="False") as server:
        yield server


@pytest.fixture(scope="module")
def tokens(fab_server):
    """One user of each role, and what they log in with."""
    manager = get_auth_manager()
    security = manager.security_manager
    with manager.flask_app.app_context():
        security.sync_roles()
        made = {}
        for role in ROLES:
            user = security.add_user(role, role, role, f"{role}@example.com", security.find_role(role), "password")
            made[role] = manager.generate_jwt(user)
    return made


def answers(server, tokens, method, address, **more):
    asked = {role: server.client(token).request(method, address, **more) for role, token in tokens.items()}
    return {role: answer.status_code for role, answer in asked.items()}


def test_each_role_may_what_airflow_lets_it(fab_server, tokens):
    wait = fab_server.waits.add("key")
    fab_server.session.commit()
    task = f"/events/dags/{wait.dag_id}/runs/{wait.run_id}/tasks/{wait.task_id}"
    page = f"/events/api/waits/{wait.dag_id}/{wait.run_id}/{wait.task_id}/-1"
    for address in ("/events/api/waits", page):
        said = answers(fab_server, tokens, "GET", address)
        assert {role for role, status in said.items() if status == 200} == MAY["see"], said
        assert set(said.values()) <= {200, 403}
    for address in (task, f"{task}/reject", "/events/keys/key", f"{page}/forget"):
        said = answers(fab_server, tokens, "POST", address, json={"reason": "none"})
        assert {role for role, status in said.items() if status != 403} == MAY["edit"], said
        assert set(said.values()) <= {200, 202, 204, 403, 409, 410}, said


def test_somebody_who_may_see_one_dag_sees_the_waits_of_no_other(fab_server):
    manager = get_auth_manager()
    security = manager.security_manager
    with manager.flask_app.app_context():
        role = security.add_role("shopper")
        for resource in ("DAG:shop", "DAG Runs", "Task Instances"):
            for action in ("can_read", "can_edit"):
                security.add_permission_to_role(role, security.create_permission(action, resource))
        user = security.add_user("shopper", "s", "s", "s@example.com", role, "password")
        token = manager.generate_jwt(user)
    mine, theirs = fab_server.waits.add("shared"), fab_server.waits.add("shared", dag_id="red")
    fab_server.session.commit()
    client = fab_server.client(token)
    listed = client.get("/events/api/waits").json()["waits"]
    assert {each["dag_id"] for each in listed} == {"shop"}
    shown = client.get(f"/events/api/waits/red/{theirs.run_id}/{theirs.task_id}/-1")
    assert shown.status_code == 403
    sent = client.post("/events/keys/shared?to=all", json=1)
    assert sent.json()["waits"] == [mine.id]
    # Without the permission on XComs nobody sees the event.
    shown = client.get(f"/events/api/waits/shop/{mine.run_id}/{mine.task_id}/-1").json()
    assert (shown["may_see_event"], shown["wait"]["record"]["event"]) == (False, None)


@pytest.mark.parametrize("how", ["role", "locked", "deleted"])
def test_what_somebody_may_not_do_any_more_their_kept_events_do_not(fab_server, monkeypatch, how):
    """FAB's manager remembers users and permissions for some seconds, which pass here at once."""
    manager = get_auth_manager()
    security = manager.security_manager

    def time_passes():
        monkeypatch.setattr(keys, "reaches", senders.Reaches())
        monkeypatch.setattr(keys, "_refused", keys._Refused())
        manager.cache.clear()

    with manager.flask_app.app_context():
        users = {
            name: security.add_user(name, "a", "a", f"{name}@example.com", security.find_role("Op"), "password")
            for name in (f"leaves {how}", f"stays {how}")
        }
        theirs, others = (manager.generate_jwt(user) for user in users.values())
    key = f"kept {how}"
    for token, event in ((theirs, "theirs"), (others, "others")):
        assert fab_server.client(token).post(f"/events/keys/{key}", json=event).status_code == 202
    with manager.flask_app.app_context():
        user = security.find_user(f"leaves {how}")
        if how == "role":
            user.roles = [security.find_role("Viewer")]
        if how == "locked":
            user.active = False
        security.update_user(user)
        if how == "deleted":
            security.session.delete(user)
            security.session.commit()
    time_passes()
    wait = fab_server.waits.add(key)
    fab_server.waits.add(key)
    fab_server.session.commit()
    assert list(matcher.match_once().values()) == [[wait.id]]
    fab_server.session.rollback()
    assert fab_server.waits.xcoms(wait) == {"return_value": "others"}
