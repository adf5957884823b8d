"""Ray's ``workflow.wait_for_event``, from where ours comes, in a virtual environment of its own."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from parts import Part, Rows, Stage
from parts.timers import NAMES, due_at_once, spread

ROOT = Path(__file__).resolve().parents[2]
# The last that had events was 2.47; 2.9.3 is what its users were pointed away from. It runs with these.
RAY = ("ray==2.9.3", "pyarrow<16", "numpy<2", "uvloop==0.19.0", "psutil")
LABEL = "Ray 2.9.3: `workflow.wait_for_event`"
PYTHON = (3, 11)
# Each is a process of 142 MB.
MOST = 8
# Seconds: Ray takes a while to start a process for each wait.
AHEAD = 90
SETTLED = 10


def measure(stage: Stage) -> Rows:
    python = environment()
    count = min(stage.options.at_once, MOST)
    ours: dict[str, Any] = {"name": "ours", "label": NAMES["ours"], "running": []}
    ray: dict[str, Any] = {"name": "ray", "label": LABEL, "running": [], "pss": [], "processes": [], "slots": []}
    for turn in range(stage.options.repeat):
        ours["running"] += due_at_once(stage.airflow, "ours", count, f"ray{turn}")
        found = run(python, count)
        ray["running"] += [round(seconds, 3) for seconds in found["running"]]
        ray["pss"] += found["pss"]
        ray["processes"].append(found["processes"] / count)
        ray["slots"].append(found["slots"] / count)
    return [{**row, "rounds": stage.options.repeat} for row in (ours, ray)]


def environment() -> Path:
    """Make the environment if it is not there, and return its Python."""
    import bootstrap

    folder = ROOT / ".venv" / "ray"
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    if not stamp.exists() or stamp.read_text() != " ".join(RAY):
        base = shutil.which(f"python{PYTHON[0]}.{PYTHON[1]}") if sys.version_info[:2] != PYTHON else sys.executable
        if base is None:
            bootstrap.fail("Ray 2.9.3 needs Python 3.11, and there is none on PATH")
        print("Installing Ray in a virtual environment of its own", flush=True)
        subprocess.run([base, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "--quiet", "install", *RAY], check=True)
        stamp.write_text(" ".join(RAY))
    return python


def run(python: Path, count: int) -> dict[str, Any]:
    """Let so many workflows wait in a Ray of their own."""
    folder = tempfile.mkdtemp(prefix="airflow-events-ray-")
    script = Path(__file__).with_name("in_ray.py")
    try:
        done = subprocess.run(
            [str(python), str(script), folder, str(count), str(AHEAD), str(SETTLED)],
            capture_output=True, text=True, timeout=AHEAD + 240,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"Ray ended with {done.returncode}:\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(rows: Rows) -> str:
    ours, ray = rows
    return "\n".join(
        [
            "| timer | due to the next task running | processes per wait | slots per wait | memory of each |",
            "|---|---|---|---|---|",
            f"| {ours['label']} | {spread(ours['running'])} | 0 | 0 | |",
            f"| {ray['label']} | {spread(ray['running'])} | {statistics.mean(ray['processes']):.2f} "
            f"| {statistics.mean(ray['slots']):.2f} | {statistics.median(ray['pss']) / 1000:.0f} MB |",
            "",
            f"{ours['rounds']} rounds by turns, {len(ours['running']) // ours['rounds']} waits due at once "
            "in each; a slot is a CPU that Ray, or Airflow's executor, has to give. PSS after a collection.",
        ]
    )


PARTS = {"ray": Part(measure, table, ("ours_1",))}
