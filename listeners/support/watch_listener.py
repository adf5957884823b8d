"""What listeners have in common that watch a log for a message."""

from __future__ import annotations

from typing import Any, ClassVar

from airflow_events.listeners.base import EventListener, is_template
from airflow_events.listeners.support.timestamps import check_since
from airflow_events.listeners.support.values import Match


class LogWatchListener(EventListener):
    """A listener that waits for the first message of a log that matches, and takes nothing away."""

    hosted: ClassVar[bool] = True

    @classmethod
    def check_arguments(cls, *args: Any, match: Any = None, since: Any = None, **others: Any) -> None:
        """Refuse an invalid ``match`` or ``since``; what templates say is not known yet."""
        if not is_template(match):
            Match(match)
        if not is_template(since):
            check_since(since)
