"""The moment at which the API server next has something to do for parked waits."""

from __future__ import annotations

import threading
import time
from datetime import datetime, timezone


class Alarm:
    """
    Wakes the thread that waits for it, at the latest when the earliest moment has come that it was told.

    It knows what this process has parked; what others have, the database tells.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._at: datetime | None = None
        self._over = False

    def ring_at(self, moment: datetime) -> None:
        """Ring at a moment, if it does not ring before."""
        with self._changed:
            if self._at is None or moment < self._at:
                self._at = moment
                self._changed.notify()

    def end(self) -> None:
        """Ring now, and whenever somebody waits for it from now on."""
        with self._changed:
            self._over = True
            self._changed.notify()

    def wait(self, longest: float) -> bool:
        """Wait until it rings, for ``longest`` seconds at most, and forget when; return False after `end`."""
        with self._changed:
            until = time.monotonic() + longest
            while not self._over and (left := self._left(until)) > 0:
                self._changed.wait(left)
            self._at = None
            return not self._over

    def _left(self, until: float) -> float:
        left = until - time.monotonic()  # a clock that is set back makes nobody wait for longer
        return left if self._at is None else min(left, (self._at - datetime.now(timezone.utc)).total_seconds())


alarm = Alarm()
"""Of this process."""
