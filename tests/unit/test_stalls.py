from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest
from airflow_events.triggers import stalls

STALLS = """
import asyncio
from airflow_events.triggers import stalls

async def main():
    with stalls.told_to(lambda: print("begin again", flush=True)):
        print("ready", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_process_that_was_stopped_begins_again_once():
    environment = {**os.environ, "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "6"}
    command = [sys.executable, "-c", STALLS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(5)
            os.kill(process.pid, signal.SIGCONT)
            assert process.stdout.readline() == "begin again\n"
        finally:
            process.kill()
        assert process.stdout.read() == ""


async def test_nothing_is_left_when_nobody_is_to_be_told():
    with stalls.told_to(lambda: None):
        assert len(stalls._told) == 1
    assert not stalls._told
    await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() if "stalls" in task.get_name()]


def test_what_cannot_have_made_another_triggerer_take_over_is_no_stall(monkeypatch):
    monkeypatch.setenv("AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD", "30")
    assert stalls._shortest() == 10
