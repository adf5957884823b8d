"""A timer of ours, Airflow's own as it comes and as it starts and ends in the triggerer, and the floor."""

from __future__ import annotations

import itertools
import json
import statistics
import time
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
TIMED = [name for name in NAMES if name != "floor"]
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


def latency(stage: Stage) -> Rows:
    """From the moment that a timer is for to the wait's success, and to the next task's start."""
    found: Rows = [{"name": name, **nothing_noted()} for name in TIMED]
    due_at_once(stage.airflow, "ours", 1, "warm-up")
    for turn in range(stage.options.repeat):
        for row in found:
            for key, values in due_at_once(stage.airflow, row["name"], stage.options.at_once, f"{turn}").items():
                row[key] += values
    return [{**row, "rounds": stage.options.repeat} for row in found]


def due_at_once(airflow: Any, name: str, count: int, label: str) -> dict[str, list[float]]:
    """Start runs that are due in a moment, and return when each wait succeeded and what followed it ran."""
    due = datetime.now(timezone.utc) + timedelta(seconds=AHEAD)
    conf = {"due": due.isoformat()}
    label = f"{label}-{time.time():.0f}"
    runs = [airflow.run(f"{name}_1", conf, run_id=f"{label}-{number}") for number in range(count)]
    found = nothing_noted()
    for run in runs:
        assert run.finished() == "success", run
        tasks = run.tasks()
        began = datetime.fromisoformat(tasks["wait"]["start_date"])
        assert began < due, f"{run} began to wait {began - due} after it was due"
        note(found, run, tasks, due)
    return found


def nothing_noted() -> dict[str, list[float]]:
    return {"fired": [], "success": [], "running": [], "workers": []}


def note(found: dict[str, list[float]], run: Any, tasks: Any, begin: datetime) -> None:
    """Add how long after ``begin`` the trigger of a run fired, its wait succeeded, and what followed it ran."""
    found["fired"].append(since(begin, fired_at(run)))
    found["success"].append(since(begin, tasks["wait"]["end_date"]))
    found["running"].append(since(begin, tasks["downstream"]["start_date"]))
    found["workers"].append(run.worker_starts("wait"))


def fired_at(run: Any) -> str:
    """Return when Airflow's runner had the event from the trigger, by its own line in the task's log."""
    lines = [line for line in run.logs("wait", "*.trigger.*").splitlines() if '"Trigger fired event"' in line]
    assert len(lines) == 1, f"{run}: {lines}"
    return str(json.loads(lines[0])["timestamp"])


def since(begin: datetime, moment: str) -> float:
    return round((datetime.fromisoformat(moment) - begin).total_seconds(), 3)


def latency_lines(what: str, begin: str, names: dict[str, str], rows: Rows) -> list[str]:
    """Return the lines of a table of what `note` has noted; ours is the first of the rows."""
    ours = statistics.median(rows[0]["running"])
    return [
        f"| {what} | {begin} to success | {begin} to downstream running | in ours | worker processes per wait |",
        "|---|---|---|---|---|",
        *(
            f"| {names[row['name']]} | {spread(row['success'])} | {spread(row['running'])} "
            f"| {statistics.median(row['running']) / ours:.2f} | {statistics.mean(row['workers']):.2f} |"
            for row in rows
        ),
    ]


def latency_table(rows: Rows) -> str:
    lines = latency_lines("timer", "due", NAMES, rows)
    at_once = len(rows[0]["success"]) // rows[0]["rounds"]
    parts = [
        "| of which | due to fired: the trigger | to success: the runner's and its supervisor's loops, a worker "
        "if there is one | to downstream running: scheduler, executor |",
        "|---|---|---|---|",
        *(f"| {NAMES[row['name']]} | {' | '.join(_steps(row))} |" for row in rows),
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"Median (least to most); {rows[0]['rounds']} rounds by turns, {at_once} waits due at once.",
            "",
            *parts,
        ]
    )


def _steps(row: dict[str, Any]) -> list[str]:
    steps = ([0.0] * len(row["fired"]), row["fired"], row["success"], row["running"])
    taken = [[now - was for was, now in zip(*pair, strict=True)] for pair in itertools.pairwise(steps)]
    return [
        f"{1000 * statistics.median(taken[0]):.0f} ms ({1000 * min(taken[0]):.0f} to {1000 * max(taken[0]):.0f})",
        *(spread(seconds) for seconds in taken[1:]),
    ]


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


def burst(stage: Stage) -> Rows:
    """How fast many waits end that are due at once."""
    count = max(stage.options.waits)
    found = []
    for name in ("ours", "peer_in_triggerer"):
        triggerer = fresh_triggerer(stage.airflow)
        due = datetime.now(timezone.utc) + timedelta(seconds=45 + count // 10)
        runs = open_waits(stage.airflow, f"{name}_10", 10, count, due)
        until_open(stage.airflow, triggerer, count)
        assert datetime.now(timezone.utc) < due, "they are due before all wait"
        found.append({"name": name, "waits": count, "ends": successes(runs, due, 600)})
        print(name, found[-1]["ends"][-1], flush=True)
    return found


def burst_table(rows: Rows) -> str:
    lines = [
        "| waits due at once | due to the first success | the median | the last | per second |",
        "|---" * 5 + "|",
    ]
    lines += [f"| {NAMES[row['name']]}; {row['waits']:,} | {ends_of(row)} |" for row in rows]
    return "\n".join(
        [*lines, "", "Runs of a DAG with 10 waits; a wait's success is the end of its task instance."]
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


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def _dags(names: list[str], *waits: int) -> tuple[str, ...]:
    return tuple(f"{name}_{number}" for name in names for number in waits)


PARTS = {
    "latency": Part(
        latency,
        latency_table,
        _dags(TIMED, 1),
        plot="From when a timer was due until its wait had succeeded, and until the next task ran",
    ),
    "memory": Part(
        memory,
        memory_table,
        _dags(["floor", "ours", "peer_in_triggerer"], *FEW, 300),
        plot="Memory that each open wait takes in the triggerer",
    ),
    "start": Part(start, start_table, (*_dags([*NAMES, "mapped"], 10), "in_one")),
    "burst": Part(burst, burst_table, _dags(["ours", "peer_in_triggerer"], 10)),
}
