"""
A small run of scripts/chaos.py; the README names the large ones.

With Java, on Kafka, since of what can be killed there its brokers are a part; otherwise with files, whose gaps the
matrix has under every fault.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "scripts" / "chaos.py"
HAS_KAFKA = shutil.which("java") and shutil.which("mvn")


def survive(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(CHAOS), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "every event was delivered once" in done.stdout
    return done.stdout


@pytest.mark.skipif(bool(HAS_KAFKA), reason="the run on Kafka kills all that this one does")
def test_every_event_is_delivered_once_under_random_kills():
    # By this seed: worker, API server, triggerer, scheduler, two workers, runner, triggerer.
    said = survive("--events", "25", "--kills", "8", "--seed", "5", "--timeout", "600")
    assert "| kills | 8 |" in said
    assert "| kills: api-server | 0 |" not in said
    assert "| committed in the inbox for the run that delivered | 25 |" in said


@pytest.mark.skipif(not HAS_KAFKA, reason="needs Java and Maven")
def test_every_message_is_delivered_once_though_brokers_are_killed():
    # By this seed: broker, triggerer, API server, scheduler, worker, broker, another worker, triggerer.
    said = survive(
        "--source", "kafka", "--brokers", "3", "--partitions", "6", "--triggerers", "2", "--events", "16",
        "--kills", "8", "--seed", "2", "--timeout", "900",
    )  # fmt: skip
    assert "| kills | 8 |" in said
    assert "| kills: broker | 0 |" not in said
    assert "| committed in the inbox for the run that delivered | 16 |" in said
