#!/usr/bin/env python3
"""
Run tests with the oldest clients that are allowed: python3 scripts/oldest.py [arguments of pytest].

They are those that ``setup.cfg`` names in the extras of the sources, with the versions that stand there; Airflow
and its providers stay as they are. They lie in a folder beside the environment, which Python looks through first.
Without arguments all that the tests of every source have in common is run.
"""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import bootstrap

# One wait, several, and a killed server, of each source: a part of every check.
QUICK = (
    "tests/sources/test_consume.py",
    *("-n", "2", "-k", "coordinates or commit_in_any_order or is_killed_while or of_another_type"),
)
COMMON = ("tests/sources/test_consume.py", "tests/sources/test_watch.py", "tests/sources/test_starts.py")
# Extras that are not for a source.
_OTHERS = ("benchmark", "docs", "kafka-registry", "release", "test")
# The tests ask SQS by boto3, of which a botocore takes one version.
_WITH = {"aiobotocore": "aiobotocore[boto3]"}


def oldest() -> list[str]:
    """Return the oldest clients, as pip takes them: ``redis==5.1``."""
    setup = configparser.ConfigParser()
    setup.read(bootstrap.ROOT / "setup.cfg")
    found: dict[str, str] = {}
    for extra, wanted in setup["options.extras_require"].items():
        for line in wanted.split() if extra not in _OTHERS else ():
            name, version = re.fullmatch(r"([^>]+)>=(.+)", line).groups()  # type: ignore[union-attr]
            if not name.startswith("apache-airflow"):
                found[name] = version
    return [f"{_WITH.get(name, name)}=={version}" for name, version in found.items()]


def install() -> Path:
    """Return a folder with the oldest clients, which is made if need be."""
    folder = Path(sys.prefix) / "oldest"
    wanted, stamp = oldest(), folder / "installed"
    if not stamp.exists() or stamp.read_text().split() != wanted:
        print(f"Installing the oldest clients: {' '.join(wanted)}", flush=True)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--upgrade"]
        # What they conflict with in the environment is not used beside them.
        done = subprocess.run([*pip, "--target", str(folder), *wanted], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            bootstrap.fail(f"pip could not install the oldest clients: {done.stderr.strip()[-500:]}")
        stamp.write_text("\n".join(wanted))
    return folder


def environment() -> dict[str, str]:
    """Return the environment of a process that imports the oldest clients."""
    others = [path for path in [os.environ.get("PYTHONPATH")] if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(install()), *others])}


if __name__ == "__main__":
    bootstrap.run_inside("[test]")
    project = ["-c", str(bootstrap.ROOT / "pyproject.toml"), "--rootdir", str(bootstrap.ROOT)]
    arguments = sys.argv[1:] or [*COMMON, "-n", "2"]
    pytest = [sys.executable, "-m", "pytest", *project, *arguments]
    sys.exit(subprocess.run(pytest, cwd=bootstrap.ROOT, env=environment()).returncode)
