"""
The inner loop, on an editable install: ``nox -s dev`` once, then ``nox``. CONTRIBUTING.md says more.

All sessions but ``ci`` share one environment, which editors use, too: installing Airflow for each takes too long.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "unit"]
nox.options.default_venv_backend = "none"

_DEV = Path(__file__).parent / ".venv" / "dev"
_QUICK = ("tests/unit", "--quick", "-n", "logical", "--maxprocesses", "4")


def _run(session: nox.Session, tool: str, *arguments: str, **environment: str) -> None:
    if not (_DEV / "bin" / tool).exists():
        session.error(f"there is no {tool} in {_DEV}: run nox -s dev")
    session.run(str(_DEV / "bin" / tool), *arguments, external=True, env=environment)


@nox.session
def dev(session: nox.Session) -> None:
    """
    Make .venv/dev: an editable install that editors, mypy and pyright can follow, and all tools.

    Again, it links new and renamed files in a few seconds, and installs only where setup.cfg or constraints.txt
    have changed.
    """
    stamp = _DEV / "installed"
    wanted = b"".join(Path(file).read_bytes() for file in ("setup.cfg", "constraints.txt"))
    if stamp.exists() and stamp.read_bytes() == wanted:
        how = ["--no-deps", "--no-build-isolation", "-e", "."]
    else:
        session.run("python3", "-m", "venv", str(_DEV), external=True)
        how = ["-c", "constraints.txt", "-e", ".[test,docs]"]
    quiet = ("--quiet", "--disable-pip-version-check")
    _run(session, "pip", "install", *quiet, *how, "--config-settings", "editable_mode=strict")
    stamp.write_bytes(wanted)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and imports."""
    _run(session, "ruff", "check", ".")
    _run(session, "ruff", "format", "--check", ".")
    _run(session, "lint-imports", "--no-logo")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strict."""
    _run(session, "mypy", "-p", "airflow_events")


@nox.session
def unit(session: nox.Session) -> None:
    """Run the quick tests, or what stands after ``--`` for pytest."""
    _run(session, "python", "-m", "pytest", *_QUICK, *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into build/site, strict."""
    _run(session, "python", "-m", "mkdocs", "build", "--strict", NO_MKDOCS_2_WARNING="1")


@nox.session
def ci(session: nox.Session) -> None:
    """Check the built wheel as every change is checked."""
    session.run(".ci/run", *session.posargs, external=True)
