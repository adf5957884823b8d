from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import textwrap
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from airflow.sdk import DAG
from airflow.serialization.decoders import smart_decode_trigger_kwargs
from airflow.serialization.serialized_objects import DagSerialization
from airflow_events import EventListener, wait_for_event
from airflow_events.errors import ListenerUnavailable
from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.directory import DirectoryListener
from airflow_events.operators.placement import placement
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


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("dags/sales/jobs.py", "sales/jobs.py"),
        ("stored/shop/versions/0123abcd/sales/jobs.py", "shop/sales/jobs.py"),
        ("stored/shop/versions/4567cdef/sales/jobs.py", "shop/sales/jobs.py"),
        ("stored/shop/tracking_repo/sales/jobs.py", "shop/sales/jobs.py"),
        ("mounted/jobs.py", "mine/jobs.py"),
        ("elsewhere/jobs.py", "jobs.py"),
    ],
)
def test_a_listener_by_value_says_where_in_its_bundle_it_is_defined(tmp_path, monkeypatch, file, place):
    """Whatever version of the bundle it is, and wherever that lies: what its events are called hangs on it."""
    monkeypatch.setenv("AIRFLOW__CORE__DAGS_FOLDER", str(tmp_path / "dags"))
    monkeypatch.setenv("AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_STORAGE_PATH", str(tmp_path / "stored"))
    bundles = [{"name": "mine", "classpath": "x", "kwargs": {"path": str(tmp_path / "mounted")}}]
    monkeypatch.setenv("AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST", json.dumps(bundles))
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(
        "from airflow_events import EventListener\n"
        "class Jobs(EventListener):\n"
        "    async def poll_for_event(self): ...\n"
    )
    name = f"unusual_prefix_{uuid.uuid4().hex}_jobs"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    sent = reference.refer(module.Jobs)
    assert sent["of"] == place
    assert reference.identify(sent) == f"{place}:Jobs"
    del sent["of"]  # as an earlier version wrote it
    assert reference.identify(sent) == "Jobs"


def test_who_does_not_say_what_tells_its_events_apart_shares_them_with_the_class_that_does(monkeypatch):
    class Named(DirectoryListener):
        pass

    class Apart(DirectoryListener):
        def event_id(self, event):
            return event["name"]

    of_directory = reference.scope(reference.name(DirectoryListener), DirectoryListener)
    assert of_directory == "airflow_events.listeners.directory:DirectoryListener"
    for listener, expected in ((Named, of_directory), (Apart, "dags/it.py:Apart")):
        sent = {"name": listener.__name__, "of": "dags/it.py", "python": "3", "pickle": ""}
        assert reference.scope(sent, listener) == expected


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


BESIDE = Path(__file__).parent / "beside"


def fresh(folder, word, seed):
    """Let a process of its own pickle the listeners, and return what it says of them."""
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(seed),
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)]),
        "AIRFLOW__CORE__DAGS_FOLDER": str(folder),
    }
    without = ["-B"] if seed % 3 == 0 else []  # compiles the source itself, if nobody has left that
    command = [sys.executable, *without, str(folder / "pickled.py"), word]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A DAG folder of what people have in one."""
    for file in BESIDE.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.setenv("AIRFLOW__CORE__DAGS_FOLDER", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("dag_of_listeners", "helpers_of_dag"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [6, pytest.param(20, marks=pytest.mark.release)])
def test_processes_pickle_a_listener_alike(beside, processes):
    def run(seed):
        return fresh(beside, {1: "imports", 2: "dag", 4: "imports", 5: "dag"}.get(seed, "plain"), seed)

    said = [run(0)]  # compiles, while there is nothing compiled yet
    with ThreadPoolExecutor(2) as pool:
        said += pool.map(run, range(1, processes))
    assert {lines[0] for lines in said} == {said[0][0]}
    assert [line.split()[:2] for line in said[0]] == [["Closing", "None"], ["Later", "None"], ["Closing", "None"]]
    assert {tuple(lines[:3]) for lines in said} == {tuple(said[0][:3])}
    assert said[0][0] != said[0][2]  # of another topic
    [version] = {lines[3] for lines in said if len(lines) > 3}  # of the DAG
    assert version.startswith("DAG ")


async def test_what_was_pickled_does_in_another_process_what_it_did_here(beside):
    import dag_of_listeners

    listener, args = dag_of_listeners.Listener, ("one",)
    with working_for(Wait("d", "r", "t")):
        expected = await listener().poll_for_event(*args)
    text = reference.by_value(listener)
    script = textwrap.dedent("""
        import asyncio, json, sys
        from airflow_events.listeners.base import Wait, working_for
        from airflow_events.triggers import reference
        listener = reference.load(json.loads(sys.stdin.read()))
        assert "dag_of_listeners" not in sys.modules and "helpers_of_dag" not in sys.modules
        with working_for(Wait("d", "r", "t")):
            event = asyncio.run(listener().poll_for_event("one"))
            asyncio.run(listener().event_checkpointed(event))
        print(json.dumps(event))
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path != str(beside))}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", script],
        input=json.dumps(text),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(json.dumps(expected))
    assert expected["topic"] == "orders" and expected["normal"] == ["a", "b"]


def test_a_listener_that_was_unpickled_is_pickled_alike(beside):
    """What is written hangs on nothing but on values: in the copy all strings, tuples and sets are others."""
    import dag_of_listeners

    by_value = reference._Folders.configured().need_value
    first = reference.pickling.pickled(dag_of_listeners.Listener, by_value).data
    copy = pickle.loads(first)
    assert copy is not dag_of_listeners.Listener
    again = pickle.loads(reference.pickling.pickled(copy, by_value).data)
    assert vars(again).keys() == vars(copy).keys()
    assert again.poll_for_event.__code__ == copy.poll_for_event.__code__


def test_a_listener_of_a_dag_file_starts_in_the_triggerer(beside):
    import dag_of_listeners

    with DAG("d", schedule=None) as dag:
        wait = wait_for_event.override(task_id="wait")(dag_of_listeners.Listener, "{{ ds }}").operator
    assert placement(wait).starts_on_worker_because is None
    data = json.loads(json.dumps(DagSerialization.to_dict(dag)))
    start = DagSerialization.from_dict(data).get_task("wait").start_trigger_args
    sent = smart_decode_trigger_kwargs(start.trigger_kwargs)["listener"]
    assert sent == reference.by_value(dag_of_listeners.Listener)
    assert reference.load(sent).__doc__ == "It closes over a topic."


def test_a_pickle_is_made_anew_as_soon_as_it_would_be_another(beside):
    import dag_of_listeners

    first = reference.by_value(dag_of_listeners.Listener)
    assert reference.by_value(dag_of_listeners.Listener)["pickle"] is first["pickle"]
    dag_of_listeners.some_task = object()  # which it does not use
    assert reference.by_value(dag_of_listeners.Listener)["pickle"] is first["pickle"]
    dag_of_listeners.LIMITS["c"] = 3
    second = reference.by_value(dag_of_listeners.Listener)
    assert second["pickle"] != first["pickle"]
    dag_of_listeners.EVERY = dag_of_listeners.EVERY * 2
    assert reference.by_value(dag_of_listeners.Listener)["pickle"] != second["pickle"]


LISTENER = """
from airflow_events import EventListener
{before}
class Listener(EventListener):
    {within}
    async def poll_for_event(self):
        return {uses}
{after}
"""
STEADY = {
    "text": ("NAME = 'a' + 'b'", "NAME"),
    "a list of sorted names": ("NAMES = sorted({'a', 'b'})", "NAMES"),
    "a set of sets": ("NAMES = {frozenset({'a', 'b'}), frozenset({'c', 'd'})}", "NAMES"),
    "environment": ("import os\nTOPIC = os.environ.get('TOPIC', 'orders').upper()", "TOPIC"),
    "folder": ("from pathlib import Path\nHERE = Path(__file__).parent / 'a'", "HERE"),
    "an object of its own": ("class C:\n    def __init__(self, a): self.a = a\nTHE = C([1])", "THE"),
    "a moment": ("from datetime import *\nAT = datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(1)", "AT"),
    "of what is never used": ("import time\nNOW = time.time()", "1"),
    "in a function": ("import time\ndef now(): return time.time()", "now()"),
    "a comprehension": ("NAMES = [n.upper() for n in ('a', 'b')]", "NAMES"),
    "in a loop": ("for I in range(3):\n    LAST = I", "LAST"),
    "unpacked": ("A, B = 1, (2, 3)", "B"),
    "logger": ("import logging\nlog = logging.getLogger('a.b')", "log.name"),
}
UNSTEADY = {
    "time": ("import time\nSTARTED = time.time()", "STARTED", "STARTED = time.time()"),
    "now": ("from datetime import datetime\nAT = str(datetime.now())", "AT", "AT = datetime.now()"),
    "chance": ("import uuid\nID = f'{uuid.uuid4()}'", "ID", "ID = uuid.uuid4()"),
    "process": ("import os\nPID = [os.getpid()]", "PID", "PID = os.getpid()"),
    "by way of another": ("import random\nA = random.random()\nB = (A, 1)", "B", "B = random.random()"),
    "in a function that is called": ("def f(): return 1\nB = f()", "B", "B = f()"),
    "the order of a set": ("NAMES = list({'a', 'b'})", "NAMES", "NAMES = list({'a', 'b'})"),
    "of a named set": ("S = {'a'}\nD = dict.fromkeys(S)", "D", "D = dict.fromkeys(S)"),
    "joined": ("S = frozenset('ab')\nT = ','.join(S | {'c'})", "T", "T = ','.join(S | {'c'})"),
    "of a comprehension": ("NAMES = [n for n in {'a', 'b'}]", "NAMES", "NAMES = [n for n in {'a', 'b'}]"),
    "in a branch": ("import time\nif True:\n    T = time.time()", "T", "T = time.time()"),
    "added": ("import time\nT = 1\nT += time.time()", "T", "T = time.time()"),
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write a module beside a DAG, and import it."""
    monkeypatch.setenv("AIRFLOW__CORE__DAGS_FOLDER", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def write(source, name=None):
        names.append(name or f"written_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(source)
        importlib.invalidate_caches()
        return importlib.import_module(names[-1])

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", STEADY)
def test_what_is_the_same_at_every_parse(written, name):
    before, uses = STEADY[name]
    module = written(LISTENER.format(before=before, uses=uses, within="", after=""))
    assert reference.unsteady(module.Listener) is None


@pytest.mark.parametrize("name", UNSTEADY)
def test_what_may_be_another_at_each_parse_is_named(written, name):
    before, uses, said = UNSTEADY[name]
    module = written(LISTENER.format(before=before, uses=uses, within="", after=""))
    because = f"its pickle may be another one whenever the DAG is parsed, with {said}"
    assert reference.unsteady(module.Listener) == because
    with DAG("d", schedule=None):
        wait = wait_for_event(module.Listener).operator
    assert placement(wait).starts_on_worker_because == f"the triggerer cannot import Listener, and {because}"
    assert wait.start_from_trigger is False and wait.start_trigger_args is None


def test_attributes_of_classes_and_modules_beside_count_too(written):
    written("import time\nAT = time.time()\nONE = 1\nTHE = dict(a=AT)", "beside_it")
    module = written(LISTENER.format(before="import time", uses="1", within="at = time.time()", after=""))
    assert "with at = time.time()" in reference.unsteady(module.Listener)
    module = written(LISTENER.format(before="from beside_it import AT", uses="AT", within="", after=""))
    assert "with AT = time.time()" in reference.unsteady(module.Listener)
    module = written(LISTENER.format(before="from beside_it import ONE", uses="ONE", within="", after=""))
    assert reference.unsteady(module.Listener) is None
    # Of a module that is used as such, everything goes along.
    module = written(LISTENER.format(before="import beside_it", uses="beside_it.ONE", within="", after=""))
    assert "with AT = time.time()" in reference.unsteady(module.Listener)


def test_a_long_pickle_stays_out_of_the_serialized_dag(written):
    long = ", ".join(f"'{number:x<50}'" for number in range(2000))
    module = written(LISTENER.format(before=f"NAMES = [{long}]", uses="NAMES", within="", after=""))
    assert reference.unsteady(module.Listener) == "its pickle of 104 KiB is too long for a serialized DAG"


def test_what_cannot_be_pickled_starts_on_a_worker_which_says_why(written):
    module = written(
        LISTENER.format(before="import threading\nL = threading.Lock()", uses="L", within="", after="")
    )
    with DAG("d", schedule=None):
        wait = wait_for_event(module.Listener).operator
    assert "it cannot be pickled: Listener is defined beside" in placement(wait).starts_on_worker_because
