"""One cell of the matrix: a wait that stands in a gap, and what became of it."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path as Folder
from typing import Any

import psutil
from airflow_events import Wait
from gaps import Gap, folder
from paths import DEADLINE, Path, dag_id
from source import EVENTS, UNKNOWN, Source, conf

from deployment import FINISHED, Deployment, Run, until
from postgres import Postgres

# Seconds.
STANDS_FIRM = 4
# There the event is not recorded, so that a deadline may come first. ("handed over" is before the record where
# a worker records.)
BEFORE_THE_RECORD = ("deferring", "polling", "half claimed", "prepared", "claimed", "recording")


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


@dataclass(frozen=True)
class Stage:
    """The Airflow that the matrix is run on."""

    airflow: Deployment
    postgres: Postgres
    folder: Folder

    def finish(self, cells: list[Cell], timeout: float = 300) -> None:
        """Wait until all runs have ended, or the time is up, which the verdicts will tell."""

        def finished() -> bool:
            with contextlib.suppress(OSError, RuntimeError):
                return all(cell.run.state in FINISHED for cell in cells)
            return False

        with contextlib.suppress(TimeoutError):
            until(finished, "the runs end", timeout, 1)


@dataclass
class Cell:
    """A wait in a gap."""

    source: Source
    path: Path
    gap: Gap
    fault: str
    base: Folder
    has_deadline: bool = False
    deleted: str = ""
    _run: Run | None = None
    _process: psutil.Process | None = None
    _reached: float = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.source.name}, {self.path.name}, {self.gap.place} {self.gap.name}, {self.fault}"

    @property
    def run(self) -> Run:
        assert self._run is not None
        return self._run

    @property
    def process(self) -> psutil.Process:
        assert self._process is not None
        return self._process

    @property
    def _armed(self) -> Folder:
        """The file of this cell's gap; a gap in a source goes by the source's name of the wait."""
        run = self.run.run_id if self.gap.name != "half claimed" else self.source.holder(self.wait)
        return folder(self.run.deployment.home, run) / self.gap.id

    @property
    def wait(self) -> Wait:
        return Wait(self.run.dag_id, self.run.run_id, "wait")

    def begin(self, stage: Stage, run_id: str) -> None:
        """Send the events, arm the gap and start the run."""
        (self.base / "delivered").mkdir(parents=True)
        self.source.prepare(self.base)
        self.source.send(self.base, *EVENTS)
        dag = dag_id(self.source, self.path, DEADLINE if self.has_deadline else None)
        self._run = Run(stage.airflow, dag, run_id)
        self._process = None
        self._armed.parent.mkdir(parents=True)
        self._armed.touch()
        stage.airflow.run(dag, conf(self.base), run_id=run_id)

    def begin_again(self, stage: Stage) -> None:
        """Start another run in place of one that was deleted."""
        self.deleted = self.source.holder(self.wait)
        self._run = stage.airflow.run(self.run.dag_id, conf(self.base), run_id=f"{self.run.run_id}-again")

    def stands_firm(self, stage: Stage) -> bool:
        """
        Whether a process has been standing in the gap for a while.

        Airflow 3.3.2 itself ends a worker that resumed a task when it reads the report of the first one late
        (apache/airflow #66374); the cell then begins anew.
        """
        reached = list(self._armed.parent.glob(f"{self.gap.id}.reached.*"))
        if not reached:
            return False
        if self._process is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process = psutil.Process(int(reached[0].name.rpartition(".")[2]))
                self._reached = time.monotonic()
        if self._process is None or is_gone(self._process):
            self.base = self.base.with_name(f"{self.base.name}x")
            self.begin(stage, f"{self.run.run_id}x")
            return False
        return time.monotonic() - self._reached > STANDS_FIRM

    @property
    def passed(self) -> bool:
        return self._armed.with_name(f"{self.gap.id}.passed").exists()

    def open(self, clock: str) -> None:
        """Let the process go on, its clock set by ``clock`` seconds."""
        new = self._armed.with_name("new")
        new.write_text(clock)
        new.rename(self._armed.with_name(f"{self.gap.id}.open"))

    def judge(self) -> None:
        """Note all that is not as it should be."""
        try:
            self.problems = self._judge()
        except Exception as error:
            self.problems = [f"{type(error).__name__}: {error}"]

    def _judge(self) -> list[str]:
        state, committed = self.run.state, self.source.committed(self.base)
        delivered = [tuple(file.name.split(" ", 1)) for file in (self.base / "delivered").iterdir()]
        if self.deleted:  # it may have delivered before it was deleted
            earlier = [event for run_id, event in delivered if run_id != self.run.run_id]
            delivered = [(run_id, event) for run_id, event in delivered if run_id == self.run.run_id]
            if self.source.commits and set(earlier) & {event for _, event in delivered}:
                return [f"delivered by the deleted run too: {earlier}"]
        if self.has_deadline and state == "failed" and self._is_unrecorded:
            return self._problems(
                ("delivered after the deadline", delivered, []),
                ("committed after the deadline", committed, {}),
                ("free", self._free(EVENTS), set(EVENTS)),
            )
        if state != "success":
            return [f"the run is {state}: {self.run}"]
        if len(delivered) != 1:
            return [f"delivered: {delivered}"]
        [(run_id, event)] = delivered
        record = self._record() or {}
        holder = self.source.holder(replace(self.wait, after=record.get("after", "")))
        mine = {event: holder} if self.source.commits else {}
        if self.deleted:  # it may have committed an event, which went with the run
            went = (self.deleted, UNKNOWN)
            committed = {event: by for event, by in committed.items() if by not in went or event in mine}
        free = set(EVENTS) - set(self.source.committed(self.base)) if self.source.commits else set(EVENTS)
        if self.deleted:  # or have claimed one, which lapses
            free -= {event for event, by in self.source.claimed(self.base).items() if by == self.deleted}
        return self._problems(
            ("delivered by", run_id, self.run.run_id),
            ("committed", committed, mine),
            ("free", self._free(free), free),
            ("recorded", record.get("phase"), "committed"),
        )

    @property
    def _is_unrecorded(self) -> bool:
        gap = self.gap.name
        return gap in BEFORE_THE_RECORD or (gap == "handed over" and self.path.ends_on_worker)

    def _record(self) -> Any:
        """Return the record: a worker's store has it, or the triggerer's XCom."""
        found = self.run.state_store("wait", "event_record") or self.run.xcom("wait", "event_record")
        return json.loads(found) if isinstance(found, str) else found  # what came with the success is text

    def _free(self, expected: Any) -> set[str]:
        """What is free in the end; a claim that lapses may take a moment."""
        with contextlib.suppress(TimeoutError):
            until(lambda: self.source.free(self.base) == set(expected), "the source is free", 5)
        return self.source.free(self.base)

    def _problems(self, *found: tuple[str, Any, Any]) -> list[str]:
        return [f"{what}: {is_}, not {wanted}" for what, is_, wanted in found if is_ != wanted]

    def as_dict(self) -> dict[str, Any]:
        """Write the verdict, for the page."""
        return {
            "source": self.source.name,
            "path": self.path.name,
            "gap": self.gap.id,
            "fault": self.fault,
            "problems": self.problems,
        }
