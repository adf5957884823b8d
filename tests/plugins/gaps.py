"""
The gaps between two durable steps of a wait, each by its name, and how to stop there from outside.

This is a plugin for the Airflow of the tests. Where that has a folder ``gaps``, it wraps the project's functions
as they are imported; without it nothing is in their way, and the project's own code knows nothing of it.

A gap is armed for one run by a file, ``$AIRFLOW_HOME/gaps/<run>/<gap>``. Whoever gets there first renames it
to ``<gap>.reached.<pid>`` and stands there until ``<gap>.open`` appears, which may say by how many seconds
the process's clock is to jump. Then it goes on, and leaves ``<gap>.passed``.

What stands in an API server is asked again before long. It stands there as well, unless the file says ``once``.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wrapt
from airflow.plugins_manager import AirflowPlugin

BEFORE, AFTER = "before", "after"
OPERATOR = "airflow_events.operators.wait_for_event"
TRIGGER = "airflow_events.triggers.event"
POLL = "airflow_events.triggers.polling"
CLIENT = "airflow_events.triggers.inbox"
ROUTES = "airflow_events.api.inbox_routes"
TRANSACTIONS = "airflow_events.inbox.transactions"

# How many requests may stand in an API server at once.
ROOM = 100

# Of which run a task instance is, as far as this process knows.
_runs: dict[str, str] = {}


@dataclass(frozen=True)
class Gap:
    """
    A point at which a process can be stopped.

    :param place: the process it is in.
    :param durable: what is durable there.
    :param module: with ``function``, the function that is wrapped.
    :param edge: before it; or after it, if it did not say by False that it did nothing.
    :param run: finds the run in ``(instance, args)``, or None where this call is not meant.
    :param commits: only in waits whose listener has something to commit.
    :param only: the name of the one source that has it; empty means that all have it.
    :param firm: it is cancelled there soon, by Airflow, and stands all the same, as if that came late.
    """

    place: str
    name: str
    durable: str
    module: str
    function: str
    edge: str
    run: Callable[[Any, Any], str | None]
    commits: bool = False
    only: str = ""
    firm: bool = False

    @property
    def id(self) -> str:
        return f"{self.place}-{self.name}".replace(" ", "-")


def _of_trigger(trigger: Any, args: Any) -> str:
    run = str(trigger.wait["run_id"])
    _runs[str(trigger.task_instance.id)] = run
    return run


def _of_poll(poll: Any, args: Any) -> str:
    return str(poll._wait.run_id)


def _asked_by_trigger(operation: str) -> Callable[[Any, Any], str | None]:
    """Find the run in ``EventTrigger._ask``; a `Finish` that ends the wait without an event is not meant."""

    def run_of(trigger: Any, args: Any) -> str | None:
        [entry] = args
        is_meant = entry.operation == operation and getattr(entry, "record_id", "") is not None
        return _of_trigger(trigger, args) if is_meant else None

    return run_of


def _asked_by_client(operation: str) -> Callable[[Any, Any], str | None]:
    """Find the run in ``Inbox.ask``, which is told nothing but the task instance."""
    return lambda inbox, args: _runs.get(args[0].ti) if args[0].operation == operation else None


def _in_transaction(operation: str) -> Callable[[Any, Any], str | None]:
    """Find the run in ``_together``, whose batches are of one entry here."""

    def run_of(_: Any, args: Any) -> str | None:
        entry = args[0][0]
        return _run_in_database(entry.ti) if entry.operation == operation else None

    return run_of


def _run_in_database(ti: str) -> str | None:
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session
    from sqlalchemy import select

    if ti not in _runs:
        with create_session(scoped=False) as session:
            run = session.scalar(select(TaskInstance.run_id).where(TaskInstance.id == uuid.UUID(ti)))
        if run is None:
            return None
        _runs[ti] = run
    return _runs[ti]


def _of_ended(_: Any, args: Any) -> str:
    [(task, _end)] = args[0]
    return str(task.run_id)


def _of_task(task: Any, args: Any) -> str:
    return str(args[0]["ti"].run_id)


def _of_success(_: Any, args: Any) -> str | None:
    return str(args[1].run_id) if args[1].task_id == "wait" else None


# In the order of a wait's life. A new gap takes part in the matrix by standing here.
GAPS = (
    Gap("worker", "deferring", "nothing yet", OPERATOR, "WaitForEventOperator._defer", BEFORE, _of_task),
    Gap(
        "triggerer", "beginning", "the trigger row",
        TRIGGER, "EventTrigger._ask", BEFORE, _asked_by_trigger("begin"),
    ),
    Gap(
        "api-server", "beginning", "the trigger row",
        TRANSACTIONS, "_together", BEFORE, _in_transaction("begin"),
    ),
    Gap(
        "api-server", "begun", "the wait's row; its trigger has no answer",
        TRANSACTIONS, "_together", AFTER, _in_transaction("begin"),
    ),
    Gap("triggerer", "polling", "the wait's row", POLL, "Poll.run", BEFORE, _of_poll),
    Gap("triggerer", "polled", "what the source holds for the wait", POLL, "Poll.run", AFTER, _of_poll),
    Gap(
        "triggerer", "recording", "the same; the inbox is about to be asked",
        CLIENT, "Inbox.ask", BEFORE, _asked_by_client("record"),
    ),
    Gap(
        "api-server", "recording", "the same; the inbox is asked",
        TRANSACTIONS, "_together", BEFORE, _in_transaction("record"),
    ),
    Gap(
        "api-server", "recorded", "the record, and the success if there is nothing to commit; no answer",
        TRANSACTIONS, "_together", AFTER, _in_transaction("record"),
    ),
    Gap(
        "triggerer", "recorded", "the record, not committed",
        TRIGGER, "EventTrigger._record", AFTER, _of_trigger, commits=True,
    ),
    Gap(
        "triggerer", "lost", "the record of an event that the source gave to another",
        TRIGGER, "EventTrigger._ask", BEFORE, _asked_by_trigger("lose"), only="contested directory",
    ),
    Gap(
        "triggerer", "committed", "the commit, which the inbox does not know of",
        TRIGGER, "EventTrigger._ask", BEFORE, _asked_by_trigger("finish"), commits=True,
    ),
    Gap(
        "api-server", "finishing", "the same; the inbox is asked",
        TRANSACTIONS, "_together", BEFORE, _in_transaction("finish"), commits=True,
    ),
    Gap(
        "api-server", "ended", "the success; neither the scheduler nor Airflow's listeners are told",
        "airflow_events.inbox.tasks", "_after", BEFORE, _of_ended,
    ),
    Gap(
        "api-server", "finished", "the success; its trigger has no answer",
        TRANSACTIONS, "_together", AFTER, _in_transaction("finish"), commits=True,
    ),
    Gap(
        "triggerer", "finished", "the success; the trigger still runs",
        TRIGGER, "EventTrigger._pass", AFTER, _of_trigger, firm=True,
    ),
    Gap(
        "worker", "resumed", "the record, committed, and the event in the task instance",
        OPERATOR, "WaitForEventOperator.execute_complete", BEFORE, _of_task,
    ),
    Gap(
        "worker", "succeeded", "the return value; the success is not reported",
        "airflow.sdk.execution_time.task_runner", "_handle_current_task_success", BEFORE, _of_success,
    ),
)  # fmt: skip


def folder(home: Path | str, run: str) -> Path:
    """Where the gaps of a run are armed."""
    return Path(home, "gaps", run)


class _Stop:
    """One process's stay at one gap of one run; false if it is not armed."""

    def __init__(self, gap: Gap, run: str | None) -> None:
        self._armed = folder(os.environ["AIRFLOW_HOME"], run or "=none") / gap.id
        reached = Path(f"{self._armed}.reached.{os.getpid()}")
        try:
            os.rename(self._armed, reached)
        except FileNotFoundError:
            is_asked_again = gap.place == "api-server" and reached.exists()
            self._stands = is_asked_again and reached.read_text() != "once"
        else:
            self._stands = True

    def __bool__(self) -> bool:
        return self._stands

    def go_on(self) -> bool:
        try:
            jump = Path(f"{self._armed}.open").read_text()
        except FileNotFoundError:
            return False
        if jump:
            import time_machine

            time_machine.travel(time.time() + float(jump), tick=True).start()
        Path(f"{self._armed}.passed").touch()
        return True


async def _stand(gap: Gap, run: str | None) -> None:
    if not (stop := _Stop(gap, run)):
        return
    cancelled: asyncio.CancelledError | None = None
    while not stop.go_on():
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError as error:
            if not gap.firm:
                raise
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _stand_in_thread(gap: Gap, run: str | None) -> None:
    if stop := _Stop(gap, run):
        while not stop.go_on():
            time.sleep(0.05)


def _wrapper(gap: Gap) -> Callable[..., Any]:
    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        async def awaited() -> Any:
            if gap.edge == BEFORE:
                await _stand(gap, gap.run(instance, args))
            result = await wrapped(*args, **kwargs)
            if gap.edge == AFTER and result is not False:
                await _stand(gap, gap.run(instance, args))
            return result

        if inspect.iscoroutinefunction(wrapped):
            return awaited()
        if gap.edge == BEFORE:
            _stand_in_thread(gap, gap.run(instance, args))
        result = wrapped(*args, **kwargs)
        if gap.edge == AFTER:
            _stand_in_thread(gap, gap.run(instance, args))
        return result

    return wrapper


def _wrap(gap: Gap) -> None:
    wrapt.register_post_import_hook(
        lambda module: wrapt.wrap_function_wrapper(module, gap.function, _wrapper(gap)), gap.module
    )


def _ask_each_alone(client: Any) -> None:
    """Let each entry be a request of its own: one that stands in the API server must not hold up others."""
    _set(client, _AT_ONCE=ROOM, _MOST_ENTRIES=1)


def _give_room(routes: Any) -> None:
    """Let many requests stand in the API server, which otherwise has two threads for all of them."""
    _set(routes, _threads=ThreadPoolExecutor(ROOM), _room=threading.BoundedSemaphore(ROOM))


def _set(module: Any, **values: Any) -> None:
    for name, value in values.items():
        getattr(module, name)  # it must not have another name by now
        setattr(module, name, value)


class GapsPlugin(AirflowPlugin):  # type: ignore[misc]
    """Makes Airflow import this module in each of its processes."""

    name = "gaps"


if Path(os.environ.get("AIRFLOW_HOME", "/nonexistent"), "gaps").is_dir():
    for _gap in GAPS:
        _wrap(_gap)
    wrapt.register_post_import_hook(_ask_each_alone, CLIENT)
    wrapt.register_post_import_hook(_give_room, ROUTES)
