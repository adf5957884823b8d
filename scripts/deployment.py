"""
A real Airflow in a folder of its own, on 127.0.0.1, for the demo, the tests and the benchmarks.

Each component is a process of its own (API server, scheduler with LocalExecutor, DAG processor, triggerers),
so that one of them can be killed. All of them end with the process that started them, whatever becomes of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import psutil

_T = TypeVar("_T")
_PR_SET_PDEATHSIG = 1
FINISHED = ("success", "failed")


def free_port() -> int:
    """
    Return a port on 127.0.0.1 that was free a moment ago.

    The system gives it to no client: a server that is killed and started again would now and then find its own
    taken.
    """
    low = _first_of_clients()
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.randrange(10_000, low) if low > 20_000 else 0))
            except OSError:
                continue
            return int(probe.getsockname()[1])


@functools.cache
def _first_of_clients() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 0


# Seconds after which what is waited for is taken to hang. It claims nothing about time: on two busy processors an
# API server alone takes more than a minute to start.
PATIENCE = 240.0


def until(condition: Callable[[], _T], what: str, timeout: float = PATIENCE, pause: float = 0.1) -> _T:
    """
    Return what ``condition`` returns once that is true; fail, naming ``what``, after ``timeout`` seconds.

    :param pause: seconds between two looks; at least as long as a look takes, or it would slow what it waits for.
    """
    end = time.monotonic() + timeout
    while True:
        began = time.monotonic()
        if result := condition():
            return result
        if (now := time.monotonic()) > end:
            raise TimeoutError(f"not within {timeout} s: {what}")
        time.sleep(max(pause, now - began))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass
class Component:
    """One process of Airflow; its output is in ``log``."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def family(self) -> list[psutil.Process]:
        """Return the process and all below it."""
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: int) -> None:
        """Send a signal to the process and all below it."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self) -> None:
        """Kill the process and all below it, and see them gone."""
        family = self.family()
        self.signal(signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(family, timeout=10)

    def stop(self, timeout: float = 15) -> None:
        """End the process as an operator would, and kill what has not ended then."""
        family = self.family()
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        _, alive = psutil.wait_procs(family, timeout=timeout)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@dataclass
class Deployment:
    """
    An Airflow below ``home``.

    :param database: an SQLAlchemy URL; None means SQLite in ``home``.
    :param settings: further options, ``{"section.key": value}``.
    :param variables: further environment variables, such as connections.
    """

    home: Path
    database: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    say: Callable[[str], None] = lambda line: None
    components: dict[str, Component] = field(default_factory=dict)
    _token: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def dags(self) -> Path:
        return self.home / "dags"

    @property
    def plugins(self) -> Path:
        return self.home / "plugins"

    @property
    def environment(self) -> dict[str, str]:
        options = {
            "core.executor": "LocalExecutor",
            "core.load_examples": "False",
            "core.dags_folder": str(self.dags),
            "core.plugins_folder": str(self.plugins),
            "core.dags_are_paused_at_creation": "False",
            "core.parallelism": "8",
            "core.simple_auth_manager_all_admins": "True",
            "core.execution_api_server_url": f"{self.url}/execution/",
            "core.fernet_key": "cP1xUPLGMgbrFYQyfGj1gUdKxCgSGOnE2Xbfl4cYBps=",
            "api.host": "127.0.0.1",
            "api.port": str(self.port),
            "api.base_url": self.url,
            "api.workers": "1",
            "api.secret_key": "only-for-this-machine",
            "api_auth.jwt_secret": "only-for-this-machine-and-long-enough-for-hs512-signatures-to-be-fine-64",
            "database.sql_alchemy_conn": self.database or f"sqlite:///{self.home}/airflow.db",
            "dag_processor.refresh_interval": "2",
            "dag_processor.min_file_process_interval": "600",
            # The API server's loop waits for one too, and stands still while its 40 threads have all of them.
            "database.sql_alchemy_pool_size": "64",
            "logging.base_log_folder": str(self.home / "logs"),
            "scheduler.scheduler_heartbeat_sec": "1",
            "scheduler.job_heartbeat_sec": "1",
            "scheduler.task_instance_heartbeat_timeout": "15",
            "scheduler.task_instance_heartbeat_timeout_detection_interval": "5",
            "scheduler.enable_health_check": "False",
            "triggerer.job_heartbeat_sec": "1",
            "triggerer.triggerer_health_check_threshold": "6",
            "usage_data_collection.enabled": "False",
            **self.settings,
        }
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "_AIRFLOW"))}
        return {
            **clean,
            "AIRFLOW_HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
            "NO_PROXY": "127.0.0.1",
            **self.variables,
            **{f"AIRFLOW__{k.replace('.', '__').upper()}": v for k, v in options.items()},
        }

    def airflow(self, *arguments: str, typed: str = "") -> str:
        """Run an ``airflow`` command to its end and return its output; ``typed`` is its standard input."""
        done = subprocess.run(
            [str(Path(sys.executable).parent / "airflow"), *arguments],
            env=self.environment,
            input=typed,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"airflow {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def prepare(self) -> None:
        """Make the folders and the database."""
        for folder in (self.home, self.dags, self.plugins, self.home / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        self.airflow("db", "migrate")

    def start(self, *names: str) -> None:
        """Start components; without names, one of each."""
        for name in names or ("api-server", "scheduler", "dag-processor", "triggerer"):
            self.start_one(name)
        if "api-server" in self.components:
            until(self.answers, f"the API server answers at {self.url}")

    def start_one(self, name: str, *, as_name: str | None = None) -> Component:
        """Start one component and return it; ``as_name`` tells several triggerers apart."""
        label = as_name or name
        log = self.home / f"{label}.log"
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "airflow"), *name.split()],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )
        self.components[label] = Component(label, process, log)
        self.say(f"{label} started (pid {process.pid})")
        return self.components[label]

    def freeze(self, component: Component, *, alone: bool = False) -> None:
        """
        Stop a component (SIGSTOP), though not while it holds SQLite's one lock.

        :param alone: without the processes below it.
        """
        what = f"{component.name} is stopped without a lock"
        until(lambda: self._freeze(component, alone=alone), what, pause=0.05)

    def _freeze(self, component: Component, *, alone: bool) -> bool:
        if alone:
            component.process.send_signal(signal.SIGSTOP)
        else:
            component.signal(signal.SIGSTOP)
        if self.database is not None:
            return True
        connection = sqlite3.connect(self.home / "airflow.db", timeout=0.3, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError:
            component.signal(signal.SIGCONT)
            return False
        finally:
            connection.close()
        return True

    def workers(self) -> list[psutil.Process]:
        """Return what runs tasks: below the scheduler are the executor's processes, and below those these."""
        scheduler = self.components["scheduler"]
        found = []
        for process in scheduler.family()[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.ppid() != scheduler.pid:
                    found.append(process)
        return found

    def restart(self, name: str) -> Component:
        """Start a component again whose process has died."""
        component = self.components[name]
        assert not component.alive, f"{name} is still running"
        return self.start_one(name.split("@")[0], as_name=name)

    def stop(self) -> None:
        """End all components."""
        for component in self.components.values():
            component.signal(signal.SIGCONT)
        others = [component for name, component in self.components.items() if name != "api-server"]
        with ThreadPoolExecutor() as pool:  # each takes seconds, and none needs another for it
            list(pool.map(Component.stop, others))
        if "api-server" in self.components:
            self.components["api-server"].stop()

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add_dags(self, *files: Path) -> None:
        """Copy DAG files (and modules beside them) into the DAG folder."""
        for file in files:
            target = self.dags / file.name
            if file.is_dir():
                shutil.copytree(file, target, dirs_exist_ok=True)
            else:
                shutil.copy(file, target)

    @property
    def token(self) -> str:
        """Of a user who may do everything; `request` sends it, too, once it was asked for."""
        if not self._token:
            self._token = self.request("GET", f"{self.url}/auth/token", None)["access_token"]
        return self._token

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """Call Airflow's REST API."""
        assert self.token
        return self.request(method, f"{self.url}/api/v2{path}", body)

    def request(self, method: str, url: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(
            url, method=method, headers=headers, data=None if body is None else json.dumps(body).encode()
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {url}: {error.code} {error.read().decode()}") from error
        return json.loads(text) if text else None

    def answers(self) -> bool:
        """Whether the API server does."""
        if not self.components["api-server"].alive:
            raise RuntimeError(f"the API server has ended; see {self.components['api-server'].log}")
        try:
            self.request("GET", f"{self.url}/api/v2/version", None)
        except (OSError, RuntimeError, ValueError):
            return False
        return True

    def wait_for_dags(self, *dag_ids: str, timeout: float = PATIENCE) -> None:
        """Wait until the DAG processor has read these DAGs."""

        def known() -> bool:
            found = {dag["dag_id"] for dag in self.api("GET", "/dags?limit=500")["dags"]}
            return set(dag_ids) <= found

        try:
            until(known, f"Airflow knows the DAGs {dag_ids}", timeout, pause=0.5)
        except TimeoutError as error:
            problems = self.api("GET", "/importErrors")["import_errors"]
            raise TimeoutError(f"{error}\n" + "\n".join(p["stack_trace"] for p in problems)) from error

    def run(self, dag_id: str, conf: dict[str, Any] | None = None, run_id: str | None = None) -> Run:
        """Start a DAG run."""
        body: dict[str, Any] = {"logical_date": None, "conf": conf or {}}
        if run_id:
            body["dag_run_id"] = run_id
        answer = self.api("POST", f"/dags/{dag_id}/dagRuns", body)
        return Run(self, dag_id, answer["dag_run_id"])


@dataclass(frozen=True)
class Run:
    """A DAG run, seen through the REST API."""

    deployment: Deployment
    dag_id: str
    run_id: str

    @property
    def path(self) -> str:
        return f"/dags/{quote(self.dag_id)}/dagRuns/{quote(self.run_id, safe='')}"

    @property
    def url(self) -> str:
        return f"{self.deployment.url}/dags/{quote(self.dag_id)}/runs/{quote(self.run_id, safe='')}"

    @property
    def state(self) -> str:
        return str(self.deployment.api("GET", self.path)["state"])

    def tasks(self) -> dict[str, dict[str, Any]]:
        """Return the task instances, by ``task_id`` or ``task_id[map_index]``."""
        found = self.deployment.api("GET", f"{self.path}/taskInstances?limit=1000")["task_instances"]
        return {t["task_id"] if t["map_index"] < 0 else f"{t['task_id']}[{t['map_index']}]": t for t in found}

    def task_state(self, task: str) -> str | None:
        state = self.tasks().get(task, {}).get("state")
        return None if state is None else str(state)

    def finished(self, timeout: float = PATIENCE) -> str:
        """Wait for the end of the run and return its state."""
        until(lambda: self.state in FINISHED, f"{self.dag_id} {self.run_id} finishes: {self}", timeout, 0.3)
        return self.state

    def until_task(self, task: str, *states: str, timeout: float = PATIENCE) -> str:
        """Wait until the task is in one of the states."""
        until(lambda: self.task_state(task) in states, f"{task} of {self} is {states}", timeout, 0.2)
        return str(self.task_state(task))

    def xcom(self, task_id: str, key: str = "return_value", map_index: int = -1) -> Any:
        """Return an XCom, or None."""
        return self._stored(task_id, f"xcomEntries/{key}?map_index={map_index}&deserialize=false")

    def state_store(self, task_id: str, key: str, map_index: int = -1) -> Any:
        """Return what the task's worker stored, or None."""
        return self._stored(task_id, f"state-store/{key}?map_index={map_index}")

    def _stored(self, task_id: str, what: str) -> Any:
        with contextlib.suppress(RuntimeError):
            value = self.deployment.api("GET", f"{self.path}/taskInstances/{task_id}/{what}")["value"]
            return json.loads(value) if isinstance(value, str) and value[:1] in '{["' else value
        return None

    def clear(self, *task_ids: str) -> None:
        """Clear tasks, as the page does."""
        self._clear(task_ids=list(task_ids), only_failed=False)

    def clear_failed(self) -> None:
        """Clear the tasks that failed, and those that did not run for it."""
        self._clear(only_failed=True)

    def _clear(self, **which: Any) -> None:
        self.deployment.api(
            "POST",
            f"/dags/{self.dag_id}/clearTaskInstances",
            {"dry_run": False, "dag_run_id": self.run_id, "reset_dag_runs": True, **which},
        )

    def mark(self, task_id: str, state: str) -> None:
        """Mark a task as ``success`` or ``failed``."""
        self.deployment.api("PATCH", f"{self.path}/taskInstances/{task_id}", {"new_state": state})

    def logs(self, task_id: str, which: str = "*") -> str:
        """Return the task's log files, or those of one kind: ``attempt=1.log``, ``*.trigger.*``."""
        folder = self.deployment.home / "logs" / f"dag_id={self.dag_id}" / f"run_id={self.run_id}"
        return "\n".join(
            f.read_text(errors="replace")
            for f in sorted(folder.glob(f"task_id={task_id}/**/{which}"))
            if f.is_file()
        )

    def worker_starts(self, task_id: str) -> int:
        """
        Count the worker processes that the task has had, over all tries.

        The evidence is the worker's own log of each try, in which each start writes its line.
        """
        files = [f for f in self._log_folder(task_id).glob("**/attempt=*.log") if ".trigger." not in f.name]
        return sum(f.read_text(errors="replace").count("DAG bundles loaded") for f in files)

    def _log_folder(self, task_id: str) -> Path:
        home = self.deployment.home
        task, _, index = task_id.rstrip("]").partition("[")
        folder = home / "logs" / f"dag_id={self.dag_id}" / f"run_id={self.run_id}" / f"task_id={task}"
        return folder / f"map_index={index}" if index else folder

    def __str__(self) -> str:
        with contextlib.suppress(Exception):
            return f"{self.dag_id} {self.run_id} " + str({k: t["state"] for k, t in self.tasks().items()})
        return f"{self.dag_id} {self.run_id}"
