"""Small runs of scripts/chaos.py; the README names the large ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "scripts" / "chaos.py"


def survive(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(CHAOS), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "every event was delivered once" in done.stdout
    return done.stdout


def test_every_event_is_delivered_once_under_random_kills():
    said = survive("--events", "25", "--kills", "8", "--seed", "3", "--timeout", "600")
    assert "| kills | 8 |" in said


@pytest.mark.skipif(not (shutil.which("java") and shutil.which("mvn")), reason="needs Java and Maven")
def test_every_message_is_delivered_once_though_brokers_are_killed():
    said = survive(
        "--source", "kafka", "--brokers", "3", "--partitions", "6", "--triggerers", "2", "--events", "12",
        "--kills", "6", "--seed", "4", "--timeout", "900",
    )  # fmt: skip
    assert "| kills | 6 |" in said
    assert "| kills: broker | 0 |" not in said
    assert "| commits noted in the ledger | 12 |" in said
