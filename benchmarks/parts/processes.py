"""The triggerer's processes, and what they take."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

# Seconds in which what has begun or ended comes to rest; `--settle`.
settled = 10.0
# Seconds in which the triggerer's processes have collected their garbage, once told.
COLLECTING = 5.0
# Cores that a supervisor takes while nobody asks it anything: less than so many, also with 10,000 waits.
RESTING = 0.2


def settle() -> None:
    time.sleep(settled)


def fresh_triggerer(airflow: Any) -> tuple[Any, Any]:
    """Start the triggerer again, and return its supervisor and its runner."""
    from deployment import until

    airflow.components["triggerer"].stop()
    triggerer = airflow.restart("triggerer")
    until(lambda: len(triggerer.family()) > 1, "the triggerer runs")
    settle()
    return supervisor_and_runner(triggerer)


def supervisor_and_runner(triggerer: Any) -> tuple[Any, Any]:
    supervisor, *others = triggerer.family()
    # What it starts besides, to see what is installed, is small and soon gone.
    return supervisor, max(others, key=lambda process: process.memory_info().rss)


def open_waits(
    airflow: Any, dag_id: str, waits: int, count: int, due: datetime | None = None, **conf: str
) -> list:
    """Start as many runs of a DAG with so many waits as make ``count``, and tell each its number."""
    if due:
        conf["due"] = due.isoformat()
    label = f"{time.time():.0f}"
    return [
        airflow.run(dag_id, {**conf, "number": f"{number}"}, run_id=f"{label}-{number}")
        for number in range(count // waits)
    ]


@dataclass
class Opened:
    """
    Waits that are open in a triggerer which had none before.

    :param runs: theirs.
    :param made: seconds until their runs were made.
    :param seconds: until all of them waited.
    :param files: open files of the supervisor that there are more than before.
    """

    airflow: Any
    triggerer: tuple[Any, Any]
    runs: list
    made: float
    seconds: float
    files: int
    before: list[int]

    def rest(self) -> None:
        """Wait until its supervisor has answered what the waits asked as they began; some never let it rest."""
        from deployment import until

        supervisor = self.triggerer[0]

        def rests() -> bool:
            worked = busy(supervisor)
            time.sleep(5)
            return busy(supervisor) - worked < 5 * RESTING

        with contextlib.suppress(TimeoutError):
            until(rests, "the triggerer's supervisor rests", timeout=60 + len(self.runs), pause=0)

    def memory(self) -> dict[str, int]:
        """Return the KB by which runner and supervisor have grown."""
        after = collected(self.airflow, self.triggerer)
        supervisor, runner = (now - was for now, was in zip(after, self.before, strict=True))
        return {"runner": runner, "supervisor": supervisor}

    def idle(self, seconds: float, look: Callable[[], None] | None = None) -> dict[str, float]:
        """
        Return how much of a core runner and supervisor take while nothing happens.

        :param seconds: for which they are looked at.
        :param look: done again and again meanwhile.
        """
        worked = [busy(process) for process in self.triggerer]
        ends = time.monotonic() + seconds
        while look is not None and time.monotonic() < ends:
            look()
            time.sleep(0.05)
        time.sleep(max(ends - time.monotonic(), 0))
        took = [busy(process) - was for process, was in zip(self.triggerer, worked, strict=True)]
        return {"supervisor_cores": round(took[0] / seconds, 4), "runner_cores": round(took[1] / seconds, 4)}


@contextlib.contextmanager
def opened(
    airflow: Any,
    dag_id: str,
    waits: int,
    count: int,
    *,
    beside: str = "",
    before: Callable[[], None] = lambda: None,
    **conf: str,
) -> Iterator[Opened]:
    """
    Have so many waits open in a triggerer that is new, and end them.

    :param waits: in each run of the DAG.
    :param count: in all.
    :param beside: the DAG of one trigger more, which runs before what is there is looked at.
    :param before: called when the triggerer is there and no wait is.
    :param conf: of the runs.
    """
    triggerer = fresh_triggerer(airflow)
    others = [airflow.run(beside)] if beside else []
    if others:
        until_open(airflow, triggerer, 1)
        settle()
    memory, files = collected(airflow, triggerer), open_files(triggerer[0])
    before()
    began = time.monotonic()
    runs = open_waits(airflow, dag_id, waits, count, **conf)
    made = time.monotonic() - began
    until_open(airflow, triggerer, count + len(others))
    seconds = time.monotonic() - began
    settle()
    more = open_files(triggerer[0]) - files
    yield Opened(airflow, triggerer, runs, round(made, 1), round(seconds, 1), more, memory)
    end(airflow, [*others, *runs])


def tenth(waits: int) -> int:
    """Return how many waits are enough where each has a worker, of which one or two start in a second."""
    return max(waits // 100, 1) * 10


def until_open(airflow: Any, triggerer: tuple[Any, Any], count: int) -> None:
    """Wait until so many wait: those with a trigger of which the supervisor has an open log, and those without."""
    from deployment import until

    def wait() -> bool:
        with_trigger, without = deferred(airflow)
        return with_trigger + without >= count and _logs(triggerer[0]) >= with_trigger

    until(wait, f"{count} tasks wait", timeout=60 + count, pause=0.2)


def deferred(airflow: Any) -> tuple[int, int]:
    """Return how many deferred task instances have a trigger, and how many are parked or hosted."""
    query = "SELECT count(trigger_id), count(*) FROM task_instance WHERE state = 'deferred'"
    with connect(airflow.database) as connection:
        [(with_trigger, all_of_them)] = connection.execute(query)
    return with_trigger, all_of_them - with_trigger


def connect(url: str) -> Any:
    """Connect to Airflow's database, of which SQLAlchemy has the URL."""
    import psycopg

    return psycopg.connect(re.sub(r"\+\w+", "", url), autocommit=True)


def _logs(process: Any) -> int:
    found = 0
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found += ".trigger." in os.readlink(entry)
    return found


def open_files(process: Any) -> int:
    return sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir())


def end(airflow: Any, runs: list) -> None:
    for run in runs:
        airflow.api("PATCH", run.path, {"state": "failed"})
    settle()


def collected(airflow: Any, processes: tuple[Any, Any]) -> list[int]:
    """Let the triggerer's processes collect their garbage, and return what memory each has then, in KB."""
    (airflow.home / "collect").touch()
    time.sleep(COLLECTING)
    return [pss(process.pid) for process in processes]


def pss(pid: int) -> int:
    """Return a process's share of memory, in KB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def busy(process: Any) -> float:
    """Return the processor time that a process has had, in seconds."""
    times = process.cpu_times()
    return float(times.user + times.system)
