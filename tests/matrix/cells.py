"""One cell of the matrix: a wait that stands in a gap, and what became of it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field, replace
from pathlib import Path as Folder
from typing import TYPE_CHECKING, Any

import psutil
from airflow.models.asset import AssetEvent
from airflow_events import Wait
from airflow_events.inbox.models import EventWait
from airflow_events.listeners.support import serde
from gaps import Gap, folder
from paths import DEADLINE, Path, dag_id
from source import EVENTS, Source, conf
from sqlalchemy import create_engine, func, select
from sqlalchemy.pool import NullPool

from deployment import FINISHED, Deployment, Run, until
from mysql import Mysql
from postgres import Postgres

if TYPE_CHECKING:
    from faults import Fault

# Seconds.
STANDS_FIRM = 4
MISSED = 15
# There no event is recorded, or is the wait's no longer, so that a deadline may come first.
WITHOUT_A_RECORD = ("deferring", "beginning", "polling", "polled", "recording", "lost")


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


@dataclass(frozen=True)
class Stage:
    """The Airflow that the matrix is run on."""

    airflow: Deployment
    database: Postgres | Mysql
    folder: Folder

    def finish(self, cells: list[Cell], timeout: float = 300) -> None:
        """Wait until all runs have ended, or the time is up, which the verdicts will tell."""

        def finished() -> bool:
            with contextlib.suppress(OSError, RuntimeError):
                return all(cell.run.state in FINISHED for cell in cells)
            return False

        with contextlib.suppress(TimeoutError):
            until(finished, "the runs end", timeout, 1)

    def row(self, run: Run) -> Any:
        """Return the inbox's row of a run's wait, or None."""
        table = EventWait.__table__
        found = select(table).filter_by(dag_id=run.dag_id, run_id=run.run_id, task_id="wait")
        with self._database.connect() as connection:
            return connection.execute(found).one_or_none()

    def asset_events(self, run: Run) -> int:
        """Return how many events of assets a run's wait has made."""
        made = select(func.count()).where(
            AssetEvent.source_dag_id == run.dag_id,
            AssetEvent.source_run_id == run.run_id,
            AssetEvent.source_task_id == "wait",
        )
        with self._database.connect() as connection:
            return int(connection.scalar(made) or 0)

    @property
    def _database(self) -> Any:
        return create_engine(self.database.url, poolclass=NullPool)


@dataclass
class Cell:
    """A wait in a gap."""

    source: Source
    path: Path
    gap: Gap
    fault: Fault
    base: Folder
    deleted: bool = False
    _run: Run | None = None
    _process: psutil.Process | None = None
    _reached: float = 0
    _ended: float = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.source.name}, {self.path.name}, {self.gap.place} {self.gap.name}, {self.fault.name}"

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
        """The file of this cell's gap."""
        return folder(self.run.deployment.home, self.run.run_id) / self.gap.id

    @property
    def wait(self) -> Wait:
        return Wait(self.run.dag_id, self.run.run_id, "wait")

    def begin(self, stage: Stage, run_id: str) -> None:
        """Send the events, arm the gap and start the run."""
        (self.base / "delivered").mkdir(parents=True)
        self.source.prepare(self.base)
        self.source.send(self.base, *EVENTS)
        dag = dag_id(self.source, self.path, DEADLINE if self.fault.has_deadline else None)
        self._run = Run(stage.airflow, dag, run_id)
        self._process = None
        self._ended = 0.0
        self._arm()
        stage.airflow.run(dag, conf(self.base), run_id=run_id)

    def also(self, gap: Gap) -> Cell:
        """Arm another gap of the same wait, and return it as a cell."""
        other = replace(self, gap=gap, _process=None, problems=[])
        other._arm()
        return other

    def _arm(self) -> None:
        self._armed.parent.mkdir(parents=True, exist_ok=True)
        self._armed.write_text("once" if self.fault.once else "")

    def begin_again(self, stage: Stage) -> None:
        """Start another run in place of one that was deleted."""
        self.deleted = True
        self._run = stage.airflow.run(self.run.dag_id, conf(self.base), run_id=f"{self.run.run_id}-again")

    def stands_firm(self, stage: Stage) -> bool:
        """
        Whether a process has been standing in the gap for a while.

        Airflow 3.3.2 itself ends a worker that resumed a task when it reads the report of the first one late
        (apache/airflow #66374); the cell then begins again.
        """
        reached = list(self._armed.parent.glob(f"{self.gap.id}.reached.*"))
        if not reached:
            if self._has_missed_it(stage):
                self._begin_under_another_name(stage)
            return False
        if self._process is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process = psutil.Process(int(reached[0].name.rpartition(".")[2]))
                self._reached = time.monotonic()
        if self._process is None or is_gone(self._process):
            self._begin_under_another_name(stage)
            return False
        return time.monotonic() - self._reached > STANDS_FIRM

    def _has_missed_it(self, stage: Stage) -> bool:
        """
        Whether the task has ended, and its trigger was cancelled before it came to the gap behind that.

        On a busy machine Airflow sees that it has ended before the answer has come to the trigger.
        """
        if (self.gap.place, self.gap.name) != ("triggerer", "finished"):
            return False
        row = stage.row(self.run)
        if row is None or row.finished_by is None:
            return False
        self._ended = self._ended or time.monotonic()
        return time.monotonic() - self._ended > MISSED

    def _begin_under_another_name(self, stage: Stage) -> None:
        self.base = self.base.with_name(f"{self.base.name}x")
        self.begin(stage, f"{self.run.run_id}x")

    @property
    def passed(self) -> bool:
        return self._armed.with_name(f"{self.gap.id}.passed").exists()

    def open(self, clock: str) -> None:
        """Let the process go on, its clock set by ``clock`` seconds."""
        new = self._armed.with_name("new")
        new.write_text(clock)
        new.rename(self._armed.with_name(f"{self.gap.id}.open"))

    def judge(self, stage: Stage) -> None:
        """Note all that is not as it should be."""
        try:
            self.problems = self._judge(stage)
        except Exception as error:
            self.problems = [f"{type(error).__name__}: {error}"]

    def _judge(self, stage: Stage) -> list[str]:
        state, committed = self.run.state, set(self.source.committed(self.base))
        delivered = [tuple(file.name.split(" ", 1)) for file in (self.base / "delivered").iterdir()]
        if self.deleted:  # it may have delivered before it was deleted
            earlier = [event for run_id, event in delivered if run_id != self.run.run_id]
            delivered = [(run_id, event) for run_id, event in delivered if run_id == self.run.run_id]
            if self.source.commits and set(earlier) & {event for _, event in delivered}:
                return [f"delivered by the deleted run too: {earlier}"]
        if self.fault.has_deadline and state == "failed" and self.gap.name in WITHOUT_A_RECORD:
            return self._problems(
                ("delivered after the deadline", delivered, []),
                ("committed after the deadline", committed, set()),
                ("free", self._free(EVENTS), set(EVENTS)),
            )
        if state != "success":
            return [f"the run is {state}: {self.run}"]
        if len(delivered) != 1:
            return [f"delivered: {delivered}"]
        [(run_id, event)] = delivered
        row = stage.row(self.run)
        if row is None or row.phase != "committed":
            return [f"the inbox has {row and row.phase}"]
        mine = {event} if self.source.commits else set()
        if self.source.acknowledges_later and event not in committed:
            committed = self._acknowledged_next(stage)
        free = set(EVENTS) - committed if self.source.commits else set(EVENTS)
        if self.deleted:  # it may have committed an event, which went with the run
            committed &= mine
        return self._problems(
            ("delivered by", run_id, self.run.run_id),
            ("committed", committed, mine),
            ("free", self._free(free), free),
            ("recorded", self.source.identity(serde.decode(row.event)), event),
            # What a worker ends, it delivers.
            ("noted as delivered", row.delivered_at is not None, not self.path.ends_on_worker),
            ("events of its outlet", *self._outcomes(stage)),
        )

    def _acknowledged_next(self, stage: Stage) -> set[str]:
        """Let another run wait, and return what is acknowledged then, besides what that was delivered."""
        other = stage.airflow.run(self.run.dag_id, conf(self.base), run_id=f"{self.run.run_id}-next")
        other.finished(timeout=120)
        its = {file.name.split(" ", 1)[1] for file in (self.base / "delivered").glob(f"{other.run_id} *")}
        return set(self.source.committed(self.base)) - its

    def _outcomes(self, stage: Stage) -> tuple[int, int]:
        """Return how many events its outlet has, and is to have; a clear may have made others."""
        found, wanted = stage.asset_events(self.run), int(self.path.has_outlet)
        return (min(found, wanted) if self.fault.clears else found), wanted

    def _free(self, expected: Any) -> set[str]:
        """What is free in the end; what a killed process had in hand may take a moment."""
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
            "fault": self.fault.name,
            "problems": self.problems,
        }
