"""
An API server that dies just before it commits an event, or between the commit and its reply.

This is a plugin for the Airflow of the tests. Where that has a file ``kill-before-the-commit`` or
``kill-before-the-reply``, the API server that comes there next with an event for a wait removes it and is gone.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import wrapt


@wrapt.when_imported("airflow_events.api.requests")
def wrap(module: Any) -> None:
    in_transaction = module.in_transaction

    def and_die(work: Any, **kwargs: Any) -> Any:
        def work_and_die(session: Any) -> Any:
            done = work(session)
            session.flush()
            _die(done, "kill-before-the-commit")
            return done

        result = in_transaction(work_and_die, **kwargs)
        _die(result, "kill-before-the-reply")
        return result

    module.in_transaction = and_die


def _die(result: Any, order: str) -> None:
    file = Path(os.environ["AIRFLOW_HOME"], order)
    if type(result).__name__ == "Receipt" and file.exists():
        file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
