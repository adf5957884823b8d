"""Taking messages: each goes to one wait."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

from aiormq import exceptions
from aiormq.abc import AbstractChannel, AbstractConnection
from airflow_events.errors import SourceUnfit
from airflow_events.listeners.hub import Hub, Seeker
from airflow_events.listeners.rabbitmq.claims import Busy, claim_for, claims_of, hold, put_back
from airflow_events.listeners.rabbitmq.client import STEP, OnServer, Source, close, connect, refusals, within
from airflow_events.listeners.rabbitmq.messages import Claim, of_note

log = logging.getLogger(__name__)

# Seconds between two looks at a queue that was empty, and at the list of claims.
_EMPTY = 0.25
_LOOK = 2.0
# Seconds after which a claim that has not lapsed is looked at, to forget it if it is finished.
_FINISHED = 5.0


class Consumer(Seeker):
    """A wait for a message that no other has; ``lapse`` in seconds."""

    def __init__(self, wait: str, lapse: float, unique: bool) -> None:
        super().__init__()
        self.wait = wait
        self.lapse = lapse
        self.unique = unique
        self.looked = False


class QueueHub(OnServer, Hub[Consumer]):
    """Claims messages for the waits on one queue, and puts back what has lapsed."""

    def __init__(self, source: Source, require_durable: bool) -> None:
        self._source = source
        self._require_durable = require_durable
        self._channel: AbstractChannel | None = None
        self._next_look = 0.0
        self._check_at: dict[str, float] = {}
        super().__init__(str(source))

    async def _connect(self) -> None:
        with refusals(self._source):
            self._server = await connect(self._source.conn_id)
            self._channel = await self._server.channel()
            await self._channel.queue_declare(self._source.queue, passive=True)
            await _check(self._server, self._source, self._require_durable)
            # What a claim needs: to make queues, to write through the default exchange, and to read.
            async with hold(self._server, self._source.claim(""), transaction=True) as held:
                pending = of_note("pending", {}, False)
                await held.channel.basic_publish(b"", routing_key=held.name, properties=pending)
                await held.channel.tx_commit()
                await held.read()
                await claims_of(held)
        self._next_look = 0.0

    async def serve(self) -> None:
        assert self._server is not None and self._channel is not None
        with refusals(self._source):
            await self._look()
            count = (await within(self._channel.queue_declare(self._source.queue, passive=True))).message_count
            for seeker in [seeker for seeker in self.seekers if not seeker.done]:
                if not count:
                    break
                if seeker.done:  # by what another one of the same wait was given
                    continue
                with contextlib.suppress(Busy):
                    claim = await within(
                        claim_for(self._server, self._source, seeker.wait, seeker.lapse, seeker.unique)
                    )
                    if claim is None:
                        count = 0
                        break
                    self._give(seeker.wait, claim)
        if not count:
            await self.pause(_EMPTY)

    def _give(self, wait: str, claim: Claim) -> None:
        for seeker in [seeker for seeker in self.seekers if seeker.wait == wait]:
            seeker.give(claim)

    async def _look(self) -> None:
        """Find what the waits here have claimed before, what has lapsed, and what is finished."""
        new = [seeker for seeker in self.seekers if not seeker.looked]
        if not new and time.monotonic() < self._next_look:
            return
        with contextlib.suppress(Busy):
            await within(self._look_at_claims(), 10 * STEP)
            for seeker in new:
                seeker.looked = True
        self._next_look = time.monotonic() + _LOOK

    async def _look_at_claims(self) -> None:
        assert self._server is not None
        waits = {seeker.wait: seeker for seeker in self.seekers if not seeker.done}
        async with hold(self._server, self._source.claims, stays=True) as claims:
            notes = claims.notes()
            now = time.time()
            first_seen = {note["claim"]: now + _FINISHED for _, note in notes}
            self._check_at = {claim: self._check_at.get(claim, at) for claim, at in first_seen.items()}
            for tag, note in notes:
                wait, name = note["wait"], note["claim"]
                if wait in waits:
                    seeker = waits[wait]
                    with contextlib.suppress(Busy):
                        found = await claim_for(
                            self._server, self._source, wait, seeker.lapse, seeker.unique, take=False
                        )
                        if found is not None:
                            self._give(wait, found)
                            continue
                elif note["until"] <= now:
                    try:
                        await within(put_back(self._server, self._source, wait, name, lapsed=True))
                    except Busy:
                        continue
                    except SourceUnfit as error:
                        log.warning("A claim of %s has lapsed and is kept: %s", wait, error)
                        continue
                elif self._check_at[name] > now:
                    continue
                self._check_at[name] = now + 10 * _FINISHED
                with contextlib.suppress(Busy):
                    async with hold(self._server, self._source.claim(wait)) as held:
                        if not any(claim.claim == name for claim in await claims_of(held)):
                            await claims.drop(tag)


async def _check(server: AbstractConnection, source: Source, require_durable: bool) -> None:
    """
    Refuse a queue that would lose messages.

    AMQP tells nothing about a queue but where a declaration differs from it. This one always differs, by a value
    that no queue can have, so it never makes one.
    """
    channel = await server.channel()
    probe: dict[str, Any] = {"x-overflow": "airflow-events-asks"}
    try:
        await channel.queue_declare(source.queue, durable=True, arguments=probe)
    except exceptions.ChannelAccessRefused:  # without the permission to configure it, it cannot be known
        return
    except exceptions.ChannelPreconditionFailed as error:
        text = str(error)
        if "'x-queue-type'" in text and "'stream'" in text:
            raise SourceUnfit(f"{source} is a stream; RabbitMQWatchListener is for these") from error
        for argument, what in (("durable", "is not durable"), ("auto_delete", "deletes itself when it is unused")):
            if f"inequivalent arg '{argument}'" in text and require_durable:
                raise SourceUnfit(
                    f"{source} {what}, so that messages are lost which no wait has had yet; declare it as durable "
                    "and not auto-delete, or give require_durable=False"
                ) from error
    finally:
        await close(channel)
