"""An API server for each file of tests of the doors, whose settings others do not see."""

from __future__ import annotations

import pytest
from in_process import in_process


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with in_process(tmp_path_factory.mktemp("doors")) as server:
        yield server
        server.session.rollback()


@pytest.fixture(autouse=True)
def nothing_is_left_open(server):
    """What a test has asked for last keeps nobody else from writing."""
    yield
    server.session.rollback()
