from __future__ import annotations

import sys

import pytest
from airflow_events import EventListener
from airflow_events.errors import ListenerUnavailable
from airflow_events.listeners.directory import DirectoryListener
from airflow_events.triggers import reference


@pytest.fixture
def dag_file(tmp_path, monkeypatch):
    """A DAG folder with a module beside the DAG file, as a worker sees it."""
    monkeypatch.setenv("AIRFLOW__CORE__DAGS_FOLDER", str(tmp_path))
    (tmp_path / "beside_dag.py").write_text("def greet(name):\n    return f'hello {name}'\n")
    (tmp_path / "its_dag.py").write_text(
        "from airflow_events import EventListener\n"
        "from beside_dag import greet\n"
        "import json\n"
        "class Greeting(EventListener):\n"
        "    async def poll_for_event(self, name):\n"
        "        return json.loads(json.dumps(greet(name)))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("beside_dag", "its_dag"):
        sys.modules.pop(name, None)


def test_an_installed_listener_goes_by_its_name():
    assert reference.is_importable(DirectoryListener)
    name = reference.name(DirectoryListener)
    assert name == "airflow_events.listeners.directory:DirectoryListener"
    assert reference.load(name) is DirectoryListener
    assert reference.display_name(name) == "DirectoryListener"


async def test_a_listener_of_a_dag_file_goes_by_value_with_the_modules_beside_it(dag_file):
    import its_dag

    assert not reference.is_importable(its_dag.Greeting)
    sent = reference.by_value(its_dag.Greeting)
    assert sent["name"] == reference.display_name(sent) == "Greeting"
    sys.path.pop(0)
    del sys.modules["its_dag"], sys.modules["beside_dag"]  # a triggerer has neither
    listener = reference.load(sent)
    assert issubclass(listener, EventListener)
    assert await listener().poll_for_event("you") == "hello you"
    assert reference.load(sent) is listener


def test_another_minor_version_of_python_is_named(dag_file):
    import its_dag

    sent = {**reference.by_value(its_dag.Greeting), "python": "3.9"}
    with pytest.raises(ListenerUnavailable, match=r"Greeting was pickled by Python 3\.9, and this process is"):
        reference.load(sent)


def test_pickles_are_refused_by_a_triggerer_that_is_told_so(dag_file, monkeypatch):
    import its_dag

    sent = reference.by_value(its_dag.Greeting)
    monkeypatch.setenv("AIRFLOW__EVENTS__PICKLED_LISTENERS", "False")
    with pytest.raises(ListenerUnavailable, match="pickled_listeners = False"):
        reference.load({**sent, "pickle": sent["pickle"] + " "})


def test_what_cannot_be_pickled_is_named(dag_file):
    import threading

    import its_dag

    its_dag.greet = threading.Lock()
    with pytest.raises(ListenerUnavailable, match=r"Greeting is defined beside the DAG.*cannot be pickled"):
        reference.by_value(its_dag.Greeting)


@pytest.mark.parametrize("name", ["no.such.module:Listener", "airflow_events.errors:Nothing", "json:JSONDecoder"])
def test_what_cannot_be_imported_is_named(name):
    with pytest.raises(ListenerUnavailable, match=name):
        reference.load(name)
