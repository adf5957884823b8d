"""
The part of the crash matrix that is run each time; ``python3 scripts/matrix.py`` runs all of it.

Every gap under kill -9 (of sources that are servers, on the path that most waits on them take), and those of one
source under what else happens daily.
"""

from __future__ import annotations

import pytest
from brokers import BROKERS
from faults import FAULTS
from proof import endure

NAMED = {fault.name: fault for fault in FAULTS}


def daily(source, path):
    return source not in BROKERS or path.name == source.paths[0]


def of_directory(source, path):
    return source.name == "directory"


@pytest.mark.parametrize(
    ("fault", "part"),
    [("killed", daily), ("told to end", of_directory), ("stood still", of_directory), ("cleared", of_directory)],
)
def test_every_gap(stage, fault, part):
    cells = endure(stage, NAMED[fault], part)
    assert len(cells) > 20
    assert [f"{cell}: {'; '.join(cell.problems)}" for cell in cells if cell.problems] == []
