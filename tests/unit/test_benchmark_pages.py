"""The pages of measured figures have what docs/benchmarks.json has, and nothing typed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def compare():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("compare", BENCHMARKS / "compare.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_pages_are_made_of_what_was_measured(compare):
    made = compare.pages.made(compare.PARTS)
    for page, text in made.items():
        assert page.read_text() == text, f"{page.name} is not what benchmarks/compare.py --draw makes"


def test_every_part_has_a_place_in_a_page(compare):
    texts = "".join(page.read_text() for page in compare.pages.PAGES)
    for name in compare.PARTS:
        assert f"<!-- {name} -->\n" in texts, name


def test_a_table_replaces_what_stands_between_its_markers_and_nothing_else(compare):
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert compare.pages.between(text, "x", "new") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"
    with pytest.raises(AssertionError, match="no place for 'y'"):
        compare.pages.between(text, "y", "new")


@pytest.mark.parametrize(
    ("waits", "expected"), [(0, 1), (5_000, 2), (10_000, 3), (55_000, 8), (100_000, 13), (190_000, 23)]
)
def test_a_projection_goes_along_the_measured_points(waits, expected):
    from parts.sizing import milliseconds

    measured = ((0, 1), (10_000, 3), (100_000, 13))
    rows = [{"name": "triggerer", "others": others, "ms": ms} for others, ms in measured]
    rows += [{"name": "scheduler", "others": 0, "ms": 7}]
    assert milliseconds(rows, "triggerer", waits) == pytest.approx(expected)
    assert milliseconds(rows, "scheduler", waits) == 7


def test_the_readme_says_of_each_program_what_it_answers():
    rows = [line for line in (BENCHMARKS / "README.md").read_text().splitlines() if line.startswith("| ")]
    for program in BENCHMARKS.glob("*.py"):
        assert sum(f"| `{program.name}`" in row for row in rows) == 1, program.name
    for page in {word for row in rows for word in row.split("`") if word.startswith("docs/")}:
        assert (BENCHMARKS.parent / page).exists(), page
