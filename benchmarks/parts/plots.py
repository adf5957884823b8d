"""The plots of docs/benchmarks.md, as SVG and PNG."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from parts import one
from parts.timers import NAMES

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
OURS, OTHERS, PALE = "#0b6e99", "#6b7280", "#d1d5db"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": OTHERS,
    "xtick.color": OTHERS,
    "ytick.left": False,
    "svg.hashsalt": "benchmarks",  # so that the same figures make the same file
    "svg.fonttype": "path",
    "figure.facecolor": "white",
}


def draw(results: dict[str, Any]) -> list[str]:
    """Draw what was measured, and return the names of the images."""
    import matplotlib as mpl

    mpl.use("Agg")
    drawn = []
    with mpl.rc_context(STYLE):
        if "one" in results:
            drawn += _save(_one(results), "benchmark-one")
        if "memory" in results:
            drawn += _save(_memory(results), "benchmark-memory")
    return drawn


def _one(results: dict[str, Any]) -> Any:
    """Each wait a dot: when it succeeded, and when what follows it ran."""
    from matplotlib import pyplot

    rows = [(plain(one.NAMES[row["name"]]), row) for row in results["one"]["rows"]]
    figure, axes = pyplot.subplots(figsize=(8, 0.7 + 0.8 * len(rows)), layout="constrained")
    for number, (label, row) in enumerate(rows):
        color = OURS if "ours: " in label else OTHERS
        for offset, key, shown in ((-0.17, "success", "wait succeeded"), (0.17, "running", "next task runs")):
            if values := row.get(key):
                middle = statistics.median(values)
                y = number + offset
                axes.plot(values, [y] * len(values), "o", color=color, alpha=0.35, markersize=5, markeredgewidth=0)
                axes.plot([middle] * 2, [y - 0.13, y + 0.13], color=color, linewidth=2)
                text = f"{middle:.2f} s   {shown}"
                axes.annotate(text, (max(values), y), (7, 0), textcoords="offset points", va="center", color=color)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(max(row["running"]) for _, row in rows))
    axes.set_xlabel("seconds after the event (each dot is a wait, the bar their median)")
    axes.grid(axis="x", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure


def _memory(results: dict[str, Any]) -> Any:
    """What a wait takes of the triggerer's two processes; or, in Ray, of its own."""
    from matplotlib import pyplot

    bars = [
        (
            f"{plain(NAMES[row['name']])}\n{row['waits']:,} waits, DAGs of {row['in_dag']} tasks",
            [max(row[part] / row["waits"], 0.0) for part in ("runner", "supervisor")],
        )
        for row in results["memory"]["rows"]
    ]
    bars += [
        (f"{plain(row['label'])}\n{len(row['running'])} waits, a process each", [statistics.mean(row["pss"]), 0.0])
        for row in results.get("ray", {}).get("rows", ())
        if row["name"] == "ray"
    ]
    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.55 * len(bars)), layout="constrained")
    # A logarithmic axis has no stacked bars: a dot for each process.
    for number, (label, (runner, supervisor)) in enumerate(bars):
        color = OURS if label.startswith("ours") else OTHERS
        total = runner + supervisor
        axes.plot([1, total], [number] * 2, color=color, linewidth=1.2, alpha=0.5)
        axes.plot([total], [number], "o", color=color, markersize=7)
        axes.annotate(
            size(total) + (f"   ({size(runner)} of it in the runner)" if supervisor else ""),
            (total, number), (8, 0), textcoords="offset points", va="center", color=color,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(10, 10 * max(sum(values) for _, values in bars) * 10)
    axes.set_xticks([10, 100, 1000, 10_000, 100_000], ["10 KB", "100 KB", "1 MB", "10 MB", "100 MB"])
    axes.minorticks_off()
    axes.set_xlabel("memory for each open wait (PSS; logarithmic)")
    axes.grid(axis="x", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure


def size(kilobytes: float) -> str:
    for unit, of_it in (("GB", 1e6), ("MB", 1e3)):
        if kilobytes >= of_it:
            return f"{kilobytes / of_it:.1f} {unit}"
    return f"{kilobytes:.0f} KB"


def plain(name: str) -> str:
    """Take Markdown's quotes off a name, and break it where it is long."""
    return re.sub(r", (start_from)", r",\n\1", name.replace("`", "")).replace(": a ", ":\na ")


def _save(figure: Any, name: str) -> list[str]:
    from matplotlib import pyplot

    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    figure.savefig(IMAGES / f"{name}.png", dpi=150, metadata={"Software": None})
    pyplot.close(figure)
    return [f"{name}.svg", f"{name}.png"]
