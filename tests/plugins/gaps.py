"""
The gaps between two durable steps of a wait, each by its name, and how to stop there from outside.

This is a plugin for the Airflow of the tests. Where that has a folder ``gaps``, it wraps the project's functions
as they are imported; without it nothing is in their way, and the project's own code knows nothing of it.

A gap is armed for one run by a file, ``$AIRFLOW_HOME/gaps/<run>/<gap>``. Whoever gets there first renames it
to ``<gap>.reached.<pid>`` and stands there until ``<gap>.open`` appears, which may say by how many seconds
the process's clock is to jump. Then it goes on, and leaves ``<gap>.passed``.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wrapt
from airflow.plugins_manager import AirflowPlugin

BEFORE, AFTER, YIELDED = "before", "after", "yielded"
TRIGGER = "airflow_events.triggers.event"
XCOM_RECORD = "airflow_events.triggers.record"
OPERATOR = "airflow_events.operators.wait_for_event"
WORKER_RECORD = "airflow_events.operators.record"


@dataclass(frozen=True)
class Gap:
    """
    A point at which a process can be stopped.

    :param place: the process it is in.
    :param durable: what is durable there.
    :param module: with ``function``, the function that is wrapped.
    :param edge: before or after it, or after what it yielded was taken.
    :param run: finds the run in ``(instance, args)``, or None where this call is not meant.
    :param commits: only in waits whose listener has something to commit.
    :param settled: only in waits whose event is not foreseen: those bring their record along with the success.
    :param only: the name of the one source that has it; empty means that all have it.
    """

    place: str
    name: str
    durable: str
    module: str
    function: str
    edge: str
    run: Callable[[Any, Any], str | None]
    commits: bool = False
    settled: bool = False
    only: str = ""

    @property
    def id(self) -> str:
        return f"{self.place}-{self.name}".replace(" ", "-")


def _in_phase(phase: str, run_of: Callable[[Any], str]) -> Callable[[Any, Any], str | None]:
    return lambda record, args: run_of(record) if args[0].phase.value == phase else None


def _of_record(phase: str) -> Callable[[Any, Any], str | None]:
    return _in_phase(phase, lambda record: record.wait.run_id)


def _of_xcom_record(record: Any, args: Any) -> str:
    return str(record.wait.run_id)


def _of_worker_record(phase: str) -> Callable[[Any, Any], str | None]:
    return _in_phase(phase, lambda record: record.ti.run_id)


def _half(phase: str) -> Callable[[Any, Any], str | None]:
    """Find the run in ``WorkerRecord._set``, the second of the two writes of ``WorkerRecord.write``."""

    def run_of(record: Any, args: Any) -> str | None:
        key, value = args
        return str(record.ti.run_id) if key == "event_record" and value["phase"] == phase else None

    return run_of


def _of_trigger(trigger: Any, args: Any) -> str:
    return str(trigger.wait["run_id"])


def _of_task(task: Any, args: Any) -> str:
    return str(args[0]["ti"].run_id)


def _of_success(_: Any, args: Any) -> str | None:
    return str(args[1].run_id) if args[1].task_id == "wait" else None


def _of_writer(_: Any, args: Any) -> str:
    [record] = args[0].args
    return str(record.wait.run_id)


def _of_claim(drops: Any, args: Any) -> str:
    return str(args[0])


# In the order of a wait's life. A new gap takes part in the matrix by standing here.
GAPS = (
    Gap("worker", "deferring", "nothing yet", OPERATOR, "WaitForEventOperator._defer", BEFORE, _of_task),
    Gap("triggerer", "polling", "the trigger row", TRIGGER, "EventTrigger._poll", BEFORE, _of_trigger),
    Gap(
        "triggerer", "half claimed", "a file that was taken from the others and is not the wait's yet",
        "airflow_events.listeners.directory.claims", "Drops._own", BEFORE, _of_claim, only="directory",
    ),
    Gap(
        "triggerer", "half prepared", "the record, which is none until the event comes",
        XCOM_RECORD, "XComRecord.deliver", BEFORE, _of_xcom_record, only="timer to come",
    ),
    Gap(
        "triggerer", "prepared", "the return value too, ahead of the event",
        "airflow_events.triggers.foreseen", "Foreseen.write", AFTER, _of_writer, only="timer to come",
    ),
    Gap("triggerer", "claimed", "the claim", TRIGGER, "EventTrigger._poll", AFTER, _of_trigger),
    Gap(
        "triggerer", "recording", "the claim; there was no record yet",
        XCOM_RECORD, "XComRecord.write", BEFORE, _of_record("recorded"), commits=True,
    ),
    Gap(
        "triggerer", "recorded", "the record, not committed",
        XCOM_RECORD, "XComRecord.write", AFTER, _of_record("recorded"), commits=True,
    ),
    Gap(
        "triggerer", "lost", "the record of an event that the source gave to another",
        XCOM_RECORD, "XComRecord.drop", BEFORE, _of_xcom_record, only="contested directory",
    ),
    Gap(
        "triggerer", "committed", "the commit, not noted",
        XCOM_RECORD, "XComRecord.write", BEFORE, _of_record("committed"), commits=True,
    ),
    Gap(
        "triggerer", "noted", "the record, noted as committed",
        XCOM_RECORD, "XComRecord.write", AFTER, _of_record("committed"), settled=True,
    ),
    Gap(
        "triggerer", "returned", "the return value",
        XCOM_RECORD, "XComRecord.deliver", AFTER, _of_xcom_record,
    ),
    Gap("triggerer", "handed over", "as before; Airflow's runner has the result in memory", TRIGGER,
        "EventTrigger.run", YIELDED, _of_trigger),
    Gap("worker", "resumed", "the claim, and the event in the task instance", OPERATOR,
        "WaitForEventOperator._finish", BEFORE, _of_task),
    Gap(
        "worker", "half recorded", "the record's copy among the XComs",
        WORKER_RECORD, "WorkerRecord._set", BEFORE, _half("recorded"), commits=True,
    ),
    Gap(
        "worker", "recorded", "the record, not committed",
        WORKER_RECORD, "WorkerRecord.write", AFTER, _of_worker_record("recorded"), commits=True,
    ),
    Gap(
        "worker", "lost", "the record of an event that the source gave to another",
        WORKER_RECORD, "WorkerRecord.drop", BEFORE, lambda record, args: record.ti.run_id,
        only="contested directory",
    ),
    Gap(
        "worker", "committed", "the commit, not noted",
        WORKER_RECORD, "WorkerRecord.write", BEFORE, _of_worker_record("committed"), commits=True,
    ),
    Gap(
        "worker", "half noted", "the commit, noted in the record's copy",
        WORKER_RECORD, "WorkerRecord._set", BEFORE, _half("committed"),
    ),
    Gap(
        "worker", "noted", "the record, noted as committed",
        WORKER_RECORD, "WorkerRecord.write", AFTER, _of_worker_record("committed"),
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
        try:
            os.rename(self._armed, f"{self._armed}.reached.{os.getpid()}")
        except FileNotFoundError:
            self._stands = False
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
    if stop := _Stop(gap, run):
        while not stop.go_on():
            await asyncio.sleep(0.05)


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
            if gap.edge == AFTER:
                await _stand(gap, gap.run(instance, args))
            return result

        async def generated() -> Any:
            async with contextlib.aclosing(wrapped(*args, **kwargs)) as events:
                async for event in events:
                    yield event
                    await _stand(gap, gap.run(instance, args))

        if gap.edge == YIELDED:
            return generated()
        if inspect.iscoroutinefunction(wrapped):
            return awaited()
        assert gap.edge == BEFORE
        _stand_in_thread(gap, gap.run(instance, args))
        return wrapped(*args, **kwargs)

    return wrapper


def _wrap(gap: Gap) -> None:
    wrapt.register_post_import_hook(
        lambda module: wrapt.wrap_function_wrapper(module, gap.function, _wrapper(gap)), gap.module
    )


class GapsPlugin(AirflowPlugin):  # type: ignore[misc]
    """Makes Airflow import this module in each of its processes."""

    name = "gaps"


if Path(os.environ.get("AIRFLOW_HOME", "/nonexistent"), "gaps").is_dir():
    for _gap in GAPS:
        _wrap(_gap)
