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


class AtRedelivery(EventsError):
    """
    The source delivered an event to another process, or over a connection that is gone.

    A listener raises it from ``event_checkpointed``. It is no failure: the source delivers the event again, and
    the process that receives it learns that it belongs to another wait, and acknowledges it. That needs an
    ``event_id``, by which a redelivery is known.
    """


class EventNotSerializable(EventsError, TypeError):
    """
    An event holds something that Airflow cannot store and give back.

    Raised before anything is committed, so the event stays at its source.

    :ivar place: where in the event, as Python would write it: ``event['lines'][3]``.
    """

    def __init__(self, place: str, reason: str) -> None:
        what = "delivered" if place.startswith("event") else "stored"
        super().__init__(f"{place} cannot be {what}: {reason}")
        self.place = place


class EventRejected(EventsError):
    """
    Somebody has rejected the wait: there will be no event, and the task fails without another try.

    :ivar reason: what they gave as the reason.
    """

    def __init__(self, reason: str, by: str) -> None:
        super().__init__(f"the wait was rejected by {by}: {reason}")
        self.reason = reason


class EventNotSent(EventsError):
    """
    The API server did not take an event that a task sent, or could not be asked.

    A retry of the task sends the same event: it counts once, also if only the answer was lost.

    :ivar status: of the answer, as HTTP has it; None if there was none.
    """

    def __init__(self, key: str, reason: str, status: int | None = None) -> None:
        super().__init__(f"the event for the key {key!r} was not sent: {reason}")
        self.status = status


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

    Likewise of a mapped wait, whose index in the list it is mapped over has other arguments now.

    :ivar index: of the event; None of a mapped wait.
    """

    index: int | None = None

    @classmethod
    def of_mapped(cls, wait_id: str, call: str) -> ArgumentsChanged:
        """Say so of a mapped wait, and what its event was recorded for."""
        return cls(
            f"the event of {wait_id} was recorded for {call}, and the task has other arguments now: the list that "
            "it is mapped over has changed. Restore the list, or forget the event, and clear the task"
        )

    @classmethod
    def of_one(cls, wait_id: str) -> ArgumentsChanged:
        """Say so of a task that waits for many now, and waited for one event when that was recorded."""
        return cls(
            f"an event was recorded for {wait_id} when the task waited for one, and it waits for many now. "
            "Restore the DAG, or forget the event, and clear the task"
        )

    @classmethod
    def at(cls, index: int, count: int) -> ArgumentsChanged:
        """Say so of an event of a list of ``count``."""
        error = cls(
            f"event {index} was recorded for other arguments than the list of {count} has there now. An event "
            "that was taken belongs to its place in the list: restore the list (the same order, no "
            "template of the current time), or forget what is recorded, and clear the task"
        )
        error.index = index
        return error


class UndefinedInTemplate(EventsError, ValueError):
    """
    A template in a wait's arguments uses a name that there is not, in the run or at all.

    Nothing is waited for: empty text in its place would be other arguments.

    :ivar place: of the template, as Python would write it: ``listener_kwargs['key']``.
    """

    def __init__(self, place: str, template: str, problem: str, reason: str = "") -> None:
        because = f": {reason}" if reason else ""
        super().__init__(f"{problem} in {place}, which is {template!r}{because}")
        self.place = place


class ListenerUnavailable(EventsError):
    """The listener cannot be loaded in this process: not importable, or pickled by another Python."""


class UnknownOutcome(EventsError):
    """A trigger of another version of this package sent something that this one cannot read."""


class SourceUnreachable(EventsError, ConnectionError):
    """
    A source was unreachable for longer than ``[events] unreachable_timeout``.

    Nothing is taken or committed; the next try of the wait connects again.
    """

    def __init__(self, source: str, seconds: float, error: BaseException) -> None:
        super().__init__(f"{source} could not be reached for {seconds:.0f} s: {error}")


class SourceMisconfigured(EventsError):
    """
    A source is set up in a way that would lose events, or cannot be used.

    The message names the connection, what was found and what is needed.
    """


class SourceMissing(SourceMisconfigured):
    """
    There is no such queue, stream or table, or there are no credentials for it.

    Where there was one, others may be about to make it again: that is waited for, as for an unreachable source.
    """


class EventUndecodable(EventsError, ValueError):
    """
    A message is not of the format that the wait was told, or cannot be stored.

    :ivar where: its coordinates at the source, where it stays.
    :ivar reason: what is wrong with it.
    :ivar event_id: its `EventListener.event_id`; None where there is none. With it one wait fails for the message,
        and the others get the next one.
    """

    event_id: str | None = None

    def __init__(self, where: str, wanted: str, reason: str, raw: bytes) -> None:
        super().__init__(f"{where} is not {wanted}: {reason}" + (f"; it begins with {raw!r}" if raw else ""))
        self.where = where
        self.reason = reason


class InboxKeyMissing(EventsError):
    """There is nothing to sign the tokens of the inbox with. The message says what to set."""


class InboxTokenRefused(EventsError):
    """A token is not good for the inbox. The message says why."""


class InboxRefused(EventsError):
    """
    The API server cannot read what the inbox was asked, and will not when it is asked again.

    Either it is of another version of this package, or there is more in it than the API server takes.
    """

    def __init__(self, operation: str, detail: str) -> None:
        super().__init__(f"the inbox rejected the request {operation!r}: {detail}")


class InboxNotMigrated(EventsError):
    """
    The tables of the inbox are not there, or of an earlier form than this version of the package needs.

    :ivar found: the revision of their form; None if there are none.
    :ivar wanted: the revision that is needed.
    """

    def __init__(self, found: str | None, wanted: str) -> None:
        super().__init__(self._said(found, wanted))
        self.found = found
        self.wanted = wanted

    def _said(self, found: str | None, wanted: str) -> str:
        return (
            f"the tables of airflow-provider-events in Airflow's database are {_of(found)}, and this version of "
            f"it needs those of revision {wanted}: run `airflow db migrate`, or set [events] migrate_on_start = "
            "True for the API server to do it"
        )


class InboxTooNew(InboxNotMigrated):
    """A later version of the package has migrated the tables of the inbox, to a form that is not known here."""

    def _said(self, found: str | None, wanted: str) -> str:
        return (
            f"the tables of airflow-provider-events in Airflow's database are {_of(found)}, which a later version "
            f"of it has made; this version knows them up to revision {wanted}: install the later one here too"
        )


def _of(found: str | None) -> str:
    return "missing" if found is None else f"of revision {found}"
