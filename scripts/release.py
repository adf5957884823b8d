#!/usr/bin/env python3
"""
Make what a release consists of, in dist/: python3 scripts/release.py v0.2.0 https://host/owner/project.

The wheel and the source distribution, the notes from CHANGELOG.md, and a bill of materials (CycloneDX) of what the
wheel installs. Refused if the tag is not the package's version, or the changelog has no dated section for it.
Needs what the extra ``release`` names. Nothing is uploaded.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import bootstrap

DIST = bootstrap.ROOT / "dist"
_RELATIVE = re.compile(r"(?P<image>!)?\[(?P<text>[^\]]*)\]\((?!\w+:|#)(?P<path>[^)\s]+)\)")


def version_of(tag: str) -> str:
    """
    Return the version that ``tag`` names.

    :raises SystemExit: it is not that of the package.
    """
    version = runpy.run_path(str(bootstrap.ROOT / "provider" / "provider_info.py"))["VERSION"]
    if tag != f"v{version}":
        bootstrap.fail(f"the tag is {tag}, and provider/provider_info.py says {version}")
    return str(version)


def notes(changelog: str, version: str) -> str:
    """
    Return what the changelog says of a version.

    :raises SystemExit: it has no section ``## [version] - YYYY-MM-DD``.
    """
    section = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)"
    if found := re.search(section, changelog, re.MULTILINE | re.DOTALL):
        return found[1].strip() + "\n"
    bootstrap.fail(f"CHANGELOG.md has no section [{version}] with a date")


def absolute(text: str, url: str, tag: str) -> str:
    """Return ``text`` with relative links leading to the project at ``url`` as it was at ``tag``; images, too."""

    def lead(link: re.Match[str]) -> str:
        kind = "raw" if link["image"] else "blob"
        return f"{link['image'] or ''}[{link['text']}]({url}/{kind}/{tag}/{link['path']})"

    return _RELATIVE.sub(lead, text)


def _build(url: str, tag: str) -> None:
    source = bootstrap.ROOT / "build" / "release"
    bootstrap.copy_source(source)
    readme = source / "README.md"
    readme.write_text(absolute(readme.read_text(), url, tag))
    setup = source / "setup.cfg"
    urls = (
        f"Documentation = {url}/tree/{tag}/docs\n    Source = {url}\n    Changelog = {url}/blob/{tag}/CHANGELOG.md"
    )
    setup.write_text(setup.read_text().replace("[metadata]\n", f"[metadata]\nproject_urls =\n    {urls}\n", 1))
    _run(sys.executable, "-m", "build", "--outdir", str(DIST), str(source))


def _bill_of_materials() -> None:
    """List what the wheel installs, with its dependencies as constraints.txt has them."""
    [wheel] = DIST.glob("*.whl")
    venv = bootstrap.ROOT / "build" / "of-the-wheel"
    _run(sys.executable, "-m", "venv", "--clear", str(venv))
    _run(str(venv / "bin" / "pip"), "install", "--quiet", "-c", "constraints.txt", str(wheel))
    tool = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible"]
    _run(*tool, "--output-file", str(DIST / "sbom.cdx.json"), str(venv / "bin" / "python"))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, cwd=bootstrap.ROOT)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        bootstrap.fail("needs a tag and the project's address: v0.2.0 https://host/owner/project")
    tag, url = sys.argv[1], sys.argv[2].rstrip("/")
    version = version_of(tag)
    DIST.mkdir(exist_ok=True)
    of_version = notes((bootstrap.ROOT / "CHANGELOG.md").read_text(), version)
    (DIST / "NOTES.md").write_text(absolute(of_version, url, tag))
    _build(url, tag)
    _bill_of_materials()
    print("\n".join(sorted(f"dist/{file.name}" for file in Path(DIST).iterdir())))
