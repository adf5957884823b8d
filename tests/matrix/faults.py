"""
What can befall a wait while a process of it stands in a gap.

A fault is a generator over all waits that stand somewhere. It strikes, and yields; the gaps are opened; it mends
what an operator would mend, and yields; every run must then end as it should; it cleans up. It takes part in the
matrix by standing in `FAULTS`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
from cells import Cell, Stage, is_gone
from paths import DEADLINE

from deployment import FINISHED, until

Course = Iterator[None]
# Seconds that Airflow waits beyond a deadline.
GRACE = 300
# Seconds after which a trigger asks an API server again that does not answer.
ASKED_AGAIN = 30


@dataclass(frozen=True)
class Fault:
    """
    A fault, and which cells it has.

    :param clock: by how many seconds the process's clock jumps.
    :param once: a request that stands in an API server passes by when it is asked again.
    :param clears: whether a user clears the wait.
    """

    name: str
    says: str
    course: Callable[[Stage, list[Cell]], Course]
    places: tuple[str, ...] = ("triggerer", "worker")
    has_deadline: bool = False
    clock: str = ""
    once: bool = False
    clears: bool = False

    @property
    def id(self) -> str:
        return self.name.replace(" ", "-").replace(",", "")


def in_triggerer(cells: list[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.gap.place == "triggerer"]


def on_workers(cells: list[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.gap.place == "worker"]


def see(stage: Stage, cells: list[Cell]) -> None:
    """Assert that each wait stands where the matrix says."""
    triggerer = {process.pid for process in stage.airflow.components["triggerer"].family()}
    workers = {process.pid for process in stage.airflow.workers()}
    api_server = {process.pid for process in stage.airflow.components["api-server"].family()}
    there = {"triggerer": triggerer, "worker": workers, "api-server": api_server}
    for cell in cells:
        assert cell.process.pid in there[cell.gap.place], cell


def see_gone(cells: list[Cell], timeout: float = 30) -> None:
    until(lambda: all(is_gone(cell.process) for cell in cells), "the processes are gone", timeout)


def killed(stage: Stage, cells: list[Cell]) -> Course:
    if in_triggerer(cells):
        stage.airflow.components["triggerer"].kill()
    for cell in on_workers(cells):
        cell.process.kill()
    see_gone(cells)
    if in_triggerer(cells):
        stage.airflow.restart("triggerer")
    yield
    yield


def replaced(stage: Stage, cells: list[Cell]) -> Course:
    second = stage.airflow.start_one("triggerer", as_name="triggerer@second")
    until(lambda: len(second.family()) > 1, "the second triggerer runs")
    stage.airflow.components["triggerer"].kill()
    see_gone(cells)
    yield
    yield
    stage.airflow.restart("triggerer")


def machine_lost(stage: Stage, cells: list[Cell]) -> Course:
    for cell in cells:
        supervisor = cell.process.parent()
        assert supervisor is not None
        supervisor.kill()
        cell.process.kill()
    see_gone(cells)
    yield
    yield


def told_to_end(stage: Stage, cells: list[Cell]) -> Course:
    for cell in on_workers(cells):  # Airflow 3.3.2 calls on_kill then, and lets the task go on
        supervisor = cell.process.parent()
        assert supervisor is not None
        supervisor.terminate()
    if in_triggerer(cells):
        stage.airflow.components["triggerer"].stop(timeout=30)
        see_gone(in_triggerer(cells))
        stage.airflow.restart("triggerer")
    yield
    yield


def stood_still(stage: Stage, cells: list[Cell]) -> Course:
    old = stage.airflow.components["triggerer"]
    stopped = []
    for cell in on_workers(cells):
        supervisor = cell.process.parent()
        assert supervisor is not None
        for process in (supervisor, cell.process):
            os.kill(process.pid, signal.SIGSTOP)
            stopped.append(process)
    try:
        if in_triggerer(cells):
            stage.airflow.freeze(old)
        stage.airflow.start_one("triggerer", as_name="triggerer@second")
        stage.finish(cells)
        yield
    finally:
        old.signal(signal.SIGCONT)
        for process in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
    until(lambda: all(cell.passed or is_gone(cell.process) for cell in cells), "they have gone on", 90)
    time.sleep(5)  # what they do then is what this is about
    yield


def without_api_server(stage: Stage, cells: list[Cell]) -> Course:
    stage.airflow.components["api-server"].kill()
    yield
    time.sleep(30)
    stage.airflow.restart("api-server")
    until(stage.airflow.answers, "the API server answers")
    yield


def api_server_killed(stage: Stage, cells: list[Cell]) -> Course:
    stage.airflow.components["api-server"].kill()
    see_gone(cells)
    yield
    stage.airflow.restart("api-server")
    until(stage.airflow.answers, "the API server answers")
    yield


def api_server_told_to_end(stage: Stage, cells: list[Cell]) -> Course:
    server = stage.airflow.components["api-server"]
    server.process.terminate()
    time.sleep(2)
    yield
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(30)
    server.kill()
    stage.airflow.restart("api-server")
    until(stage.airflow.answers, "the API server answers")
    yield


def api_server_stood_still(stage: Stage, cells: list[Cell]) -> Course:
    server = stage.airflow.components["api-server"]
    server.signal(signal.SIGSTOP)
    try:
        yield
        time.sleep(ASKED_AGAIN + 10)
    finally:
        server.signal(signal.SIGCONT)
    yield


def asked_again(stage: Stage, cells: list[Cell]) -> Course:
    stage.finish(cells, ASKED_AGAIN + 60)
    yield
    until(lambda: all(cell.passed for cell in cells), "they have gone on", 30)
    time.sleep(2)  # what they do then is what this is about
    yield


def without_database(stage: Stage, cells: list[Cell]) -> Course:
    stage.database.crash()
    yield
    time.sleep(5)
    stage.database.start()
    for _ in range(40):  # some components end only when they miss it
        time.sleep(1)
        for name, component in list(stage.airflow.components.items()):
            if not component.alive:
                stage.airflow.restart(name)  # as a service manager would
    yield


def scheduler_killed(stage: Stage, cells: list[Cell]) -> Course:
    scheduler = stage.airflow.components["scheduler"]
    family = scheduler.family()
    scheduler.process.kill()
    scheduler.process.wait()
    yield
    stage.airflow.restart("scheduler")
    yield
    for process in family:  # its workers outlive it
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def cleared(stage: Stage, cells: list[Cell]) -> Course:
    for cell in cells:
        cell.run.clear("wait", "deliver")
    yield
    yield


def marked_failed(stage: Stage, cells: list[Cell]) -> Course:
    yield from _marked(stage, cells, "failed")


def marked_success(stage: Stage, cells: list[Cell]) -> Course:
    yield from _marked(stage, cells, "success")


def _marked(stage: Stage, cells: list[Cell], state: str) -> Course:
    for cell in cells:
        try:
            cell.run.mark("wait", state)
        except RuntimeError as error:
            if "already in" not in str(error):  # the state that it is to have
                raise
    yield
    _see_the_end(stage, cells)
    for cell in cells:
        cell.run.clear("wait", "deliver")
    yield


def _see_the_end(stage: Stage, cells: list[Cell]) -> None:
    until(lambda: all(is_gone(cell.process) for cell in on_workers(cells)), "the workers are gone", 60)
    until(lambda: all(cell.run.state in FINISHED for cell in cells), "the runs have ended", 120, 0.5)
    time.sleep(5)  # until a trigger that was cancelled has let go


def deleted(stage: Stage, cells: list[Cell]) -> Course:
    for cell in cells:
        stage.airflow.api("PATCH", cell.run.path, {"state": "failed"})
        stage.airflow.api("DELETE", cell.run.path)
    yield
    time.sleep(10)  # until whoever stood there has noticed
    for cell in cells:
        cell.begin_again(stage)
    yield


def too_late(stage: Stage, cells: list[Cell]) -> Course:
    time.sleep(DEADLINE + 5)
    yield
    yield


def much_too_late(stage: Stage, cells: list[Cell]) -> Course:
    time.sleep(DEADLINE + GRACE + 30)
    yield
    yield


def undisturbed(stage: Stage, cells: list[Cell]) -> Course:
    yield
    yield


TRIGGERER, WORKER, API_SERVER = ("triggerer",), ("worker",), ("api-server",)
ALL = (*TRIGGERER, *WORKER, *API_SERVER)

FAULTS = (
    Fault("killed", "SIGKILL of the process that stands there; a triggerer is started again", killed),
    Fault("replaced", "SIGKILL, while a second triggerer is there", replaced, TRIGGERER),
    Fault("machine lost", "SIGKILL of the worker and its supervisor at once", machine_lost, WORKER),
    Fault(
        "told to end",
        "SIGTERM, as in a rolling restart: the triggerer ends, a worker may finish its task",
        told_to_end,
    ),
    Fault(
        "stood still",
        "SIGSTOP until another triggerer, or another try, has ended the wait; then SIGCONT",
        stood_still,
    ),
    Fault(
        "no API server",
        "the API server is killed, and started again 30 s after the wait went on",
        without_api_server,
    ),
    Fault(
        "API server killed",
        "SIGKILL of the API server that the request is in; it is started again, and asked again",
        api_server_killed,
        API_SERVER,
    ),
    Fault(
        "API server told to end",
        "SIGTERM, and the request goes on meanwhile; the API server is started again",
        api_server_told_to_end,
        API_SERVER,
    ),
    Fault(
        "API server stood still",
        "SIGSTOP for 40 s, until it was asked again; then SIGCONT, and it goes on with both requests",
        api_server_stood_still,
        API_SERVER,
    ),
    Fault(
        "asked again",
        "the request stays in the API server until the same, asked again, has ended the wait; then it goes on",
        asked_again,
        API_SERVER,
        once=True,
    ),
    Fault(
        "no database",
        "PostgreSQL crashes, and starts again 5 s after the wait went on",
        without_database,
        ALL,
    ),
    Fault("scheduler killed", "SIGKILL of the scheduler", scheduler_killed),
    Fault("cleared", "a user clears the task", cleared, ALL, clears=True),
    Fault(
        "marked failed",
        "a user marks the task as failed, and clears it later",
        marked_failed,
        ALL,
        clears=True,
    ),
    Fault(
        "marked success",
        "a user marks the task as successful, and clears it later",
        marked_success,
        ALL,
        clears=True,
    ),
    Fault(
        "deleted",
        "a user ends and deletes the run; another run waits, for what the first had in hand, too",
        deleted,
        ALL,
    ),
    Fault("too late", "the deadline passes there", too_late, has_deadline=True),
    Fault(
        "much too late",
        "the deadline passes there, and the moment at which Airflow ends the deferral by itself",
        much_too_late,
        has_deadline=True,
    ),
    Fault("clock ahead", "the process's clock jumps ahead by two days", undisturbed, clock="172800"),
    Fault("clock back", "the process's clock jumps back by an hour", undisturbed, clock="-3600"),
)
