"""A source is a folder below ``listeners``; whatever else has to know of it does. See docs/adding-a-source.md."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {folder.name for folder in (ROOT / "listeners").iterdir() if (folder / "__init__.py").exists()}
SOURCES = sorted(FOLDERS - {"support"})
# Files need no client and no server.
WITH_CLIENTS = [name for name in SOURCES if name != "directory"]


def read(path):
    return (ROOT / path).read_text()


def setup():
    found = configparser.ConfigParser()
    found.read_string(read("setup.cfg"))
    return found


def requirements(extra):
    lines = setup()["options.extras_require"][extra].split()
    return {re.match(r"[\w-]+(\[[\w,]+\])?", line)[0].partition("[")[0] for line in lines}


def test_there_are_some():
    assert {"directory", "kafka", "redis"} <= set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_it_is_packaged(name):
    module = f"airflow_events.listeners.{name}"
    assert module in setup()["options"]["packages"].split()
    assert f"{module} = listeners/{name}" in setup()["options"]["package_dir"]


@pytest.mark.parametrize("name", SOURCES)
def test_it_is_in_the_import_rules(name):
    _, *contracts = read("pyproject.toml").split("[[tool.importlinter.contracts]]")
    of = {re.search(r'name = "(.*)"', contract)[1]: contract for contract in contracts}
    for contract in ("no listener knows another", "the contract knows nothing of the project"):
        assert f'"airflow_events.listeners.{name}"' in of[contract]


@pytest.mark.parametrize("name", WITH_CLIENTS)
def test_an_extra_brings_its_client_and_so_do_the_tests(name):
    assert requirements(name) <= requirements("test")
    assert f'"{name}", ' in read(f"listeners/{name}/__init__.py")  # what `needs` tells to install


@pytest.mark.parametrize("name", WITH_CLIENTS)
def test_it_takes_part_in_what_tests_all(name):
    assert f"from of_{name} import" in read("tests/sources/conftest.py")
    assert (ROOT / f"tests/sources/test_{name}.py").exists()
    assert f'listener_is = ("{name}", ' in read("tests/plugins/brokers.py")
    assert f'    "{name}": (' in read("tests/unit/test_clients.py")


@pytest.mark.parametrize("name", WITH_CLIENTS)
def test_its_page_says_what_to_grant(name):
    page = read(f"docs/sources/{name}.md")
    assert re.search(r"^## .*(rights|grant|permission)", page, re.IGNORECASE | re.MULTILINE)


@pytest.mark.parametrize("name", SOURCES)
def test_its_ids_are_frozen(name):
    assert re.search(rf"airflow_events\.listeners\.{name}\b", read("tests/unit/test_frozen.py"))
