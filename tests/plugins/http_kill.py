"""
An API server that dies between the commit of an event and its reply.

This is a plugin for the Airflow of the tests. Where that has a file ``kill-before-the-reply``, the API server that
commits an event next removes the file and is gone.
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
        result = in_transaction(work, **kwargs)
        order = Path(os.environ["AIRFLOW_HOME"], "kill-before-the-reply")
        if type(result).__name__ == "Receipt" and order.exists():
            order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    module.in_transaction = and_die
