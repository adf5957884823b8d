"""A link from one page to another leads somewhere, and what has to be on a page is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from airflow_events import errors
from airflow_events.provider_info import OPTIONS

import settings_page

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)")


def anchors(page):
    """Return what GitHub makes of the headings of a page."""
    headings = [line.lstrip("#").strip().lower() for line in page.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    wrong = []
    for path, anchor in LINK.findall(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        if "://" in path or path.startswith("mailto:"):
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            wrong.append(f"{path}#{anchor}" if anchor else path)
    assert wrong == []


def test_the_page_of_the_settings_is_made_of_what_airflow_is_told():
    assert settings_page.PAGE.read_text() == settings_page.page(OPTIONS), "run python3 scripts/settings_page.py"


def test_every_error_is_explained():
    page = (ROOT / "docs" / "errors.md").read_text()
    ours = {error.__name__ for error in vars(errors).values() if isinstance(error, type)} - {"EventsError"}
    assert sorted(error for error in ours if f"| `{error}` |" not in page) == []


def test_every_listener_has_a_page_that_shows_its_event():
    page = (ROOT / "docs" / "events.md").read_text()
    table = (ROOT / "README.md").read_text()
    listeners = set(re.findall(r"`(?:airflow_events[\w.]+\.)?(\w+Listener)`", table)) - {"MyListener"}
    assert len(listeners) > 10
    assert sorted(name for name in listeners if f"| `{name}` |" not in page) == []


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(page for page in pages if not re.search(rf"[ :]{re.escape(page)}$", menu, re.MULTILINE)) == []


def test_every_decision_is_in_their_index():
    index = (ROOT / "docs" / "decisions" / "index.md").read_text()
    pages = [page.name for page in (ROOT / "docs" / "decisions").glob("*.md") if page.name != "index.md"]
    assert sorted(page for page in pages if f"]({page})" not in index) == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_files_that_the_first_pages_name_are_there(page):
    folders = "provider|listeners|triggers|operators|tests|scripts|benchmarks|example_dags"
    named = re.findall(rf"(?:`(\w+(?:\.\w+)?)` in )?`((?:{folders})/[\w./-]*)`", (ROOT / page).read_text())
    assert named
    for what, path in named:
        assert (ROOT / path).exists(), path
        if what:
            for name in what.split("."):
                assert re.search(
                    rf"^ *(?:async )?(?:def|class) {name}\b", (ROOT / path).read_text(), re.MULTILINE
                ), what
