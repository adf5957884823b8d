"""
From an event that was polled to an event that may be delivered: record, commit, note.

This is the one place where an event becomes final, called by the triggerer and by the worker alike.
Its order is the promise:

1. The record is read. If there is one, it is the wait's event, whatever was polled meanwhile.
2. The event is recorded, in Airflow's database.
3. It is committed, at the source, by a fresh listener.
4. The commit is noted in the record.

Whoever dies in between leaves a state from which `settle` goes on: before 2 the claim, from 2 on the
record. Nothing is committed that is not recorded (nothing is lost), and nothing is returned that is
not committed (nothing comes twice).
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import logging
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Protocol

import greenback
from airflow_events import metrics, settings
from airflow_events.errors import CommitFailed, EventLost, EventRejected
from airflow_events.listeners.base import EventListener, Wait, commits, releases, working_for
from airflow_events.listeners.serde import as_json, check, decode
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_delay
from tenacity.wait import wait_exponential, wait_random

log = logging.getLogger(__name__)


class Phase(str, enum.Enum):
    """How far a recorded event has come. The values stand in Airflow's database: they are frozen."""

    RECORDED = "recorded"
    COMMITTED = "committed"
    REJECTED = "rejected"
    """There will be no event. What stands in its place says why, by whom, and of which generation."""


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def is_to_come(recorded: datetime | None) -> bool:
    """Whether what was written ahead of an event, which comes then, is no record yet."""
    return recorded is not None and recorded > datetime.now(timezone.utc)


@dataclass(frozen=True)
class Record:
    """
    The event of a wait, as it is durable in Airflow's database.

    :param id: of this recording, so that one of them can be dropped without touching a later one.
    :param until: of an event that was sent before its wait had begun: when it lapses unless the wait has
        taken it by then. None is never.
    :param receipt: what the sender of an event that was sent to the wait was told; None of all others.
    :param recorded_at: when the event was recorded first, ISO 8601 in UTC; empty in records of earlier versions.
    :param after: the wait's `airflow_events.listeners.base.Wait.after` when it claimed the event.
    :param foreseen: written before the event comes, which is at ``recorded_at``; until then it is no record.
    """

    event: Any
    phase: Phase
    id: str = field(default="", compare=False)
    until: datetime | None = None
    receipt: dict[str, Any] | None = None
    recorded_at: str = field(default_factory=_now, compare=False)
    after: str = field(default="", compare=False)
    foreseen: bool = field(default=False, compare=False)

    @property
    def is_to_come(self) -> bool:
        """Whether the event is foreseen and has not come yet."""
        return self.foreseen and is_to_come(datetime.fromisoformat(self.recorded_at))

    @property
    def lapsed(self) -> bool:
        """Whether the event came too early for the wait to take it."""
        return self.until is not None and self.until < datetime.now(timezone.utc)

    def taken(self) -> Record:
        """Return the record once the wait has taken it, after which it does not lapse."""
        return dataclasses.replace(self, until=None)

    def committed(self) -> Record:
        """Return the record after the commit."""
        return dataclasses.replace(self, phase=Phase.COMMITTED)

    def as_dict(self) -> dict[str, Any]:
        """Write the record as it is stored."""
        optional = {
            "until": self.until,
            "receipt": self.receipt,
            "after": self.after or None,
            "foreseen": self.foreseen or None,
        }
        # The phase comes first: the page finds uncommitted records in the database by how they begin.
        return {
            "phase": self.phase.value,
            "event": self.event,
            "id": self.id,
            "recorded_at": self.recorded_at,
            **{name: value for name, value in optional.items() if value is not None},
        }

    def as_xcom(self) -> dict[str, Any]:
        """Write the record for a task's success to bring along, which Airflow stores as text."""
        xcom: dict[str, Any] = as_json(self.as_dict())
        return xcom

    @classmethod
    def from_dict(cls, stored: dict[str, Any] | str) -> Record:
        """Read what `as_dict` wrote, or the text that became of `as_xcom`."""
        told: dict[str, Any] = decode(stored) if isinstance(stored, str) else stored
        return cls(
            event=told["event"],
            phase=Phase(told["phase"]),
            id=told.get("id", ""),
            until=told.get("until"),
            receipt=told.get("receipt"),
            recorded_at=told.get("recorded_at", ""),
            after=told.get("after", ""),
            foreseen=told.get("foreseen", False),
        )


class RecordStore(Protocol):
    """Where the record of one wait is kept. Each method is durable when it returns."""

    @property
    def after(self) -> str:
        """The id of the record that was dropped last, as `read` has found it; empty if none was."""

    async def read(self) -> Record | None:
        """Return the record, or None if no event has been recorded, or one that has lapsed."""

    async def write(self, record: Record) -> None:
        """Put ``record`` in the place of any earlier one."""

    async def drop(self, record: Record) -> None:
        """Forget this record; nothing happens if it is forgotten already, or if there is a later one."""


async def settle(
    listener: type[EventListener],
    wait: Wait,
    store: RecordStore,
    event: Any,
    *,
    args: Any = (),
    kwargs: Any = None,
    arrived: float | None = None,
) -> Any:
    """
    Record and commit ``event`` for ``wait``, and return the event to deliver.

    That is another than ``event`` if the wait already has one; ``event`` is then released.

    :param args: what ``event`` was polled with, for `EventListener.event_released`; ``kwargs`` likewise.
    :param arrived: when it was polled, in seconds since the epoch, for the metrics; None if nobody knows.
    :raises EventLost: another wait has the event; the record is dropped, and the wait should go on, under the
        name that it has then. Or ``event`` was polled under a name that the wait has no more.
    :raises EventRejected: the wait was rejected meanwhile.
    :raises EventNotSerializable: before anything was recorded.
    :raises CommitFailed: the event is recorded and not committed.
    """
    record = await store.read()
    if record is not None and record.phase is Phase.REJECTED:
        raise EventRejected(record.event["reason"], record.event["by"])
    superfluous = record is not None and record.event != event
    polled_by = wait
    if record is None:
        if store.after != wait.after:
            await release(listener, wait, event, args, kwargs or {})
            raise EventLost(f"{wait.id} has lost an event since it claimed this one, and has another name now")
        record = record_of(listener, wait, event)
        await store.write(record)
        recorded(listener, wait, arrived)
    elif record.until is not None:
        record = record.taken()
        await store.write(record)
    if record.phase is Phase.RECORDED:
        wait = dataclasses.replace(wait, after=record.after)
        try:
            await commit(listener, wait, record.event)
        except EventLost:
            await store.drop(record)
            metrics.count(metrics.LOST, **_tags(listener, wait))
            if superfluous:
                await release(listener, polled_by, event, args, kwargs or {})
            raise
        metrics.count(metrics.COMMITTED, **_tags(listener, wait))
        record = record.committed()
        await store.write(record)
    if superfluous:
        # Only now: should it be the same event in another form, it is committed and releasing it
        # changes nothing.
        await release(listener, polled_by, event, args, kwargs or {})
    return record.event


def record_of(listener: type[EventListener], wait: Wait, event: Any, at: datetime | None = None) -> Record:
    """
    Return a record of an event that has none yet.

    :param at: when it comes, if it is foreseen; None if it is there.
    :raises EventNotSerializable: it cannot be recorded.
    """
    check(event)
    phase = Phase.RECORDED if commits(listener) else Phase.COMMITTED
    record = Record(event, phase, uuid.uuid4().hex, after=wait.after)
    return record if at is None else dataclasses.replace(record, recorded_at=at.isoformat(), foreseen=True)


async def commit(listener: type[EventListener], wait: Wait, event: Any) -> None:
    """
    Call ``event_checkpointed`` of a fresh listener, again and again while it fails.

    :raises EventLost: as the listener says.
    :raises CommitFailed: it failed for ``[events] commit_timeout`` seconds.
    """
    timeout = settings.commit_timeout()

    has_portal = greenback.has_portal()

    async def checkpoint() -> None:
        await inherit_portal(has_portal)
        await listener().event_checkpointed(event)

    async def once() -> None:
        try:
            # The timeout is for a source that never answers.
            await asyncio.wait_for(checkpoint(), timeout)
        except EventLost:
            raise
        except Exception:
            metrics.count(metrics.COMMIT_FAILED, **_tags(listener, wait))
            raise

    def failed(state: RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        log.warning(
            "%s.event_checkpointed failed for the wait %s; its event is recorded. Again in %.1f s (try %d)",
            listener.__qualname__,
            wait.id,
            state.next_action.sleep,
            state.attempt_number + 1,
            exc_info=state.outcome.exception(),
        )

    def gave_up(state: RetryCallState) -> None:
        assert state.outcome is not None
        raise CommitFailed(listener.__qualname__, wait.id, state.attempt_number) from state.outcome.exception()

    attempts = AsyncRetrying(
        retry=retry_if_exception(lambda e: isinstance(e, Exception) and not isinstance(e, EventLost)),
        stop=stop_after_delay(timeout),
        wait=wait_exponential(multiplier=0.5, max=30) + wait_random(0, 0.5),
        before_sleep=failed,
        retry_error_callback=gave_up,
    )
    with working_for(wait):
        await attempts(once)


def recorded(listener: type[EventListener], wait: Wait, arrived: float | None) -> None:
    """Tell the metrics that the event which arrived then (seconds since the epoch) is recorded now."""
    metrics.count(metrics.RECORDED, **_tags(listener, wait))
    metrics.since(metrics.TO_RECORD, arrived, **_tags(listener, wait))


def delivered(listener: type[EventListener], wait: Wait, arrived: float | None) -> None:
    """Tell the metrics that the event which arrived then (seconds since the epoch) is the wait's result now."""
    metrics.since(metrics.TO_DELIVERY, arrived, **_tags(listener, wait))


def _tags(listener: type[EventListener], wait: Wait) -> dict[str, str]:
    return {"dag_id": wait.dag_id, "listener": listener.__qualname__}


async def inherit_portal(has_portal: bool) -> None:
    """
    Let a task of its own use Airflow's synchronous calls, such as ``BaseHook.get_connection``.

    In a triggerer they work by a portal, which Airflow opens for the trigger's own task.

    :param has_portal: whether the task that started this one had it.
    """
    if has_portal:
        await greenback.ensure_portal()


async def release(listener: type[EventListener], wait: Wait, event: Any | None, args: Any, kwargs: Any) -> None:
    """Give back what the wait holds, if the listener can; that it failed is only logged."""
    if not releases(listener):
        return
    try:
        with working_for(wait):
            await listener().event_released(event, *args, **kwargs)
    except Exception:
        log.warning(
            "%s.event_released failed for the wait %s; its claim will have to lapse",
            listener.__qualname__,
            wait.id,
            exc_info=True,
        )
