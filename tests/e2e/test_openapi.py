"""
The routes against their own description: schemathesis makes requests of it, and judges the answers by it.

Once with any addresses, of which few lead anywhere, and once with those of waits, so that payloads, keys and
parameters get to where an event is checked and stored.
"""

from __future__ import annotations

import uuid

import httpx
import pytest
import schemathesis
from airflow_events.api.app import create_app
from hypothesis import HealthCheck, given, settings, strategies
from schemathesis.checks import not_a_server_error
from schemathesis.core.parameters import ParameterLocation
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks


@schemathesis.check
def invalid_body_rejection(ctx, response, case):
    """
    Judge only bodies: an invalid object is a valid text once it is in an address, and the login is ours.

    (``tests/unit/doors/test_who_sees.py`` has the parameters of addresses.)
    """
    if case.meta.is_negative_at(ParameterLocation.BODY):
        checks.negative_data_rejection(ctx, response, case)


JUDGED_BY = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    invalid_body_rejection,
    checks.unsupported_method,
]
# Of each operation, and the same ones each time: what is found here must not depend on the day.
BOUNDED = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def user(strict):
    """The headers of somebody who may edit the task instances of every DAG."""
    login = {"username": "ursula", "password": "ursula"}
    answer = httpx.post(f"{strict.url}/auth/token", json=login, timeout=60)
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


@pytest.fixture(scope="module")
def described(strict, user):
    """What the app says of itself."""
    return schemathesis.openapi.from_url(f"{strict.url}/events/openapi.json", headers=user)


@pytest.fixture(scope="module")
def addresses(airflow):
    """Parts of addresses that lead to a wait: one that waits for anything, and one that has a schema."""
    found = []
    for dag_id in ("http_one", "http_strict"):
        run = airflow.run(dag_id, {"key": uuid.uuid4().hex})
        run.until_task("wait", "deferred")
        found.append({"dag_id": dag_id, "run_id": run.run_id, "task_id": "wait"})
    return found


OPERATIONS = sorted((path, method) for path, ways in create_app().openapi()["paths"].items() for method in ways)


@pytest.mark.parametrize("kind", list(GenerationMode), ids=lambda kind: kind.value)
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_any_request_is_answered_as_described(described, user, path, method, kind):
    requests = described[path][method].as_strategy(generation_mode=kind)

    @BOUNDED
    @given(requests)
    def check(case):
        case.call_and_validate(headers=user, checks=JUDGED_BY)

    check()


@pytest.mark.parametrize("kind", list(GenerationMode), ids=lambda kind: kind.value)
@pytest.mark.parametrize(("path", "method"), [each for each in OPERATIONS if "{task_id}" in each[0]])
def test_requests_about_waits_are_answered_as_described(described, user, addresses, path, method, kind):
    requests = described[path][method].as_strategy(generation_mode=kind)
    # The address is in order, whatever it was made to be.
    judges = [judge for judge in JUDGED_BY if judge is not invalid_body_rejection]

    @BOUNDED
    @given(requests, strategies.sampled_from(addresses))
    def check(case, address):
        case.path_parameters = {**case.path_parameters, **address}
        case.call_and_validate(headers=user, checks=judges)

    check()


def test_the_description_says_where_the_app_is(strict, user, described):
    assert described.get_base_url() == f"{strict.url}/events"
    said = httpx.get(f"{strict.url}/events/openapi.json", headers=user, timeout=60).json()
    assert said["servers"] == [{"url": "/events"}]
    assert len(said["paths"]) >= 9
    assert all(way["summary"] for ways in said["paths"].values() for way in ways.values())
