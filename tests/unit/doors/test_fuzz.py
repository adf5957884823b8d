"""The same requests each time, bounded; `scripts/fuzz.py` makes others, for as long as it is told to."""

from __future__ import annotations

import nasty
import pytest
from in_process import ROUTES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("method", "path"), nasty.DESCRIBED)
def test_requests_as_they_are_described_and_not(server, method, path):
    nasty.as_described(server, method, path, examples=5)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_bodies_that_are_no_json_or_nasty(server, method, path):
    nasty.with_any_body(server, method, path, examples=25 if method == "POST" else 3)
