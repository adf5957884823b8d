"""
The part of the crash matrix that is run each time; ``python3 scripts/matrix.py`` runs all of it.

Every gap of every path of every source under kill -9, and those of one source under what else happens daily.
"""

from __future__ import annotations

import pytest
from faults import FAULTS
from proof import endure

NAMED = {fault.name: fault for fault in FAULTS}


@pytest.mark.parametrize(
    ("fault", "only"),
    [("killed", []), ("told to end", ["directory"]), ("stood still", ["directory"]), ("cleared", ["directory"])],
)
def test_every_gap(stage, fault, only):
    cells = endure(stage, NAMED[fault], only)
    assert len(cells) > 20
    assert [f"{cell}: {'; '.join(cell.problems)}" for cell in cells if cell.problems] == []
