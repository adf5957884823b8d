#!/usr/bin/env python3
"""
Run the tests against the built wheel: python3 scripts/test.py [--release | arguments of pytest].

Without arguments the quick ones come first. The others mostly wait, for a source or for Airflow's loops, so two
run beside one another: those with a real Airflow, and those of the sources, some of these again with the oldest
clients, after which come those that kill much of theirs, and some more with a real Airflow. Three at once starve
each other on two processors. What a part says is printed when it has ended. What is marked as a variant is left
out: with ``--release`` it is run too, and ten times as many schedules of the model. With other arguments, pytest
gets them as they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO

import bootstrap
import oldest

RELEASE = "--release"
# Each kills much of its Airflow, or starts one of its own.
WITH_FAULTS = ("tests/chaos", "tests/e2e/test_matrix.py", "tests/e2e/test_crashes.py")
# So many of the others that both lanes take as long.
OF_OTHER_LANE = tuple(f"tests/e2e/test_{name}.py" for name in ("starts", "sends", "airflow"))


@dataclass
class Part:
    """Tests that have a pytest of their own, as if they were the only ones."""

    name: str
    arguments: tuple[str, ...]
    environment: Callable[[], dict[str, str]] | None = None
    _process: subprocess.Popen[bytes] | None = None
    _said: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    _began: float = 0

    def begin(self, pytest: list[str], *, quietly: bool = True) -> None:
        print(f"== tests: {self.name}: begun", flush=True)
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            [*pytest, *self.arguments],
            cwd=bootstrap.ROOT,
            env=None if self.environment is None else self.environment(),
            stdout=self._said if quietly else None,
            stderr=subprocess.STDOUT if quietly else None,
        )

    @property
    def is_done(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None

    def end(self) -> int:
        """Wait for it, print what it said, and return its exit code."""
        assert self._process is not None
        code = self._process.wait()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace")
        minutes, seconds = divmod(round(time.monotonic() - self._began), 60)
        how = "passed" if code == 0 else f"FAILED (exit code {code})"
        print(f"{said}== tests: {self.name}: {how}, {minutes} min {seconds:02} s", flush=True)
        return code

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


# The model first: its tests are the longest, and one that begins last leaves the other processors idle.
QUICK = Part("quick", ("tests/model", "tests/unit", "-n", "logical", "--maxprocesses", "4"))
SOURCES = Part("sources", ("tests/sources", "-n", "3"))
AIRFLOW = Part("a real Airflow", ("tests/e2e", *(f"--ignore={path}" for path in (*WITH_FAULTS, *OF_OTHER_LANE))))
STARTS = Part("a real Airflow: what starts runs, and from one DAG to another", OF_OTHER_LANE)
FAULTS = Part("a real Airflow under faults", WITH_FAULTS)
OLDEST = Part("sources, with the oldest clients", oldest.QUICK, oldest.environment)
# Those of a lane run one after another.
LANES = ((AIRFLOW,), (SOURCES, OLDEST, FAULTS, STARTS))


def run_all(pytest: list[str]) -> int:
    """Run all parts, say in the end which have failed, and return the exit code of the first of these."""
    QUICK.begin(pytest, quietly=False)
    if code := QUICK.end():
        return code
    lanes, failed = [list(lane) for lane in LANES], {}
    try:
        for first, *_ in lanes:
            first.begin(pytest)
        while lanes:
            for lane in [lane for lane in lanes if lane[0].is_done]:
                part = lane.pop(0)
                if code := part.end():
                    failed[part.name] = code
                if lane:
                    lane[0].begin(pytest)
            lanes = [lane for lane in lanes if lane]
            time.sleep(0.5)
    finally:
        for part in [part for lane in lanes for part in lane]:
            part.stop()
    print(f"== tests: {'FAILED: ' + ', '.join(failed) if failed else 'all passed'}", flush=True)
    return next(iter(failed.values()), 0)


if __name__ == "__main__":
    bootstrap.run_inside("[test]")
    project = ["-c", str(bootstrap.ROOT / "pyproject.toml"), "--rootdir", str(bootstrap.ROOT), "--durations=25"]
    if sys.argv[1:] == [RELEASE]:
        os.environ["MODEL_EXAMPLES"] = "10"
    elif len(sys.argv) > 1:
        import pytest

        sys.exit(pytest.main([*project, *sys.argv[1:]]))
    else:
        project += ["-m", "not release"]
    sys.exit(run_all([sys.executable, "-m", "pytest", *project]))
