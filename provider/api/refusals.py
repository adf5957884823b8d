"""Why a request is refused, each with the status that it is answered with."""

from __future__ import annotations

from typing import Any, ClassVar

from airflow_events.errors import EventsError
from airflow_events.listeners.support import schemas


class Refusal(EventsError):
    """A request that changed nothing."""

    status: ClassVar[int]
    retry_after: ClassVar[int | None] = None
    """Seconds after which the same request has a chance; None: it has not."""


class NoSuchWait(Refusal):
    """There is no such run or task, or it does not wait for HTTP events."""

    status = 404


class HasEvent(Refusal):
    """The wait has another event already."""

    status = 409


class Over(Refusal):
    """The wait has ended without an event."""

    status = 410


class Unfit(Refusal):
    """The payload is not what the wait wants, or cannot be stored."""

    status = 422


class Misfit(Unfit):
    """
    The payload does not fit the wait's schema.

    Why is only worked out where it is said: that may take a while, and as this is raised the wait is locked.
    """

    def __init__(self, schema: Any, payload: Any) -> None:
        super().__init__()
        self._judged = schema, payload

    def __str__(self) -> str:
        return schemas.misfit(*self._judged)


class TooEarly(Refusal):
    """What the wait wants is not known before it begins."""

    status = 425
    retry_after = 10


class TooMany(Refusal):
    """More events are kept than are allowed to be."""

    status = 429
    retry_after = 60


class Moving(Refusal):
    """The wait is between two states."""

    status = 503
    retry_after = 2


class Unreadable(Refusal):
    """What the wait waits for is encrypted with another Fernet key, say."""

    status = 503
    retry_after = 60


class Denied(Refusal):
    """The address or the signature is not valid."""

    status = 403
