"""
What a wait has claimed, and how that moves.

All that is decided is decided by one classic queue of the broker at a time: whoever is its exclusive consumer
holds it, reads all of it, and writes to it over the same channel, so that a holder whose connection ends has
written before the next one reads, or never. There are three kinds of them:

``airflow-events.claim.*``
    What one wait has claimed of one source: the message itself. Whoever leaves it empty deletes it.
``airflow-events.claims.*``
    One for each source: which claims there are, so that they are found when they lapse. It stays.
``airflow-events.commits.*``
    Several for each source: who committed what. Each note expires after ``[events] commit_memory`` seconds, and
    the queue after twice that.

A message moves in three steps, of which each is durable before the next. The last is one transaction:

1. The claim's name is written down; a copy goes to the claim queue, with a note beside it, *pending*, that is not
   persistent.
2. A note *moved* goes to the claim queue, and the message is acknowledged: ``tx.commit``.

A client that dies cannot divide a transaction. A copy with *pending* and without *moved* was never acknowledged:
the message is still in its queue, and the copy is dropped. If *pending* is gone as well the broker has been
restarted, which can divide a transaction; the copy is then kept, for it may be all that there is. So nothing is
lost, and what is doubled by it is found at the commit: a message that the broker gives out again says so, and
counts as the one with its ``message_id`` that somebody has committed before.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from aiormq import exceptions
from aiormq.abc import AbstractChannel, AbstractConnection, DeliveredMessage
from airflow_events import settings
from airflow_events.errors import EventLost, SourceUnfit
from airflow_events.listeners.rabbitmq.client import Source, close, refusals
from airflow_events.listeners.rabbitmq.messages import (
    Claim,
    about_of,
    as_json,
    copied,
    newly_claimed,
    of_note,
    restored,
    tag_of,
)
from pamqp.commands import Basic

# Seconds for which a queue that somebody else holds is tried again. It is held for milliseconds.
_PATIENCE = 10.0
# Seconds by which the clocks of two triggerers may differ.
_SKEW = 5.0
# Milliseconds; the longest that RabbitMQ takes.
_LONGEST = 2**32 - 1


class Held:
    """
    A queue of ours of which this is the exclusive consumer, and all that is in it.

    :ivar channel: over which alone it may be written to.
    """

    def __init__(self, name: str, channel: AbstractChannel) -> None:
        self.name = name
        self.channel = channel
        self.messages: dict[int, DeliveredMessage] = {}

    async def receive(self, message: DeliveredMessage) -> None:
        self.messages[tag_of(message)] = message

    async def read(self) -> None:
        """Receive all that is there: what the broker has sent before it answers is here."""
        while (await self.channel.queue_declare(self.name, passive=True)).message_count:
            pass

    async def drop(self, *tags: int) -> None:
        for tag in tags:
            if self.messages.pop(tag, None) is not None:
                await self.channel.basic_ack(tag)

    def notes(self) -> list[tuple[int, dict[str, Any]]]:
        return [(tag, json.loads(message.body)) for tag, message in self.messages.items()]

    def claims(self) -> tuple[list[Claim], list[int]]:
        """Return the claims that stand, and the delivery tags of what is left of others."""
        copies: dict[str, Claim] = {}
        notes: dict[str, dict[str, list[int]]] = {}
        for tag, message in self.messages.items():
            about = about_of(message)
            kind, claim = about.get("kind", ""), about.get("claim", "")
            if kind == "copy" and claim not in copies:
                when = about["at"], about["until"]
                copies[claim] = Claim(about["id"], claim, *when, about["again"], about, message, tags=[tag])
            else:
                notes.setdefault(claim, {}).setdefault(kind, []).append(tag)
        standing, rest = [], []
        for claim, found in copies.items():
            beside = notes.pop(claim, {})
            found.tags += [tag for tags in beside.values() for tag in tags]
            if "moved" in beside or "pending" not in beside:
                standing.append(found)
            else:  # its mover died before it acknowledged the message
                rest += found.tags
        rest += [tag for kinds in notes.values() for tags in kinds.values() for tag in tags]
        return standing, rest


class Busy(TimeoutError):
    """Somebody else holds a queue for longer than it takes."""


@contextlib.asynccontextmanager
async def hold(
    server: AbstractConnection,
    name: str,
    *,
    expires: int | None = None,
    transaction: bool = False,
    stays: bool = False,
) -> AsyncIterator[Held]:
    """
    Hold a queue of ours, made if it is not there; see the module's docstring.

    :param expires: after how many milliseconds the broker deletes it if nobody has used it.
    :param transaction: what is written and acknowledged takes effect at ``tx_commit``.
    :param stays: it is not deleted when it is left empty. Only such a queue may others write to.
    :raises _Busy: somebody else holds it.
    """
    arguments: dict[str, Any] = {"x-queue-type": "classic", **({"x-expires": expires} if expires else {})}
    passive, patience = False, time.monotonic() + _PATIENCE
    while True:
        channel = await server.channel(publisher_confirms=not transaction)
        held = Held(name, channel)
        try:
            if transaction:
                await channel.tx_select()
            await channel.queue_declare(name, durable=True, passive=passive, arguments=arguments)
            consumer = (await channel.basic_consume(name, held.receive, exclusive=True)).consumer_tag or ""
            await held.read()
            break
        except exceptions.ChannelPreconditionFailed:  # [events] commit_memory was another when it was made
            if passive or expires is None:
                raise
            passive = True
        except exceptions.ChannelNotFoundEntity as error:  # whoever held it has left it empty
            if time.monotonic() > patience or "no queue" not in str(error):
                raise
            passive = False
        except exceptions.ChannelAccessRefused as error:
            if "in exclusive use" not in str(error):
                raise
            if time.monotonic() > patience:
                raise Busy(f"the queue {name!r} is held by somebody else") from error
            await asyncio.sleep(0.03)
        except BaseException:
            await close(channel)
            raise
    try:
        yield held
        if transaction:
            await channel.tx_commit()
        if not stays and not held.messages:
            # What came until now is here once the broker has answered, and what comes from now on keeps the queue.
            await channel.basic_cancel(consumer)
            if not held.messages:
                with contextlib.suppress(exceptions.ChannelPreconditionFailed):
                    await channel.queue_delete(name, if_empty=True, if_unused=True)
    finally:
        await close(channel)


async def claims_of(held: Held) -> list[Claim]:
    """Return the claims that stand in a queue, and drop what is left of others."""
    standing, rest = held.claims()
    await held.drop(*rest)
    return standing


async def claim_for(
    server: AbstractConnection, source: Source, wait: str, lapse: float, unique: bool, take: bool = True
) -> Claim | None:
    """
    Return what the wait has claimed; if that is nothing, claim the next message.

    :param take: False claims nothing.
    :return: None if the wait has nothing, and there is no message.
    """
    async with hold(server, source.claim(wait), transaction=True) as held:
        channel = held.channel
        if standing := await claims_of(held):
            await channel.tx_commit()
            return standing[0]
        if not take:
            return None
        message = await channel.basic_get(source.queue)
        if isinstance(message.delivery, Basic.GetEmpty):
            return None
        await channel.queue_declare(source.claims, durable=True, arguments={"x-queue-type": "classic"})
        await _see_made(server)
        about = newly_claimed(message, lapse, unique)
        note = {"claim": about["claim"], "wait": wait, "until": about["until"]}
        listed = of_note("claim", about, True)
        await channel.basic_publish(as_json(note), routing_key=source.claims, properties=listed)
        await channel.basic_publish(message.body, routing_key=held.name, properties=copied(message, about))
        await channel.basic_publish(b"", routing_key=held.name, properties=of_note("pending", about, False))
        await channel.tx_commit()
        await channel.basic_publish(b"", routing_key=held.name, properties=of_note("moved", about, True))
        await channel.basic_ack(tag_of(message))
        await channel.tx_commit()
        await held.read()
        return (await claims_of(held))[0]


async def _see_made(server: AbstractConnection) -> None:
    """
    Return when the broker has on its disk which queues were made before.

    RabbitMQ 3.10 answers ``queue.declare`` when the queue is in its log of transactions, but that the transaction
    was decided may come to the disk up to two seconds later; killed before, it starts without the queue, and drops
    what it has confirmed for it. The next transaction writes down what came before it: a queue, made and deleted.
    """
    channel = await server.channel()
    try:
        name = f"airflow-events.made.{uuid.uuid4().hex}"
        await channel.queue_declare(name, durable=True, exclusive=True, arguments={"x-queue-type": "classic"})
        await channel.queue_delete(name)
    finally:
        await close(channel)


def _memory() -> int:
    return min(round(settings.commit_memory() * 1000), _LONGEST)


async def commit(server: AbstractConnection, source: Source, wait: str, identity: str, stamp: str) -> None:
    """
    Commit a claim of the wait.

    :raises EventLost: another wait has the message, or had it committed, or somebody else took it.
    """
    what = f"the message {identity} of {source}"
    with refusals(source):
        async with (
            hold(server, source.commits(identity), expires=min(2 * _memory(), _LONGEST)) as commits,
            hold(server, source.claim(wait)) as held,
        ):
            standing = next((claim for claim in await claims_of(held) if claim.claim == stamp), None)
            found = _committed(commits, identity, stamp, standing)
            if found is None:
                if standing is None:
                    raise EventLost(f"{what} is not claimed by {wait} any more: its claim lapsed, or was released")
                if not commits.messages:  # it may just have been made
                    await _see_made(server)
                note = {"id": identity, "claim": stamp, "wait": wait, "again": standing.again, "at": standing.at}
                properties = of_note("commit", note, True)
                properties.expiration = str(_memory())
                await commits.channel.basic_publish(as_json(note), routing_key=commits.name, properties=properties)
                await commits.read()
            if standing is not None:
                await held.drop(*standing.tags)
            if found is not None and (found["claim"] != stamp or found["wait"] != wait):
                raise EventLost(f"{what} was committed by {found['wait']}")


async def put_back(
    server: AbstractConnection, source: Source, wait: str, stamp: str | None = None, lapsed: bool = False
) -> None:
    """
    Put what the wait has claimed and not committed back into its queue.

    :param stamp: which claim; None is all of them.
    :param lapsed: only what has lapsed.
    """
    with refusals(source):
        async with hold(server, source.claim(wait)) as held:
            found = await claims_of(held)
        for identity, claim in [(claim.id, claim.claim) for claim in found]:
            if stamp not in (None, claim):
                continue
            # In the order of a commit, so that the two do not wait for each other.
            async with (
                hold(server, source.commits(identity), expires=min(2 * _memory(), _LONGEST)) as commits,
                hold(server, source.claim(wait)) as held,
            ):
                for standing in await claims_of(held):
                    if standing.claim != claim or (lapsed and standing.until > time.time()):
                        continue
                    if _committed(commits, identity, claim, standing) is None:
                        await _return(held.channel, source, standing)
                    await held.drop(*standing.tags)


async def _return(channel: AbstractChannel, source: Source, claim: Claim) -> None:
    try:
        properties = restored(claim)
        await channel.basic_publish(
            claim.message.body, routing_key=source.queue, properties=properties, mandatory=True
        )
    except exceptions.DeliveryError as error:
        raise SourceUnfit(f"{source} does not take a message back, which stays claimed: {error}") from error


def _committed(commits: Held, identity: str, stamp: str, claim: Claim | None) -> dict[str, Any] | None:
    """Return the note of who committed the claim, or the same message by another claim."""
    same = [note for _, note in commits.notes() if note["id"] == identity]
    for note in same:
        if note["claim"] == stamp:
            return note
    for note in same:
        # Two that were both given out for the first time are two messages, whatever their sender calls them. One
        # that was given out for the first time is a double only of what was given out again after it.
        if claim is None or claim.again or (note["again"] and claim.at < note["at"] + _SKEW):
            return note
    return None
