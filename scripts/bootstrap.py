"""A virtual environment with the project's wheel in it, made with nothing but Python and pip."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
_NETWORK = "is there a network and a package index?"


def fail(message: str) -> NoReturn:
    """End with one line."""
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def run_inside(extras: str = "") -> None:
    """
    Continue the calling script inside of the project's virtual environment, which is made if need be.

    Returns at once if it runs there already. The project's own wheel is built each time; what it depends
    on is installed again when ``setup.cfg`` or ``constraints.txt`` has changed. From then on SIGTERM does what
    Ctrl-C does, so that what the script starts ends with it.

    :param extras: of the package, as pip writes them: ``[test]``.
    """
    venv = ROOT / ".venv" / f"py{sys.version_info.major}.{sys.version_info.minor}"
    if Path(sys.prefix) == venv:
        signal.signal(signal.SIGTERM, _interrupt)
        return
    if sys.version_info < (3, 10):  # noqa: UP036 (whoever has an older one learns it here)
        fail(f"needs Python 3.10 or later; {sys.executable} is {sys.version.split()[0]}")
    python = venv / "bin" / "python"
    if not python.exists():
        print(f"Making a virtual environment in {venv.relative_to(ROOT)}", flush=True)
        problem = "Python's venv is missing or broken (Debian: apt install python3-venv)"
        _run(problem, sys.executable, "-m", "venv", "--clear", str(venv))
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = _build(pip)
    constraints = ROOT / "constraints.txt"
    wanted = hashlib.sha256((ROOT / "setup.cfg").read_bytes() + constraints.read_bytes()).hexdigest()
    stamp = venv / f"installed{extras}"
    if not stamp.exists() or stamp.read_text() != wanted:
        print("Installing Airflow and the provider's wheel (a few minutes the first time)", flush=True)
        _run(f"pip could not install; {_NETWORK}", *pip, "install", "-c", str(constraints), f"{wheel}{extras}")
        stamp.write_text(wanted)
    _run("pip could not install the wheel", *pip, "install", "--no-deps", "--force-reinstall", str(wheel))
    os.execv(python, [str(python), *sys.argv])


def _interrupt(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice, and to end takes a while
    raise KeyboardInterrupt


def _build(pip: list[str]) -> Path:
    """Build the wheel from a copy of what belongs to it, so that the checkout stays as it is."""
    source, built = ROOT / ".venv" / "source", ROOT / ".venv" / "wheel"
    shutil.rmtree(built, ignore_errors=True)
    copy_source(source)
    _run(f"pip could not build the wheel; {_NETWORK}", *pip, "wheel", "--no-deps", "-w", str(built), str(source))
    [wheel] = built.glob("*.whl")
    return wheel


def copy_source(folder: Path) -> None:
    """Make ``folder`` again, with all that the package is built from."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("provider", "listeners", "triggers", "operators", "example_dags"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)


def _run(problem: str, *command: str) -> None:
    """Run a command without its output; should it fail, end with ``problem`` and what it said last."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    if done.returncode:
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")] or said or [f"exit code {done.returncode}"]
        fail(f"{problem} ({errors[-1]})")
