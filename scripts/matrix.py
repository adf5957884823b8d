#!/usr/bin/env python3
"""
The crash matrix: python3 scripts/matrix.py [--faults killed "told to end" ...].

Starts an Airflow of its own on PostgreSQL, stops a process of each wait in every gap between two durable steps,
lets every fault strike it there, and judges by the source what became of the event. Writes docs/crash-matrix.md,
and beside it the results of each fault as it was last run.
(With SQLite, Airflow's API server stands still when so many write at once.)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shutil
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bootstrap

DOCS = bootstrap.ROOT / "docs"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Every gap of every wait under every fault.")
    parser.add_argument(
        "--faults", nargs="+", metavar="FAULT", help="only these; the page keeps what it says of the others"
    )
    parser.add_argument("--sources", nargs="+", metavar="SOURCE", default=[], help="only these; likewise")
    parser.add_argument("--database", choices=("postgres", "mysql"), default="postgres")
    parser.add_argument("--keep", action="store_true", help="keep the folder of its Airflow")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    bootstrap.run_inside("[test]")
    tests = bootstrap.ROOT / "tests"
    sys.path[:0] = [str(tests / "plugins"), str(tests / "matrix"), str(tests / "sources")]
    from cells import Stage
    from faults import FAULTS
    from proof import SETTINGS, endure, furnish, served

    from databases import missing, serve
    from deployment import Deployment

    if problem := missing(options.database):
        bootstrap.fail(problem)
    known = {fault.name: fault for fault in FAULTS}
    if unknown := set(options.faults or ()) - known.keys():
        bootstrap.fail(f"there is no fault {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    home = Path(tempfile.mkdtemp(prefix="airflow-events-matrix-"))
    all_good = True
    with contextlib.ExitStack() as stack:
        if options.keep:
            print(f"kept: {home}")
        else:
            stack.callback(shutil.rmtree, home, ignore_errors=True)
        database = stack.enter_context(serve(options.database))
        assert database is not None
        variables = stack.enter_context(served(*options.sources))
        airflow = stack.enter_context(
            Deployment(home, database=database.url, settings=SETTINGS, variables=variables)
        )
        airflow.prepare()
        furnish(airflow)
        airflow.start()
        airflow.wait_for_dags("directory_no_worker")
        stage = Stage(airflow, database, home / "cells")
        for fault in [known[name] for name in options.faults or known]:
            struck = time.time()
            cells = []
            for part in parts(options.sources):
                cells += endure(stage, fault, lambda source, *_, part=part: source.name in part)
            bad = [cell for cell in cells if cell.problems]
            print(f"{fault.name}: {len(cells)} cells, {len(bad)} bad, {time.time() - struck:.0f} s", flush=True)
            for cell in bad:
                print(f"  {cell}: {'; '.join(cell.problems)}", flush=True)
            write([cell.as_dict() for cell in cells])
            all_good = all_good and not bad
    return 0 if all_good else 1


def parts(names: list[str]) -> list[list[str]]:
    """Divide the sources so that the executor has room for all workers that stand in gaps at once."""
    from brokers import BROKERS

    from sources import SOURCES

    servers = [source.name for source in BROKERS]
    others = [source.name for source in SOURCES if source.name not in servers]
    divided = [others, *(servers[at : at + 2] for at in range(0, len(servers), 2))]
    chosen = [[name for name in part if not names or name in names] for part in divided]
    return [part for part in chosen if part]


def write(cells: list[dict[str, Any]]) -> None:
    """Put the results of one fault beside all others, and write the page of all."""
    from proof import EDITION, page

    from sources import SOURCES

    store = DOCS / "crash-matrix.json"
    run = f"{date.today().isoformat()}, Airflow {version('apache-airflow')}, Python {platform.python_version()}"
    known = json.loads(store.read_text()) if store.exists() else []
    # Of a source that is run again, what it had in gaps that are no more is dropped.
    outlived = {cell["source"] for cell in cells} | (
        {cell["source"] for cell in known} - {s.name for s in SOURCES}
    )
    kept = [cell for cell in known if cell.get("edition") == EDITION or cell["source"] not in outlived]
    results = {tuple(cell[name] for name in ("fault", "source", "path", "gap")): cell for cell in kept}
    for cell in cells:
        key = tuple(cell[name] for name in ("fault", "source", "path", "gap"))
        results[key] = {**cell, "edition": EDITION, "run": run}
    lines = ",\n".join(json.dumps(cell) for _, cell in sorted(results.items()))
    store.write_text(f"[\n{lines}\n]\n")
    (DOCS / "crash-matrix.md").write_text(page(list(results.values())))


if __name__ == "__main__":
    sys.exit(main())
