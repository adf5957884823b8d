"""What a listener is asked for once its event is recorded, or is not to be: to commit it, or to give it back."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import greenback
from airflow_events import metrics, settings
from airflow_events.errors import AtRedelivery, CommitFailed, EventLost
from airflow_events.listeners.base import EventListener, Wait, releases, working_for
from airflow_events.listeners.support.shared import background
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_delay
from tenacity.wait import wait_exponential, wait_random

log = logging.getLogger(__name__)


class Superseded(Exception):
    """The wait is another's by now, or nobody's, and its event may be another's."""


# What a listener says to a commit, and is no failure of it; and what ends it.
_ANSWERS = (AtRedelivery, EventLost, Superseded)
# Seconds that a commit, or giving back, which takes too long has to end.
_LONGEST_GOODBYE = 5.0
# Seconds that giving back may take.
_LONGEST_RELEASE = 20.0
# Seconds after which an event is given back that nothing can be done with now.
_LATER = 300.0


async def commit(
    listener: type[EventListener],
    wait: Wait,
    event: Any,
    check: Callable[[], Awaitable[None]] | None = None,
    longest: float | None = None,
) -> None:
    """
    Call ``event_checkpointed`` of a fresh listener, again and again while it fails.

    :param check: called before each attempt but the first, since a user may have cleared the wait meanwhile.
    :param longest: seconds for which it may fail, where those of the settings are too many.
    :raises AtRedelivery: as the listener says; `EventLost` likewise.
    :raises Superseded: as ``check`` says.
    :raises CommitFailed: it failed for ``[events] commit_timeout`` seconds.
    """
    timeout = settings.commit_timeout()
    if longest is not None:
        timeout = min(timeout, longest)

    async def once() -> None:
        if check is not None and attempts.statistics["attempt_number"] > 1:
            await check()
        try:
            await _bounded(lambda: listener().event_checkpointed(event), "event_checkpointed", timeout)
        except _ANSWERS:
            raise
        except Exception:
            metrics.count(metrics.COMMIT_FAILED, **tags(listener, wait))
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
        retry=retry_if_exception(lambda e: isinstance(e, Exception) and not isinstance(e, _ANSWERS)),
        stop=stop_after_delay(timeout),
        wait=wait_exponential(multiplier=0.5, max=30) + wait_random(0, 0.5),
        before_sleep=failed,
        retry_error_callback=gave_up,
    )
    with working_for(wait):
        await attempts(once)


async def _bounded(call: Callable[[], Awaitable[Any]], name: str, seconds: float) -> None:
    """
    Have a listener do something, in a task of its own: that what it awaits is cancelled does not cancel this.

    :param name: of the listener's method.
    :param seconds: for a source that never answers.
    :raises asyncio.TimeoutError: it took longer.
    :raises RuntimeError: it cancelled itself, or would have ended the triggerer. What it raises otherwise escapes.
    """
    has_portal = greenback.has_portal()

    async def work() -> None:
        await inherit_portal(has_portal)
        try:
            await call()
        except SystemExit as error:
            raise RuntimeError(f"{name} called sys.exit({error.code!r})") from None

    task = asyncio.ensure_future(work())
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise asyncio.TimeoutError
        if task.cancelled():
            raise RuntimeError(f"{name} cancelled itself")
        task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_LONGEST_GOODBYE)


async def acknowledge(
    listener: type[EventListener],
    wait: Wait,
    event: Any,
    check: Callable[[], Awaitable[None]] | None = None,
    longest: float | None = None,
) -> bool:
    """
    Commit an event, and return whether the source has confirmed that it has forgotten it.

    If not, it delivers it again.

    :param check: as of `commit`; ``longest`` likewise.
    :raises EventLost: as the listener says.
    :raises CommitFailed: it failed for ``[events] commit_timeout`` seconds.
    :raises Superseded: as ``check`` says.
    """
    try:
        await commit(listener, wait, event, check, longest)
    except AtRedelivery as later:
        log.info("The source delivers the event again, and it is acknowledged then: %s", later)
        return False
    return True


def recorded(listener: type[EventListener], wait: Wait, arrived: float | None) -> None:
    """Tell the metrics that the event which arrived then (seconds since the epoch) is recorded now."""
    metrics.count(metrics.RECORDED, **tags(listener, wait))
    metrics.since(metrics.TO_RECORD, arrived, **tags(listener, wait))


def delivered(listener: type[EventListener], wait: Wait, arrived: float | None) -> None:
    """Tell the metrics that the event which arrived then (seconds since the epoch) is the wait's result now."""
    metrics.since(metrics.TO_DELIVERY, arrived, **tags(listener, wait))


def tags(listener: type[EventListener], wait: Wait) -> dict[str, str]:
    """Return what the metrics of a wait are told apart by."""
    return {"dag_id": wait.dag_id, "listener": listener.__qualname__}


async def inherit_portal(has_portal: bool) -> None:
    """
    Let a task of its own use Airflow's synchronous calls, such as ``BaseHook.get_connection``.

    In a triggerer they work by a portal, which Airflow opens for the trigger's own task.

    :param has_portal: whether the task that started this one had it.
    """
    if has_portal:
        await greenback.ensure_portal()


def release_later(listener: type[EventListener], wait: Wait, event: Any, args: Any, kwargs: Any) -> None:
    """Give back, five minutes from now, an event that nothing can be done with: others get what is behind it."""

    async def wait_and_release() -> None:
        await inherit_portal(has_portal)
        await asyncio.sleep(_LATER)
        await release(listener, wait, event, args, kwargs)

    has_portal = greenback.has_portal()
    background(wait_and_release(), f"giving back later what {wait.id} was given")


async def release(listener: type[EventListener], wait: Wait, event: Any | None, args: Any, kwargs: Any) -> None:
    """Give back what the wait holds, if the listener can; that it failed is only logged."""
    if not releases(listener):
        return
    try:
        with working_for(wait):
            give_back = functools.partial(listener().event_released, event, *args, **kwargs)
            await _bounded(give_back, "event_released", _LONGEST_RELEASE)
    except Exception:
        log.warning(
            "%s.event_released failed for the wait %s; the source has to deliver it again by itself",
            listener.__qualname__,
            wait.id,
            exc_info=True,
        )
