#!/usr/bin/env python3
"""
What an open wait costs the process that runs the triggers: python3 benchmarks/runner.py [--tasks 0 10 300].

Airflow's own ``TriggerRunner`` in a process of its own, spoken to as its supervisor does, by somebody who has
no database and finds no XCom. So it takes a minute, and what it shows is the runner's alone. Each row is a
fresh process.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks" / "plugins")]

import bootstrap  # noqa: E402

# What is imported with the first of them is no part of a wait.
WARM_UP = 20
SETTLED = 8
IDLE = 20
COLLECTING = 5
NAMES = ("floor", "ours", "peer")
NOW = datetime.now(timezone.utc)
DUE = "2100-01-01T00:00:00+00:00"
LABELS = {
    "floor": "the floor: a trigger that awaits forever",
    "ours": "ours: `TimerListener`",
    "peer": "`DateTimeSensorAsync`, `start_from_trigger`",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What an open wait costs the process that runs the triggers.")
    parser.add_argument(
        "--tasks", type=int, nargs="+", default=[10, 300], help="in a DAG; 0: no DAG (default: 10 300)"
    )
    parser.add_argument("--waits", type=int, default=300, help="open waits (default: 300)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--again", type=int, default=1, help="how often the waits are opened, ended before")
    parser.add_argument(
        "--batch",
        type=int,
        default=50,
        help="how many the supervisor sends at once (default: 50, which is what Airflow's takes on in a second; "
        "while its runner is busy they add up)",
    )
    options = parser.parse_args()
    bootstrap.run_inside("[test]")

    with tempfile.TemporaryDirectory(prefix="airflow-events-runner-") as home:
        os.environ["AIRFLOW_HOME"] = home
        os.environ["AIRFLOW__CORE__FERNET_KEY"] = "dGhpcyBpcyBub3QgYSBzZWNyZXQgYXQgYWxsLCBub28="
        print(
            "| open waits | KB per wait | above the floor | at the most | processor time while nothing happens |"
        )
        print("|---|---|---|---|---|")
        for tasks in options.tasks:
            floor = None
            for name in options.only:
                kept, most, cores = cost(name, tasks, options)
                floor = kept if floor is None else floor
                where = f"in DAGs of {tasks} tasks" if tasks else "deferred by a worker"
                print(
                    f"| {LABELS[name]}; {options.waits}, {where} | {kept:.1f} | {kept - floor:+.1f} | {most:.1f} "
                    f"| {cores:.4f} cores |",
                    flush=True,
                )


def cost(name: str, tasks: int, options: argparse.Namespace) -> tuple[float, float, float]:
    """Return the KB per wait that the process keeps, the most that it had, and the cores that it idles with."""
    waits, again = options.waits, options.again
    with Runner(options.batch) as runner:
        runner.serve(workloads(name, tasks, range(100_000, 100_000 + WARM_UP)), seconds=SETTLED)
        before = runner.collected()
        for turn in range(again):
            numbers = range(turn * waits, (turn + 1) * waits)
            runner.serve(workloads(name, tasks, numbers))
            if turn < again - 1:
                runner.serve([], cancel=numbers, seconds=5)
        runner.serve([], seconds=SETTLED)
        kept = runner.collected() - before
        busy = runner.busy()
        runner.serve([], seconds=IDLE)
        return kept / waits, (runner.most() - before) / waits, (runner.busy() - busy) / IDLE


def workloads(name: str, tasks: int, numbers: range) -> list[Any]:
    """
    Return what the supervisor would send for so many waits.

    :param tasks: in their DAG, all of them such waits; with 0 a worker has deferred them, and no DAG is sent.
    """
    from airflow.executors.workloads.task import TaskInstanceDTO
    from airflow.executors.workloads.trigger import RunTrigger
    from airflow.models.trigger import Trigger
    from airflow.sdk import DAG
    from airflow.serialization.serialized_objects import DagSerialization

    with DAG("d", schedule=None, params={"due": DUE}) as dag:
        for number in range(max(tasks, 1)):
            OPERATORS[name](f"wait{number}")
    classpath = dag.get_task("wait0").start_trigger_args.trigger_cls
    data = DagSerialization.to_dict(dag) if tasks else None
    made = []
    for number in numbers:
        task_id, run_id = f"wait{number % max(tasks, 1)}", f"run{number // max(tasks, 1)}"
        kwargs = dag.get_task(task_id).start_trigger_args.trigger_kwargs if tasks else DEFERRED[name](run_id)
        ti = TaskInstanceDTO(
            id=uuid.uuid4(), dag_version_id=uuid.uuid4(), dag_id="d", run_id=run_id, task_id=task_id, try_number=1,
            map_index=-1, pool_slots=1, queue="default", priority_weight=1,
        )  # fmt: skip
        run = {
            "dag_id": "d", "run_id": run_id, "logical_date": NOW, "data_interval_start": NOW,
            "data_interval_end": NOW, "run_after": NOW, "start_date": NOW, "end_date": None, "clear_number": 0,
            "run_type": "manual", "state": "running", "conf": {}, "triggering_user_name": None,
            "consumed_asset_events": [], "partition_key": None, "partition_date": None, "note": None,
        }  # fmt: skip
        made.append(
            RunTrigger(
                id=number + 1,
                classpath=classpath,
                encrypted_kwargs=Trigger.encrypt_kwargs(kwargs or {}),
                ti=ti,
                dag_data=data,
                dag_run_data=run if tasks else None,
            )
        )
    return made


def _of_ours(task_id: str) -> Any:
    from airflow_events import wait_for_event
    from airflow_events.listeners.timer import TimerListener

    return wait_for_event.override(task_id=task_id)(TimerListener, "{{ params.due }}")


def _of_the_peer(task_id: str) -> Any:
    from airflow.providers.standard.sensors.date_time import DateTimeSensorAsync

    return DateTimeSensorAsync(
        task_id=task_id, target_time="{{ params.due }}", start_from_trigger=True, end_from_trigger=True
    )


def _of_the_floor(task_id: str) -> Any:
    from floor import Floor

    return Floor(task_id=task_id)


OPERATORS = {"floor": _of_the_floor, "ours": _of_ours, "peer": _of_the_peer}
# What a worker would have written.
DEFERRED: dict[str, Callable[[str], dict[str, Any]]] = {
    "floor": lambda run_id: {},
    "ours": lambda run_id: {
        "listener": "airflow_events.listeners.timer:TimerListener",
        "listener_args": [DUE],
        "wait": {"dag_id": "d", "run_id": run_id, "task_id": "wait0", "map_index": -1, "run_start": NOW},
    },
    "peer": lambda run_id: {"moment": datetime.fromisoformat(DUE), "end_from_trigger": True},
}


class Runner:
    """A process with Airflow's ``TriggerRunner``, and what its supervisor would answer."""

    def __init__(self, batch: int) -> None:
        self._batch = batch

    def __enter__(self) -> Runner:
        ours, theirs = socket.socketpair()
        code = "import sys; sys.path.insert(0, sys.argv[1]); import runner; runner.run()"
        command = [sys.executable, "-c", code, str(ROOT / "benchmarks"), "triggerer"]
        self._process = subprocess.Popen(command, stdin=theirs)
        theirs.close()
        self._socket = ours
        self._send(0, {"type": "StartTriggerer"})
        self.serve([], seconds=SETTLED)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def serve(self, create: list[Any], *, cancel: Iterable[int] = (), seconds: float = 0) -> None:
        """Answer the runner for so many seconds at least, and until it has all that it is to do."""
        self._create, self._cancel = list(create), {number + 1 for number in cancel}
        end = time.monotonic() + seconds
        while self._create or time.monotonic() < end:
            if select.select([self._socket], [], [], 0.2)[0]:
                number, body, *_ = self._receive()
                self._send(number, self._answer(body))
            elif self._process.poll() is not None:
                raise RuntimeError("the runner has ended")

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        match body["type"]:
            case "TriggerStateChanges":
                batch, self._create = self._create[: self._batch], self._create[self._batch :]
                return {
                    "type": "TriggerStateSync",
                    "to_create": [workload.model_dump() for workload in batch],
                    "to_cancel": self._cancel,
                }
            case "GetXCom":
                return {"type": "XComResult", "key": body["key"], "value": None}
            case "GetTaskStates":
                return {
                    "type": "TaskStatesResult",
                    "task_states": {body["run_ids"][0]: {body["task_ids"][0]: "failed"}},
                }
            case other:
                raise AssertionError(f"the runner asks {other}")

    def _send(self, number: int, body: dict[str, Any]) -> None:
        from airflow.sdk.execution_time.comms import _ResponseFrame

        self._socket.sendall(_ResponseFrame(id=number, body=body).as_bytes())

    def _receive(self) -> list[Any]:
        import msgspec

        size = int.from_bytes(self._exactly(4), "big")
        return msgspec.msgpack.decode(self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            more = self._socket.recv(size - len(found))
            if not more:
                raise RuntimeError("the runner has ended")
            found += more
        return found

    def collected(self) -> float:
        """Let it collect its garbage, and return its share of memory then, in KB."""
        (Path(os.environ["AIRFLOW_HOME"]) / "collect").touch()
        self.serve([], seconds=COLLECTING)
        return self._kilobytes("smaps_rollup", "Pss:")

    def most(self) -> float:
        """Return the most memory that it has had, in KB."""
        return self._kilobytes("status", "VmHWM:")

    def busy(self) -> float:
        """Return the processor time that it has used, in seconds."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _kilobytes(self, file: str, field: str) -> float:
        lines = Path(f"/proc/{self._process.pid}/{file}").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(field))


def run() -> None:
    """Be Airflow's ``TriggerRunner``, spoken to through standard input."""
    import floor  # noqa: F401, which collects when told
    from airflow.jobs.triggerer_job_runner import TriggerRunner
    from airflow.sdk.log import configure_logging, reset_logging

    reset_logging()
    with open(os.devnull, "wb", buffering=0) as nowhere:
        configure_logging(json_output=True, output=nowhere, sending_to_supervisor=True)
        TriggerRunner().run()


if __name__ == "__main__":
    main()
