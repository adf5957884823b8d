from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

import browser
from databases import NAMES

TESTS = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption(
        "--database",
        choices=NAMES,
        default="postgres",
        help="Airflow's metadata database in the end-to-end tests",
    )
    parser.addoption("--keep", action="store_true", help="keep the folder of the Airflow of the tests")
    parser.addoption("--quick", action="store_true", help="leave out what is marked slow, and take SQLite alone")


def pytest_configure(config):
    # The tests' own process is an Airflow too, in a folder of its own, without a database.
    home = tempfile.mkdtemp(prefix="airflow-events-unit-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    for name in [name for name in os.environ if name.startswith("AIRFLOW__")]:
        del os.environ[name]
    os.environ["AIRFLOW_HOME"] = home
    os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
    os.environ["AIRFLOW__CORE__DAGS_FOLDER"] = str(TESTS / "dags")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        slow = [item for item in items if is_slow(item)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def is_slow(item):
    of_server = hasattr(item, "callspec") and item.callspec.params.get("engine", "sqlite") != "sqlite"
    return of_server or item.get_closest_marker("slow") is not None


@pytest.fixture(scope="module")
def chromium():
    """A real browser."""
    if problem := browser.missing():
        pytest.skip(problem)
    with browser.browser() as started:
        yield started
