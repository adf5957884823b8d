"""Finding out which listener blocks the triggerer's loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


@coroutine
def timed(
    work: Coroutine[Any, Any, _T], threshold: float, blocked: Callable[[float], None]
) -> Generator[Any, Any, _T]:
    """
    Await ``work``, and call ``blocked`` with the seconds when a step of it took longer than ``threshold``.

    A step is what runs between two moments at which the event loop has its turn.
    """
    resume: Callable[[Any], Any] = work.send
    received: Any = None
    while True:
        began = time.perf_counter()
        try:
            awaited = resume(received)
        except StopIteration as done:
            result: _T = done.value
            return result
        finally:
            if (took := time.perf_counter() - began) > threshold:
                blocked(took)
        try:
            received = yield awaited
            resume = work.send
        except GeneratorExit:
            work.close()
            raise
        except BaseException as error:
            received = error
            resume = work.throw
