"""
Waits of Ray's workflows: ``python in_ray.py FOLDER WAITS AHEAD SETTLED``, with Ray 2.9.3's own Python.

So many workflows, of a timer and a step that follows it, wait until ``AHEAD`` seconds from when all of them were
started. ``SETTLED`` seconds after each has its process the memory of these is taken. Prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from pathlib import Path

import psutil
import ray
from ray import workflow
from ray.workflow.event_listener import TimerListener


class Timer(TimerListener):
    async def poll_for_event(self, moment: float) -> float:
        gc.collect()  # as for the others
        await super().poll_for_event(moment)
        return moment


@ray.remote
def running(moment: float) -> float:
    return time.time() - moment


def main(folder: str, waits: int, ahead: float, settled: float) -> None:
    # A slot for each wait, and some for what else Ray does.
    ray.init(
        num_cpus=waits + 4,
        storage=f"file://{folder}",
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    workflow.init()
    due = time.time() + ahead
    ends = [
        workflow.run_async(running.bind(workflow.wait_for_event(Timer, due)), workflow_id=f"wait{number}")
        for number in range(waits)
    ]
    while len(processes()) < waits and time.time() < due:
        time.sleep(0.1)
    time.sleep(settled)
    waiting = processes()
    found = {
        "pss": [pss(process.pid) for process in waiting],
        "processes": len(waiting),
        "slots": ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0),
    }
    if time.time() > due:
        sys.exit(
            f"the waits were due {time.time() - due:.1f} s before they were measured: more time ahead is needed"
        )
    found["running"] = ray.get(ends)
    print(json.dumps(found))


def processes() -> list[psutil.Process]:
    """Return the processes that wait: Ray's workers have what they do in their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith("ray::_workflow_task_executor"):
                found.append(process)
    return found


def pss(pid: int) -> int:
    """Return a process's share of memory, in KB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
