#!/usr/bin/env python3
"""
Run the tests against the built wheel: python3 scripts/test.py [arguments of pytest].

Without arguments the quick ones come first, then those of the sources (which mostly wait, so several at once),
then those with a real Airflow. With arguments, pytest gets them as they are.
"""

from __future__ import annotations

import subprocess
import sys

import bootstrap

STAGES = (
    ["tests/unit", "tests/model"],
    ["tests/sources", "-n", "4", "--dist", "loadgroup"],
    ["tests/chaos", "tests/e2e"],
)

if __name__ == "__main__":
    bootstrap.run_inside("[test]")
    import pytest

    project = ["-c", str(bootstrap.ROOT / "pyproject.toml"), "--rootdir", str(bootstrap.ROOT), "--durations=10"]
    if len(sys.argv) > 1:
        sys.exit(pytest.main([*project, *sys.argv[1:]]))
    for stage in STAGES:
        # Each in a process of its own, as if it were the only one.
        done = subprocess.run([sys.executable, "-m", "pytest", *project, *stage], cwd=bootstrap.ROOT)
        if done.returncode:
            sys.exit(done.returncode)
