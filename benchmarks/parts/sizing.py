"""A projection to more waits than were measured, from what was."""

from __future__ import annotations

import itertools
from typing import Any

from parts.plots import size

# Waits in all, in each triggerer, and in each run.
CASES = (
    (1_000, 1_000, 10),
    (10_000, 1_000, 10),
    (10_000, 10_000, 10),
    (100_000, 1_000, 10),
    (100_000, 10_000, 10),
    (1_000_000, 1_000, 10),
    (1_000_000, 10_000, 10),
    (1_000_000, 10_000, 1),
)
# The same as places in tasks of `wait_for_events`.
PLACES = 1_000_000
IN_ONE = 10_000
# Airflow's own: seconds between two loops, and `[scheduler] max_dagruns_per_loop_to_schedule`.
PAUSE = 1.0
RUNS_A_LOOP = 20
# That a watch makes for its message: to read its record, to write it, and to write its return value.
WATCH, REQUESTS = "kafka_watch", 3


def projection(results: dict[str, Any]) -> str:
    if not {"database", "memory", "messages"} <= results.keys():
        return "Not measured yet."
    rows = [row for row in results["memory"]["rows"] if row["name"] == "ours" and row["in_dag"] == 10]
    one = max(rows, key=lambda row: row["waits"])
    each = (one["runner"] + one["supervisor"]) / one["waits"]
    asked = results["database"]["rows"]
    watches = next(row for row in results["messages"]["rows"] if row["name"] == WATCH)
    took = watches["ends"][-1] / watches["waits"] / REQUESTS
    besides = took - milliseconds(asked, "triggerer", watches["waits"]) / 1000
    lines = [
        "| waits | triggerers | memory of all triggerers | a triggerer's loop comes every "
        "| requests that it answers in a second, at most | cores of the database that the loops take, idle "
        "| the scheduler has looked at each run once after |",
        "|---|---|---|---|---|---|---|",
    ]
    for waits, in_each, in_run in CASES:
        triggerers = -(-waits // in_each)
        lines.append(
            f"| {waits:,}, {in_run} to a run | {triggerers:,} with {in_each:,} each | {size(each * waits)} "
            f"| {_loops(asked, besides, waits, triggerers, waits // in_run)} |"
        )
    tasks = PLACES // IN_ONE
    lines.append(
        f"| {PLACES:,} in {tasks:,} tasks of `wait_for_events` | 1 "
        f"| [{IN_ONE:,} in one](many-events.md#what-it-costs) | {_loops(asked, besides, tasks, 1, tasks)} |"
    )
    most = max(row["others"] for row in asked)
    return "\n".join(
        [
            *lines,
            "",
            f"Projected, all of it: {each:.0f} KB for each wait, as measured with {one['waits']:,} of ours in "
            "DAGs of 10 tasks; the time of a loop in the database between and beyond the measured points on "
            f"straight lines (measured up to {most:,} waits); {PAUSE:.0f} s between two loops, and none where "
            f"requests come, of which each takes one, and {1000 * besides:.0f} ms besides what the database takes "
            f"for the loop, as measured with messages to {watches['waits']:,} watches at once "
            f"({1000 * took:.0f} ms for a request); {RUNS_A_LOOP} runs in a loop of one scheduler. What events "
            "themselves cost, and what the queries of many triggerers do to each other, is not in it.",
        ]
    )


def _loops(asked: list[dict[str, Any]], besides: float, waits: int, triggerers: int, runs: int) -> str:
    loop = milliseconds(asked, "triggerer", waits) / 1000
    looked = runs / RUNS_A_LOOP * (PAUSE + milliseconds(asked, "scheduler", waits) / 1000)
    cores = triggerers * loop / (PAUSE + loop)
    return f"{PAUSE + loop:.1f} s | {1 / (loop + besides):.1f} | {cores:,.2f} | {duration(looked)}"


def milliseconds(rows: list[dict[str, Any]], name: str, waits: int) -> float:
    """Return the database's time for a loop: on a line between the measured points, and on the last one beyond."""
    points = sorted((row["others"], row["ms"]) for row in rows if row["name"] == name)
    if len(points) == 1:
        return float(points[0][1])
    left, right = next(
        (pair for pair in itertools.pairwise(points) if pair[1][0] >= waits), (points[-2], points[-1])
    )
    return float(left[1] + (right[1] - left[1]) * (waits - left[0]) / (right[0] - left[0]))


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
