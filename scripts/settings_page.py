#!/usr/bin/env python3
"""Write docs/settings.md from what Airflow is told of the options: python3 scripts/settings_page.py."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "settings.md"

_HEAD = """\
# Settings

Made by `python3 scripts/settings_page.py` from `provider/provider_info.py`, which Airflow reads, too:
`airflow config list --section events --show-values --include-descriptions` prints the same, with the values of a
deployment, its secrets too.

They are the section `[events]` of Airflow's configuration, or stand in the environment:
`AIRFLOW__EVENTS__COMMIT_TIMEOUT=300`. A secret may come from a command or from a secrets backend, as any of
Airflow's: `AIRFLOW__EVENTS__INBOX_SECRET_CMD`, `AIRFLOW__EVENTS__INBOX_SECRET_SECRET`. Give API servers,
triggerers and workers the same.
"""


def page(options: dict[str, dict[str, Any]]) -> str:
    """Return the text of the page; ``options`` as of ``provider_info.OPTIONS``."""
    return _HEAD + "".join(_section(name, option) for name, option in sorted(options.items()))


def _section(name: str, option: dict[str, Any]) -> str:
    default = f"`{option['default']}`" if option["default"] else "empty"
    secret = " Secret." if option.get("sensitive") else ""
    return (
        f"\n## {name}\n\n{option['description']}\n\n"
        f"Type {option['type']}, default {default}, since {option['version_added']}.{secret}\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(runpy.run_path(str(ROOT / "provider" / "provider_info.py"))["OPTIONS"]))
