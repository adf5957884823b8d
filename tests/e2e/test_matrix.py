"""
The part of the crash matrix that is run each time; ``python3 scripts/matrix.py`` runs all of it.

The sources that need no server, in every gap that a wait without workers comes by, and in those that only
workers have: behind its start a wait that a worker began goes the same way. Under the faults that have most to do
with what is durable where: a process dies, the inbox cannot be asked, its answer is lost, and a process goes on
that the wait has outlived.
"""

from __future__ import annotations

import pytest
from brokers import BROKERS
from faults import FAULTS
from paths import PATHS
from proof import endure

NAMED = {fault.name: fault for fault in FAULTS}


def once(source, path, gap):
    has_a_twin = path is not PATHS[0] and PATHS[0].passes(gap, source)
    return source not in BROKERS and not has_a_twin


def in_triggerer_once(source, path, gap):
    # Workers are not to be taken for dead by the scheduler meanwhile.
    return gap.place == "triggerer" and once(source, path, gap)


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        ("killed", once),
        ("API server killed", once),
        ("no API server", in_triggerer_once),
        ("stood still", in_triggerer_once),
    ],
)
def test_every_gap(stage, fault, part):
    cells = endure(stage, NAMED[fault], part)
    assert len(cells) > 20
    assert [f"{cell}: {'; '.join(cell.problems)}" for cell in cells if cell.problems] == []
