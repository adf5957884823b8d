"""A timer of ours, Airflow's own as it comes and as it starts and ends in the triggerer, and the floor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from parts import Part, Rows, Stage
from parts.processes import (
    end,
    fresh_triggerer,
    open_waits,
    opened,
    tenth,
    until_open,
)

NAMES = {
    "ours": "ours: `TimerListener`",
    "peer": "`DateTimeSensorAsync`",
    "peer_in_triggerer": "`DateTimeSensorAsync`, `start_from_trigger`, `end_from_trigger`",
    "floor": "the floor: a trigger that awaits forever",
}
STARTED = {
    **NAMES,
    "mapped": "ours: `TimerListener`, mapped (`.expand`)",
    "in_one": "ours: `wait_for_events(TimerListener, …)`, one task",
}
# Waits of the DAGs in which they are few.
FEW = (3, 10)
# Events of that one task, as its DAG has it.
IN_ONE = 1000
# Seconds.
AHEAD = 15


def due_at_once(airflow: Any, name: str, count: int, label: str) -> list[float]:
    """Start runs that are due in a moment, and return the seconds from it until what follows each wait ran."""
    due = datetime.now(timezone.utc) + timedelta(seconds=AHEAD)
    conf = {"due": due.isoformat()}
    label = f"{label}-{time.time():.0f}"
    runs = [airflow.run(f"{name}_1", conf, run_id=f"{label}-{number}") for number in range(count)]
    found = []
    for run in runs:
        assert run.finished() == "success", run
        tasks = run.tasks()
        began = datetime.fromisoformat(tasks["wait"]["start_date"])
        assert began < due, f"{run} began to wait {began - due} after it was due"
        found.append(since(due, tasks["downstream"]["start_date"]))
    return found


def since(begin: datetime, moment: str) -> float:
    return round((datetime.fromisoformat(moment) - begin).total_seconds(), 3)


def memory(stage: Stage) -> Rows:
    """What an open wait costs the triggerer, above one that has none."""
    found = []
    many = [(waits, count - count % waits) for count in stage.options.waits for waits in FEW]
    for waits, count in [*many, (300, stage.options.in_one_dag)]:
        for name in ("floor", "ours", "peer_in_triggerer"):
            with opened(stage.airflow, f"{name}_{waits}", waits, count) as those:
                those.rest()
                memory, cores = those.memory(), those.idle(stage.options.look)
            found.append(
                {
                    "name": name,
                    "in_dag": waits,
                    "waits": count,
                    "look": stage.options.look,
                    **memory,
                    "files": those.files,
                    "cores": round(sum(cores.values()), 4),
                }
            )
            print(found[-1], flush=True)
    return found


def memory_table(rows: Rows) -> str:
    lines = [
        "| open waits, each started in the triggerer | memory of the runner per wait | above the floor "
        "| memory of its supervisor per wait | open files per wait | processor time while nothing happens "
        "| of the floor's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        count, in_dag = row["waits"], row["in_dag"]
        floor = floor_of(rows, row)
        lines.append(
            f"| {NAMES[row['name']]}; {count:,}, in DAGs of {in_dag} tasks | {row['runner'] / count:.1f} KB "
            f"| {(row['runner'] - floor['runner']) / count:+.1f} KB | {row['supervisor'] / count:.1f} KB "
            f"| {row['files'] / count:.2f} | {row['cores']:.3f} cores | {row['cores'] / floor['cores']:.2f} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"PSS after a collection; processor time of runner and supervisor over {rows[0]['look']:g} s.",
        ]
    )


def floor_of(rows: Rows, row: dict[str, Any]) -> dict[str, Any]:
    """Return the floor's row of the same number of waits."""
    same = [each for each in rows if (each["in_dag"], each["waits"]) == (row["in_dag"], row["waits"])]
    return next(each for each in same if each["name"] == "floor")


def start(stage: Stage) -> Rows:
    """How long it takes until many waits wait."""
    from deployment import until

    most = max(stage.options.waits)
    found = []
    for name, count in (
        ("floor", most),
        ("ours", most),
        ("peer_in_triggerer", most),
        ("mapped", tenth(most)),
        ("peer", tenth(most)),
        ("in_one", IN_ONE),
    ):
        triggerer = fresh_triggerer(stage.airflow)
        began = time.monotonic()
        if name == "in_one":
            runs = [stage.airflow.run(name)]
            until(lambda run=runs[0]: "are waited for" in run.logs("wait"), "all wait", 300, 0.1)
        else:
            runs = open_waits(stage.airflow, f"{name}_10", 10, count)
            until_open(stage.airflow, triggerer, count)
        found.append({"name": name, "waits": count, "seconds": round(time.monotonic() - began, 2)})
        end(stage.airflow, runs)
        print(found[-1], flush=True)
    return found


def start_table(rows: Rows) -> str:
    lines = ["| waits | worker processes | until all wait | per second |", "|---|---|---|---|"]
    lines += [
        f"| {STARTED[row['name']]}; {row['waits']:,} "
        f"| {row['waits'] if row['name'] in ('mapped', 'peer') else 0} | {row['seconds']:.1f} s "
        f"| {row['waits'] / row['seconds']:.1f} |"
        for row in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            "From the first request that makes a run; runs of a DAG with 10 waits, and one run of a task that "
            "waits for all. Worker processes are those that begin the wait.",
        ]
    )


def successes(runs: list, begin: datetime, timeout: float) -> list[float]:
    """
    Return how long after ``begin`` each task of these runs has succeeded, in their order.

    :param timeout: seconds that a run may take from when it is looked for.
    """
    moments = []
    for run in runs:
        assert run.finished(timeout=timeout) == "success", run
        moments += [task["end_date"] for task in run.tasks().values()]
    return sorted(since(begin, moment) for moment in moments)


def ends_of(row: dict[str, Any]) -> str:
    """Return when the first, the median and the last of a row's waits ended, and how many did in a second."""
    first, median, last = row["ends"][0], statistics.median(row["ends"]), row["ends"][-1]
    return f"{first:.1f} s | {median:.1f} s | {last:.1f} s | {row['waits'] / last:.1f}"


def spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def _dags(names: list[str], *waits: int) -> tuple[str, ...]:
    return tuple(f"{name}_{number}" for name in names for number in waits)


PARTS = {
    "memory": Part(
        memory,
        memory_table,
        _dags(["floor", "ours", "peer_in_triggerer"], *FEW, 300),
        plot="Memory that each open wait takes in the triggerer",
    ),
    "start": Part(start, start_table, (*_dags([*NAMES, "mapped"], 10), "in_one")),
}
