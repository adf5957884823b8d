"""What is published: the text with its links, the notes, and the tag."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import release

ROOT = Path(__file__).parents[2]
URL = "https://example.org/owner/project"


def test_links_of_the_published_text_are_absolute():
    text = release.absolute((ROOT / "README.md").read_text(), URL, "v9.8.7")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    assert [link for link in links if not re.match(r"https?://|#", link)] == []
    assert f"]({URL}/blob/v9.8.7/docs/inbox.md)" in text
    assert f"]({URL}/raw/v9.8.7/docs/images/list-light.png)" in text


def test_the_notes_of_a_version_are_its_section_of_the_changelog():
    text = "## [Unreleased]\n\nc\n\n## [1.1.0] - 2026-12-01\n\n### Added\n\n- b\n\n## [1.0.0] - 2026-11-01\n\na\n"
    assert release.notes(text, "1.1.0") == "### Added\n\n- b\n"
    assert release.notes(text, "1.0.0") == "a\n"
    with pytest.raises(SystemExit, match=r"no section \[1\.2\.0\]"):
        release.notes(text, "1.2.0")


def test_a_tag_of_another_version_is_refused():
    with pytest.raises(SystemExit, match=r"the tag is v0\.0\.1, and provider/provider_info\.py says"):
        release.version_of("v0.0.1")
