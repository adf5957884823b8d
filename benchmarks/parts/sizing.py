"""A projection to more waits than were measured, from what was."""

from __future__ import annotations

import itertools
from typing import Any

from parts.plots import size

# Waits in all, and of which kind.
CASES = tuple((waits, kind) for waits in (10_000, 100_000, 1_000_000) for kind in ("trigger", "hosted", "parked"))
WHAT = {
    "trigger": "a trigger each",
    "hosted": "watches, [hosted](life-of-a-wait.md#hosted-waits)",
    "parked": "timers and HTTP, [parked](life-of-a-wait.md#parked-waits)",
}
# KB that one takes in the triggerer once it is hosted or parked, as the part `mixed` measures 33,334 watches. The
# part `large` measures what they take as they begin, a thousand at once, which those that begin later use again.
HELD = {"hosted": 2.2, "parked": 0.0}
# Of those with a trigger each, and of the others for whom somebody polls, in each triggerer; and in each run.
IN_EACH, IN_RUN = 10_000, 10
HOSTED_IN_EACH = 250_000
# The same as places in tasks of `wait_for_events`.
PLACES = 1_000_000
IN_ONE = 10_000
# Airflow's own: seconds between two loops, and `[scheduler] max_dagruns_per_loop_to_schedule`.
PAUSE = 1.0
RUNS_A_LOOP = 20


def projection(results: dict[str, Any]) -> str:
    """Return the table of what waits would take, of what the parts `database` and `large` measured."""
    if not {"database", "large"} <= results.keys():
        return "Not measured yet."
    asked, large = results["database"]["rows"], {row["name"]: row for row in results["large"]["rows"]}
    if all(row.get("triggers", True) for row in asked):
        return "Not measured yet."
    floor = large["floor"]
    each = {"trigger": (floor["runner"] + floor["supervisor"]) / floor["waits"], **HELD}
    lines = [
        "| waits | each of them | triggerers | memory of all triggerers | cores of the database that triggerers' "
        "loops take, idle | and an API server's | the scheduler has looked at each run once after |",
        "|---|---|---|---|---|---|---|",
    ]
    for waits, kind in CASES:
        in_each = {"trigger": IN_EACH, "hosted": HOSTED_IN_EACH}.get(kind, waits)
        triggerers = -(-waits // in_each)
        memory = size(each[kind] * waits) if each[kind] * waits >= 1000 else "nothing to speak of"
        lines.append(
            f"| {waits:,} | {WHAT[kind]} | {triggerers:,} | {memory} "
            f"| {_loops(asked, waits, triggerers, waits // IN_RUN, triggers=kind == 'trigger')} |"
        )
    tasks = PLACES // IN_ONE
    lines.append(
        f"| {PLACES:,} | places in {tasks:,} tasks of `wait_for_events` | 1 "
        f"| [{IN_ONE:,} in one](many-events.md#what-it-costs) | {_loops(asked, tasks, 1, tasks, triggers=True)} |"
    )
    most = max(row["others"] for row in asked)
    return "\n".join(
        [
            *lines,
            "",
            f"Projected, all of it: memory as measured with {floor['waits']:,} waits in DAGs of 10 tasks "
            f"({each['trigger']:.0f} KB for a trigger), and for hosted watches "
            f"[{HELD['hosted']} KB each](benchmarks.md#without-triggers-of-their-own); as they begin, each "
            "has a trigger for a moment; the time of a loop in the database between the measured points on "
            "straight lines "
            f"(measured up to {most:,} waits, with triggers and without); {PAUSE:.0f} s between two loops; "
            f"{IN_EACH:,} waits with a trigger to a triggerer, "
            f"{HOSTED_IN_EACH:,} hosted ones; {IN_RUN} waits to a "
            f"run, and {RUNS_A_LOOP} runs in a loop of one scheduler. What events themselves cost, and what the "
            "queries of many triggerers do to each other, is not in it.",
        ]
    )


def _loops(asked: list[dict[str, Any]], waits: int, triggerers: int, runs: int, *, triggers: bool) -> str:
    loop, api = (
        milliseconds(asked, name, waits, triggers=triggers) / 1000 for name in ("triggerer", "api-server")
    )
    looked = runs / RUNS_A_LOOP * (PAUSE + milliseconds(asked, "scheduler", waits, triggers=triggers) / 1000)
    return f"{triggerers * loop / (PAUSE + loop):,.2f} | {api / (PAUSE + api):,.3f} | {duration(looked)}"


def milliseconds(rows: list[dict[str, Any]], name: str, waits: int, *, triggers: bool = True) -> float:
    """
    Return the database's time for a loop: on a line between the measured points, and on the last one beyond.

    :param triggers: whether the waits have some. With none, of others, both measure the same.
    """
    points = sorted(
        (row["others"], row["ms"])
        for row in rows
        if row["name"] == name and (not row["others"] or row.get("triggers", True) is triggers)
    )
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
