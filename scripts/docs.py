#!/usr/bin/env python3
"""
Build the site of the documentation into build/site: python3 scripts/docs.py.

A page that is in no menu, a link or an anchor that leads nowhere, a name in the API that does not exist: each ends
it with an error. ``--serve`` serves the site on 127.0.0.1:8000 instead, and builds it again when a page changes.
"""

from __future__ import annotations

import os
import sys

import bootstrap

if __name__ == "__main__":
    bootstrap.run_inside("[docs]")
    os.environ["NO_MKDOCS_2_WARNING"] = "1"  # an announcement of the theme's authors, not of this project's pages
    how = ["serve"] if "--serve" in sys.argv else ["build"]
    os.chdir(bootstrap.ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "mkdocs", *how, "--strict"])
