"""What Airflow's page of connections offers for the sources."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import airflow
import jsonschema
import pytest
from airflow_events.provider_info import get_provider_info

CHILD = """
import json
from airflow.api_fastapi.core_api.services.ui.connections import HookMetaService

offered = {each.connection_type: each.model_dump() for each in HookMetaService.hook_meta_data()}
print(json.dumps(offered, default=str))
"""


@pytest.fixture(scope="module")
def offered():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "already registered" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["amqp", "aws", "kafka", "nats", "postgres", "redis"])
def test_each_source_has_a_type_of_connection(offered, kind):
    if kind == "redis":
        pytest.importorskip("airflow.providers.redis", reason="pip install airflow-provider-events[redis]")
    assert offered[kind]["hook_name"]


@pytest.mark.parametrize(("kind", "source"), [("nats", "nats"), ("amqp", "rabbitmq")])
def test_the_form_asks_for_every_extra_that_is_known_by_its_type(offered, kind, source):
    client = __import__(f"airflow_events.listeners.{source}.client", fromlist=["_EXTRAS"])
    fields = offered[kind]["extra_fields"]
    assert set(fields) == set(client._EXTRAS)
    for name in ("token", "nkey_seed"):
        assert name not in fields or fields[name]["schema"]["format"] == "password"
    boolean = {"nats": {"tls", "tls_handshake_first"}, "amqp": {"ssl", "ssl_verify"}}[kind]
    assert {name for name, field in fields.items() if field["schema"]["type"][0] == "boolean"} == boolean


def test_what_is_said_of_a_connection_type_is_as_airflow_wants_it():
    schema = json.loads((Path(airflow.__file__).parent / "provider.yaml.schema.json").read_text())
    for connection in get_provider_info()["connection-types"]:
        jsonschema.validate(connection, schema["properties"]["connection-types"]["items"])


def test_the_class_of_each_type_is_there_and_imports_no_client():
    asked = "print(hooks.NatsHook.conn_type, 'nats' in sys.modules)"
    code = f"import sys; from airflow_events.listeners.support import hooks; {asked}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "nats False"
