"""Everything that this package raises on its own account."""

from __future__ import annotations


class EventsError(Exception):
    """The root of this package's errors."""


class EventLost(EventsError):
    """
    The source has given the event to another wait.

    A listener raises it from ``event_checkpointed``. It is no failure: the record of the event is
    dropped and the wait goes on waiting.
    """


class EventNotSerializable(EventsError, TypeError):
    """
    An event holds something that Airflow cannot store and give back.

    Raised before anything is committed, so the event stays at its source.

    :ivar place: where in the event, as Python would write it: ``event['lines'][3]``.
    """

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place} cannot be delivered: {reason}")
        self.place = place


class EventRejected(EventsError):
    """
    Somebody has rejected the wait: there will be no event, and the task fails without another try.

    :ivar reason: what they gave as the reason.
    """

    def __init__(self, reason: str, by: str) -> None:
        super().__init__(f"the wait was rejected by {by}: {reason}")
        self.reason = reason


class CommitFailed(EventsError):
    """
    ``event_checkpointed`` kept raising for ``[events] commit_timeout`` seconds.

    The record of the event stays, and the next try of the wait begins with the commit. The cause is
    the listener's last exception.

    :ivar attempts: how often the commit was tried.
    """

    def __init__(self, listener: str, wait_id: str, attempts: int) -> None:
        super().__init__(
            f"{listener}.event_checkpointed failed {attempts} times for the wait {wait_id}; "
            "its event is recorded, and the next try of the task commits it"
        )
        self.attempts = attempts


class ArgumentsChanged(EventsError):
    """
    A task that waits for many events has recorded one for other arguments than are at its place now.

    Its source may have forgotten that event, so it is not dropped for this.

    :ivar index: of the event.
    """

    def __init__(self, index: int, count: int) -> None:
        super().__init__(
            f"event {index} was recorded for other arguments than the list of {count} has there now. An event "
            "that was taken belongs to its place in the list: let the list be as it was (the same order, no "
            "template of the current time), or forget what is recorded, and clear the task"
        )
        self.index = index


class ListenerUnavailable(EventsError):
    """The listener cannot be had in this process: not importable, or pickled by another Python."""


class UnknownOutcome(EventsError):
    """A trigger of another version of this package sent something that this one cannot read."""


class SourceUnreachable(EventsError, ConnectionError):
    """
    A source was away for longer than ``[events] unreachable_timeout``.

    Nothing is taken or committed; the next try of the wait connects again.
    """

    def __init__(self, source: str, seconds: float, error: BaseException) -> None:
        super().__init__(f"{source} could not be reached for {seconds:.0f} s: {error}")


class SourceUnfit(EventsError):
    """
    A source is set up in a way that would lose events, or cannot be used.

    The message names the connection, what was found and what is needed.
    """


class EventUndecodable(EventsError, ValueError):
    """
    A message is not of the format that the wait was told.

    :ivar where: its coordinates at the source, where it stays.
    """

    def __init__(self, where: str, wanted: str, reason: str, raw: bytes) -> None:
        super().__init__(f"{where} is not {wanted}: {reason}; it begins with {raw!r}")
        self.where = where
