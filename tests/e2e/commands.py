"""
``airflow``, many times from one start.

Airflow's imports are seconds of processor time and the same for every command. This process has them behind it,
and forks for each line of its input: a command's arguments and what is typed, as JSON. The answer is a line as
well: exit code, output, errors.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

# Whatever is printed by an import is no answer.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

from airflow.__main__ import main  # noqa: E402
from airflow_events.api import refusals, requests, sending  # noqa: E402, F401
from airflow_events.cli import commands  # noqa: E402, F401


def answer(arguments, typed):
    """Return the answer; in the command's process, None."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(typed.encode())
        stdin.seek(0)
        child = os.fork()
        if child == 0:
            for number, file in enumerate((stdin, stdout, stderr)):
                os.dup2(file.fileno(), number)
            sys.stdin = open(0, closefd=False)  # noqa: SIM115
            sys.argv = ["airflow", *arguments]
            return None
        _, status = os.waitpid(child, 0)
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
        return [os.waitstatus_to_exitcode(status), *said]


for line in sys.stdin:
    if (found := answer(*json.loads(line))) is None:
        main()
        break
    print(json.dumps(found), file=answers, flush=True)
