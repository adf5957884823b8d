"""The steps of a poll: how long each blocks the triggerer's loop, and what Airflow offers while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import greenback

_T = TypeVar("_T")


class Steps(Coroutine[Any, Any, _T], Iterator[Any]):
    """
    Run ``work`` step by step; a task can be made of it, or it can be awaited.

    A step is what runs between two moments at which the event loop has its turn. An object rather than an async
    function around ``work``, because there is one for each open wait.

    :param threshold: seconds; ``blocked`` is called with those of a step that took longer.
    :param portal: let each step make Airflow's synchronous calls, such as ``BaseHook.get_connection``. In a
        triggerer they work by a portal of greenback's, and one that is kept while nothing happens takes several
        times the memory of all else of a wait. So each step has its own.
    """

    __slots__ = ("_blocked", "_portal", "_step", "_threshold", "_work")

    def __init__(
        self,
        work: Coroutine[Any, Any, _T],
        threshold: float,
        blocked: Callable[[float], None],
        *,
        portal: bool = False,
    ) -> None:
        self._work = work
        self._threshold = threshold
        self._blocked = blocked
        self._portal = portal
        # The step that is within a synchronous call, for which the event loop has its turn.
        self._step: Coroutine[Any, Any, tuple[Any, StopIteration | None]] | None = None

    def __await__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        return self._timed("send", value)

    def throw(self, *error: Any) -> Any:
        return self._timed("throw", *error)

    def close(self) -> None:
        if self._step is not None:
            self._step.close()
        self._work.close()

    def _timed(self, how: str, *received: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._resume(how, *received) if self._portal else getattr(self._work, how)(*received)
        except SystemExit as error:  # which would end the triggerer
            raise RuntimeError(f"poll_for_event called sys.exit({error.code!r})") from None
        finally:
            if (took := time.perf_counter() - began) > self._threshold:
                self._blocked(took)

    def _resume(self, how: str, *received: Any) -> Any:
        if self._step is None:
            self._step = greenback.with_portal_run_sync(_one_step, getattr(self._work, how), *received)
            how, received = "send", (None,)
        try:
            return getattr(self._step, how)(*received)
        except StopIteration as done:
            self._step = None
            awaited, result = done.value
        except BaseException:
            self._step = None
            raise
        if result is not None:
            raise result
        return awaited


def _one_step(resume: Callable[..., Any], *received: Any) -> tuple[Any, StopIteration | None]:
    """Return what a step waits for, or with what it ended: a StopIteration cannot pass through a coroutine."""
    try:
        return resume(*received), None
    except StopIteration as result:
        return None, result
