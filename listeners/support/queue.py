"""
Queues: each message goes to one wait, and stays unacknowledged at its source until the inbox has it.

A source that delivers at least once derives from `QueueHub`: it says how to receive, acknowledge and give back.
Which wait gets a message is decided here as long as it is in this process, and by the inbox in the end: a message
is known by its `EventListener.event_id`, however often and wherever it is delivered.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import Any, ClassVar, TypeVar

from airflow_events.errors import AtRedelivery, EventUndecodable
from airflow_events.listeners.base import EventListener, current_wait
from airflow_events.listeners.support.hub import Hub, Seeker
from airflow_events.listeners.support.polls import Polled, Polls
from airflow_events.listeners.support.shared import OnePerLoop, background, shared, woken
from airflow_events.listeners.support.values import checked, unreadable

log = logging.getLogger(__name__)

# How many ids of messages that could not be read a hub remembers.
_REMEMBERED = 10_000
# How many messages are acknowledged, or given back, at once.
_AT_ONCE = 500
# What a dead letter says besides what it was, where its source has names for that: why, and where it came from.
REASON, SOURCE = "airflow-events-reason", "airflow-events-source"
# Seconds that giving back may take; after that the source has to notice by itself.
_LONGEST_RETURN = 5.0
# Seconds until another wait tries what to do with a message that cannot be read, where one has failed to.
_POSTPONED = 30.0

_H = TypeVar("_H", bound="QueueHub")


class Delivery:
    """
    A message that this process has received.

    :param id: its `EventListener.event_id`, the same at each redelivery.
    :param message: as the source's client has it, with all that it takes to acknowledge it.
    :ivar wait: which was given it, by its `Wait.id`.
    :ivar is_stale: whether it came over a connection that is gone, so that it can be acknowledged only when it
        comes again.
    :ivar is_acknowledged: whether its source has confirmed that it has forgotten it.
    """

    __slots__ = ("id", "is_acknowledged", "is_stale", "message", "wait")

    def __init__(self, id: str, message: Any) -> None:
        self.id, self.message, self.wait = id, message, ""
        self.is_stale = self.is_acknowledged = False


class NotInHand(AtRedelivery):
    """The hub does not have the message any more that it was to acknowledge."""


class QueueHub(Hub[Seeker]):
    """
    Receives messages for the waits of a triggerer, and holds each until it is acknowledged or given back.

    A subclass receives in `serve`, at most `wanted` messages, and calls `offer` for each.

    :ivar in_hand: by id, the messages that a wait has, and that are neither acknowledged nor given back.
    :ivar aside: by `known_by`, the messages that no wait of this hub can read, of which the source waits to hear.
    """

    keep_every: float | None = None
    """Seconds after which `keep` is called, again and again; None if nothing need be done to keep a message."""

    def __init__(self, name: str) -> None:
        self.in_hand: dict[str, Delivery] = {}
        self.aside: dict[str, Delivery] = {}
        self._open: dict[Seeker, None] = {}  # those that were given nothing yet, in the order in which they came
        self._unreadable: OrderedDict[str, None] = OrderedDict()
        self._acknowledging = _Batches(self._acknowledge)
        self._returning = _Batches(self._give_back)
        self._keeps_otherwise = asyncio.Event()
        super().__init__(name)
        self._keeper = None if self.keep_every is None else background(self._keep(), f"keeping of {name}")

    @abc.abstractmethod
    async def acknowledge(self, deliveries: Mapping[str, Delivery]) -> None:
        """
        Tell the source that it may forget these, by their ids; return once it has confirmed that it has.

        None of them is stale. What it raises is told to those who wait for it, and they come again.
        """

    @abc.abstractmethod
    async def give_back(self, deliveries: Mapping[str, Delivery]) -> None:
        """Let the source deliver these again at once, to whoever waits, without counting it as a failure."""

    async def keep(self, deliveries: Mapping[str, Delivery]) -> None:
        """Tell the source that these are still being worked on."""

    async def lag(self, seeker: Seeker) -> int | None:
        """
        Return how many messages nobody has acknowledged yet; None if the source does not tell.

        It is asked while there is a connection, beside `serve`. What it raises counts as None.

        :param seeker: of a hub that can tell messages apart, whose messages are meant; it gets none.
        """
        return None

    async def can_tell(self) -> None:
        """Return once messages can be acknowledged, or given back."""
        await self.connected()

    @property
    def wanted(self) -> int:
        """How many messages the waits still want."""
        return len(self._open)

    @property
    def is_needed(self) -> bool:
        """Whether the source waits to hear of a message that a wait has, or a wait to hear of the source."""
        return bool(self.in_hand) or self._acknowledging.is_waited_for

    def offer(self, id: str, message: Any) -> None:
        """Give a message to the wait that has waited longest; give it back if none wants it."""
        if (delivery := self.hold(id, message)) is not None:
            self.pass_on(delivery)

    def hold(self, id: str, message: Any) -> Delivery | None:
        """Have a message in hand; return None if a wait has it already, or none can read it."""
        delivery = Delivery(id, message)
        if self._unreadable and (known_by := self.known_by(delivery)) in self._unreadable:
            self.aside[known_by] = delivery
            return None
        InHand.of_loop().note(id, self)
        before = self.in_hand.get(id)
        self.in_hand[id] = delivery
        if before is None:
            return delivery
        delivery.wait = before.wait  # the source thinks that nobody works on it any more
        return None

    def connection_lost(self) -> None:
        """Note that the connection is gone, of a source whose deliveries end with it."""
        for delivery in self.in_hand.values():
            delivery.is_stale = True
        self.aside.clear()

    def set_aside(self, delivery: Delivery) -> None:
        """Give the message to no wait of this hub any more, since none of them can read it."""
        self.forget(delivery.id)
        known_by = self.known_by(delivery)
        self._unreadable[known_by] = None
        while len(self._unreadable) > _REMEMBERED:
            self._unreadable.popitem(last=False)
        self.aside[known_by] = delivery

    def known_by(self, delivery: Delivery) -> str:
        """Return what a message that cannot be read is known by at each delivery."""
        return delivery.id

    def postpone(self, delivery: Delivery) -> None:
        """Give the message to no wait for a while, since nothing can be done with it now."""
        delivery.wait = ""
        background(self._release_later(delivery.id), f"postponing {delivery.id}")

    async def _release_later(self, id: str) -> None:
        await asyncio.sleep(_POSTPONED)
        await self.release(id)

    async def settle(self, id: str) -> None:
        """
        Acknowledge a message.

        :raises AtRedelivery: it can be acknowledged only when it comes again: the connection over which it came is
            gone.
        :raises NotInHand: it was given back, or has come to another hub meanwhile.
        """
        before = self.in_hand.get(id)
        if before is not None and not before.is_stale:  # or nothing need be asked
            await self._acknowledging.add(id)
        # It may have come once more meanwhile, or another wait has seen to it.
        known = [one for one in (before, self.in_hand.get(id)) if one is not None]
        self.forget(id)
        if any(one.is_acknowledged and not one.is_stale for one in known):
            return
        if any(one.is_stale for one in known):
            raise AtRedelivery(f"{self.name}: the connection over which {id} came is gone")
        raise NotInHand(f"{self.name}: {id} was given back before it could be acknowledged")

    async def release(self, id: str) -> None:
        """Let another wait have a message: one of this process if there is any, or else one of another."""
        if (delivery := self.in_hand.get(id)) is None:
            return
        if self.wanted:
            self.pass_on(delivery)
        else:
            # Whoever asks may be cancelled meanwhile, as a wait that has ended is.
            await asyncio.shield(background(self._return(delivery), f"giving back {id}"))

    async def take(self, seeker: Seeker) -> Delivery:
        """Return a message, which is the wait's to acknowledge or to give back."""
        self._open[seeker] = None
        try:
            delivery: Delivery = await super().take(seeker)
        except BaseException:
            found = seeker.found
            given = found.result() if found.done() and not found.cancelled() and not found.exception() else None
            if isinstance(given, Delivery):  # it came too late
                self.pass_on(given)
            raise
        if isinstance(delivery, Delivery):  # and not what a watch was given, which is nobody's
            InHand.of_loop().given(delivery)
        return delivery

    def _let_go(self, seeker: Seeker) -> None:
        super()._let_go(seeker)
        self._open.pop(seeker, None)

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        held = {**self.in_hand, **self.aside}
        if held:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self.give_back(held), _LONGEST_RETURN)
        for id in list(self.in_hand):
            self.forget(id)
        self._acknowledging.stop()
        self._returning.stop()
        await super().close()

    def pass_on(self, delivery: Delivery) -> None:
        """Let another wait have a message that is in hand."""
        delivery.wait = ""
        while self._open:
            seeker = next(iter(self._open))
            del self._open[seeker]
            if not seeker.done:
                seeker.give(delivery)
                return
        background(self._return(delivery), f"giving back {delivery.id}")

    async def _return(self, delivery: Delivery) -> None:
        try:
            await asyncio.wait_for(self._returning.add(delivery.id), _LONGEST_RETURN)
        except Exception as error:
            log.info("%s could not be given back, so its source has to notice by itself: %r", delivery.id, error)
        finally:
            if (now := self.in_hand.get(delivery.id)) is delivery:
                self.forget(delivery.id)
            elif now is not None:  # it has come again already
                self.pass_on(now)

    def forget(self, id: str) -> None:
        """Have a message in hand no longer."""
        self.in_hand.pop(id, None)
        InHand.of_loop().forget(id, self)

    async def _acknowledge(self, ids: list[str]) -> None:
        await self.can_tell()
        if fresh := self._fresh(ids):
            await self.acknowledge(fresh)
            for id, delivery in fresh.items():
                delivery.is_acknowledged = True
                if id in self.in_hand:  # it may have come once more meanwhile
                    self.in_hand[id].is_acknowledged = True

    async def _give_back(self, ids: list[str]) -> None:
        await self.can_tell()
        if fresh := self._fresh(ids):
            await self.give_back(fresh)

    def _fresh(self, ids: list[str]) -> dict[str, Delivery]:
        return {id: self.in_hand[id] for id in ids if id in self.in_hand and not self.in_hand[id].is_stale}

    def keep_each(self, seconds: float) -> None:
        """Set `keep_every` of a hub that has one, from now on."""
        if seconds != self.keep_every:
            self.keep_every = seconds
            self._keeps_otherwise.set()

    async def _keep(self) -> None:
        assert self.keep_every is not None
        while True:
            self._keeps_otherwise.clear()
            await woken(self._keeps_otherwise, self.keep_every)
            held = {**self._fresh(list(self.in_hand)), **self.aside}
            if not held:
                continue
            try:
                await self.keep(held)
            except Exception as error:
                log.warning("%s could not be told that %d messages are in hand: %s", self.name, len(held), error)


class Wanting(Seeker):
    """A wait that wants something of a source, and not whatever comes."""

    def __init__(self, wanted: Hashable) -> None:
        super().__init__()
        self.wanted: Any = wanted


class LookingHub(QueueHub):
    """
    Looks at a source where all is everybody's until it is acknowledged: what is given back is found again.

    :ivar waiting: the waits by what they want, in the order in which they came.
    """

    def __init__(self, name: str) -> None:
        self.waiting: dict[Any, dict[Any, None]] = {}
        super().__init__(name)

    @abc.abstractmethod
    def look_again(self) -> None:
        """Look at once, whatever was seen last."""

    def joined(self, seeker: Seeker) -> None:
        assert isinstance(seeker, Wanting)
        self.waiting.setdefault(seeker.wanted, {})[seeker] = None
        self.look_again()

    def left(self, seeker: Seeker) -> None:
        assert isinstance(seeker, Wanting)
        seekers = self.waiting.get(seeker.wanted, {})
        seekers.pop(seeker, None)
        if not seekers:
            self.waiting.pop(seeker.wanted, None)

    def pass_on(self, delivery: Delivery) -> None:
        self.forget(delivery.id)
        self.look_again()

    async def release(self, id: str) -> None:
        self.forget(id)
        self.look_again()

    async def give_back(self, deliveries: Mapping[str, Delivery]) -> None:
        """Do nothing: it is everybody's."""


class InHand(OnePerLoop):
    """Which hub has which message."""

    def __init__(self) -> None:
        self.hubs: dict[str, QueueHub] = {}
        self.of_waits: dict[str, set[str]] = {}

    def given(self, delivery: Delivery) -> None:
        """Note that a wait was given it."""
        delivery.wait = current_wait().id
        self.of_waits.setdefault(delivery.wait, set()).add(delivery.id)

    def note(self, id: str, hub: QueueHub) -> None:
        """Note that a hub has it now, and another one no longer, to which the source had delivered it before."""
        before = self.hubs.get(id)
        if before is not None and before is not hub:
            before.forget(id)
        self.hubs[id] = hub

    def forget(self, id: str, hub: QueueHub) -> None:
        """Note that a hub has it no longer."""
        if self.hubs.get(id) is hub:
            del self.hubs[id]

    async def poll_ended(self, listener: type[EventListener], wait: str, event: Any | None) -> None:
        """
        Give back what a wait was given by a poll that has ended, besides the event that it returned.

        It may have been cancelled in a listener that does something with what it received before it returns it.
        """
        if wait not in self.of_waits:
            return
        returned = None if event is None else listener().event_id(event)
        for id in self.of_waits.pop(wait):
            hub = self.hubs.get(id)
            if hub is not None and id != returned and hub.in_hand[id].wait == wait:
                await hub.release(id)


class QueueListener(EventListener):
    """
    A listener of a queue: its `poll_for_event` calls `receive`, and the rest follows from `event_id`.

    A source where a message can be acknowledged by its coordinates, over any connection, defines `acknowledge`.
    """

    hosted: ClassVar[bool] = True

    @abc.abstractmethod
    def event_id(self, event: Any) -> str:
        """Return the coordinates of the message at its source, as one text: see `EventListener.event_id`."""

    def event_content(self, event: Any) -> Any:
        """
        Return what the source has of the message, its ``digest``: a redelivery may be read by another format.

        Of an event without one, all but the connection over which it came.
        """
        if digest := event.get("digest"):
            return digest
        return {name: said for name, said in event.items() if not name.endswith(("_conn_id", "_config_id"))}

    async def acknowledge(self, event: Any) -> None:
        """
        Acknowledge the event's message, which this process does not have.

        :raises AtRedelivery: it can be acknowledged only when it comes again.
        """
        raise AtRedelivery(f"another process received {self.event_id(event)}")

    async def event_checkpointed(self, event: Any) -> None:
        """Acknowledge the message."""
        try:
            await self._acknowledge(event)
        except NotInHand:
            await self._acknowledge(event)

    async def _acknowledge(self, event: Any) -> None:
        id = self.event_id(event)
        hub = InHand.of_loop().hubs.get(id)
        if hub is None:
            await self.acknowledge(event)
        else:
            await hub.settle(id)

    async def event_released(self, event: Any | None, *args: Any, **kwargs: Any) -> None:
        """Let another wait have the message at once."""
        id = None if event is None else self.event_id(event)
        if id is not None and (hub := InHand.of_loop().hubs.get(id)) is not None:
            await hub.release(id)


class FinalIdListener(QueueListener):
    """A listener of a queue that never gives an id to another message: the id says all of an event's content."""

    def event_content(self, event: Any) -> str:
        """Return the id: by which format and connection a message was read, makes no other event of it."""
        return self.event_id(event)


async def receive(
    key: Hashable,
    make: Callable[[], _H],
    read: Callable[[Any], dict[str, Any]],
    otherwise: Callable[[_H, Delivery, EventUndecodable], Awaitable[None]] | None = None,
    seek: Callable[[], Seeker] = Seeker,
) -> dict[str, Any]:
    """
    Return the event of the next message that can be read and stored.

    :param key: of the hub, as of `shared`; with all that ``read`` depends on.
    :param make: the hub.
    :param read: makes an event of a message.
    :param otherwise: what becomes of a message that cannot be read; it is acknowledged afterwards. None fails the
        wait for it, and the message stays unacknowledged.
    :param seek: says what the wait wants, of a hub that can tell messages apart.
    :raises EventUndecodable: a message cannot be read, or not be stored.
    """
    while True:
        async with shared(key, make) as hub:
            if type(hub).lag is not QueueHub.lag:
                Polls.of_loop().note(Polled(key, make, seek))
            delivery = await hub.take(seek())
            try:
                return _readable(read, delivery)
            except EventUndecodable as error:
                if otherwise is None:
                    hub.set_aside(delivery)
                    raise
                try:
                    await otherwise(hub, delivery, error)
                    with contextlib.suppress(AtRedelivery):
                        await hub.settle(delivery.id)
                except hub.lost as gone:  # the connection, or the place of dead letters for a while
                    log.warning("%s: not done yet, and tried again (%r): %s", hub.name, gone, error)
                    hub.postpone(delivery)
                except Exception:  # this wait fails for it, and others get what is behind it
                    hub.postpone(delivery)
                    raise
                except BaseException:
                    await hub.release(delivery.id)
                    raise


def _readable(read: Callable[[Any], dict[str, Any]], delivery: Delivery) -> dict[str, Any]:
    """
    Return a message's event, checked.

    :raises EventUndecodable: there is none, whatever the reason: one message must not stop a queue.
    """
    try:
        event: dict[str, Any] = checked(read(delivery.message), delivery.id)
        return event
    except EventUndecodable as error:
        error.event_id = delivery.id
        raise
    except Exception as error:
        failed = unreadable(delivery.id, error)
        failed.event_id = delivery.id
        raise failed from error


async def skip(hub: QueueHub, delivery: Delivery, error: EventUndecodable) -> None:
    """Pass over a message that cannot be read; it is acknowledged."""
    log.warning("Passed over, and acknowledged: %s", error)


class _Batches:
    """Does for many at once what is asked for each: while one batch is under way, the next one gathers."""

    def __init__(self, work: Callable[[list[str]], Awaitable[None]]) -> None:
        self._work = work
        self._asked: dict[str, asyncio.Future[None]] = {}
        self._running: asyncio.Task[None] | None = None
        self._waiting = 0

    @property
    def is_waited_for(self) -> bool:
        """Whether anybody waits for it to be done."""
        return bool(self._waiting)

    def stop(self) -> None:
        """Do no more of it."""
        if self._running is not None:
            self._running.cancel()

    async def add(self, id: str) -> None:
        """Return once it is done for ``id``; raise what the work for its batch raised."""
        if id not in self._asked:
            self._asked[id] = asyncio.get_running_loop().create_future()
        asked = self._asked[id]
        if self._running is None or self._running.done():
            self._running = background(self._run(), "a batch")
        self._waiting += 1
        try:
            await asyncio.shield(asked)
        finally:
            self._waiting -= 1

    async def _run(self) -> None:
        while self._asked:
            ids = list(self._asked)[:_AT_ONCE]
            batch = {id: self._asked.pop(id) for id in ids}
            error: BaseException | None = None
            try:
                await self._work(ids)
            except BaseException as raised:
                error = raised
            for asked in batch.values():
                if asked.done():
                    continue
                if error is None:
                    asked.set_result(None)
                elif isinstance(error, Exception):
                    asked.set_exception(error)
                else:
                    asked.cancel()
            if error is not None and not isinstance(error, Exception):
                raise error
