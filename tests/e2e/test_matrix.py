"""
The part of the crash matrix that is run each time; ``python3 scripts/matrix.py`` runs all of it.

Every gap of every source under kill -9: of the directory and the timer on every path, of sources that are servers
on the path that most waits on them take. Every gap of the directory under what else happens daily.

A path that starts on a worker may have a twin that does not, and ends where it ends. Behind their start they come
by the same gaps, and what differs is where the next try looks for the record first. The directory shows that under
kill -9 and a clear; for other sources, and under SIGTERM and SIGSTOP, of such a path only its start is run each
time.
"""

from __future__ import annotations

import pytest
from brokers import BROKERS
from faults import FAULTS
from paths import PATHS
from proof import endure

NAMED = {fault.name: fault for fault in FAULTS}


def repeats_its_twin(source, path, gap):
    twins = [
        other
        for other in PATHS
        if other.name in source.paths
        and not other.starts_on_worker
        and other.ends_on_worker == path.ends_on_worker
    ]
    return path.starts_on_worker and gap.name != "deferring" and bool(twins)


def of_each_source(source, path, gap):
    if source in BROKERS:
        return path.name == source.paths[0]
    return source.name in ("directory", "timer", "timer to come") or not repeats_its_twin(source, path, gap)


def of_directory(source, path, gap):
    return source.name == "directory"


def of_directory_once(source, path, gap):
    return of_directory(source, path, gap) and not repeats_its_twin(source, path, gap)


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        ("killed", of_each_source),
        ("told to end", of_directory_once),
        ("stood still", of_directory_once),
        ("cleared", of_directory),
    ],
)
def test_every_gap(stage, fault, part):
    cells = endure(stage, NAMED[fault], part)
    assert len(cells) > 20
    assert [f"{cell}: {'; '.join(cell.problems)}" for cell in cells if cell.problems] == []
