"""What was measured, in docs/benchmarks.json, and the pages that are made of it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from parts import Part, Rows, sizing

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = DOCS / "benchmarks.json"
PAGES = (DOCS / "benchmarks.md", DOCS / "sizing.md")


def kept() -> dict[str, Any]:
    """Return what was measured last, by part: ``rows``, and ``run``, which says when and where."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def keep(part: str, rows: Rows, note: str) -> None:
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release().split('-')[0]}"
    run = (
        f"{date.today().isoformat()}, Airflow {version('apache-airflow')}, standard provider "
        f"{version('apache-airflow-providers-standard')}, Python {platform.python_version()}, {machine}"
    )
    results = kept()
    results[part] = {"run": run + (f"; {note}" if note else ""), "rows": rows}
    RESULTS.write_text("{\n" + ",\n".join(_lines(part, results[part]) for part in results) + "\n}\n")


def _lines(part: str, result: dict[str, Any]) -> str:
    rows = ",\n   ".join(json.dumps(row) for row in result["rows"])
    return f' {json.dumps(part)}: {{\n  "run": {json.dumps(result["run"])},\n  "rows": [\n   {rows}\n  ]\n }}'


def made(parts: Mapping[str, Part]) -> dict[Path, str]:
    """
    Return the pages' texts with the tables of what was measured in place of those that are there.

    A table stands between its markers, ``<!-- name -->``; one that was never measured stays as it is.
    """
    results = kept()
    contents = {}
    for name, result in results.items():
        shown = [parts[name].table(result["rows"]), f"Run on {result['run']}."]
        if parts[name].plot:
            shown.insert(0, f"![{parts[name].plot}](images/benchmark-{name}.svg)")
        contents[name] = "\n\n".join(shown)
    contents["projection"] = sizing.projection(results)
    texts = {page: page.read_text() for page in PAGES}
    for part, content in contents.items():
        page = next((page for page, text in texts.items() if f"<!-- {part} -->\n" in text), None)
        assert page, f"no page has a place for {part!r}"
        texts[page] = between(texts[page], part, content)
    return texts


def between(text: str, name: str, content: str) -> str:
    """Put ``content`` between the markers ``name``."""
    before, begin, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    assert begin and end, f"no place for {name!r}"
    return f"{before}{begin}{content}\n{end}{after}"
