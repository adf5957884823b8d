"""Why a request is refused, each with the status that it is answered with."""

from __future__ import annotations

from typing import ClassVar

from airflow_events.errors import EventsError


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


class TooEarly(Refusal):
    """What the wait wants is not known before it begins."""

    status = 425
    retry_after = 10


class Moving(Refusal):
    """The wait is between two states."""

    status = 503
    retry_after = 2


class Denied(Refusal):
    """The address or the signature is not valid."""

    status = 403
