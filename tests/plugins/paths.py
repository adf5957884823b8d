"""The ways that a wait can take through triggerer and workers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gaps import GAPS, Gap
from source import Source

# Seconds; of the waits that have one.
DEADLINE = 180.0


@dataclass(frozen=True)
class Path:
    """
    Where a wait starts, and whether a worker ends it.

    :param has_outlet: of its task, whose events tell how often it ended.
    """

    name: str
    starts_on_worker: bool = False
    ends_on_worker: bool = False
    has_outlet: bool = False

    def passes(self, gap: Gap, source: Source) -> bool:
        """Whether a wait that goes this way comes by the gap."""
        if gap.commits and not source.commits:
            return False
        if gap.only != source.name and (gap.only or source.has_gaps_of_its_own):
            return False
        if gap.name == "deferring":
            return self.starts_on_worker
        if gap.name == "ended":
            return not self.ends_on_worker
        return gap.place != "worker" or self.ends_on_worker


PATHS = (
    Path("no worker", has_outlet=True),
    Path("starts on a worker", starts_on_worker=True),
    Path("ends on a worker", ends_on_worker=True),
)


def dag_id(source: Source, path: Path, timeout: float | None) -> str:
    """Name the DAG of a source and a path."""
    words = f"{source.name} {path.name} {'with a deadline' if timeout else ''}"
    return re.sub(r"\W+", "_", words).strip("_")


def ways() -> list[tuple[Source, Path, Gap]]:
    """List every gap of every path of every source."""
    from sources import SOURCES

    return [
        (source, path, gap)
        for source in SOURCES
        for path in PATHS
        if path.name in source.paths
        for gap in GAPS
        if path.passes(gap, source)
    ]
