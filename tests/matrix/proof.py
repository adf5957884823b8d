"""The matrix: every gap of every path of every source, under every fault."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path as Folder
from typing import Any

from cells import Cell, Stage
from faults import FAULTS, Fault, see
from gaps import GAPS, Gap
from paths import PATHS, Path, ways
from source import Source

from deployment import Deployment, until
from sources import SOURCES

TESTS = Folder(__file__).parents[1]
# Of the gaps: what was run in those of another edition is not to be mistaken for them.
EDITION = 2
SETTINGS = {
    "core.parallelism": "64",
    "events.commit_timeout": "20",
    "events.directory_rescan_interval": "1",
    # Longer than the API server is unreachable, or the scheduler would take all workers for dead.
    "scheduler.task_instance_heartbeat_timeout": "60",
    # A killed scheduler leaves its queued tasks, which Airflow otherwise looks for every five minutes. One that is
    # only slow must not take itself for dead.
    "scheduler.scheduler_health_check_threshold": "15",
    "scheduler.orphaned_tasks_check_interval": "5",
}


@contextlib.contextmanager
def served(*names: str) -> Iterator[dict[str, str]]:
    """
    Start the servers of the sources, and yield the environment variables by which Airflow finds them.

    A source whose server is not installed has no part in what follows.

    :param names: of the sources; none means all.
    """
    with contextlib.ExitStack() as stack:
        variables = {}
        for source in SOURCES:
            if not names or source.name in names:
                variables.update(stack.enter_context(source.serve()))
        yield variables


def furnish(airflow: Deployment, *, gaps: bool = True) -> None:
    """
    Lay the plugins and DAGs into an Airflow that is not started yet.

    :param gaps: whether its processes can be stopped in them.
    """
    for plugin in (TESTS / "plugins").glob("*.py"):
        shutil.copy(plugin, airflow.plugins)
    if gaps:
        (airflow.home / "gaps").mkdir()
    airflow.add_dags(TESTS / "dags" / "matrix.py")


def endure(stage: Stage, fault: Fault, part: Callable[[Source, Path, Gap], bool] = lambda *_: True) -> list[Cell]:
    """
    Let every wait stand in its gap, let the fault strike all of them at once, and judge each.

    :param part: of which sources, paths and gaps.
    """
    cells = [
        Cell(source, path, gap, fault, stage.folder / fault.id / f"{number}")
        for number, (source, path, gap) in enumerate(ways())
        if gap.place in fault.places and source.is_there and part(source, path, gap)
    ]
    for cell in cells:
        cell.begin(stage, f"{fault.id}-{cell.base.name}")
    try:
        until(
            lambda: all([cell.stands_firm(stage) for cell in cells]),  # noqa: C419 (each of them goes on)
            f"all waits of {fault.name!r} stand in their gaps",
            timeout=90 + 4 * len(cells),
            pause=0.3,
        )
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {', '.join(str(c) for c in cells if not c.stands_firm(stage))}") from error
    see(stage, cells)
    course = fault.course(stage, cells)
    next(course)
    for cell in cells:
        cell.open(fault.clock)
    next(course)
    stage.finish(cells)
    for _ in course:
        raise AssertionError("a fault yields twice")
    for name in [name for name in stage.airflow.components if "@" in name]:
        stage.airflow.components.pop(name).stop()
    for cell in cells:
        cell.judge(stage)
    return cells


def page(all_cells: list[dict[str, Any]]) -> str:
    """
    Write the page.

    :param all_cells: as they were last run; of those that are of an earlier edition, it only says so.
    """
    cells = [cell for cell in all_cells if cell.get("edition") == EDITION]
    verdicts = {(c["source"], c["path"], c["gap"], c["fault"]): "✗" if c["problems"] else "✓" for c in cells}
    bad = [cell for cell in cells if cell["problems"]]
    lines = [
        "# The crash matrix",
        "",
        "Made by `python3 scripts/matrix.py`, not typed: a real Airflow on PostgreSQL, with the scheduler's "
        f"LocalExecutor. **{len(cells)} cells, {len(bad)} not as they should be.**",
        "",
        "A real process of each wait is stopped in a gap between two durable steps, a fault strikes it there, "
        "and it goes on, if it can. A cell is ✓ if then the run succeeds, downstream got one event once, the "
        "inbox has that event for the wait, committed and delivered, the source (asked by a client of its own) "
        "says that this wait and no other committed it, the other event that was sent is free for others, and an "
        "outlet of the task has one event. Where the deadline passes before the event was recorded, the run may "
        "fail instead, and both events must be free. An empty cell has not been run, or cannot be.",
        "",
        "In this Airflow each entry is a request to the inbox of its own, so that one which stands in the API "
        "server does not hold up others; batches of them are what [chaos](what-a-crash-leaves.md) has.",
        "",
        "| fault | what happens | run |",
        "|---|---|---|",
    ]
    for fault in FAULTS:
        runs = Counter(cell["run"] for cell in cells if cell["fault"] == fault.name)
        lines.append(
            f"| {fault.name} | {fault.says} | {'; '.join(f'{n} cells: {run}' for run, n in runs.items())} |"
        )
    were_run = {cell["source"] for cell in cells}
    for source in [source for source in SOURCES if source.name in were_run]:
        for path in [path for path in PATHS if path.name in source.paths]:
            gaps = [gap for gap in GAPS if path.passes(gap, source)]
            lines += ["", f"## {source.name}: {path.name}", "", *_table(source.name, path.name, gaps, verdicts)]
    if bad:
        lines += ["", "## Not as it should be", ""]
        lines += [
            f"- {c['source']}, {c['path']}, {c['gap']}, {c['fault']}: {'; '.join(c['problems'])}" for c in bad
        ]
    if earlier := [cell for cell in all_cells if cell.get("edition") != EDITION]:
        lines += ["", *_earlier(earlier)]
    return "\n".join([*lines, ""])


def _earlier(cells: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Not run again",
        "",
        "These sources were run in the gaps of 0.1, in which the source alone decided whose an "
        "event is, and workers recorded, too. They say nothing of the tables above. Since then they are tested by "
        "the suite of all sources and by [chaos](what-a-crash-leaves.md), and not by this matrix.",
        "",
        "| source | cells | not as they should be | run |",
        "|---|---|---|---|",
    ]
    for source in dict.fromkeys(cell["source"] for cell in cells):
        of_it = [cell for cell in cells if cell["source"] == source]
        bad, runs = sum(bool(cell["problems"]) for cell in of_it), sorted({cell["run"] for cell in of_it})
        lines.append(f"| {source} | {len(of_it)} | {bad} | {'; '.join(runs)} |")
    return lines


def _table(source: str, path: str, gaps: list[Gap], verdicts: dict[tuple[str, str, str, str], str]) -> list[str]:
    return [
        "| where | durable there | " + " | ".join(fault.name for fault in FAULTS) + " |",
        "|---|---" + "|:-:" * len(FAULTS) + "|",
        *[
            f"| {gap.place}: {gap.name} | {gap.durable} | "
            + " | ".join(verdicts.get((source, path, gap.id, fault.name), "") for fault in FAULTS)
            + " |"
            for gap in gaps
        ],
    ]
