"""What a DAG file that names a listener has to have, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from airflow_events.listeners.support.clients import needs

# By the source: the packages without which it cannot be, and how its error calls the listener.
CLIENTS = {
    "kafka": (["confluent_kafka"], "a Kafka listener"),
    "nats": (["nats"], "a NATS listener"),
    "postgres": (["psycopg"], "a PostgreSQL listener"),
    "rabbitmq": (["aiormq"], "a RabbitMQ listener"),
    "redis": (["redis"], "a Redis listener"),
    "sqs": (["aiobotocore", "airflow.providers.amazon"], "an SQS listener"),
}
CHILD = """
import importlib, json, sys

source, packages = sys.argv[1], sys.argv[2:]
listeners = f"airflow_events.listeners.{source}"


class Without:
    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def error():
    try:
        importlib.import_module(listeners)
    except ImportError as error:
        return str(error)


errors = []
for package in packages:
    was = sys.modules.pop(package, None)
    sys.meta_path.insert(0, Without(package))
    errors.append(error())
    del sys.meta_path[0]
    sys.modules[package] = None
    errors.append(error())
    del sys.modules[package]
    if was is not None:  # imported by Airflow itself, as one of its providers
        sys.modules[package] = was

importlib.import_module(f"airflow_events.example_dags.{source}_events")
assert listeners in sys.modules
# What Airflow itself reads of its providers is no client.
within = tuple(f"{package}." for package in packages)
loaded = sorted(n for n in sys.modules if n.startswith(within) and not n.endswith(".get_provider_info"))
print(json.dumps({"errors": errors, "loaded": loaded}))
"""


@pytest.mark.parametrize("source", CLIENTS)
def test_a_dag_file_that_names_a_listener_needs_its_client_and_does_not_import_it(source):
    packages, listener = CLIENTS[source]
    done = subprocess.run([sys.executable, "-c", CHILD, source, *packages], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    wanted = f"{listener} needs: pip install airflow-provider-events[{source}]"
    assert found == {"errors": [wanted] * 2 * len(packages), "loaded": []}


def test_a_folder_of_a_clients_name_is_not_the_client(tmp_path, monkeypatch):
    (tmp_path / "of_nobody").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"pip install airflow-provider-events\[nobody\]"):
        needs("a listener", "nobody", "of_nobody")
    (tmp_path / "of_nobody" / "__init__.py").touch()
    needs("a listener", "nobody", "of_nobody")
    assert "of_nobody" not in sys.modules


def test_what_is_imported_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "of_nobody", type(sys)("of_nobody"))
    assert sys.modules["of_nobody"].__spec__ is None
    needs("a listener", "nobody", "of_nobody")
