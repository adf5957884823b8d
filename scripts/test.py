#!/usr/bin/env python3
"""
Run the tests against the built wheel: python3 scripts/test.py [arguments of pytest].

Without arguments that name tests, the quick ones come first, then those with a real Airflow.
"""

from __future__ import annotations

import sys

import bootstrap

if __name__ == "__main__":
    bootstrap.run_inside("[test]")
    import pytest

    sys.exit(
        pytest.main(
            ["-c", str(bootstrap.ROOT / "pyproject.toml"), "--rootdir", str(bootstrap.ROOT), *sys.argv[1:]]
        )
    )
