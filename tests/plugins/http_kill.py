"""
An API server that dies while it gives an event to waits, or gives none for a while.

This is a plugin for the Airflow of the tests. What is to happen is in files of its home, each for the API
server with one port, which takes the file away before it dies:

``kill-before-the-commit-<port>`` and ``kill-before-the-reply-<port>``
    hold what the transaction returns that is meant: ``Receipt`` (an event for a wait), ``KeyReceipt`` (one for
    a key) or ``dict`` (what the matcher gave).
``kill-within-<port>``
    holds how many waits have been given an event in the transaction when it dies, before the next.
``no-matching-<port>``
    the matcher passes over as long as the file is there.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import wrapt

_GIVEN = "given to"


@wrapt.when_imported("airflow_events.inbox.database")
def wrap_transactions(module: Any) -> None:
    in_transaction = module.in_transaction

    def and_die(work: Any, **kwargs: Any) -> Any:
        if getattr(work, "__name__", "") == "wanted" and _order("no-matching").exists():
            return []

        def work_and_die(session: Any) -> Any:
            done = work(session)
            session.flush()
            _die("kill-before-the-commit", type(done).__name__ if done else "")
            return done

        result = in_transaction(work_and_die, **kwargs)
        _die("kill-before-the-reply", type(result).__name__ if result else "")
        return result

    module.in_transaction = and_die


@wrapt.when_imported("airflow_events.api.sending")
def wrap_giving(module: Any) -> None:
    give = module.give

    def and_die(row: Any, *args: Any, **kwargs: Any) -> Any:
        given = row.session.info.setdefault(_GIVEN, [])
        row.session.flush()
        _die("kill-within", str(len(given)))
        receipt = give(row, *args, **kwargs)
        given.append(receipt.wait)
        return receipt

    module.give = and_die


def _order(name: str) -> Path:
    return Path(os.environ["AIRFLOW_HOME"], f"{name}-{os.environ.get('AIRFLOW__API__PORT')}")


def _die(name: str, here: str) -> None:
    order = _order(name)
    try:
        meant = order.read_text()
    except FileNotFoundError:
        return
    if meant == here:
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
