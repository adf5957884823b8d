"""A small run of scripts/chaos.py; the README names the large one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHAOS = Path(__file__).parents[2] / "scripts" / "chaos.py"


def test_every_event_is_delivered_once_under_random_kills():
    done = subprocess.run(
        [sys.executable, str(CHAOS), "--events", "25", "--kills", "8", "--seed", "3", "--timeout", "600"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "| kills | 8 |" in done.stdout
    assert "every event was delivered once" in done.stdout
