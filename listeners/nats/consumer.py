"""The durable consumer: made if it is not there, refused where it would lose events or hold them up."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_events.errors import SourceMisconfigured
from airflow_events.listeners.nats.client import SECOND, Server, about_of
from airflow_events.listeners.nats.messages import Source, covers
from nats.js.errors import APIError, NotFoundError

if TYPE_CHECKING:
    from airflow_events.listeners.nats import Start

# Of a consumer that is made here; the server's own limit is 1000.
_MAX_ACK_PENDING = 10_000
# What the server answers where it, or the account, allows less (err_code).
_TOO_MUCH_PENDING = 10121
# The shortest time, in seconds, within which what is in hand is kept in time.
SHORTEST = 1.0
# What a consumer may not have, and why.
_UNSET = {
    "deliver_subject": "none: a consumer that is pulled from",
    "inactive_threshold": "none: it stays while no wait waits",
    "headers_only": "false: the messages whole",
    "priority_groups": "none: every triggerer may pull",
}


@dataclass(frozen=True)
class Wanted:
    """
    What the waits want of a consumer.

    :param subject: of which subjects; None is whatever it has.
    :param deliver_policy: where one begins that is made here.
    :param lease: the ``ack_wait`` of one that is made here, in seconds.
    :param persistent: whether it must be kept on disk.
    :param again: when the stream was made of which there was a consumer, as the server writes it, and the sequence
        up to which all was acknowledged: one that is made in its place goes on there. None if there was none.
    """

    subject: str | None
    deliver_policy: Start
    lease: float
    persistent: bool
    again: tuple[str, int] | None = None


class Consumer:
    """
    A consumer as JetStream describes it, and its stream.

    :ivar config: as it was when it was checked.
    """

    def __init__(self, stream: dict[str, Any], about: dict[str, Any]) -> None:
        self._stream = stream
        self.config: dict[str, Any] = about["config"]
        self.stream_made: str = stream["created"]
        self.made: str = about["created"]
        self.acknowledged_to: int = about["ack_floor"]["stream_seq"]

    @property
    def filters(self) -> list[str]:
        """The subjects that it delivers."""
        return self.config.get("filter_subjects") or [self.config.get("filter_subject") or ">"]

    @property
    def again_after(self) -> float:
        """After how many seconds JetStream delivers again what nobody keeps."""
        return float(min([self.config.get("ack_wait", 30 * SECOND), *(self.config.get("backoff") or ())]) / SECOND)

    @property
    def max_batch(self) -> int | None:
        """How many messages may be pulled at once; None if there is no limit."""
        return self.config.get("max_batch") or None

    def delivers(self, subject: str) -> bool:
        """Whether it would deliver what is published to ``subject``."""
        subjects = self._stream["config"].get("subjects") or []
        return all(any(covers(pattern, subject) for pattern in patterns) for patterns in (subjects, self.filters))

    def check(self, source: Source, wanted: Wanted) -> None:
        """
        Check that it serves the waits.

        :raises SourceMisconfigured: it would lose events, or keep them from the waits.
        """
        config, filters = self.config, self.filters
        pending = config.get("max_ack_pending", -1)
        again, again_by = timedelta(seconds=self.again_after), "backoff" if config.get("backoff") else "ack_wait"
        if wanted.persistent:
            stored = "memory" if config.get("mem_storage") else "file"
            for what, found in (("the stream", self._stream["config"]["storage"]), ("the consumer", stored)):
                _need(source, what, "storage", found, found == "file", "'file', or require_persistence=False")
        for key, value, fits, needed in (
            ("ack_policy", config["ack_policy"], config["ack_policy"] == "explicit", "'explicit'"),
            ("max_deliver", config.get("max_deliver"), config.get("max_deliver", -1) <= 0, "-1: none given up"),
            *((key, config.get(key), not config.get(key), needed) for key, needed in _UNSET.items()),
            ("max_ack_pending", pending, pending != 1, "more: one message that cannot be read would stop all"),
            (again_by, again, again >= timedelta(seconds=SHORTEST), f"{SHORTEST:g} s or more, to be kept in time"),
        ):
            _need(source, "the consumer", key, value, fits, needed)
        if wanted.subject is not None:
            fits = filters == [wanted.subject]
            _need(source, "the consumer", "filter_subject", filters, fits, repr(wanted.subject))


async def info(server: Server, source: Source) -> dict[str, Any]:
    """
    Return what JetStream says of the consumer.

    :raises NotFoundError: there is none.
    """
    return await server.api(f"CONSUMER.INFO.{source.stream}.{source.durable}")


async def consumer_of(server: Server, source: Source, wanted: Wanted) -> Consumer:
    """
    Return the consumer, which is made if it is not there.

    :raises SourceMisconfigured: see `Consumer.check`.
    """
    stream = await about_of(server, source)
    try:
        about = await info(server, source)
    except NotFoundError:
        await _make(server, source, wanted, stream)
        about = await info(server, source)
    # The stream is looked up again, since it may have been made again before the consumer was found. Now it is the
    # consumer's, as long as that is the same: it goes with its stream.
    consumer = Consumer(await about_of(server, source), about)
    consumer.check(source, wanted)
    return consumer


async def _make(server: Server, source: Source, wanted: Wanted, stream: dict[str, Any]) -> None:
    limit = (stream["config"].get("consumer_limits") or {}).get("max_ack_pending") or _MAX_ACK_PENDING
    config: dict[str, Any] = {
        "durable_name": source.durable,
        "description": "Waits of airflow-provider-events",
        "deliver_policy": wanted.deliver_policy,
        "ack_policy": "explicit",
        "ack_wait": round(wanted.lease * SECOND),
        "max_deliver": -1,
        "max_ack_pending": limit,
    }
    if wanted.again is not None:
        made, acknowledged_to = wanted.again
        config["deliver_policy"] = "all"
        # One that ends before has lost its last messages, as its files were restored, and what comes is new.
        if made == stream["created"] and acknowledged_to <= stream["state"]["last_seq"]:
            config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": acknowledged_to + 1}
    if wanted.subject is not None:
        config["filter_subject"] = wanted.subject
    what = f"CONSUMER.DURABLE.CREATE.{source.stream}.{source.durable}"
    request = {"stream_name": source.stream, "config": config, "action": "create"}
    try:
        await server.make(what, **request)
    except APIError as error:
        if error.err_code != _TOO_MUCH_PENDING:
            raise
        del config["max_ack_pending"]  # then it is what the server, or the account, allows
        await server.make(what, **request)


def _need(source: Source, what: str, key: str, found: Any, fits: bool, needed: str) -> None:
    if not fits:
        raise SourceMisconfigured(
            f"{source}: {what} would lose or hold up events: {key} is {str(found)!r}; needed: {needed}"
        )
