#!/usr/bin/env python3
"""
Requests that nobody would make on purpose: python3 scripts/fuzz.py [--minutes 10].

Makes them to an API server of its own, in this process, other ones each time; the tests make the same few each
time. Ends with the first that is answered with 500, or not as it is described, or that is accepted and does not
come back, and prints it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import bootstrap


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whatever is sent to the routes is answered, and not by 500.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--examples", type=int, default=100, help="of each route in a row (default: 100)")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    bootstrap.run_inside("[test]")
    sys.path.insert(0, str(bootstrap.ROOT / "tests" / "plugins"))
    with tempfile.TemporaryDirectory(prefix="airflow-events-fuzz-") as folder:
        # Airflow reads these as it is imported: it is one of its own, with nobody's plugins in it.
        os.environ |= {"AIRFLOW_HOME": folder, "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
        search(Path(folder), time.monotonic() + options.minutes * 60, options.examples)
    return 0


def search(folder: Path, until: float, examples: int) -> None:
    """Make requests until that time, in seconds of the monotonic clock."""
    import nasty
    from in_process import ROUTES, in_process

    logging.disable(logging.WARNING)
    rounds = 0
    with in_process(folder) as server:
        while time.monotonic() < until:
            for make, routes in ((nasty.with_any_body, ROUTES), (nasty.as_described, nasty.DESCRIBED)):
                for method, path in routes:
                    if time.monotonic() < until:
                        make(server, method, path, examples=examples, repeatable=False)
            rounds += 1
            print(f"{rounds} rounds of {len(ROUTES)} routes", flush=True)


if __name__ == "__main__":
    sys.exit(main())
